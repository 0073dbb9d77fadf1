"""One visible dial: quick, laptop or full."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision

import tutorial_lib.offline  # noqa: F401  (registers the mini models)
from tutorial_lib.engine import pick_device
from tutorial_lib.offline.sample import write_sample
from tutorial_lib.penn_fudan import PennFudanDataset, download_penn_fudan


@dataclass(frozen=True)
class Preset:
    """What one preset decides.

    ``split`` is the number of train, validation and test images. ``min_size`` and ``max_size`` are the model's, in
    pixels: of several ``min_size`` it takes a random one for each training image, and the last in evaluation.
    ``epochs`` is for finetuning (notebook 02), ``scratch_epochs`` for a backbone that is not trained as a
    detector yet (03), ``long_epochs`` for the full run (04).
    """

    name: str
    data: str
    split: tuple[int, int, int]
    faster_rcnn: str
    mask_rcnn: str
    weights: str
    trunk_weights: str | None
    min_size: tuple[int, ...]
    max_size: int
    batch_size: int
    learning_rate: float
    epochs: int
    scratch_epochs: int
    long_epochs: int


_MINI = {
    "faster_rcnn": "fasterrcnn_mini_fpn", "mask_rcnn": "maskrcnn_mini_fpn",
    "weights": "DEFAULT", "trunk_weights": None,
}  # fmt: skip

PRESETS = {
    "quick": Preset(
        "quick", "synthetic sample", split=(40, 8, 16), **_MINI, min_size=(192,), max_size=384,
        batch_size=4, learning_rate=5e-4, epochs=8, scratch_epochs=5, long_epochs=14,
    ),
    "laptop": Preset(
        "laptop", "PennFudan", split=(100, 20, 50), **_MINI, min_size=(208, 240, 272, 304, 320), max_size=560,
        batch_size=2, learning_rate=5e-4, epochs=8, scratch_epochs=6, long_epochs=10,
    ),
    "full": Preset(
        "full", "PennFudan", split=(100, 20, 50), faster_rcnn="fasterrcnn_resnet50_fpn",
        mask_rcnn="maskrcnn_resnet50_fpn", weights="DEFAULT", trunk_weights="DEFAULT",
        min_size=(800,), max_size=1333, batch_size=2, learning_rate=1e-4, epochs=5, scratch_epochs=10, long_epochs=10,
    ),
}  # fmt: skip


# What `full` becomes on a CPU. Notebook 04 then takes 21 minutes on two threads (results/full_cpu.json).
FULL_ON_CPU = {"min_size": (400,), "max_size": 640, "epochs": 3, "scratch_epochs": 6, "long_epochs": 3}


def choose_preset(name: str | None = None, device: torch.device | None = None) -> Preset:
    """The preset of that name; else of ``TUTORIAL_PRESET``; else full where CUDA is and quick where not.

    On a CPU, ``full`` has smaller images and fewer epochs.

    Args:
        device: :func:`tutorial_lib.engine.pick_device` unless given.

    Raises:
        ValueError: there is no preset of that name.
    """
    kind = (device or pick_device()).type
    name = name or os.environ.get("TUTORIAL_PRESET") or ("full" if kind == "cuda" else "quick")
    if name not in PRESETS:
        raise ValueError(f"TUTORIAL_PRESET is {name!r}; it can be {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return replace(preset, **FULL_ON_CPU) if name == "full" and kind == "cpu" else preset


def data_folder() -> Path:
    """Where datasets are kept: ``data`` beside the library in a clone of the project, else in PyTorch's cache.

    The cache is ``~/.cache/torch/tutorial_lib``, or ``tutorial_lib`` in ``TORCH_HOME`` or ``XDG_CACHE_HOME/torch``.
    """
    project = Path(__file__).parents[1]
    in_clone = (project / "notebooks").is_dir() and (project / "pyproject.toml").is_file()
    return project / "data" if in_clone else Path(torch.hub.get_dir()).parent / "tutorial_lib"


def prepare_data(preset: Preset, root: str | Path | None = None) -> Path:
    """The folder of the preset's dataset, made or downloaded if need be.

    PennFudan is taken from the folder ``PENN_FUDAN_ROOT`` where that is set.

    Args:
        root: the folder to put it in; :func:`data_folder` unless given.

    Raises:
        ValueError: the folder holds fewer images than the preset's split needs.
        RuntimeError: PennFudan cannot be downloaded, or there is something else in its place;
            the message says what to do.
    """
    root = data_folder() if root is None else Path(root)
    if preset.data != "PennFudan":
        return write_sample(root, num_images=sum(preset.split))
    if folder := os.environ.get("PENN_FUDAN_ROOT"):
        found = len(PennFudanDataset(folder))
        if found < sum(preset.split):
            raise ValueError(f"PENN_FUDAN_ROOT={folder} holds {found} images; {preset.name} needs {sum(preset.split)}")
        return Path(folder)
    try:
        return download_penn_fudan(root)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"PennFudan cannot be downloaded ({error}). Set PENN_FUDAN_ROOT to a folder that holds it, "
            "or TUTORIAL_PRESET=quick, which needs no download."
        ) from error


def fetch_weights(name: str, weights: str | None = "DEFAULT") -> None:
    """Put the weights of a torchvision model where its builder finds them, checking their hash.

    Args:
        name: of a registered model, as in ``torchvision.models.list_models()``.
        weights: the name of a member of its weights enum; None is nothing to fetch.

    Raises:
        RuntimeError: they cannot be fetched, or are not what the hash in their name says.
            The message says from where, and what to set.
    """
    if weights is None:
        return
    entry = torchvision.models.get_model_weights(name)[weights]
    if not entry.url.startswith("http"):  # a file of this package
        entry.get_state_dict()
        return
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    wanted = torch.hub.HASH_REGEX.search(path.name)
    try:
        # torch.hub checks what it downloads, not what it finds.
        if wanted and path.is_file() and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(wanted[1]):
            raise RuntimeError(f"{path} is not what the hash in its name says; delete it")
        entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"the weights {entry} of {name} cannot be fetched from {entry.url} ({error}). "
            f"With no network, put that file into {path.parent}, "
            "or set TUTORIAL_PRESET=quick or laptop, whose weights are in the package."
        ) from error


def provenance(preset: Preset, device: torch.device, weights: str | None = None) -> str:
    """One line that says what the numbers of a run were made with.

    Args:
        weights: what the models start from, where that is not the preset's detector weights.
    """
    if weights is None:
        weights = "starter weights" if "mini" in preset.mask_rcnn else "torchvision's COCO weights"
    where = f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    return (
        f"preset {preset.name} | data {preset.data}, {' + '.join(map(str, preset.split))} images | {weights} | "
        f"{where} | torch {torch.__version__}, torchvision {torchvision.__version__}"
    )
