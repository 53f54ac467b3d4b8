"""How many statements the product has: ``python tests/helpers/count_statements.py [COMMIT ...]``.

The last line is the tree as it is. A statement is a node of the syntax tree: neither comments nor line breaks count.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("sa3dist", "kernels/sa3dist_kernels")


def statements(source: str) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(source)))


def of_tree() -> int:
    return sum(statements(path.read_text()) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def of_commit(commit: str) -> int:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout

    names = git("ls-tree", "-r", "--name-only", commit, *FOLDERS).split()
    return sum(statements(git("show", f"{commit}:{name}")) for name in names if name.endswith(".py"))


def main() -> None:
    counts = {commit: of_commit(commit) for commit in sys.argv[1:]} | {"this tree": of_tree()}
    first = next(iter(counts.values()))
    for name, count in counts.items():
        print(f"{name:12} {count:6}  {count / first - 1:+.1%}")


if __name__ == "__main__":
    main()
