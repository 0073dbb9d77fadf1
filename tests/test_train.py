"""The training script, and evaluation in several processes, with PyTorch's own launcher and gloo."""

import json
import runpy
import sys

import pytest
import torch

from tests.in_parts import evaluated
from tests.processes import launch
from tutorial_lib.checkpoint import load_checkpoint


def in_processes(number, out, job, *arguments):
    """What each process found, and what they printed."""
    finished = launch(number, "tests/in_parts.py", job, out, *arguments)
    assert finished.returncode == 0, finished.stderr
    return [json.loads((out / f"process{rank}.json").read_text()) for rank in range(number)], finished.stdout


def script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    runpy.run_module("tutorial_lib.train", run_name="__main__")


def test_evaluation_in_parts_is_evaluation_of_the_whole(sample_root, tmp_path):
    """Three processes share 12 images evenly, and of 5, one is given twice."""
    found, _ = in_processes(3, tmp_path, "evaluate", sample_root)
    whole = [evaluated(sample_root, num_images, in_parts=False) for num_images in (12, 5)]
    assert all(0 < whole[0][1 + i] < 1 for i in (0, 1, 3, 5, 6, 8))  # AP, AP50 and AR: not all or nothing
    for part in found:
        for i in range(2):
            assert part[i] == pytest.approx(whole[i], abs=1e-9)


def check_results(out, how):
    results = json.loads((out / "results.json").read_text())
    assert results["num_test_images"] == 16 and 0 <= results["mask_AP"] < 1
    assert f"{how}, 5 windows, learning rate 0.0015" in results["made_by"]
    checkpoint = load_checkpoint(out / "best.pt")
    assert checkpoint["epoch"] == results["epoch"] and checkpoint["preset"] == "quick"
    assert not any(name.startswith("module.") for name in checkpoint["model"])  # loads without a process group
    return results["box_AP"]


def test_the_script_trains_chooses_and_reports(tmp_path, monkeypatch, capsys):
    script(monkeypatch, "--preset", "quick", "--epochs", 2, "--out", tmp_path)
    assert "epoch 2/2" in capsys.readouterr().out
    assert 0.05 < check_results(tmp_path, "1 process(es), 2 epochs, seed 0, batches of 4 each") < 1
    with pytest.raises(FileExistsError, match="best.pt is of an earlier run; give --out another folder"):
        script(monkeypatch, "--preset", "quick", "--out", tmp_path)


def test_two_processes_train_one_model_on_different_images(tmp_path):
    (first, second), printed = in_processes(2, tmp_path, "train")
    assert printed.count("epoch 2/2") == 1  # said once, not by every process
    check_results(tmp_path, "2 process(es), 2 epochs, seed 0, batches of 4 each")
    for epoch in range(2):
        steps = list(zip(first["image_ids"][epoch], second["image_ids"][epoch], strict=True))
        assert len(steps) == 5 and all(len(part) == 4 for step in steps for part in step)
        assert len({image_id for step in steps for part in step for image_id in part}) == 40  # each image once
    assert first["image_ids"][0] != first["image_ids"][1]
    assert first["weights"] == second["weights"] and first["weights"][0] != first["weights"][1]


def test_a_failure_of_one_process_ends_the_run(tmp_path):
    (tmp_path / "in_the_way").write_text("a file where a folder should be")
    finished = launch(2, "-m", "tutorial_lib.train", "--preset", "quick", "--out", tmp_path / "in_the_way")
    assert finished.returncode != 0 and "in_the_way" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs 0: at least one"),
        ("--batch-size -1", "--batch-size -1: at least one"),
        ("--num-windows 0", "--num-windows 0: at least one"),
        ("--learning-rate 0", "--learning-rate 0.0 must be over 0"),
        ("--learning-rate nan", "--learning-rate nan must be over 0"),
        ("--device gpu", "argument --device: invalid a_device value: 'gpu'"),
        ("--device cuda", "0 GPU(s) for 1 process(es); --device cpu goes without"),
        ("--preset quick --batch-size 41", "40 training images are too few for 1 process(es) with batches of 41"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, *arguments.split(), "--out", tmp_path / "out")
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_each_process_has_its_own_gpu(tmp_path, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        script(monkeypatch, "--device", "cuda", "--preset", "quick", "--batch-size", 21, "--out", tmp_path / "out")
    assert chosen == [torch.device("cuda:1")]
    assert "too few for 2 process(es) with batches of 21: lower --batch-size" in capsys.readouterr().err
