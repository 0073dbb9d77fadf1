"""Notebook 04's training is killed and the notebook run again, as its reader would do it."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from tests.processes import run_python
from tools.notebooks import SOURCES, read_source
from tutorial_lib.checkpoint import load_checkpoint

EPOCHS = 3
# Run as a program of its own: the cells as they are, but for a smaller preset and a folder written into RUN.
PROGRAM = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
from torch.optim.optimizer import register_optimizer_step_post_hook
from tutorial_lib import presets

data, run, epochs, steps_to_live = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
small = {"split": (4, 3, 1), "batch_size": 2, "min_size": (64, 80), "max_size": 96, "long_epochs": epochs}
presets.PRESETS["quick"] = replace(presets.PRESETS["quick"], **small)
presets.data_folder = lambda: data

def die(*_):
    global steps_to_live
    steps_to_live -= 1
    if steps_to_live == 0:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows both end it at once

register_optimizer_step_post_hook(die)
cells = json.loads((data / "cells.json").read_text(encoding="utf-8"))
(settings,) = [number for number, cell in enumerate(cells) if "RUN = None" in cell]
cells[settings] = cells[settings].replace("RUN = None", f"RUN = Path({str(run)!r})")
names = {}
for cell in cells:
    exec(cell, names)
history = list(names["history"])
exec(cells[-1], names)  # the training once more: there is nothing left to do
assert names["start"] == epochs + 1 and names["history"] == history
names["settings"] = [*names["settings"], "another"]
try:
    exec(cells[-1], names)
except AssertionError as error:
    print(error)
"""


def cells_to_the_training() -> list[str]:
    notebook = read_source(SOURCES / "04_penn_fudan_mask_rcnn.py")
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (last,) = [number for number, cell in enumerate(code) if "for epoch in range(start" in cell and "resume(" in cell]
    return code[: last + 1]


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """A function that runs the notebook to the end of its training, in a folder of that name, if it lives so long."""
    for name, value in {"TUTORIAL_PRESET": "quick", "TUTORIAL_DEVICE": "cpu", "MPLBACKEND": "Agg"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cells.json").write_text(json.dumps(cells_to_the_training()), encoding="utf-8")

    def run(name: str, steps_to_live: int = 0) -> subprocess.CompletedProcess:
        return run_python("-c", PROGRAM, tmp_path, tmp_path / name, EPOCHS, steps_to_live, timeout=120)

    return run


def test_a_killed_run_that_is_run_again_ends_as_if_it_had_not_been_killed(tmp_path, run_notebook):
    whole = run_notebook("whole")
    assert whole.returncode == 0, whole.stderr
    assert "other settings need another RUN" in whole.stdout

    killed = run_notebook("killed", steps_to_live=3)  # an epoch has two
    assert killed.returncode == (15 if os.name == "nt" else -9), killed.stderr
    assert len(load_checkpoint(tmp_path / "killed" / "last.pt")["history"]) == 1
    again = run_notebook("killed")
    assert again.returncode == 0, again.stderr
    assert f"epochs 2 to {EPOCHS}" in again.stdout

    for file in ("last.pt", "best.pt"):
        expected, found = (load_checkpoint(tmp_path / name / file) for name in ("whole", "killed"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found["model"][key], value) for key, value in expected["model"].items()), file
        for key in ("history", "best_epoch", "settings", "epoch"):
            assert found.get(key) == expected.get(key), (file, key)
