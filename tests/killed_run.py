"""Train, be killed with SIGKILL at random moments and go on, until the end; compare with a run that was not.

    python tests/killed_run.py DATA_FOLDER SCRATCH_FOLDER KILLS

Runs are forked from this process, so that a new one begins at once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

from tutorial_lib.checkpoint import load_checkpoint, resume, save_checkpoint
from tutorial_lib.data import collate_fn
from tutorial_lib.engine import train_one_epoch, warmup_cosine
from tutorial_lib.models import replace_predictors
from tutorial_lib.offline.mini_models import maskrcnn_mini_fpn
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

EPOCHS = 6


def train(data: str, path: Path) -> None:
    """As notebook 04 does it: a checkpoint after every epoch, and on from the last one."""
    torch.manual_seed(0)
    dataset = Subset(PennFudanDataset(data, get_transform(train=True)), range(3))
    loader = DataLoader(dataset, 3, shuffle=True, collate_fn=collate_fn)
    model = replace_predictors(maskrcnn_mini_fpn(weights="DEFAULT", min_size=64, max_size=96), 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lr_scheduler = warmup_cosine(optimizer, 2, EPOCHS * len(loader))
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    done = resume(path, **parts)["epoch"] if path.exists() else 0
    for epoch in range(done + 1, EPOCHS + 1):
        train_one_epoch(model, optimizer, loader, torch.device("cpu"), lr_scheduler=lr_scheduler, progress=False)
        save_checkpoint(path, **parts, epoch=epoch)


def forked(data: str, path: Path, seconds: float | None = None) -> bool:
    """Train in a process of its own, killed after so many seconds; whether it was alive until then."""
    child = os.fork()
    if not child:
        train(data, path)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "training failed"
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    data, scratch, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    begun = time.perf_counter()
    forked(data, scratch / "whole.pt")
    whole = time.perf_counter() - begun
    rng, killed = random.Random(0), 0
    while killed < kills:  # five a run, none so late that all is done before the last
        killed += forked(data, scratch / f"killed{killed // 5}.pt", rng.uniform(0, whole / 4))
    expected = load_checkpoint(scratch / "whole.pt")["model"]
    for path in sorted(scratch.glob("killed*.pt")):
        forked(data, path)
        found = load_checkpoint(path)
        assert found["epoch"] == EPOCHS
        assert all(torch.equal(found["model"][key], value) for key, value in expected.items()), path
    print(f"killed {killed} times; weights identical")
