"""The training script, and evaluation in several processes, with PyTorch's own launcher and gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.evaluate_in_parts import starter
from tutorial_lib.engine import evaluate, load_checkpoint
from tutorial_lib.penn_fudan import PennFudanDataset, collate_fn
from tutorial_lib.transforms import get_transform

REPOSITORY = Path(__file__).parents[1]


def launch(processes: int, *command: str) -> subprocess.CompletedProcess:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    return subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_in_parts_is_evaluation_of_the_whole(sample_root, tmp_path, processes):
    """12 images: two processes share them evenly, and of 5, three processes get one twice."""
    for num_images in (12, 5):
        out = tmp_path / f"{num_images}.json"
        finished = launch(processes, "tests/evaluate_in_parts.py", str(sample_root), str(num_images), str(out))
        assert finished.returncode == 0, finished.stderr
        found = json.loads(out.read_text())
        dataset = torch.utils.data.Subset(PennFudanDataset(sample_root, get_transform(train=False)), range(num_images))
        whole = evaluate(starter(), DataLoader(dataset, collate_fn=collate_fn), torch.device("cpu"), progress=False)
        assert [part["num_images"] for part in found] == [num_images] * processes
        assert 0 < whole.box.AP < 1 and (num_images == 5 or 0 < whole.mask.AP < 1)  # there is something to compare
        for part in found:
            for kind in ("box", "mask"):
                for name in ("AP", "AP50", "AP75", "AR", "AR1"):
                    expected = getattr(getattr(whole, kind), name)
                    assert abs(part[kind][name] - expected) < 1e-9, (kind, name)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_script_trains_chooses_and_reports(tmp_path, processes):
    command = ["-m", "tutorial_lib.train", "--preset", "quick", "--epochs", "2", "--out", str(tmp_path)]
    finished = launch(processes, *command, "--batch-size", str(4 // processes))
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert finished.stdout.count("epoch 2/2") == 1  # said once, not by every process
    assert results["num_test_images"] == 16
    assert 0.05 < results["box_AP"] < 1 and 0 <= results["mask_AP"] < 1  # two epochs are few
    assert f"{processes} process(es), 2 epochs, seed 0" in results["made_by"]
    checkpoint = load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["epoch"] == results["epoch"] and checkpoint["preset"] == "quick"
    assert not any(name.startswith("module.") for name in checkpoint["model"])  # loads without a process group


@pytest.mark.parametrize("argument", ["--epochs", "--batch-size"])
def test_a_number_that_is_not_positive_is_refused(tmp_path, argument):
    finished = launch(1, "-m", "tutorial_lib.train", "--preset", "quick", argument, "0", "--out", str(tmp_path / "out"))
    assert finished.returncode == 2
    assert f"{argument} 0: at least one" in finished.stderr
    assert not (tmp_path / "out").exists()


def test_more_processes_than_images_are_refused(tmp_path):
    command = ["-m", "tutorial_lib.train", "--preset", "quick", "--batch-size", "41", "--out", str(tmp_path)]
    finished = launch(1, *command)
    assert finished.returncode != 0
    assert "40 images are too few for 1 process(es) with batches of 41" in finished.stderr


def test_large_pages_are_asked_for_unless_the_user_has_chosen():
    code = "import os, tutorial_lib; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    without = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    for chosen, expected in (({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")):
        finished = subprocess.run(
            [sys.executable, "-c", code], env=without | chosen, capture_output=True, text=True, check=True
        )
        assert finished.stdout.strip() == expected


def test_a_failure_of_one_process_ends_the_run(tmp_path):
    (tmp_path / "in_the_way").write_text("a file where a folder should be")
    command = ["-m", "tutorial_lib.train", "--preset", "quick", "--epochs", "1", "--out", str(tmp_path / "in_the_way")]
    finished = launch(2, *command)
    assert finished.returncode != 0
    assert "in_the_way" in finished.stderr
