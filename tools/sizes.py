"""Lines of code of tutorial_lib, without docstrings, comments and blank lines, beside what they may be.

    python -m tools.sizes

A test holds them.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "tutorial_lib"
LIMIT = 2750  # of all together
GROUPS = {
    "what the course teaches": (
        866,
        "data penn_fudan transforms models engine checkpoint coco_eval visualization".split(),
    ),
    "your own data": (1030, ["coco", "convert", "checks", "predict", "export"]),
    "scripts and presets": (340, ["train", "presets", "info"]),
    "offline": (520, ["offline"]),
}


def lines_of_code(text: str) -> int:
    """Of a module's text: the lines that hold code, a statement over three lines counting as three."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - docstrings)


def sizes() -> dict[str, int]:
    """Lines of code by module; those of a package, ``offline``, are added up."""
    found: dict[str, int] = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        found[name] = found.get(name, 0) + lines_of_code(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    found = sizes()
    for title, (most, modules) in GROUPS.items():
        print(f"{title}: {sum(found.get(name, 0) for name in modules)} of {most}")
        for name in modules:
            print(f"    {name:16}{found.get(name, 0):5}")
    print(f"all: {sum(found.values())} of {LIMIT}")
