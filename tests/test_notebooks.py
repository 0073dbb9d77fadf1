"""The stored notebooks against their sources, the library and the project's address; no re-execution."""

import ast
import re
import tomllib

import nbformat
import pytest

from tools.notebooks import NOTEBOOKS, ROOT, SOURCES, code_of_cells, code_of_module, hashes, library_hash, read_source

NAMES = sorted(path.stem for path in SOURCES.glob("*.py"))
HEADINGS = ["What you'll do", "Set-up", "Recap", "On your own", "In practice", "Further reading"]


def stored(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def tagged(tag):
    cells = [(name, i, c) for name in NAMES for i, c in enumerate(code_cells(read_source(SOURCES / f"{name}.py")))]
    return [pytest.param(cell.source, id=f"{name}-{i}") for name, i, cell in cells if tag in tags(cell)]


def shown_from_library():
    cells = [(name, i, c) for name in NAMES for i, c in enumerate(code_cells(read_source(SOURCES / f"{name}.py")))]
    return [pytest.param(c.source, id=f"{n}-{i}") for n, i, c in cells if c.source.startswith("# tutorial_lib/")]


def test_the_notebooks_are_there():
    wanted = ["01_dataset", "02_finetuning_a_predictor", "03_swapping_the_backbone", "04_penn_fudan_mask_rcnn"]
    wanted += ["05_evaluating_detections", "06_when_it_breaks", "07_making_it_fast"]
    assert NAMES == wanted
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_source_and_notebook_agree(name):
    source, notebook = read_source(SOURCES / f"{name}.py"), stored(name)
    assert [(c.cell_type, c.source, tags(c)) for c in source.cells] == [
        (c.cell_type, c.source, tags(c)) for c in notebook.cells
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
def test_badge_and_set_up_cell_name_the_address(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    notebook = stored(name)
    badge = f"https://colab.research.google.com/github/{address.removeprefix('https://github.com/')}"
    assert f"({badge}/blob/main/notebooks/{name}.ipynb)" in notebook.cells[0].source
    (set_up,) = [cell.source for cell in code_cells(notebook) if "set-up" in tags(cell)]
    assert f'ADDRESS = "{address}"' in set_up and "--no-deps" in set_up


@pytest.mark.parametrize("name", NAMES)
def test_headings(name):
    text = "\n".join(cell.source for cell in stored(name).cells if cell.cell_type == "markdown")
    found = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS
    assert text.count("<summary>Hint</summary>") >= 2
    assert "**Next:**" in text


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short(name):
    """At most 22 statements, as notebook 04's training loop has; what is shown whole to be copied may be longer.

    Statements and not lines: the formatter spreads one call over several.
    """
    for cell in code_cells(stored(name)):
        statements = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.stmt)]
        assert "copy-me" in tags(cell) or len(statements) <= 22, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_links_to_other_notebooks_exist(name):
    for cell in stored(name).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([\w./]+\.ipynb)\)", cell.source):
                assert (NOTEBOOKS / link).is_file(), link


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


@pytest.mark.parametrize("source", shown_from_library())
def test_shown_functions_are_the_librarys(source):
    module = source.splitlines()[0].removeprefix("# ")
    library = definitions((ROOT / module).read_text(encoding="utf-8"))
    shown = definitions(source)
    assert shown
    for name, text in shown.items():
        assert text == library[name]


@pytest.mark.parametrize("source", tagged("copy-me"))
def test_copy_me_cells_run_alone(source):
    exec(compile(source, "copy-me", "exec"), {"__name__": "copied"})


def test_the_library_hash_is_of_the_modules_that_are_needed(monkeypatch, tmp_path):
    from tools import notebooks

    library = tmp_path / "tutorial_lib"
    (library / "weights").mkdir(parents=True)
    modules = {"__init__": "", "a": "import tutorial_lib.b", "b": "x = 1", "c": "y = 1", "models": "z = 1"}
    for name, text in modules.items():
        (library / f"{name}.py").write_text(text)
    (library / "weights" / "mini.pt").write_bytes(b"1")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    codes = ["from tutorial_lib.a import x", "from tutorial_lib.c import y", "import tutorial_lib.models", None]

    def changed(path, content):
        before = [library_hash(code) for code in codes]
        path.write_bytes(content)
        return [library_hash(code) != earlier for code, earlier in zip(codes, before, strict=True)]

    assert changed(library / "b.py", b"x = 2") == [True, False, False, True]  # a needs it
    assert changed(library / "c.py", b"y = 2") == [False, True, False, True]
    assert changed(library / "weights" / "mini.pt", b"2") == [False, False, True, True]
    assert changed(library / "c.py", b"# why\ny = 2") == [False] * 4
    assert changed(library / "__init__.py", b"w = 1") == [True] * 4
    before = library_hash("import torch")
    assert changed(library / "__init__.py", b"w = 2") == [True] * 4 and library_hash("import torch") == before


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
