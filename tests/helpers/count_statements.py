"""How many statements the product has: ``python tests/helpers/count_statements.py [COMMIT ...] [--known-to COMMIT]``.

The last line is the tree as it is. A statement is a node of the syntax tree: neither comments nor line breaks count.
--rooms FOLDER_OR_FILE ...   count these alone, such as sa3dist/data or sa3dist/train.py
--known-to COMMIT            count only files that were there at that commit: what came later is left out
"""

import argparse
import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sa3dist", "kernels/sa3dist_kernels")


def statements(source: str) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source)))


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def sources(commit: str | None, rooms: list[str]) -> dict[str, str]:
    """Source by name of a commit's Python files in ``rooms``; None: of the tree as it is."""
    if commit is None:
        found = [
            path for room in rooms for path in ((ROOT / room).rglob("*.py") if not room.endswith(".py") else [room])
        ]
        return {str((ROOT / path).relative_to(ROOT)): (ROOT / path).read_text() for path in found}
    names = git("ls-tree", "-r", "--name-only", commit, *rooms).split()
    return {name: git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*")
    parser.add_argument("--rooms", nargs="+", default=list(FOLDERS))
    parser.add_argument("--known-to", metavar="COMMIT")
    options = parser.parse_args()
    known = sources(options.known_to, options.rooms).keys() if options.known_to else None
    first = None
    for commit in [*options.commits, None]:
        found = sources(commit, options.rooms).items()
        count = sum(statements(source) for name, source in found if known is None or name in known)
        first = first or count
        print(f"{commit or 'this tree':12} {count:6}  {count / first - 1:+.1%}")


if __name__ == "__main__":
    main()
