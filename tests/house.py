"""Figures of the house: what an optimizer's file is made of, the way of one update.

python tests/house.py
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import pathlib
import sys

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "tf_effopt"
OPTIMIZERS = PACKAGE / "optimizers"
MANY = 10  # files: what stands in so many of them could stand in one place
# Lines of docstrings and brackets that say nothing.
SKELETON = {'"""', "Args:", "Raises:", "Returns:", "Example:", ")", "):", "]", "}", "("}


def optimizer_files() -> list[pathlib.Path]:
    return sorted(x for x in OPTIMIZERS.glob("*.py") if x.name != "__init__.py")


def non_blank(path: pathlib.Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


@dataclasses.dataclass
class Repeated:
    """Lines that stand in `MANY` or more optimizers' files."""

    lines: dict[str, int]  # with the number of times
    of: int

    @property
    def share(self) -> float:
        return sum(self.lines.values()) / self.of


def repeated_lines() -> Repeated:
    files = [non_blank(path) for path in optimizer_files()]
    in_files = collections.Counter(line for lines in files for line in set(lines))
    times = collections.Counter(line for lines in files for line in lines)
    found = {
        line: times[line]
        for line, count in in_files.items()
        if count >= MANY and line not in SKELETON
    }
    return Repeated(found, sum(times.values()))


def kinds_of_lines(path: pathlib.Path) -> dict[str, int]:
    """Kind -> the number of non-blank lines of one optimizer's file."""
    text = path.read_text()
    lines = text.splitlines()
    kinds: dict[int, str] = {}

    def mark(node: ast.AST, kind: str) -> None:
        for number in range(node.lineno, node.end_lineno + 1):
            kinds.setdefault(number, kind)

    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            mark(node.body[0], "docs")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            mark(node, "rule")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            mark(node, "imports")
        elif isinstance(node, ast.ClassDef):
            for x in node.body:
                if isinstance(x, ast.AnnAssign):
                    mark(x, "arguments")
                elif isinstance(x, ast.FunctionDef) and x.name == "__init__":
                    mark(x, "constructor")
                elif isinstance(x, ast.FunctionDef):
                    mark(x, "other methods")
    numbers = [i for i, line in enumerate(lines, 1) if line.strip()]
    return collections.Counter(kinds.get(i, "declarations") for i in numbers)


def share_of_content(files: list[pathlib.Path]) -> float:
    """Of non-blank lines: rules, docstrings and declared arguments."""
    kinds = sum(map(kinds_of_lines, files), collections.Counter())
    content = kinds["rule"] + kinds["docs"] + kinds["arguments"]
    return content / kinds.total()


def files_entered() -> list[str]:
    """The package's files that one eager `Adam.apply` enters, not the first."""
    import keras

    import tf_effopt

    weights = [keras.Variable(keras.ops.ones((3, 2))), keras.Variable([1.0])]
    gradients = [keras.ops.ones(w.shape) for w in weights]
    optimizer = tf_effopt.Adam()
    optimizer.apply(gradients, weights)
    entered: dict[str, None] = {}

    def called(frame, event, argument):
        name = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in name.parents:
            entered[str(name.relative_to(PACKAGE))] = None

    sys.setprofile(called)
    try:
        optimizer.apply(gradients, weights)
    finally:
        sys.setprofile(None)
    return list(entered)


def long_files(limit: int) -> dict[str, int]:
    """The package's files of more lines than that."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        count = len(path.read_text().splitlines())
        if count > limit:
            found[str(path.relative_to(PACKAGE))] = count
    return found


def long_classes(limit: int) -> dict[str, int]:
    """The package's classes of more lines than that, their docstring left out."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            count = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                count -= node.body[0].end_lineno - node.body[0].lineno + 1
            if count > limit:
                found[f"{path.relative_to(PACKAGE)}:{node.name}"] = count
    return found


def main() -> None:
    repeated = repeated_lines()
    print(f"in {MANY} or more optimizers' files: {repeated.share:.1%} of the lines")
    for line, times in sorted(repeated.lines.items(), key=lambda x: -x[1]):
        print(f"    {times} x {line}")
    files = optimizer_files()
    content = share_of_content(files)
    print(f"rules, docstrings, arguments: {content:.1%} of the lines")
    for kind, count in sum(map(kinds_of_lines, files), collections.Counter()).items():
        print(f"    {count} {kind}")
    for path in files:
        print(f"    {share_of_content([path]):.0%} {path.name}")
    entered = files_entered()
    print(f"files entered by `Adam.apply`: {len(entered)}")
    print(*(f"    {name}" for name in entered), sep="\n")


if __name__ == "__main__":
    main()
