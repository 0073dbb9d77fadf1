"""The notebooks against their sources, the library and the project's address; no re-execution."""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from PIL import Image

from tools import notebooks
from tools.notebooks import NOTEBOOKS, ROOT, SOURCES, code_of_cells, code_of_module, hashes, library_hash, read_source

NAMES = sorted(path.stem for path in SOURCES.glob("*.py"))
HEADINGS = ["What you'll do", "Set-up", "Recap", "On your own", "In practice", "Further reading"]
# Run as a program of its own: each cell by itself, where importing tutorial_lib fails. Writes what failed to a file.
ALONE = """
import json, sys, traceback, types
sys.modules["tutorial_lib"] = None
failed = {}
for name, source in json.loads(sys.stdin.read()).items():
    module = sys.modules["copied"] = types.ModuleType("copied")
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        failed[name] = f"line {lines[-1] if lines else '?'}: {error!r}"
with open(sys.argv[1], "w") as file:
    json.dump(failed, file)
"""


def stored(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def source(name):
    return read_source(SOURCES / f"{name}.py")


def markdown(name):
    return "\n\n".join(cell.source for cell in source(name).cells if cell.cell_type == "markdown")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def copy_me(name):
    """The cells to be copied, by their number among the code cells."""
    return {f"cell {i}": c.source for i, c in enumerate(code_cells(source(name)), 1) if "copy-me" in tags(c)}


def shown_from_library():
    cells = [(name, i, cell) for name in NAMES for i, cell in enumerate(code_cells(source(name)), 1)]
    return [pytest.param(c.source, id=f"{name}-{i}") for name, i, c in cells if c.source.startswith("# tutorial_lib/")]


def test_the_notebooks_are_there():
    wanted = ["01_dataset", "02_finetuning_a_predictor", "03_swapping_the_backbone", "04_penn_fudan_mask_rcnn"]
    wanted += [
        "05_your_own_data",
        "06_evaluating_detections",
        "07_when_it_breaks",
        "08_inside_mask_rcnn",
        "09_anchors_and_backbones",
    ]
    assert NAMES == [*wanted, "10_making_it_fast"]
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_source_and_notebook_agree(name):
    assert [(c.cell_type, c.source, tags(c)) for c in source(name).cells] == [
        (c.cell_type, c.source, tags(c)) for c in stored(name).cells
    ], "run `make notebooks`"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_of_this_code(name):
    notebook = stored(name)
    known = notebook.metadata["tutorial"]
    for key, value in hashes(notebook).items():
        assert known[key] == value, f"{key}: the code is newer than its outputs: run `make notebooks`"
    assert {"preset", "device", "python", "torch", "torchvision", "date", "seconds"} <= set(known)


@pytest.mark.parametrize("name", NAMES)
def test_run_once_in_order_without_errors(name):
    cells = code_cells(stored(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.get("text")
            assert "\r" not in output.get("text", ""), "a progress bar is stored"
    assert "widgets" not in stored(name).metadata


@pytest.mark.parametrize("name", NAMES)
def test_at_least_half_of_the_outputs_are_compared(name):
    shown = [cell for cell in code_cells(stored(name)) if cell.outputs]
    ignored = [cell for cell in shown if "nbval-ignore-output" in tags(cell)]
    assert len(ignored) * 2 <= len(shown)


@pytest.mark.parametrize("name", NAMES)
def test_headings(name):
    text = markdown(name)
    found = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS
    assert text.count("<summary>Hint</summary>") >= 2
    assert "**Next:**" in text


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short(name):
    """At most 22 statements, as notebook 04's training loop has; what is shown whole to be copied may be longer.

    Statements and not lines: the formatter spreads one call over several.
    """
    for cell in code_cells(source(name)):
        statements = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.stmt)]
        assert "copy-me" in tags(cell) or len(statements) <= 22, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_links_to_files_exist(name):
    """To other notebooks, pictures and the library, from the notebook's folder."""
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", markdown(name))
    links += re.findall(r"""(?:href|src)=["']([^"']+)["']""", markdown(name))
    for link in links:
        path = link.partition("#")[0]
        if path and not re.match(r"\w+:", path):
            assert path.removesuffix(".ipynb") in NAMES or (NOTEBOOKS / path).exists(), link


@pytest.mark.parametrize("name", NAMES)
def test_links_within_a_notebook_lead_to_a_heading(name):
    headings = re.findall(r"^#+ (.*)$", markdown(name), flags=re.MULTILINE)
    # As Jupyter makes them, and as GitHub does.
    anchors = {heading.replace(" ", "-") for heading in headings}
    anchors |= {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r"""\bid=["']([^"']+)["']""", markdown(name)))
    for link in re.findall(r"\]\(#([^)\s]+)\)", markdown(name)):
        assert link in anchors, link


@pytest.mark.parametrize("name", NAMES)
def test_pictures_have_a_text_for_those_who_do_not_see_them(name):
    for text, link in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", markdown(name)):
        assert text.strip(), link
    for tag in re.findall(r"<img\b[^>]*>", markdown(name)):
        assert re.search(r"""\balt=["'][^"']+["']""", tag), tag


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_suits_github(name):
    """GitHub does not show notebooks of many megabytes, nor widgets, and shows escape codes as they are."""
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 2_000_000
    outputs = json.dumps([cell.outputs for cell in code_cells(stored(name))])
    assert r"\u001b" not in outputs
    assert "vnd.jupyter.widget" not in outputs


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_sharp_and_not_too_large(name):
    """A figure's text has its size at 100 dpi, before empty edges are cut off and wide ones are made smaller."""
    bundles = [output["data"] for cell in code_cells(stored(name)) for output in cell.outputs if "data" in output]
    for data in bundles:
        for kind in {"image/png", "image/jpeg"} & data.keys():
            with Image.open(io.BytesIO(base64.b64decode(data[kind]))) as picture:
                width, height = picture.size
            assert 150 <= width <= 1300 and 100 <= height <= 1000, data["text/plain"]
            if figure := re.match(r"<Figure size (\d+)x", data["text/plain"]):
                assert 72 <= 100 * width / int(figure[1]) <= 110, data["text/plain"]


@pytest.mark.parametrize("name", NAMES)
def test_no_place_holder_is_left(name):
    assert not re.search(r"@\w+@", (SOURCES / f"{name}.py").read_text(encoding="utf-8"))


def definitions(text):
    """Functions and classes by name, without docstrings."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            found[node.name] = ast.unparse(node)
    return found


@pytest.mark.parametrize("cell", shown_from_library())
def test_shown_functions_are_the_librarys(cell):
    module = cell.splitlines()[0].removeprefix("# ")
    library = definitions((ROOT / module).read_text(encoding="utf-8"))
    shown = definitions(cell)
    assert shown
    for name, text in shown.items():
        assert text == library[name]


def failures_alone(cells, folder):
    """Of cells by name, those that fail where tutorial_lib cannot be imported, with the error."""
    written = folder / "failed.json"
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    subprocess.run(
        [sys.executable, "-c", ALONE, str(written)], cwd=folder, env=environment, check=True, timeout=300,
        input=json.dumps(cells), stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return json.loads(written.read_text())


@pytest.mark.parametrize("name", [name for name in NAMES if copy_me(name)])
def test_copy_me_cells_run_alone(name, tmp_path):
    assert failures_alone(copy_me(name), tmp_path) == {}


def test_what_does_not_run_alone_is_noticed(tmp_path):
    cells = {
        "good": "from dataclasses import dataclass\nimport torch\n@dataclass\nclass A:\n    x: 'torch.Tensor'",
        "library": "import torch\nfrom tutorial_lib.data import collate_fn",
        "of the cell above": "A(torch.ones(1))",
    }
    failed = failures_alone(cells, tmp_path)
    assert failed.keys() == {"library", "of the cell above"}
    assert failed["library"].startswith("line 2: ModuleNotFoundError")
    assert "NameError" in failed["of the cell above"]


@pytest.fixture
def changed_hashes(tmp_path, monkeypatch):
    """A function that writes a file of a library, and says which hashes of given codes that changes."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)

    def changed(codes, path, content):
        path = tmp_path / "tutorial_lib" / path
        before = [library_hash(code) for code in codes]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return [library_hash(code) != earlier for code, earlier in zip(codes, before, strict=True)]

    return changed


def test_the_library_hash_is_of_the_modules_that_are_needed(changed_hashes):
    library = {
        "__init__.py": b"", "a.py": b"import tutorial_lib.b", "b.py": b"x = 1", "c.py": b"y = 1",
        "p.py": b"import tutorial_lib.offline  # registers", "offline/d.py": b"z = 1", "offline/e.py": b"z = 1",
        "offline/__init__.py": b"from tutorial_lib.offline import d",
    }  # fmt: skip
    for path, content in library.items():
        changed_hashes([], path, content)
    codes = [
        "from tutorial_lib.a import x",
        "from tutorial_lib import (\n    c,\n)",
        "import tutorial_lib.p",
        "from tutorial_lib.offline.e import z",
        "!python -m tutorial_lib.c",
        "print('see tutorial_lib.c')",
        None,
    ]
    assert changed_hashes(codes, "b.py", b"x = 2") == [True] + [False] * 5 + [True]  # a needs it
    assert changed_hashes(codes, "c.py", b"y = 2") == [False, True, False, False, True, False, True]
    assert changed_hashes(codes, "offline/d.py", b"z = 2") == [False, False, True, True, False, False, True]
    assert changed_hashes(codes, "offline/e.py", b"z = 2") == [False, False, False, True, False, False, True]
    assert changed_hashes(codes, "offline/__init__.py", b"w = 1") == [False, False, True, True, False, False, True]
    assert changed_hashes(codes, "__init__.py", b"w = 1") == [True] * 5 + [False, True]
    assert changed_hashes(codes, "c.py", b"# why\ny = 2") == [False] * 7


def test_the_library_hash_is_of_the_sample_the_weights_and_the_results_that_are_needed(changed_hashes, tmp_path):
    library = tmp_path / "tutorial_lib"
    shutil.copytree(ROOT / "tutorial_lib", library, ignore=shutil.ignore_patterns("__pycache__"))
    codes = [
        "from tutorial_lib.presets import choose_preset, prepare_data",
        "from tutorial_lib.coco_eval import compare",
        'results = files("tutorial_lib") / "results"\nrows = json.loads((results / "speed.json").read_text())["rows"]',
        'rows = {name: results(f"{name}.json") for name in ("speed", "growth")}',
        "print('speed', speed_json, results)",
    ]
    sample = (library / "offline" / "sample.py").read_text(encoding="utf-8")
    raised = re.sub(r"^VERSION = (\d+)", r"VERSION = 1\1", sample, flags=re.MULTILINE)
    assert raised != sample
    assert changed_hashes(codes, "offline/sample.py", raised.encode()) == [True, False, False, False, False]
    weights = bytearray((library / "offline" / "weights" / "mini_fpn.pt").read_bytes())
    weights[1000] ^= 1
    assert changed_hashes(codes, "offline/weights/mini_fpn.pt", weights) == [True, False, False, False, False]
    assert changed_hashes(codes, "offline/weights/mini_fpn.json", b"{}") == [True, False, False, False, False]
    assert changed_hashes(codes, "results/speed.json", b"{}") == [False, False, True, True, True]
    assert changed_hashes(codes, "results/growth.json", b"{}") == [False, False, False, True, False]


def test_the_notebooks_that_show_results_depend_on_them(changed_hashes, tmp_path):
    library = tmp_path / "tutorial_lib"
    shutil.copytree(ROOT / "tutorial_lib", library, ignore=shutil.ignore_patterns("__pycache__"))
    codes = [code_of_cells(source(name)) for name in NAMES]
    shown = {"speed": "10", "growth": "10", "time_to_ap": "10", "recipes": "10", "backbones": "09"}
    for result, shown_in in shown.items():
        changed = changed_hashes(codes, f"results/{result}.json", b"{}")
        assert changed == [name.startswith(shown_in) for name in NAMES], result


def test_the_library_hash_sees_code_and_not_prose(tmp_path):
    text = '"""Doc."""\n# why\ndef f(x):\n    """Doc f."""\n    return x + 1\n'
    assert code_of_module(text) == "def f(x):\n    return x + 1"
    assert code_of_module(text.replace("Doc f.", "Else.\n\n    More.").replace("# why", "# because")) == code_of_module(
        text
    )
    assert code_of_module(text.replace("x + 1", "x + 2")) != code_of_module(text)


def test_a_comment_in_a_cell_is_prose():
    def code(*sources):
        return code_of_cells(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]))

    assert code("# why\nx = 1", "y = 2") == code("x = 1", "# how\ny = 2") != code("x = 1", "y = 3")


def measured_rows():
    """README's table of stored runs: minutes and APs by notebook's number."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d) \| ([\d.]+) min \| (\S+) \| (\S+) \|", readme, flags=re.MULTILINE)
    return {number: (float(minutes), box, mask) for number, minutes, box, mask in rows}


@pytest.mark.parametrize("name", NAMES)
def test_readme_has_the_numbers_of_the_stored_runs(name):
    notebook, (minutes, *aps) = stored(name), measured_rows()[name[:2]]
    assert minutes == round(notebook.metadata["tutorial"]["seconds"] / 60, 1)
    results = [c for c in code_cells(notebook) if "results" in tags(c)]
    data = [output["data"]["text/plain"] for c in results for output in c.outputs if "data" in output]
    found = ast.literal_eval(data[0]) if data else {}
    assert aps == [f"{found[key]:.3f}" if key in found else "–" for key in ("box_AP", "mask_AP")]


@pytest.mark.parametrize("name", NAMES)
def test_the_minutes_in_the_text_are_those_of_the_stored_run(name):
    """Within a third, or a quarter of a minute: another day's run is not as fast to the second."""
    opening = "\n".join(cell.source for cell in stored(name).cells[:3] if cell.cell_type == "markdown")
    opening = opening.replace("half a minute", "0.5 minutes").replace("a minute", "1 minute")
    said = re.search(r"([\d.]+)(?: min\w*)?(?: at `quick` and)? at `laptop`|`laptop` \|.*?([\d.]+) min", opening)
    said = said or re.search(r"([\d.]+) minutes?", opening)  # the same at every preset
    minutes = float(next(filter(None, said.groups())))
    if f"less than {minutes:.0f} minute" in opening:
        minutes = min(minutes, stored(name).metadata["tutorial"]["seconds"] / 60)
    assert minutes == pytest.approx(stored(name).metadata["tutorial"]["seconds"] / 60, rel=1 / 3, abs=0.25), said[0]
