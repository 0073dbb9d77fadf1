"""Checkpoints: saved all or nothing, loaded without running code, resumed as if training had never stopped."""

from __future__ import annotations

import os
import pickle
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from tests.processes import run_python
from tutorial_lib import checkpoint
from tutorial_lib.checkpoint import load_checkpoint, resume, save_checkpoint
from tutorial_lib.engine import warmup_cosine


class Counter(nn.Module):
    """Counts what it is shown, in a state that is no tensor."""

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def new_parts(width=4, scaler=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1), Counter())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = warmup_cosine(optimizer, 2, 10)
    return {
        "model": model, "optimizer": optimizer, "lr_scheduler": schedule,
        "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=scaler),
    }  # fmt: skip


def three_steps(model, optimizer, lr_scheduler, scaler):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        lr_scheduler.step()


def all_of(parts):
    """The states of the parts and of the random generators, as plain numbers, which can be compared with ``==``."""
    states = {name: dict(part.state_dict()) for name, part in parts.items()}
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    return tree_map(lambda v: v.tolist() if hasattr(v, "tolist") else v, [states, generators])


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    path = tmp_path / "new folder" / "last.pt"
    parts = new_parts()
    three_steps(**parts)
    save_checkpoint(path, **parts, epoch=3, best=0.5, history=[{"loss": 1.5}], preset="quick")
    saved = all_of(parts)
    three_steps(**parts)
    sampled = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    resumed = new_parts()
    assert resume(path, **resumed) == {"epoch": 3, "best": 0.5, "history": [{"loss": 1.5}], "preset": "quick"}
    assert all_of(resumed) == saved and resumed["model"][3].seen == 24
    three_steps(**resumed)
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()) == sampled
    assert all_of(resumed) == all_of(parts)
    save_checkpoint(str(path), epoch=6)  # in the place of the one before
    assert load_checkpoint(str(path))["epoch"] == 6
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("message", "saved"),
    [
        (r"does not hold scaler; it holds model, optimizer, lr_scheduler, epoch, random", {"scaler": None}),
        (r"does not fit the model: .*\n.*size mismatch for 0.weight", {"model": new_parts(width=5)["model"]}),
        (r"does not fit the model: .*\n.*Missing key", {"model": nn.Linear(3, 4)}),
        (r"does not fit the model: 'seen'", {"model": {**new_parts()["model"].state_dict(), "3._extra_state": {}}}),
        (r"does not fit the optimizer", {"optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(2))])}),
        (r"does not fit the scaler: .*disabled", new_parts(scaler=False)),
        (r"does not fit the random generators", {"random": {"torch": torch.get_rng_state(), "cuda": []}}),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, message, saved):
    path, parts = tmp_path / "last.pt", new_parts()
    three_steps(**parts)
    state = {**parts, "epoch": 3, **saved}
    save_checkpoint(path, **{name: part for name, part in state.items() if part is not None and name != "random"})
    if "random" in saved:
        torch.save({**load_checkpoint(path), **saved}, path)
    three_steps(**parts)
    torch.rand(1), np.random.rand(), random.random()
    before = all_of(parts)
    with pytest.raises(ValueError, match=rf"last\.pt {message}"):
        resume(path, **parts)
    assert all_of(parts) == before


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    """What could not be loaded is refused, and weights that are not finite; Ctrl-C half-way through the file."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, epoch=1, history=[{"loss": np.nan}], curve={"AP": torch.tensor(np.nan)})
    for named, state in {
        "numpy": {"best": np.float64(0.5)},
        "torch.nn": {"ema": {"model": nn.Linear(1, 1)}},
        "random": {"random": 4},
    }.items():
        with pytest.raises(TypeError, match=named):
            save_checkpoint(path, **state)

    def write_a_bit(state, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    for part, bad in {"0.weight": np.nan, "0.bias": -np.inf, "1.running_var": np.inf}.items():
        model = new_parts()["model"]
        model.state_dict()[part].view(-1)[1] = bad
        for state in (model, model.state_dict()):
            with pytest.raises(FloatingPointError, match=rf"last\.pt is not written: {part} is not finite"):
                save_checkpoint(path, model=state, epoch=2)
    monkeypatch.setattr(checkpoint.torch, "save", write_a_bit)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, epoch=2)
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_is_said_and_the_earlier_checkpoint_kept(tmp_path):
    """The limit on a file's size fails a write as a full disk does, half-way through the file."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of a process's files")
    path = tmp_path / "last.pt"
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for kept in ("nothing is left of it", "the checkpoint that was there is kept"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"last\.pt cannot be written \(.*\); {kept}"):
                save_checkpoint(path, values=torch.ones(1_000_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [file.name for file in tmp_path.iterdir()] == ["last.pt"] * path.exists()
        save_checkpoint(path, epoch=1)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked, to save their start")
def test_killed_ten_times_training_ends_with_the_same_weights(tmp_path, sample_root):
    finished = run_python("tests/killed_run.py", sample_root, tmp_path, 10)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "killed 10 times; weights identical\n"


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_what_is_no_checkpoint_is_refused_and_no_code_run(tmp_path):
    path, trap = tmp_path / "cut short.pt", tmp_path / "trap"
    torch.save({"model": Malicious(trap)}, path)
    malicious = path.read_bytes()
    save_checkpoint(path, model=new_parts()["model"])
    whole = path.read_bytes()
    cut = [whole[: int(share * len(whole))] for share in (0, 0.01, 0.5, 0.99)]
    for content in [*cut, b"<html>", b"\0" * 64, b"\x80", malicious, pickle.dumps(Malicious(trap), protocol=2)]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cut short\.pt cannot be read as a checkpoint"):
            load_checkpoint(path)
    assert not trap.exists()
    for missing in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such checkpoint"):
            load_checkpoint(missing)
