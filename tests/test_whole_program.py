"""The whole program that ends notebook 04: it trains for an epoch where tutorial_lib cannot be imported."""

from __future__ import annotations

import ast

import pytest
import torch
from PIL import Image

from tests.processes import run_python
from tools.notebooks import SOURCES, read_source
from tutorial_lib.offline.sample import write_sample

# Run as a program of its own, in an empty folder. The model is torchvision's without its weights, a download.
PROGRAM = """
import os, runpy, sys
from torchvision.models import detection

os.chdir(sys.argv[2])
sys.modules["tutorial_lib"] = None
build = detection.maskrcnn_resnet50_fpn
detection.maskrcnn_resnet50_fpn = lambda weights: build(weights_backbone=None, min_size=64, max_size=96)
assert "main" in runpy.run_path(sys.argv[1], run_name="__main__"), "it is only defined, where there is no PennFudanPed"
assert os.listdir() == []
runpy.run_path(sys.argv[1], run_name="program")["main"](sys.argv[3], epochs=1)
"""


@pytest.fixture(scope="module")
def program() -> str:
    cells = [cell for cell in read_source(SOURCES / "04_penn_fudan_mask_rcnn.py").cells if cell.cell_type == "code"]
    (found,) = [cell for cell in cells if "def main(" in cell.source]
    assert "copy-me" in found.metadata["tags"]
    return found.source


def test_it_is_short_and_says_that_it_runs_alone(program):
    lines = program.splitlines()
    assert lines[0] == "# Copy me: runs alone"
    assert len(lines) <= 110


def test_it_imports_torch_torchvision_pillow_and_tqdm(program):
    nodes = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"pathlib", "torch", "torchvision", "PIL", "tqdm"}


def test_it_trains_saves_loads_and_predicts_without_the_library(program, tmp_path):
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    root = write_sample(tmp_path, num_images=5)
    finished = run_python("-c", PROGRAM, tmp_path / "program.py", tmp_path / "empty", root, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("epoch 1/1  validation loss ")
    assert float(finished.stdout.split()[-1]) > 0
    state = torch.load(tmp_path / "empty" / "best.pt", weights_only=True)
    assert state["roi_heads.box_predictor.cls_score.weight"].shape[0] == 2
    assert state["roi_heads.mask_predictor.mask_fcn_logits.weight"].shape[0] == 2
    with Image.open(tmp_path / "empty" / "masks.png") as picture:
        sizes = {Image.open(path).size for path in (root / "PNGImages").glob("*.png")}
        assert picture.size in sizes
