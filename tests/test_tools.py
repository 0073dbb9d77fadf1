"""``python -m tools.notebooks run``, on notebooks of two cells."""

import jupytext
import nbformat
import pytest

from tools import notebooks


def source_of(*cells):
    made = [nbformat.v4.new_markdown_cell("# Title")]
    made += [nbformat.v4.new_code_cell(text, metadata={"tags": tags}) for text, tags in cells]
    return jupytext.writes(nbformat.v4.new_notebook(cells=made), fmt="py:percent")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("NOTEBOOKS", "SOURCES", "BUILD"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(notebooks, name, tmp_path / name)
    monkeypatch.setenv("TUTORIAL_PRESET", "quick")
    return tmp_path


def test_run_ends_with_a_table_and_leaves_copies_and_pictures(folders, capsys):
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    good = source_of(("print('epoch 1')", []), (plot, []), ("{'box_AP': 0.5, 'mask_AP': 0.25}", ["results"]))
    (folders / "SOURCES" / "01_good.py").write_text(good, encoding="utf-8")
    (folders / "SOURCES" / "02_bad.py").write_text(source_of(("1 / 0", [])), encoding="utf-8")
    assert notebooks.run([]) == 1
    printed = capsys.readouterr().out
    assert "epoch 1" in printed and "ZeroDivisionError" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line.startswith(("01_good", "02_bad"))}
    assert "0.500    0.250" in rows["01_good"]
    assert "failed" in rows["02_bad"]
    assert (folders / "BUILD" / "01_good-01.png").read_bytes().startswith(b"\x89PNG")
    assert (folders / "BUILD" / "01_good.ipynb").is_file() and (folders / "BUILD" / "02_bad.ipynb").is_file()


def test_build_runs_changed_code_and_keeps_outputs_when_prose_changes(folders):
    source = folders / "SOURCES" / "01_small.py"
    source.write_text(source_of(("import time\ntime.time()", [])), encoding="utf-8")
    notebooks.build([], force=False)
    path = folders / "NOTEBOOKS" / "01_small.ipynb"
    first = nbformat.read(path, as_version=4)

    source.write_text(source.read_text(encoding="utf-8").replace("# Title", "# Another title"), encoding="utf-8")
    notebooks.build([], force=False)
    second = nbformat.read(path, as_version=4)
    assert second.cells[0].source == "# Another title"
    assert second.cells[1].outputs == first.cells[1].outputs

    source.write_text(source.read_text(encoding="utf-8").replace("time.time()", "time.time() + 1"), encoding="utf-8")
    notebooks.build([], force=False)
    third = nbformat.read(path, as_version=4)
    assert third.cells[1].outputs != first.cells[1].outputs
    assert third.metadata["tutorial"]["preset"] == "quick"
