"""How long `full` takes without a GPU: the steps of notebook 04, timed on a few photographs.

    PENN_FUDAN_ROOT=/path/to/PennFudanPed python -m tools.benchmarks.full_cpu [--images N]

The model is torchvision's Mask R-CNN with a ResNet-50, at the sizes of ``presets.FULL_ON_CPU``, in float32 and, where
the processor is faster in it, with ``use_bfloat16``. AP is not measured, since the weights are random. They have the
names and shapes of COCO's, and a server of this process hands them out: ``fetch_weights`` and
``get_model(weights="DEFAULT")`` do what they do with torchvision's, so BatchNorm is frozen and three stages of the
ResNet are trained.

Every row of ``results/full_cpu.json`` has the seconds of an image, and the minutes of notebook 04 that follow from
them: of each epoch the training, the validation loss and the evaluation of the validation images, and afterwards two
more evaluations of the validation images and three of the test images. Images are in memory. Random weights give 100
detections an image, which is more than trained ones do, so evaluation is measured at its slowest. Rows of other numbers
of threads are kept. With ``--images`` nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import torch
from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import MaskRCNN

from tools.benchmarks import RESULTS, provenance, write_results
from tutorial_lib.data import collate_fn, split_dataset
from tutorial_lib.engine import evaluate, has_fast_bfloat16, train_one_epoch, use_bfloat16, validation_loss
from tutorial_lib.models import replace_predictors
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.presets import FULL_ON_CPU, PRESETS, Preset, fetch_weights, prepare_data
from tutorial_lib.transforms import get_transform

CPU = torch.device("cpu")
NUM_IMAGES = 24
WHAT = "seconds and minutes of notebook 04 at full on a CPU; AP is not measured, since the weights are random"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server that hands out a folder's files, to this machine only."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def random_weights(name: str) -> dict[str, torch.Tensor]:
    """Of a detector with a ResNet. The last BatchNorm of each block is 0: features do not grow from block to block."""
    torch.manual_seed(0)
    state = get_model(name, weights=None, weights_backbone=None).state_dict()
    return {key: value.zero_() if key.endswith("bn3.weight") else value for key, value in state.items()}


def pretrained(preset: Preset) -> MaskRCNN:
    """The preset's Mask R-CNN as it comes with COCO's weights, but from random ones."""
    name = preset.mask_rcnn
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        file = Path(scratch) / "weights.pth"
        torch.save(random_weights(name), file)
        file = file.rename(file.with_name(f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"))
        environment = {"TORCH_HOME": f"{scratch}/torch", "no_proxy": "*", "NO_PROXY": "*"}
        stack.enter_context(mock.patch.dict(os.environ, environment))
        address = stack.enter_context(served(Path(scratch)))
        weights = get_model_weights(name)[preset.weights].value
        stack.enter_context(mock.patch.object(weights, "url", f"{address}/{file.name}"))
        fetch_weights(name, preset.weights)
        return get_model(name, weights=preset.weights, min_size=preset.min_size, max_size=preset.max_size)


def minutes(preset: Preset, training: float, loss: float, evaluation: float) -> float:
    """Of notebook 04, from the seconds of an image."""
    num_train, num_val, num_test = preset.split
    epoch = num_train * training + num_val * (loss + evaluation)
    return (preset.long_epochs * epoch + (3 * num_test + 2 * num_val) * evaluation) / 60


def batches_of(preset: Preset, part: int, num_images: int, train: bool) -> list[tuple]:
    """The first images of a part of the split, decoded."""
    dataset = PennFudanDataset(prepare_data(preset), get_transform(train))
    images = Subset(split_dataset(dataset, preset.split, seed=0, block=10)[part], range(num_images))
    return list(DataLoader(images, preset.batch_size, collate_fn=collate_fn))


def in_turn(works: dict[str, Callable], batches: list[tuple]) -> dict[str, float]:
    """Mean seconds of an image. The works take every batch in turn, so that a busy machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for batch in [batches[0], *batches]:  # the first is a warm-up
        for name, work in works.items():
            begun = time.perf_counter()
            work([batch])
            seconds[name].append((time.perf_counter() - begun) / len(batch[0]))
    return {name: statistics.mean(values[1:]) for name, values in seconds.items()}


def measure(preset: Preset, num_images: int) -> list[dict]:
    """A row for each precision."""
    models, optimizers = {}, {}
    for precision in ["float32", "bfloat16"] if has_fast_bfloat16(CPU) else ["float32"]:
        torch.manual_seed(0)
        models[precision] = model = replace_predictors(pretrained(preset), 2)
        if precision == "bfloat16":
            use_bfloat16(model, CPU)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers[precision] = torch.optim.AdamW(parameters, lr=preset.learning_rate, fused=True)

    def train(name: str, loader: list) -> None:
        train_one_epoch(models[name], optimizers[name], loader, CPU, progress=False)

    plain, augmented = batches_of(preset, 2, num_images, False), batches_of(preset, 0, num_images, True)
    quiet = partial(evaluate, device=CPU, progress=False)
    found = {name: quiet(model, plain).images for name, model in models.items()}
    evaluation = in_turn({name: partial(quiet, model) for name, model in models.items()}, plain)
    loss = in_turn({name: partial(validation_loss, model, device=CPU) for name, model in models.items()}, plain)
    training = in_turn({name: partial(train, name) for name in models}, augmented)
    return [
        {
            "precision": name, "model": preset.mask_rcnn, "min_size": preset.min_size, "max_size": preset.max_size,
            "batch_size": preset.batch_size, "split": preset.split, "epochs": preset.long_epochs,
            "images_timed": num_images, "detections_per_image": statistics.mean(len(i.scores) for i in found[name]),
            "training_seconds_per_image": training[name], "validation_loss_seconds_per_image": loss[name],
            "evaluation_seconds_per_image": evaluation[name],
            "notebook_04_minutes": round(minutes(preset, training[name], loss[name], evaluation[name]), 1),
            "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1", **provenance(CPU),
        }
        for name in models
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help=f"to train and to test on, to try it; else {NUM_IMAGES}")
    number = parser.parse_args().images
    rows = measure(replace(PRESETS["full"], **FULL_ON_CPU), number or NUM_IMAGES)
    print(json.dumps(rows, indent=1))
    if number is None:
        path = RESULTS / "full_cpu.json"
        others = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        rows += [row for row in others if row["threads"] != torch.get_num_threads()]
        write_results("full_cpu", {"what": WHAT, "rows": sorted(rows, key=lambda row: row["threads"])})
