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
    batches = f"batches of {4 // processes} each, 5 windows, learning rate 0.0015"
    assert f"{processes} process(es), 2 epochs, seed 0, {batches}" in results["made_by"]
    checkpoint = load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["epoch"] == results["epoch"] and checkpoint["preset"] == "quick"
    assert not any(name.startswith("module.") for name in checkpoint["model"])  # loads without a process group


def test_processes_train_one_model_on_different_images(tmp_path):
    finished = launch(2, "tests/train_in_parts.py", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    first, second = json.loads((tmp_path / "everyone.json").read_text())
    for epoch in range(2):
        steps = list(zip(first["image_ids"][epoch], second["image_ids"][epoch], strict=True))
        assert len(steps) == 5 and all(len(part) == 4 for step in steps for part in step)
        assert len({image_id for step in steps for part in step for image_id in part}) == 40  # each image once
    assert first["image_ids"][0] != first["image_ids"][1]
    assert first["weights"] == second["weights"] and first["weights"][0] != first["weights"][1]
    assert all(first[name] == second[name] for name in ("epoch", "validation_mask_AP", "box_AP", "mask_AP"))


@pytest.mark.parametrize("argument", ["--epochs", "--batch-size", "--num-windows"])
def test_a_number_that_is_not_positive_is_refused(tmp_path, argument):
    finished = launch(1, "-m", "tutorial_lib.train", "--preset", "quick", argument, "0", "--out", str(tmp_path / "out"))
    assert finished.returncode == 2
    assert f"{argument} 0: at least one" in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "0"], "--learning-rate 0.0 must be over 0"),
        (["--learning-rate", "nan"], "--learning-rate nan must be over 0"),
        (["--device", "gpu"], "argument --device: invalid a_device value: 'gpu'"),
        (["--device", "cuda"], "--device cpu goes without"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finished = launch(1, "-m", "tutorial_lib.train", *arguments, "--out", str(tmp_path / "out"))
    assert finished.returncode == 2 and message in finished.stderr
    assert not (tmp_path / "out").exists()


def test_more_images_a_step_than_there_are_are_refused(tmp_path):
    command = ["-m", "tutorial_lib.train", "--preset", "quick", "--batch-size", "21", "--out", str(tmp_path / "out")]
    finished = launch(2, *command)
    assert finished.returncode != 0
    assert "40 training images are too few for 2 process(es) with batches of 21" in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["best.pt", "results.json"])
def test_an_earlier_run_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("of yesterday")
    finished = launch(1, "-m", "tutorial_lib.train", "--preset", "quick", "--out", str(tmp_path))
    assert finished.returncode != 0
    assert f"{tmp_path / name} is of an earlier run; give --out another folder" in finished.stderr
    assert (tmp_path / name).read_text() == "of yesterday" and len(list(tmp_path.iterdir())) == 1


def test_large_pages_are_asked_for_unless_the_user_has_chosen():
    code = "import os, tutorial_lib; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    without = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    for chosen, expected in (({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")):
        finished = subprocess.run(
            [sys.executable, "-c", code], env=without | chosen, capture_output=True, text=True, check=True
        )
        assert finished.stdout.strip() == expected


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="large pages on demand are Linux's, and switched on by its setting [madvise] alone",
)
def test_large_tensors_lie_in_large_pages():
    """PyTorch reads the variable at its first tensor, so the library must not make one before it sets it."""
    code = """
import re, tutorial_lib.models, torch
tensor = torch.ones(64, 1 << 20)
print(sum(int(kib) for kib in re.findall(r"AnonHugePages:\\s+(\\d+)", open("/proc/self/smaps").read())))
"""
    found = {}
    for chosen in ("0", "1"):
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": chosen}
        if chosen == "1":
            del environment["THP_MEM_ALLOC_ENABLE"]
        command = [sys.executable, "-c", code]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[chosen] = int(finished.stdout)
    assert found["1"] > found["0"] + 16 * 1024  # KiB, of the tensor's 256 MiB: how many Linux finds differs


def test_a_failure_of_one_process_ends_the_run(tmp_path):
    (tmp_path / "in_the_way").write_text("a file where a folder should be")
    command = ["-m", "tutorial_lib.train", "--preset", "quick", "--epochs", "1", "--out", str(tmp_path / "in_the_way")]
    finished = launch(2, *command)
    assert finished.returncode != 0
    assert "in_the_way" in finished.stderr
