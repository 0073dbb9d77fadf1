"""Build the site from the stored notebooks, README and the library's docstrings: no network, nothing is executed.

    python docs/build.py [FOLDER]

The site goes to FOLDER, else to build/site. Sphinx's warnings are errors. What Sphinx reads is written to FOLDER-source
first, laid out as the repository is, so that most links between its files can stay as they are.
"""

from __future__ import annotations

import ast
import base64
import json
import re
import shutil
import sys
from html import escape
from pathlib import Path

from nbformat.v4 import new_markdown_cell
from sphinx.cmd.build import main as sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
from tools.address import kept  # noqa: E402
from tools.sizes import GROUPS  # noqa: E402

# What the copy-me cells do whose first function or class has no docstring, by notebook and name.
ABOUT = {
    "01 MyPennFudan": "A dataset class for images whose masks hold a number for each object, as PennFudan's do.",
    "03 mobilenet_v2_detector": "Faster R-CNN around MobileNetV2, with anchors and RoIAlign that fit it.",
    "03 PyramidBackbone": "A feature pyramid on four maps of any network that is a list of blocks.",
    "03 freeze_batch_norm": "Replaces each BatchNorm of a network by one that never changes.",
    "04 replace_mask_predictor": "Replaces only the layer of the mask predictor that depends on the number of classes.",
    "04 Pedestrians": "The whole program: dataset, model, training, the best epoch, saving, loading, prediction.",
    "09 freeze_batch_norm": "Replaces each BatchNorm of a model by one that never changes, on the model's device.",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def notebooks_of(readme: str) -> dict[str, list[tuple[str, str, str]]]:
    """README's tables of notebooks: (name, title, what you will do), by the heading of a table."""
    tables = {}
    for heading, rows in re.findall(r"^\| ([^|\[]+?) \|.*\n\|-.*\n((?:\| \[.*\n)+)", readme, re.MULTILINE):
        found = re.findall(r"^\| \[(.*?)\]\(notebooks/(\w+)\.ipynb\) \| (.*?) \|", rows, re.MULTILINE)
        tables[heading] = [(name, title, text) for title, name, text in found]
    return tables


def with_links(text: str, name: str, pages: Path, address: str) -> str:
    """Markdown whose links to files of the project lead to their pages, to GitHub, or to a copy among the pages.

    Args:
        name: of the text's file in the repository; its links start from there.
        address: of the project on GitHub, or "".
    """

    def one(found: re.Match) -> str:
        is_picture, label, target = found.groups()
        if re.match(r"[a-z]+:", target):
            return found[0]
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if file.is_dir():
            return label
        if anchor and re.search(rf'id=\\?"{anchor}\\?"', file.read_text(encoding="utf-8")):
            return f'<a href="{path.replace(".ipynb", ".html")}#{anchor}">{label}</a>'  # Sphinx does not see these ids
        if not path or file.suffix in (".ipynb", ".md"):
            return found[0]
        linked = file.relative_to(ROOT).as_posix()
        if re.fullmatch(r"tutorial_lib/.*\.py", linked):
            return f"[{label}](/reference/{linked.removesuffix('.py').replace('/', '.')}.rst)"
        if address and not is_picture:
            return f"[{label}]({address}/blob/main/{linked})"
        (pages / linked).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, pages / linked)
        return found[0]

    return re.sub(r"(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^\]])*)\]\(([^)\s]+)\)", one, text)


def about(cell: str, number: str) -> tuple[str, str]:
    """The names that a cell to be copied defines, and one line on it.

    Raises:
        KeyError: there is neither a docstring nor a line in ``ABOUT``.
    """
    defined = [node for node in ast.parse(cell).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = [node.name for node in defined] or ["cell"]
    docstring = ast.get_docstring(defined[0]) if defined else None
    if module := re.match(r"# (tutorial_lib/.*\.py)", cell):
        library = {getattr(node, "name", None): node for node in ast.parse(read(module[1])).body}
        docstring = ast.get_docstring(library[names[-1]])
    line = docstring.split("\n")[0] if docstring else ABOUT.get(f"{number} {names[0]}")
    if not line:
        raise KeyError(f"notebook {number}: the copy-me cell of {names[0]} needs a docstring, or a line in ABOUT here")
    return ", ".join(f"`{name}`" for name in names), line


def write_notebook(name: str, pages: Path, extra: Path, address: str) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Write one notebook's page, the notebook itself to be downloaded, and its largest picture, for the front page.

    Returns:
        The name of the picture's file, in a list, empty without pictures; and the cells to be copied: names, a line
        and the text.
    """
    notebook, heading, pictures, copied = json.loads(read(f"notebooks/{name}.ipynb")), "", [], []
    run = notebook["metadata"].get("tutorial", {})
    cells = []
    for place, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.*)$", source, re.MULTILINE) or [heading])[-1]
            source = with_links(source, f"notebooks/{name}.ipynb", pages, address)
            if place == 0:
                made = f" · outputs of {run['date']}, preset {run['preset']}" if run else ""
                title, _, below = source.partition("\n")
                link = f'<a href="{name}.ipynb" download>Download the notebook</a>'
                source = f'{title}\n\n<p class="run">{link}{made}</p>\n{below}'
            cell["source"] = source
        elif "copy-me" in cell["metadata"].get("tags", []):
            copied.append((*about(source, name[:2]), source))
            cells.append(new_markdown_cell(f'<div id="copy-{len(copied)}"></div>'))
        alternative = f"Figure of the section “{heading.replace('`', '')}”"
        cell["metadata"]["mystnb"] = {"image": {"alt": alternative}}
        for output in cell.get("outputs", []):
            pictures += [(kind, data) for kind, data in output.get("data", {}).items() if kind.startswith("image/")]
        cells.append(cell)
    notebook["cells"] = cells
    (pages / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", extra / "notebooks")
    if not pictures:
        return [], copied
    kind, data = max(pictures, key=lambda picture: (picture[0] == "image/jpeg", len(picture[1])))
    picture = extra / "pictures" / f"{name}.{kind.removeprefix('image/')}"
    picture.write_bytes(base64.b64decode("".join(data)))
    return [f"pictures/{picture.name}"], copied


def write_reference(pages: Path) -> None:
    """A page for each module of the library, and one that lists them with the first line of what they say."""
    lines = ["Reference", "=========", "", "The library, from its docstrings.", ""]
    toctree = ["", ".. toctree::", "   :hidden:", ""]
    for title, (_, modules) in GROUPS.items():
        title = title[0].upper() + title[1:]
        lines += [title, "-" * len(title), ""]
        for module in modules:
            file, package = ROOT / "tutorial_lib" / f"{module}.py", ROOT / "tutorial_lib" / module
            for path in [file] if file.exists() else sorted(package.glob("*.py")):
                full = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                name = full.removesuffix(".__init__")
                summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n")[0]
                lines.append(f"- :doc:`{name.removeprefix('tutorial_lib.')} <{full}>`: {summary}")
                toctree.append(f"   {name.removeprefix('tutorial_lib.')} <{full}>")
                page = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n"
                (pages / "reference" / f"{full}.rst").write_text(page, encoding="utf-8")
        lines.append("")
    (pages / "reference" / "index.rst").write_text("\n".join(lines + toctree) + "\n", encoding="utf-8")


def write_pages(pages: Path, extra: Path) -> None:
    address = kept(ROOT)
    readme = read("README.md")
    tables = notebooks_of(readme)
    cards, contents, copied = [], [], []
    for heading, rows in tables.items():
        heading = heading[0].upper() + heading[1:]
        cards += [f"## {heading}", "", '<div class="cards">']
        contents += ["```{toctree}", ":hidden:", f":caption: {heading}", ""]
        for name, title, text in rows:
            picture, cells = write_notebook(name, pages, extra, address)
            shown = "".join(f'<img src="{path}" alt="" loading="lazy">' for path in picture)
            link = f'<a class="card" href="notebooks/{name}.html">'
            cards.append(f"{link}{shown}<strong>{escape(title)}</strong><span>{escape(text)}</span></a>")
            contents.append(f"{title} <notebooks/{name}>")
            copied += [f"## {title}", ""] * bool(cells)
            for number, (names, line, cell) in enumerate(cells, start=1):
                origin = f'<a href="notebooks/{name}.html#copy-{number}">In notebook {name[:2]}</a>'
                copied += [f"### {names}", "", f"{line} {origin}.", "", "```python", cell, "```", ""]
        cards += ["</div>", ""]
        contents += ["```", ""]
    beginning, sections = re.split(r"(?=^## )", readme, maxsplit=1, flags=re.MULTILINE)
    beginning = beginning.partition("\n| ")[0]
    parts = {
        "README's beginning": with_links(beginning, "README.md", pages, address),
        "README's sections": with_links(sections, "README.md", pages, address),
        "cards": "\n".join(cards),
        "contents": "\n".join(contents),
        "cells": "\n".join(copied),
    }
    for page in DOCS.glob("*.md"):
        text = re.sub(r"<!-- (.*?) -->", lambda found: parts[found[1]], page.read_text(encoding="utf-8"))
        (pages / page.name).write_text(text, encoding="utf-8")
    contributing = with_links(read("CONTRIBUTING.md"), "CONTRIBUTING.md", pages, address)
    (pages / "CONTRIBUTING.md").write_text(contributing, encoding="utf-8")
    write_reference(pages)


def build(folder: Path) -> int:
    """The site in this folder, in place of an older one; returns Sphinx's exit code."""
    if folder.exists() and any(folder.iterdir()) and not (folder / ".buildinfo").exists():
        sys.exit(f"{folder} holds something that is not a site; remove it, or give another folder")
    source = folder.with_name(f"{folder.name}-source")
    pages, extra = source / "pages", source / "extra"
    for old in (folder, source):
        shutil.rmtree(old, ignore_errors=True)
    for new in (pages / "notebooks", pages / "reference", extra / "notebooks", extra / "pictures"):
        new.mkdir(parents=True)
    write_pages(pages, extra)
    options = [
        "-W",
        "--keep-going",
        "-n",
        "-q",
        "-c",
        DOCS,
        "-d",
        source / "doctrees",
        "-D",
        f"html_extra_path={extra}",
    ]
    return sphinx([*map(str, options), str(pages), str(folder)])


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()))
