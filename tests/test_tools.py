"""The notebooks' builder on notebooks of a few cells, and the smaller tools."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from types import SimpleNamespace

import jupytext
import nbformat
import pytest
import torch
from torchvision.models import get_model, get_model_weights

from tests.processes import run_python
from tools import address, notebooks, sizes
from tools.lowest import lowest
from tools.pretrain import of_models

FOLDERS = ("NOTEBOOKS", "SOURCES", "BUILD")
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
RUN = f"""
import sys
from pathlib import Path
from tools import notebooks
for name in {FOLDERS}:
    setattr(notebooks, name, Path(sys.argv[1]) / name)
sys.exit(notebooks.run(sys.argv[2:]))
"""


def source_of(*cells):
    made = [nbformat.v4.new_markdown_cell("# Title")]
    made += [nbformat.v4.new_code_cell(text, metadata={"tags": tags}) for text, tags in cells]
    return jupytext.writes(nbformat.v4.new_notebook(cells=made), fmt="py:percent")


def printed_by(path):
    """What is stored as printed, by cell."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setattr(notebooks, name, tmp_path / name)
    monkeypatch.setenv("TUTORIAL_PRESET", "quick")
    monkeypatch.setattr(notebooks, "CELL_TIMEOUT", 60)
    return tmp_path


# run


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The default run, of good and bad notebooks: its folder, its output and its rows by notebook."""
    folder = tmp_path_factory.mktemp("ran")
    for name in FOLDERS:
        (folder / name).mkdir()
    result = ("{'box_AP': 0.5, 'mask_AP': 0.25}", ["results"])
    cells = {
        "01_good": [("print('epoch 1 \u2192')", []), (PLOT, []), result],
        "02_error": [("print('before')", []), ("1 / 0", []), ("print('after')", [])],
        "03_exits": [("print('before')", []), ("import os\nos._exit(1)", []), ("print('after')", [])],
        "04_killed": [(PLOT, []), ("import os\nos.kill(os.getpid(), 9)", []), result],
        "05_plain": [("{'box_AP': 0.0}", [])],
        "06_deeper": [("print('deeper')", [])],
    }
    for name, of_notebook in cells.items():
        (folder / "SOURCES" / f"{name}.py").write_text(source_of(*of_notebook), encoding="utf-8")
    (folder / "BUILD" / "01_good-07.png").write_bytes(b"of an earlier run")
    command = [sys.executable, "-c", RUN, str(folder)]
    finished = subprocess.run(
        command, cwd=notebooks.ROOT, stdout=subprocess.PIPE, text=True, timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},  # as Windows writes to a file or a pipe
    )  # fmt: skip
    rows = {line.split()[0]: line for line in finished.stdout.splitlines() if line.startswith("0")}
    return SimpleNamespace(build=folder / "BUILD", printed=finished.stdout, failed=finished.returncode, rows=rows)


def test_run_ends_with_a_table_whatever_happens_to_the_notebooks(ran):
    assert ran.failed == 3
    assert "epoch 1 ?" in ran.printed  # → is not in that code page
    for name, what in {"02_error": "ZeroDivisionError", "03_exits": "DeadKernel", "04_killed": "DeadKernel"}.items():
        assert f"{name} failed: " in ran.printed and what in ran.printed.partition(f"{name} failed: ")[2]
        assert "failed   failed" in ran.rows[name]
    assert "0.500    0.250" in ran.rows["01_good"]


def test_without_a_results_cell_there_is_no_ap(ran):
    assert ran.rows["05_plain"].split()[3:5] == ["-", "-"]


def test_run_without_names_runs_the_course_and_says_how_to_run_the_rest(ran):
    assert set(ran.rows) == {"01_good", "02_error", "03_exits", "04_killed", "05_plain"}
    assert not (ran.build / "06_deeper.ipynb").exists()
    assert "make run NOTEBOOKS=all" in ran.printed.splitlines()[-1]


def test_run_keeps_a_copy_as_far_as_each_notebook_got(ran):
    assert printed_by(ran.build / "01_good.ipynb")[0] == "epoch 1 →\n"
    for name in ("02_error", "03_exits"):
        assert printed_by(ran.build / f"{name}.ipynb") == ["before\n", "", ""]


def test_run_leaves_pictures_and_none_of_an_earlier_run(ran):
    assert sorted(path.name for path in ran.build.glob("*.png")) == ["01_good-01.png", "04_killed-01.png"]
    assert (ran.build / "01_good-01.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("names", "ran"),
    [([], "01 05"), (["all"], "01 05 06 10"), (["06", "10"], "06 10"), (["05_x"], "05"), (["0"], "01 05 06")],
)
def test_names_choose_what_is_run(folders, monkeypatch, capsys, names, ran):
    for number in ("01", "05", "06", "10"):
        (folders / "SOURCES" / f"{number}_x.py").touch()
    seen = []
    monkeypatch.setattr(notebooks, "_run_one", lambda source: seen.append(source.stem[:2]) or (source.stem, 1, {}, 0))
    assert notebooks.run(names) == 0
    assert " ".join(seen) == ran
    assert ("NOTEBOOKS=all" in capsys.readouterr().out) == (names == [])


def test_an_unknown_name_is_an_error_that_lists_the_names(folders):
    (folders / "SOURCES" / "01_x.py").touch()
    for command in (notebooks.run, lambda names: notebooks.build(names, force=False)):
        with pytest.raises(ValueError, match="no notebook starts with 05; there are 01_x, and all"):
            command(["01", "05"])


def test_run_writes_results_and_notebooks_that_can_be_stored(ran):
    results = json.loads((ran.build / "results.json").read_text(encoding="utf-8"))
    rows = {row.pop("notebook"): row for row in results.pop("notebooks")}
    assert results.keys() == {"preset", "device", "threads", "python", "torch", "torchvision", "date"}
    assert rows.keys() == ran.rows.keys() and all(row.pop("seconds") >= 0 for row in rows.values())
    assert rows["01_good"] == {"failed": False, "box_AP": 0.5, "mask_AP": 0.25} and rows["02_error"] == {"failed": True}
    good, bad = (nbformat.read(ran.build / f"{name}.ipynb", as_version=4) for name in ("01_good", "02_error"))
    assert good.metadata["tutorial"].items() >= (notebooks.hashes(good) | {"date": results["date"]}).items()
    assert good.metadata["language_info"] == {"name": "python"} and "tutorial" not in bad.metadata


def test_jpeg_pictures_are_found_too():
    def shown(kind):
        return nbformat.v4.new_output("display_data", {kind: "AAAA", "text/plain": "<Figure>"})

    outputs = [shown("image/png"), shown("image/jpeg"), nbformat.v4.new_output("stream", text="x")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)])
    assert notebooks._pictures_of(notebook) == [("png", b"\0\0\0"), ("jpg", b"\0\0\0")]


# build


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


# address

GIVEN = "https://github.com/an-owner/a.name_1"
PLACES = ("pyproject.toml", "CITATION.cff", "README.md", "notebooks")


@pytest.fixture
def tree(tmp_path):
    """A copy of what has the address."""
    for name in PLACES:
        copy = shutil.copytree if (address.ROOT / name).is_dir() else shutil.copy
        copy(address.ROOT / name, tmp_path / name)
    return tmp_path


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def badges_of(text):
    return re.findall(r"\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)", text)


def check_address(root, wanted):
    """Every place has this address, or none."""
    assert address.kept(root) == wanted
    assert (f'repository-code: "{wanted}"\n' in (root / "CITATION.cff").read_text(encoding="utf-8")) == bool(wanted)
    pages = {}
    for path in sorted((root / "notebooks" / "py").glob("*.py")):
        page = f"{wanted.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/notebooks"
        pages[path.stem] = f"{page}/{path.stem}.ipynb"
        built = path.parents[1] / f"{path.stem}.ipynb"
        found = [notebooks.read_source(path)] + [nbformat.read(p, as_version=4) for p in [built] if p.exists()]
        for notebook in found:
            whole = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
            assert badges_of(whole) == badges_of(notebook.cells[0].source) == [pages[path.stem]] * bool(wanted), path
            (set_up,) = [cell.source for cell in notebook.cells if "set-up" in cell.metadata.get("tags", [])]
            assert set_up.startswith(address.SET_UP.format(wanted)), f"{path}: run `python -m tools.address {wanted!r}`"
    readme = (root / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[[^|]*\]\(notebooks/(\w+)\.ipynb\) \|[^|]*\|(.*)$", readme, flags=re.MULTILINE)
    assert listed and [badges_of(rest) for _, rest in listed] == [[pages[name]] * bool(wanted) for name, _ in listed]
    assert len(badges_of(readme)) == len(listed) * bool(wanted)
    for table in re.findall(r"(?:^\|.*\|\n)+", readme, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1, table


def test_every_place_has_the_address_of_pyproject():
    check_address(address.ROOT, address.kept())


def test_an_address_is_written_everywhere_once_and_taken_out_again(tree):
    address.set_address("", tree)
    without = contents(tree)
    for url in (GIVEN, "https://github.com/another/name"):
        address.set_address(url, tree)
        check_address(tree, url)
        assert address.set_address(url, tree) == []
    address.set_address("", tree)
    check_address(tree, "")
    assert contents(tree) == without


def test_outputs_stay_and_are_not_stale(tree):
    before = {path: nbformat.read(path, as_version=4) for path in (tree / "notebooks").glob("*.ipynb")}
    address.set_address(GIVEN if address.kept() != GIVEN else "", tree)
    assert before
    for path, old in before.items():
        new = nbformat.read(path, as_version=4)
        assert new.metadata == old.metadata and notebooks.hashes(new) == notebooks.hashes(old)
        assert [cell.get("outputs") for cell in new.cells] == [cell.get("outputs") for cell in old.cells]
        written = path.read_text(encoding="utf-8")
        nbformat.write(new, path)
        assert path.read_text(encoding="utf-8") == written, "not as nbformat writes it"


def test_an_older_set_up_cell_is_replaced_and_what_is_below_it_stays(tree):
    address.set_address(address.kept(), tree)
    path = tree / "notebooks" / "py" / "03_swapping_the_backbone.py"
    text = path.read_text(encoding="utf-8")
    older = 'import importlib.util\n\nADDRESS = "https://x"\nif True:\n    %pip("--no-deps {packages}")'
    path.write_text(text.replace(address.SET_UP.format(address.kept()), older), encoding="utf-8")
    assert address.set_address(address.kept(), tree) == [path]
    assert path.read_text(encoding="utf-8") == text and "efficientnet" in text


def test_build_writes_the_set_up_cell(folders):
    source = folders / "SOURCES" / "01_small.py"
    older = address.SET_UP.format("https://x")
    source.write_text(source_of((older, ["set-up"])), encoding="utf-8")
    notebooks.build([], force=False)
    built = nbformat.read(folders / "NOTEBOOKS" / "01_small.ipynb", as_version=4)
    assert built.cells[1].source == address.SET_UP.format(address.kept())
    assert built.cells[1].source in source.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "url",
    ["https://github.com/{}", "https://github.com/{}.git", "https://github.com/{}/", "git@github.com:{}.git"]
    + ["ssh://git@github.com/{}.git", "https://name:secret@github.com/{}", "git@github.com:{}"],
)
def test_forms_of_an_address(url):
    assert address.on_github(url.format("an-owner/a.name_1")) == GIVEN


@pytest.mark.parametrize(
    "url",
    [
        "https://gitlab.com/a/b",
        "git@host:a/b.git",
        "/srv/a.git",
        "https://github.com/a",
        "https://github.com/a/b/tree/x",
    ]
    + ["https://name:secret@example.org/a/b", 'https://github.com/a/"b', "https://github.com.example.org/a/b"],
)
def test_another_host_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match="not a repository on GitHub") as refused:
        address.on_github(url)
    assert "secret" not in str(refused.value)


def test_the_command_asks_git_and_takes_an_address(tree):
    (tree / "tools").mkdir()
    shutil.copy(address.__file__, tree / "tools")

    def command(*url):
        return subprocess.run(
            [sys.executable, "-S", "-m", "tools.address", *url], cwd=tree, capture_output=True, text=True, timeout=60
        )  # -S: without installed packages

    def git(*arguments):
        subprocess.run(["git", "-C", tree, *arguments], check=True, timeout=60, stdout=subprocess.DEVNULL)

    git("init", "--quiet")
    refused = command()
    assert refused.returncode == 2 and "git has no address for origin" in refused.stderr
    git("remote", "add", "origin", "git@github.com:an-owner/a.name_1.git")
    finished = command()
    assert finished.returncode == 0 and finished.stdout.startswith(GIVEN), finished.stderr
    check_address(tree, GIVEN)
    assert command("https://gitlab.com/a/b").returncode == 2
    check_address(tree, GIVEN)
    assert command("").returncode == 0
    check_address(tree, "")


@pytest.mark.parametrize("installed", [True, False])
def test_the_set_up_cell_installs_or_says_what_to_do(monkeypatch, installed):
    asked = []
    shell = SimpleNamespace(run_line_magic=lambda *magic: asked.append(magic))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    for url in ("", GIVEN):
        if installed or url:
            exec(address.SET_UP.format(url), {"get_ipython": lambda: shell})
        else:
            with pytest.raises(AssertionError, match="tutorial_lib is missing: set ADDRESS"):
                exec(address.SET_UP.format(url), {"get_ipython": lambda: shell})
    packages = f"install -q --no-deps tutorial_lib@git+{GIVEN} pycocotools defusedxml"
    assert asked == ([] if installed else [("pip", packages)])


def test_no_place_holder_of_an_address_is_left():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=address.ROOT, capture_output=True)
    for name in listed.stdout.decode().splitlines() if listed.returncode == 0 else []:
        path = address.ROOT / name
        assert not path.is_file() or b"YOUR" + b"_ACCOUNT" not in path.read_bytes(), name


# info, sizes, lowest, pretrain


def test_info_says_what_a_report_needs():
    finished = run_python("-m", "tutorial_lib.info", TUTORIAL_DEVICE="cpu", TUTORIAL_PRESET="laptop")
    assert finished.returncode == 0, finished.stderr
    for name in ("torch", "torchvision", "numpy", "pillow", "pycocotools"):
        assert f"{name} {version(name)}\n" in finished.stdout
    for said in (f"python {sys.version.split()[0]}", "device cpu", "preset laptop, 1 threads", "bfloat16 "):
        assert said in finished.stdout


def test_the_library_is_small():
    found, grouped = sizes.sizes(), set()
    for title, (most, modules) in sizes.GROUPS.items():
        grouped |= set(modules)
        assert sum(found.get(name, 0) for name in modules) <= most, title
    assert sum(found.values()) <= sizes.LIMIT
    assert {name for name, lines in found.items() if lines} <= grouped


def test_lines_of_code_are_counted_without_docstrings_comments_and_blanks():
    text = '"""Doc."""\n\n# why\ndef f(\n    x,\n):\n    """Doc\n    of f."""\n    return """a\n\n    b"""  # so\n'
    assert sizes.lines_of_code(text) == 6


def test_lowest_versions_are_those_of_pyproject():
    text = (notebooks.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    versions = lowest(text)
    assert {"torch==2.10", "torchvision==0.25"} < set(versions)
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    assert len(versions) == sum("[" not in requirement for requirement in wanted)
    for unclear in ("torch", "torch>=2.10,<3", "torch==2.10"):
        with pytest.raises(ValueError, match=f"not {unclear}$"):
            lowest(f'[project]\ndependencies = ["numpy>=1", "{unclear}"]\noptional-dependencies = {{}}')


def test_conda_gets_its_packages_from_pyproject():
    text = (notebooks.ROOT / "environment.yml").read_text(encoding="utf-8")
    project = tomllib.loads((notebooks.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [line.strip(" -") for line in text.partition("dependencies:\n")[2].splitlines()]
    assert listed == [f"python{project['requires-python']}", "pip", "pip:", "editable .[notebooks,test]"]
    assert {"notebooks", "test"} <= project["optional-dependencies"].keys()


def test_the_citation_names_this_version_and_licence():
    project = tomllib.loads((notebooks.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (notebooks.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    of_code = project["license"].partition(" ")[0]  # the weights have another
    assert f"version: {project['version']}\n" in text and f"license: {of_code}\n" in text


def test_starter_weights_say_what_belongs_to_each_model():
    metrics = SimpleNamespace(AP=0.1234, per_class={1: 0.5678})
    masks = SimpleNamespace(AP=0.25, per_class={1: 0.5})
    results = SimpleNamespace(box=metrics, mask=masks, num_images=200)
    with torch.device("meta"):
        models = {name: get_model(name, num_classes=8) for name in ("fasterrcnn_mini_fpn", "maskrcnn_mini_fpn")}
    made = of_models(models["maskrcnn_mini_fpn"], results)
    for name, model in models.items():
        stored = get_model_weights(name).DEFAULT.meta
        assert made[name]["num_params"] == stored["num_params"] == sum(p.numel() for p in model.parameters())
        ((_, of_model),), ((_, of_stored),) = made[name]["_metrics"].items(), stored["_metrics"].items()
        assert of_model.keys() == of_stored.keys() and of_model["box_map"] == 0.123
    assert "mask_map" not in made["fasterrcnn_mini_fpn"]["_metrics"].popitem()[1]
