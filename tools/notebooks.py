"""Build and run the notebooks.

    python -m tools.notebooks build [NAME ...]   write notebooks/*.ipynb from notebooks/py/*.py
    python -m tools.notebooks run [NAME ...]     run them into build/, with a summary table and build/results.json
    python -m tools.notebooks address [URL]      write the project's address into badges and set-up cells

A name is the start of one, as in ``run 06 07``. Without names, ``build`` builds all, and ``run`` runs the course
(01 to 05); ``run all`` runs every notebook.

``build`` runs a notebook only where what its outputs depend on has changed: its code, the library's modules,
weights and results that it needs. A change of the prose, of a badge or of a set-up cell keeps them; badges and
set-up cells are those of the address in pyproject.toml. Both use the preset at hand (TUTORIAL_PRESET).

``address`` is :mod:`tools.address`: without URL, that of ``git remote get-url origin``.
"""

from __future__ import annotations

import argparse
import ast
import base64
import datetime
import functools
import hashlib
import io
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import torch
import torchvision
from nbclient import NotebookClient
from PIL import Image

from tools import address
from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SOURCES = NOTEBOOKS / "py"
BUILD = ROOT / "build"
COURSE = ("01", "02", "03", "04", "05")
CELL_TIMEOUT = None  # seconds; the tests set it


@functools.cache
def code_of_module(text: str) -> str:
    """A module's or cell's lines without its docstrings and comment lines, so that prose can change."""
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            dropped.update(range(docstring.lineno, docstring.end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    kept = (line.rstrip() for number, line in lines if number not in dropped)
    return "\n".join(line for line in kept if line and not line.lstrip().startswith("#"))


def _modules() -> dict[str, str]:
    """The code of tutorial_lib's modules by dotted name; a package is the module ``__init__.py``."""
    modules = {}
    for path in (ROOT / "tutorial_lib").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = code_of_module(path.read_text(encoding="utf-8"))
    return modules


def _imported(code: str) -> set[str]:
    """What a code imports of tutorial_lib, or starts with ``-m``, with the packages around it."""
    names = set(re.findall(r"(?:\bfrom|\bimport|-m\W+)\s*(tutorial_lib[\w.]*)", code))
    for package, listed in re.findall(r"\bfrom (tutorial_lib[\w.]*) import (\([^)]*\)|.*)", code):
        names |= {f"{package}.{name}" for name in re.findall(r"\w+", listed)}
    parts = [name.split(".") for name in names]
    return {".".join(name[:length]) for name in parts for length in range(1, len(name) + 1)}


def library_hash(code: str | None = None) -> str:
    """Of what this code needs of tutorial_lib; without a code, of all its modules and the weights.

    That is the modules that it imports and those that they import, the starter weights where ``offline.mini_models``
    is among them, and each file of ``results`` that the code names: as ``speed.json``, or as ``"speed"`` beside the
    word results.
    """
    modules, needed = _modules(), set()
    found = set(modules) if code is None else _imported(code)
    while found := (found & modules.keys()) - needed:
        needed |= found
        found = {name for module in found for name in _imported(modules[module])}
    digest = hashlib.sha256()
    for name in sorted(needed):
        digest.update(f"{name}\n{modules[name]}\n".encode())
    data = ROOT / "tutorial_lib"
    files = sorted((data / "offline" / "weights").glob("*.*")) if "tutorial_lib.offline.mini_models" in needed else []
    for path in sorted((data / "results").glob("*.json")) if code else []:
        quoted = re.search(rf"""["']{path.stem}["']""", code) and "results" in code
        if re.search(rf"\b{path.stem}\.json\b", code) or quoted:
            files.append(path)
    for path in files:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def code_of_cells(notebook: nbformat.NotebookNode) -> str:
    """A notebook's code cells without comment lines, but for the set-up cell, which only installs."""
    cells = [c.source for c in notebook.cells if c.cell_type == "code" and "set-up" not in c.metadata.get("tags", [])]
    return "\n---\n".join(map(code_of_module, cells))


def hashes(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Of what a notebook's outputs depend on: its own code, and what it needs of the library."""
    code = code_of_cells(notebook)
    return {"code_hash": hashlib.sha256(code.encode()).hexdigest()[:16], "library_hash": library_hash(code)}


def read_source(path: Path) -> nbformat.NotebookNode:
    """The notebook of a py:percent file, with ids that depend only on the cells' order."""
    notebook = jupytext.read(path)
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"
    return notebook


class _Reporter(NotebookClient):
    """Prints what the cells print, and how far the notebook is."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            text = msg["content"]["text"].rpartition("\r")[2]
            if text.endswith("\n"):  # a progress bar does not
                print("\n".join(f"      {line}" for line in text.splitlines()), flush=True)
        return super().process_message(msg, cell, cell_index)


def execute(notebook: nbformat.NotebookNode, name: str) -> float:
    """Run a notebook in place; returns the seconds it took."""
    cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    sys.stdout.reconfigure(errors="replace")  # Windows' code page has no →, and a file or a pipe is written in it

    def say(cell, cell_index):
        if cell.cell_type == "code":
            heads = [c.source for c in notebook.cells[:cell_index] if c.cell_type == "markdown"]
            titles = [line.lstrip("# ") for text in heads for line in text.splitlines() if line.startswith("#")]
            print(f"  {name}  cell {cells.index(cell_index) + 1}/{len(cells)}  {titles[-1]}", flush=True)

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    begun = time.perf_counter()
    _Reporter(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", coalesce_streams=True,
        extra_arguments=["--log-level=40"], record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOKS)}}, on_cell_execute=say,
    ).execute()  # fmt: skip
    return time.perf_counter() - begun


def store_photographs_as_jpeg(notebook: nbformat.NotebookNode) -> None:
    """As JPEG where that is smaller, at most 960 pixels wide: GitHub does not show notebooks of many megabytes."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in {"image/png", "image/jpeg"} & output.get("data", {}).keys():
                stored, jpeg = output["data"][kind], io.BytesIO()
                with Image.open(io.BytesIO(base64.b64decode(stored))) as picture:
                    if kind == "image/jpeg" and picture.width <= 960:
                        continue
                    picture = picture.convert("RGB")
                    picture.thumbnail((960, 2000))
                    picture.save(jpeg, "JPEG", quality=85, optimize=True)
                encoded = base64.b64encode(jpeg.getvalue()).decode()
                if len(encoded) < len(stored):
                    del output["data"][kind]
                    output["data"]["image/jpeg"] = encoded


def made_on() -> dict[str, str | int]:
    """What a run was made with and on, now."""
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"
    return {
        "preset": choose_preset().name,
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": datetime.date.today().isoformat(),
    }


def complete(notebook: nbformat.NotebookNode, made: dict) -> None:
    """Make a notebook one that can be stored: what its outputs were made on, smaller pictures, no kernel's version."""
    notebook.metadata["tutorial"] = made
    store_photographs_as_jpeg(notebook)
    notebook.metadata["language_info"] = {"name": "python"}


def chosen(names: list[str]) -> list[Path]:
    """The sources of the notebooks that start with one of these names, or of all.

    Raises:
        ValueError: no notebook starts with one of the names.
    """
    sources = sorted(SOURCES.glob("*.py"))
    if names == ["all"]:
        return sources
    if unknown := [name for name in names if not any(source.stem.startswith(name) for source in sources)]:
        there = ", ".join(source.stem for source in sources)
        raise ValueError(f"no notebook starts with {' or '.join(unknown)}; there are {there}, and all")
    return [source for source in sources if source.stem.startswith(tuple(names))]


def build(names: list[str], force: bool) -> None:
    for source in chosen(names or ["all"]):
        address.write(source, address.in_source(source.read_text(encoding="utf-8"), source.stem, address.kept()))
        notebook, path = read_source(source), NOTEBOOKS / f"{source.stem}.ipynb"
        current = hashes(notebook)
        stored = nbformat.read(path, as_version=4) if path.exists() else None
        known = stored.metadata.get("tutorial", {}) if stored else {}
        if not force and all(known.get(key) == value for key, value in current.items()):
            outputs = [c for c in stored.cells if c.cell_type == "code"]
            for cell, old in zip((c for c in notebook.cells if c.cell_type == "code"), outputs, strict=True):
                cell.outputs, cell.execution_count = old.outputs, old.execution_count
            made = known
            print(f"{path.name}: code unchanged, outputs kept")
        else:
            seconds = execute(notebook, source.stem)
            made = {**made_on(), "seconds": round(seconds), **current}
            print(f"{path.name}: run in {seconds:.0f} s")
        complete(notebook, made)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)


def _result_of(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """What the cell tagged ``results`` gave: a dict with box_AP and mask_AP."""
    for cell in notebook.cells:
        if "results" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if "data" in output:
                    return ast.literal_eval(output["data"]["text/plain"])
    return {}


def _pictures_of(notebook: nbformat.NotebookNode) -> list[tuple[str, bytes]]:
    """The ending and the bytes of every picture, in order."""
    bundles = [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    endings = {"image/png": "png", "image/jpeg": "jpg"}
    found = [(endings[kind], bundle[kind]) for bundle in bundles for kind in endings if kind in bundle]
    return [(ending, base64.b64decode(picture)) for ending, picture in found]


def _run_one(source: Path) -> tuple[str, float, dict[str, float] | None, int]:
    """The row of a notebook: its name, seconds, result (None where it failed) and number of pictures.

    The notebook goes into build/ as far as it got, with its pictures, also where its kernel died.
    """
    notebook, begun, result = read_source(source), time.perf_counter(), None
    try:
        execute(notebook, source.stem)
        result = _result_of(notebook)
    except Exception as error:  # of a cell, or of the kernel: the other notebooks still run
        print(f"{source.stem} failed: {type(error).__name__}: {error}", flush=True)
    seconds, pictures = time.perf_counter() - begun, _pictures_of(notebook)
    if result is not None:
        complete(notebook, {**made_on(), "seconds": round(seconds), **hashes(notebook)})
    nbformat.write(notebook, BUILD / f"{source.stem}.ipynb")
    for old in BUILD.glob(f"{source.stem}-[0-9][0-9].*"):
        old.unlink()
    for number, (ending, picture) in enumerate(pictures, start=1):
        (BUILD / f"{source.stem}-{number:02d}.{ending}").write_bytes(picture)
    return source.stem, seconds, result, len(pictures)


def run(names: list[str]) -> int:
    """Run notebooks, the course unless named, and print a table of them; returns how many failed."""
    sources = chosen(names) if names else [s for s in chosen(["all"]) if s.stem.startswith(COURSE)]
    BUILD.mkdir(exist_ok=True)
    print(f"preset {choose_preset().name}; {len(sources)} notebooks", flush=True)
    rows, made = [], made_on() | {"threads": torch.get_num_threads()}
    for source in sources:
        rows.append(_run_one(source))
        ran = [{"notebook": name, "seconds": round(s), "failed": r is None, **(r or {})} for name, s, r, _ in rows]
        (BUILD / "results.json").write_text(json.dumps(made | {"notebooks": ran}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'notebook':32} {'time':>7} {'box AP':>8} {'mask AP':>8}  pictures")
    for name, seconds, result, pictures in rows:
        aps = ["failed"] * 2
        if result is not None:
            aps = [f"{result[kind]:.3f}" if kind in result else "-" for kind in ("box_AP", "mask_AP")]
        print(f"{name:32} {seconds:5.0f} s {aps[0]:>8} {aps[1]:>8}  build/{name}-* ({pictures})")
    print(f"\nThe executed notebooks are in build/; AP is on the test images, at preset {choose_preset().name}.")
    if not names:
        print('The deeper notebooks: make run NOTEBOOKS=all, or by name, as in make run NOTEBOOKS="06 07".')
    return sum(result is None for _, _, result, _ in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "run", "address"])
    parser.add_argument("names", nargs="*", help="of notebooks, or their first letters, e.g. 02; or all; or the URL")
    parser.add_argument("--force", action="store_true", help="build: run even where nothing changed")
    arguments = parser.parse_intermixed_args()  # `build --force 03` too
    try:
        if arguments.command == "address":
            address.main(arguments.names[0] if arguments.names else None)
        else:
            chosen(arguments.names)
    except ValueError as error:
        parser.error(str(error))
    if arguments.command == "build":
        build(arguments.names, arguments.force)
    elif arguments.command == "run":
        sys.exit(run(arguments.names))
