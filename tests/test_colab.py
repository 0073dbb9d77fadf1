"""Every notebook as Colab runs it: with Colab's packages, from an empty folder that holds only the .ipynb.

    TUTORIAL_COLAB=/path/to/a/folder python -m pytest -m colab -n 0

It needs a package registry, and about 6 GB for PyTorch with CUDA. The packages go into the virtual environment
TUTORIAL_COLAB, where the next run finds them. It is made with this Python where it is not there: for Colab's,
``python3.13 -m venv /path/to/a/folder`` before. Without that variable it is a temporary folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.processes import REPOSITORY, end
from tools.address import in_notebook
from tools.notebooks import NOTEBOOKS

pytestmark = pytest.mark.colab
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
# Of github.com/googlecolab/backend-info, pip-freeze.txt, in August 2026, with Python 3.13: what the notebooks use, what
# runs them, and what 05's set-up may change.
PACKAGES = """
torch==2.11.0 torchvision==0.26.0 numpy==2.1.3 scipy==1.16.3 pillow==11.3.0 matplotlib==3.10.0
pycocotools==2.0.11 defusedxml==0.7.1 tqdm==4.67.3 pandas==2.2.3
protobuf==5.29.6 flatbuffers==25.12.19 ml_dtypes==0.6.0
ipykernel==6.17.1 ipython==7.34.0 jupyter_client==7.4.9 traitlets==5.7.1 tornado==6.5.7 pyzmq==26.2.1
nbclient==0.10.4 nbconvert==7.17.1 nbformat==5.11.1 pip==24.1.2 setuptools==75.2.0
"""
# Packages by name, and the library's tables of results.
INSTALLED = """
import importlib.metadata, importlib.resources, importlib.util, json
packages = {package.name: package.version for package in importlib.metadata.distributions()}
there = importlib.util.find_spec("tutorial_lib") and importlib.resources.files("tutorial_lib") / "results"
print(json.dumps([packages, sorted(file.name for file in there.iterdir()) if there else []]))
"""


def run(*command: object, folder: Path, timeout: float) -> str:
    """What a command prints, without this environment's variables.

    Raises:
        AssertionError: it failed, or did not end in time.
    """
    ours = ("PYTHON", "VIRTUAL_ENV", "TUTORIAL_", "PENN_FUDAN", "JUPYTER", "IPYTHON", "MPL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"TUTORIAL_PRESET": "quick", "TORCH_HOME": str(folder.parent / "torch")}
    environment |= {"JUPYTER_DATA_DIR": str(folder.parent / "jupyter")}  # no kernels but its own
    process = subprocess.Popen(
        list(map(str, command)), cwd=folder, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        output = end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{process.args} took over {timeout} s; its output: {output}") from error
        raise  # Ctrl-C
    assert process.returncode == 0, printed[-5000:]
    return printed


@pytest.fixture(scope="module")
def colab() -> Iterator[Path]:
    """An environment with Colab's packages."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("TUTORIAL_COLAB", temporary)).resolve()
        installed = folder / "installed.txt"
        if not (folder / "bin" / "python").exists():
            run(sys.executable, "-m", "venv", folder, folder=folder.parent, timeout=120)
        if not installed.exists() or installed.read_text(encoding="utf-8") != PACKAGES:
            run(folder / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES.split(), folder=folder, timeout=3000)
            installed.write_text(PACKAGES, encoding="utf-8")
        yield folder


@pytest.fixture
def fresh(colab) -> Iterator[Path]:
    """The python of a copy for one notebook; its files are links, so that 5 GB take seconds and no room."""
    copy = colab.with_name(f"{colab.name}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(colab, copy, symlinks=True, copy_function=os.link)
    yield copy / "bin" / "python"
    shutil.rmtree(copy)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> str:
    """The address of a bare clone, with what is not yet committed here."""
    clone = tmp_path_factory.mktemp("github") / "clone.git"
    with_files = ["git", "--git-dir", clone, "--work-tree", REPOSITORY, "-c", "core.bare=false"]
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    run("git", "clone", "--quiet", "--bare", REPOSITORY, clone, folder=clone.parent, timeout=120)
    run(*with_files, "add", "--all", folder=REPOSITORY, timeout=120)
    run(*with_files, *author, "commit", "--quiet", "--allow-empty", "-m", "as it is", folder=REPOSITORY, timeout=120)
    return clone.as_uri()


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_colab(name, fresh, repository, tmp_path):
    path = tmp_path / "Colab Notebooks" / f"{name}.ipynb"  # the folder's name on a Google Drive
    path.parent.mkdir()
    text = (NOTEBOOKS / path.name).read_text(encoding="utf-8")
    path.write_text(in_notebook(text, name, repository), encoding="utf-8")
    asked = (fresh, "-c", INSTALLED)
    before, _ = json.loads(run(*asked, folder=path.parent, timeout=60))
    assert "torch" in before and "tutorial-lib" not in before
    execute = ("--to", "notebook", "--execute", "--allow-errors", "--inplace", "--ExecutePreprocessor.timeout=900")
    run(fresh, "-m", "nbconvert", *execute, path, folder=path.parent, timeout=1800)
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    bad = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = [output.get("text") or "\n".join(output.get("traceback", "")) for output in [*cells[0].outputs, *bad[:2]]]
    assert not bad, "the set-up and what went wrong:\n" + "\n".join(shown)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    after, results = json.loads(run(*asked, folder=path.parent, timeout=60))
    assert "tutorial-lib" in after
    assert {package: after.get(package) for package in before} == before, "the set-up changed Colab's packages"
    assert results == sorted(file.name for file in (REPOSITORY / "tutorial_lib" / "results").iterdir())
