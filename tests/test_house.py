"""The layout holds: no circle of imports, few modules at the top, short files and functions, independent stages."""

import functools

import pytest

from tests.helpers import house
from tests.helpers.golden import ROOT

AT_THE_TOP = {
    *("cli", "train", "pipeline", "shard", "encode", "loop", "export"),
    *("settings", "config", "formats", "errors", "progress", "supervise"),
}
STAGES = {"sa3dist.shard", "sa3dist.encode", "sa3dist.loop", "sa3dist.export"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 60


# Read once for all tests.
package = functools.cache(lambda name: house.read_package(ROOT / name))


@pytest.fixture(scope="module", params=["sa3dist", "kernels/sa3dist_kernels"])
def product(request):
    return package(request.param)


@pytest.fixture(scope="module")
def sa3dist():
    return package("sa3dist")


def test_no_module_imports_itself_in_a_circle(product):
    assert house.circles(house.import_graph(product)) == []


def test_no_room_imports_itself_in_a_circle(sa3dist):
    assert house.circles(house.room_graph(sa3dist)) == []


def test_only_stages_and_what_all_share_stand_at_the_top(sa3dist):
    assert house.strays(sa3dist, AT_THE_TOP) == []


def test_files_and_functions_are_short(product):
    assert house.long_files(product, MOST_LINES) == []
    assert house.long_functions(product, MOST_LINES_OF_A_FUNCTION) == []


def test_the_four_stages_do_not_import_one_another(sa3dist):
    assert sa3dist.keys() >= STAGES
    assert house.imports_among(sa3dist, STAGES) == []


def test_every_module_says_in_a_docstring_what_it_holds(product):
    assert house.without_docstring(product) == []


def test_no_test_imports_another_test_file():
    assert house.imported_test_files(house.read_package(ROOT / "tests")) == []


# The checks can fail: each fault in a small made-up tree.


@pytest.fixture
def tree(tmp_path):
    """Writes files of a package called p and reads it."""

    def make(**files):
        for name, text in files.items():
            path = tmp_path / "p" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for folder in (tmp_path / "p", *(path for path in (tmp_path / "p").iterdir() if path.is_dir())):
            (folder / "__init__.py").touch()
        return house.read_package(tmp_path / "p")

    return make


@pytest.mark.parametrize(
    "closing",
    ["from p.a import x", "from p import a", "import p.a", "from . import a", "from .a import x"],
)
def test_a_circle_of_modules_is_found_however_it_is_written(tree, closing):
    modules = tree(a="import p.b", b=f"def later():\n    {closing}")
    assert house.circles(house.import_graph(modules)) in (["p.a -> p.b -> p.a"], ["p.b -> p.a -> p.b"])


def test_what_only_a_type_checker_imports_closes_no_circle(tree):
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\nelse:\n    import p.c"
    modules = tree(a="import p.b", b=checked, c="")
    assert house.import_graph(modules) == {"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": set()}
    assert house.circles(house.import_graph(modules)) == []


def test_a_circle_of_rooms_is_found_where_no_modules_form_one(tree):
    modules = tree(one__a="from p.two import a", one__b="", two__a="", two__b="import p.one.b")
    assert house.circles(house.import_graph(modules)) == []
    assert house.circles(house.room_graph(modules)) in (["p.one -> p.two -> p.one"], ["p.two -> p.one -> p.two"])


def test_a_folders_own_module_belongs_to_its_room_and_a_module_at_the_top_is_a_room(tree):
    modules = tree(room__a="from p.room import b\nfrom p import top", room__b="", top="import p.room")
    assert house.room_graph(modules) == {"p.room": {"p.top"}, "p.top": {"p.room"}}


def test_strays_long_files_long_functions_missing_docstrings_and_imports_among_stages_are_named(tree):
    lines = ["@staticmethod", "async def long():", *["    1"] * 4]
    modules = tree(a='"""Says what."""\nfrom p import b', b="\n".join(lines), room__c='"""Says what."""')
    assert house.strays(modules, {"a"}) == ["p.b"]
    assert house.long_files(modules, 6) == []
    assert house.long_files(modules, 5) == ["p.b: 6 lines"]
    assert house.long_functions(modules, 5) == []
    assert house.long_functions(modules, 4) == ["p.b.long: 5 lines"]
    assert house.without_docstring(modules) == ["p", "p.b", "p.room"]
    assert house.imports_among(modules, {"p.a", "p.b"}) == ["p.a imports p.b"]


@pytest.mark.parametrize(
    "statement",
    ["from tests.room import test_b", "from tests.room.{} import x", "code = 'from tests.room.{} import x'"],
)
def test_an_import_of_a_test_file_is_found_in_programs_that_tests_start_too(tmp_path, statement):
    room = tmp_path / "tests" / "room"
    room.mkdir(parents=True)
    # Filled in here: this file's own strings are looked at too.
    (room / "test_a.py").write_text(statement.format("test_b"))
    (room / "test_b.py").write_text("from tests.helpers.golden import golden\nx = 1")
    (found,) = house.imported_test_files(house.read_package(tmp_path / "tests"))
    assert found == "tests.room.test_a imports tests.room.test_b"
