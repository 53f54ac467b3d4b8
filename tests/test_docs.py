"""What README and docs name is there: files, folders, modules, and what they link to."""

import importlib
import importlib.util
import re
from collections.abc import Iterator

import pytest

from tests.helpers.golden import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("launch/*.md"),
        *ROOT.glob("kernels/benchmarks/results/*.md"),
    ]
)
FOLDERS = "sa3dist|kernels|tests|docs|configs|launch|docker"
# Named because it must not be there.
ABSENT = {"kernels/__init__.py"}


def braces_written_out(path: str) -> Iterator[str]:
    """``a/{b,c}.py`` as ``a/b.py`` and ``a/c.py``."""
    found = re.search(r"\{([^{}]*)\}", path)
    if found is None:
        yield path
        return
    for word in found[1].split(","):
        yield from braces_written_out(path[: found.start()] + word + path[found.end() :])


def missing_paths(text: str) -> list[str]:
    """Paths from the repository's root, in prose and in commands, and bare names of Python files."""
    named = re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*{{}},-]*", text)
    paths = {path for name in named for path in braces_written_out(name.rstrip(".,-*"))}
    scripts = {f"**/{name}" for name in re.findall(r"(?<![\w./*{}-])\w+\.py\b", text)}
    return sorted(path for path in (paths | scripts) - ABSENT if not any(ROOT.glob(path.rstrip("/"))))


def missing_links(text: str, folder) -> list[str]:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [link for link in links if link and "://" not in link and not (folder / link).exists()]


def missing_modules(text: str) -> list[str]:
    """Dotted names of our packages that are neither a module nor something in one."""
    missing = []
    for name in sorted(set(re.findall(r"(?<![\w./-])sa3dist(?:_kernels)?(?:\.[a-z_]\w*)+", text))):
        parent, _, last = name.rpartition(".")
        try:
            known = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            known = False
        if not known and not hasattr(importlib.import_module(parent), last):
            missing.append(name)
    return missing


def layout_faults(text: str) -> list[str]:
    """Lines at which a table has no header, or a table or code block has no empty line beside it, as after a bad merge.

    A browser then shows them as running text.
    """

    def kind(line: str) -> str:
        if not line.strip() or line.startswith("```"):
            return "empty"
        if line.startswith("|"):
            return "table"
        # Four spaces are code, unless they continue an entry of a list.
        return "code" if line.startswith("    ") else "text"

    faults, listed = [], False
    lines = re.sub(r"(?ms)^```.*?^```$", "", text).splitlines()
    for number, (before, line) in enumerate(zip(["", *lines], lines, strict=False), 1):
        # Indented lines, or an entry of a list, continue a list.
        listed = bool(re.match(r"\s*([*-]|\d+\.) ", line)) or (listed and (line.startswith("  ") or not line.strip()))
        pair = kind(before), kind(line)
        if pair in {("table", "text"), ("text", "table"), ("code", "text"), ("text", "code")} and not listed:
            faults.append(f"{number}: no empty line before {line[:40]!r}")
        following = lines[number] if number < len(lines) else ""
        if pair[1] == "table" and pair[0] != "table" and not re.match(r"\|[-:| ]+\|$", following):
            faults.append(f"{number}: a table without a header")
    return faults


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_and_code_of_a_page_are_shown_as_such(page):
    assert layout_faults(page.read_text(encoding="utf-8")) == []


def test_a_page_that_an_edit_has_mixed_is_noticed():
    mixed = "Text.\n\n    code\ntold below\n\n| `a` | b |\n| `c` | d |\nmore\n\n* an entry\n    of a list\n"
    assert layout_faults(mixed) == [
        "4: no empty line before 'told below'",
        "6: a table without a header",
        "8: no empty line before 'more'",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_everything_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert missing_paths(text) == []
    assert missing_links(text, page.parent) == []
    assert missing_modules(text) == []


def test_what_is_missing_is_named():
    text = "see `sa3dist/{train,gone}.py`, tests/no_such/, **launch/*.sh**, gone.py, [this](docs/none.md)"
    assert missing_paths(text) == ["**/gone.py", "docs/none.md", "sa3dist/gone.py", "tests/no_such/"]
    assert missing_links(text, ROOT) == ["docs/none.md"]
    assert missing_modules("sa3dist.train.main, sa3dist.flow") == []
    assert missing_modules("`python -m sa3dist.train` and sa3dist.train.nothing") == ["sa3dist.train.nothing"]
