"""What grouping images by aspect ratio costs: notebook 04's finetuning with several `num_windows` of the batch sampler.

    python -m tools.benchmarks.windows [--processes 2]

At `quick`, on the synthetic sample, with 10 batches an epoch; at `laptop`, on PennFudan (PENN_FUDAN_ROOT), with 25, and
the 4 epochs of ``starter.py``. With as many windows as batches it is plain shuffling. Rows go to
``results/windows.json``; those that are there already are not measured again, so delete the file to measure all with
new code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from tools.benchmarks import RESULTS, write_results
from tools.benchmarks.starter import finetune
from tutorial_lib.presets import choose_preset

NUM_WINDOWS = {"quick": (10, 5, 1), "laptop": (25, 5)}
SEEDS = range(3)


def measured(name: str, seed: int, num_windows: int) -> dict:
    return {"num_windows": num_windows, **finetune(choose_preset(name), seed, "DEFAULT", num_windows)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, of one thread each if > 1")
    processes = parser.parse_args().processes
    path = RESULTS / "windows.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    known = {(row["preset"], row["seed"], row["num_windows"]) for row in rows}
    wanted = [(name, seed, number) for name, numbers in NUM_WINDOWS.items() for number in numbers for seed in SEEDS]
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
            rows.sort(key=lambda row: (row["preset"], -row["num_windows"], row["seed"]))
            write_results("windows", {"rows": rows})
