"""Every notebook as a reader runs it: JupyterLab, as `make lab` starts it, in a real browser.

    python -m pytest -m browser -n 0 tests/test_jupyterlab.py

It needs ``pip install playwright`` and an installed Chromium or Chrome: the program named by TUTORIAL_CHROMIUM, or one
on the PATH. The screenshots are in build/screenshots.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, end
from tools.notebooks import BUILD, NOTEBOOKS

pytestmark = pytest.mark.browser
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
SECONDS = 900  # for a notebook
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"
NO_NEWS = '{"fetchNews": "false", "checkForUpdates": false}'  # JupyterLab would ask whether to look for them
READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
RUN_ALL = """async () => {
    await jupyterapp.commands.execute('notebook:clear-all-cell-outputs');
    jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.ended = true });
}"""
CELLS = "[...jupyterapp.shell.currentWidget.content.model.cells].map(cell => cell.toJSON())"
SHUT_DOWN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()"
SCROLL = "async number => { await jupyterapp.shell.currentWidget.content.scrollToItem(number, 'start') }"
# What a reader would see to be broken, of the cells in view.
BROKEN = """() => {
    const pictures = [...document.querySelectorAll('.jp-Notebook img')].filter(picture => !picture.naturalWidth);
    const formulas = document.querySelectorAll('.jp-Notebook mjx-merror');
    return [...pictures.map(picture => picture.src), ...[...formulas].map(formula => formula.textContent)];
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The address of JupyterLab on a copy of the project, where notebooks put data too; {} is a notebook's name."""
    project = tmp_path_factory.mktemp("project")
    for folder in (NOTEBOOKS, REPOSITORY / "tutorial_lib"):
        shutil.copytree(folder, project / folder.name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", project)
    settings = (
        project / "jupyter/config/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    )
    settings.parent.mkdir(parents=True)
    settings.write_text(NO_NEWS, encoding="utf-8")
    own = {f"JUPYTER_{kind}_DIR": str(project / "jupyter" / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": str(project / "ipython"), "PYTHONPATH": str(project), "TUTORIAL_PRESET": "quick"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    options += ["--ip=127.0.0.1", "--no-browser", "--allow-root", "--LabApp.expose_app_in_browser=True"]
    with open(project / "lab.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "notebooks", *options], cwd=project,
            env={**os.environ, **own}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", process, log.name)
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}.ipynb?token={token}&reset"
        finally:
            end(process)


def wait_for(address: str, process: subprocess.Popen, log: str, seconds: float = 60) -> None:
    """Until this address answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + seconds
    while True:
        try:
            opener.open(address, timeout=5).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > until:
                raise AssertionError(Path(log).read_text(encoding="utf-8")) from error
            time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="NOT TESTED IN A BROWSER: pip install playwright", exc_type=ImportError
    )
    named = os.environ.get("TUTORIAL_CHROMIUM")
    found = [shutil.which(name) for name in ([named] if named else ["chromium", "chromium-browser", "google-chrome"])]
    if not any(found):
        assert not named, f"TUTORIAL_CHROMIUM={named} is not a program"
        pytest.skip("NOT TESTED IN A BROWSER: install Chromium, or set TUTORIAL_CHROMIUM to a program like it")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=next(filter(None, found)), args=FLAGS.split(), timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    page = browser.new_page(viewport={"width": 1300, "height": 1500})
    yield page
    page.evaluate(SHUT_DOWN)
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_runs_in_jupyterlab(name, lab, page):
    page.goto(lab.format(name), timeout=60_000)
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(RUN_ALL)
    page.wait_for_function("window.ended", timeout=SECONDS * 1000, polling=500)
    cells = page.evaluate(CELLS)
    (BUILD / "screenshots").mkdir(parents=True, exist_ok=True)
    for old in (BUILD / "screenshots").glob(f"{name}-*.png"):
        old.unlink()
    broken = []
    for number, cell in enumerate(cells):
        heading = re.match(r"##? (.*)", cell["source"])
        if heading and cell["cell_type"] == "markdown":
            page.evaluate(SCROLL, number)
            page.wait_for_timeout(1000)  # pictures and formulas come into view
            slug = re.sub(r"\W+", "-", heading[1].lower())[:40]
            page.screenshot(path=BUILD / "screenshots" / f"{name}-{number:03d}-{slug}.png")
            broken += page.evaluate(BROKEN)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    errors = [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors, "\n".join(errors[0]["traceback"])
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not broken, "pictures or formulas that do not show"
