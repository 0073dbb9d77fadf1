"""What grouping images by aspect ratio costs: notebook 04's finetuning with several windows of the batch sampler.

    python -m tests.benchmarks.windows [--processes 2]

At `quick`, on the drawn sample, all epochs; at `laptop`, on PennFudan (PENN_FUDAN_ROOT), the 4 epochs of ``starter.py``.
Rows go to ``results/windows.json``; those that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from tests.benchmarks import RESULTS, write_results
from tests.benchmarks.starter import finetune
from tutorial_lib.presets import choose_preset

WINDOWS = {"quick": (1, 2, 4, 10), "laptop": (1, 5)}
SEEDS = range(3)


def measured(name: str, seed: int, window: int) -> dict:
    return {"window": window, **finetune(choose_preset(name), seed, "DEFAULT", window)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, of one thread each if > 1")
    processes = parser.parse_args().processes
    path = RESULTS / "windows.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    known = {(row["preset"], row["seed"], row["window"]) for row in rows}
    wanted = [(name, seed, window) for name, windows in WINDOWS.items() for window in windows for seed in SEEDS]
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1 if processes > 1 else torch.get_num_threads(),),
    )
    with pool:
        for done in as_completed([pool.submit(measured, *job) for job in wanted if job not in known]):
            rows.append(done.result())
            print(rows[-1], flush=True)
            rows.sort(key=lambda row: (row["preset"], row["window"], row["seed"]))
            write_results("windows", {"rows": rows})
