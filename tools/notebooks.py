"""Build and run the notebooks.

    python -m tools.notebooks build [NAME ...]   write notebooks/*.ipynb from notebooks/py/*.py
    python -m tools.notebooks run [NAME ...]     run them into build/, with a summary table

``build`` runs a notebook only where its code, or that of the library's modules which it needs, is newer than
the stored outputs; a change of the prose keeps them. Both use the preset at hand (TUTORIAL_PRESET).
"""

from __future__ import annotations

import argparse
import ast
import base64
import datetime
import hashlib
import io
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
from nbclient.exceptions import CellExecutionError
from PIL import Image

from tutorial_lib.engine import pick_device
from tutorial_lib.presets import choose_preset

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SOURCES = NOTEBOOKS / "py"
BUILD = ROOT / "build"


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


def library_hash(code: str | None = None) -> str:
    """Of the modules of tutorial_lib that this code imports, and that those import (of all, without it).

    With any goes ``__init__``, and with ``models`` the starter weights.
    """
    modules = {
        path.stem: code_of_module(path.read_text(encoding="utf-8")) for path in (ROOT / "tutorial_lib").glob("*.py")
    }
    needed, found = set(), set(modules if code is None else re.findall(r"tutorial_lib\.(\w+)", code))
    found |= {"__init__"} if found else set()
    while found := (found & modules.keys()) - needed:
        needed |= found
        found = {name for module in found for name in re.findall(r"tutorial_lib\.(\w+)", modules[module])}
    digest = hashlib.sha256()
    for name in sorted(needed):
        digest.update(f"{name}\n{modules[name]}\n".encode())
    if "models" in needed:
        for path in sorted((ROOT / "tutorial_lib" / "weights").glob("*.pt")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def code_of_cells(notebook: nbformat.NotebookNode) -> str:
    """A notebook's code cells without comment lines, but for the set-up cell, which only installs."""
    cells = [c.source for c in notebook.cells if c.cell_type == "code" and "set-up" not in c.metadata.get("tags", [])]
    return "\n---\n".join(map(code_of_module, cells))


def hashes(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Of what a notebook's outputs depend on: its own code, and the library's."""
    code = code_of_cells(notebook)
    return {"code_hash": hashlib.sha256(code.encode()).hexdigest()[:16], "library_hash": library_hash(code)}


def read_source(path: Path) -> nbformat.NotebookNode:
    """The notebook of a py:percent file, with ids that depend on the cells' places alone."""
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
        notebook, timeout=None, kernel_name="python3", coalesce_streams=True,
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


def build(names: list[str], force: bool) -> None:
    for source in sorted(SOURCES.glob("*.py")):
        if names and not any(source.stem.startswith(name) for name in names):
            continue
        notebook, path = read_source(source), NOTEBOOKS / f"{source.stem}.ipynb"
        current = hashes(notebook)
        stored = nbformat.read(path, as_version=4) if path.exists() else None
        known = stored.metadata.get("tutorial", {}) if stored else {}
        if not force and all(known.get(key) == value for key, value in current.items()):
            outputs = [c for c in stored.cells if c.cell_type == "code"]
            for cell, old in zip((c for c in notebook.cells if c.cell_type == "code"), outputs, strict=True):
                cell.outputs, cell.execution_count = old.outputs, old.execution_count
            notebook.metadata["tutorial"] = known
            print(f"{path.name}: code unchanged, outputs kept")
        else:
            seconds = execute(notebook, source.stem)
            device = pick_device()
            notebook.metadata["tutorial"] = {
                "preset": choose_preset().name,
                "device": torch.cuda.get_device_name()
                if device.type == "cuda"
                else f"{device.type} ({os.cpu_count()} cores)",
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "date": datetime.date.today().isoformat(),
                "seconds": round(seconds),
                **current,
            }
            print(f"{path.name}: run in {seconds:.0f} s")
        store_photographs_as_jpeg(notebook)
        notebook.metadata["language_info"] = {"name": "python"}
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


def run(names: list[str]) -> int:
    BUILD.mkdir(exist_ok=True)
    rows, failed = [], 0
    sources = [s for s in sorted(SOURCES.glob("*.py")) if not names or any(s.stem.startswith(n) for n in names)]
    print(f"preset {choose_preset().name}; {len(sources)} notebooks", flush=True)
    for source in sources:
        notebook, begun = read_source(source), time.perf_counter()
        try:
            execute(notebook, source.stem)
            result = _result_of(notebook)
        except CellExecutionError as error:
            print(error)
            result, failed = {"failed": True}, failed + 1
        nbformat.write(notebook, BUILD / f"{source.stem}.ipynb")
        pictures = [
            output["data"]["image/png"]
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        for number, picture in enumerate(pictures, start=1):
            (BUILD / f"{source.stem}-{number:02d}.png").write_bytes(base64.b64decode(picture))
        rows.append((source.stem, time.perf_counter() - begun, result, len(pictures)))
    print(f"\n{'notebook':32} {'time':>7} {'box AP':>8} {'mask AP':>8}  pictures")
    for name, seconds, result, pictures in rows:
        aps = [
            "failed" if "failed" in result else f"{result[k]:.3f}" if k in result else "-"
            for k in ("box_AP", "mask_AP")
        ]
        print(f"{name:32} {seconds:5.0f} s {aps[0]:>8} {aps[1]:>8}  build/{name}-*.png ({pictures})")
    print(f"\nThe executed notebooks are in build/; AP is on the test images, at preset {choose_preset().name}.")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build", "run"])
    parser.add_argument("names", nargs="*", help="only the notebooks that start so, e.g. 02")
    parser.add_argument("--force", action="store_true", help="build: run even where nothing changed")
    arguments = parser.parse_intermixed_args()  # `build --force 03` too
    if arguments.command == "build":
        build(arguments.names, arguments.force)
    else:
        sys.exit(run(arguments.names))
