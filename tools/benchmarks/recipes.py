"""What helps AP: notebook 04's training at `laptop`, and the same with one thing changed, three seeds each.

    PENN_FUDAN_ROOT=/path/to/PennFudanPed python -m tools.benchmarks.recipes [--processes 2] [change ...]

Each run is measured as in ``time_to_ap.py``, with an evaluation after every epoch, and takes five to ten minutes. A row
of ``results/recipes.json`` is the mean of a change's seeds; a change that was measured before is replaced. The lines
"notebook 04" and "classic recipe" are of the runs in ``time_to_ap.json``. Lines with ``"older": true`` are of trainings
before this one, most with one seed, by a script that is not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tools.benchmarks import RESULTS, write_results
from tools.benchmarks.time_to_ap import PRESET, SEEDS, in_processes, ours, random_predictors
from tutorial_lib.models import replace_predictors


def mean_without_person(model: nn.Module, num_classes: int) -> nn.Module:
    """New predictors as for a class that the weights do not know: class 1 is left out of the mean."""
    heads = model.roi_heads
    layers = {
        heads.box_predictor.cls_score: 1,
        heads.box_predictor.bbox_pred: 4,
        heads.mask_predictor.mask_fcn_logits: 1,
    }
    for layer, rows in layers.items():
        for parameter in layer.parameters():
            background, _, *others = parameter.data.split(rows)
            parameter.data = torch.cat([background, *others])
    return replace_predictors(model, num_classes)


TIMED = {"classic": "classic recipe", "ours": "notebook 04"}
CHANGES = {
    "random predictors": partial(ours, new_predictors=random_predictors),
    "mean of the classes but person": partial(ours, new_predictors=mean_without_person),
    "batches of 4": partial(ours, preset=replace(PRESET, batch_size=4)),
}


def mean_row(change: str, rows: list[dict]) -> dict:
    """The mean over the seeds; validation AP is that of the last three epochs."""
    last = {"val_box_AP": 1, "val_mask_AP": 2}
    means = {key: statistics.mean(epoch[i] for row in rows for epoch in row["history"][-3:]) for key, i in last.items()}
    means |= {key: statistics.mean(row[key] for row in rows) for key in ("test_box_AP", "test_mask_AP")}
    row = {"change": change, "seeds": sorted(row["seed"] for row in rows), "epochs": rows[0]["epochs"]}
    row |= {key: round(value, 4) for key, value in means.items()}
    row["seconds"] = round(statistics.mean(row["history"][-1][0] for row in rows))
    return row | {key: rows[0][key] for key in ("device", "threads", "torch", "torchvision", "python", "date")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", default=list(CHANGES), help=f"of {', '.join(CHANGES)}; all unless named")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    timed = json.loads((RESULTS / "time_to_ap.json").read_text(encoding="utf-8"))["rows"]
    found = defaultdict(list)
    for row in timed:
        found[TIMED[row["recipe"]]].append(row)
    jobs = [(change, seed) for change in arguments.changes for seed in SEEDS]
    for change, run in in_processes(CHANGES, jobs, arguments.processes):
        found[change].append(run)
        print(change, run["seed"], run["test_box_AP"], run["test_mask_AP"], flush=True)
        results = json.loads((RESULTS / "recipes.json").read_text(encoding="utf-8"))
        new = [mean_row(change, runs) for change, runs in found.items() if len(runs) == len(SEEDS)]
        old = [row for row in results["rows"] if row["change"] not in {row["change"] for row in new}]
        write_results("recipes", results | {"rows": [*old, *new]})
