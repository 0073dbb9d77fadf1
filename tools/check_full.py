"""Load the real weights of the full preset, and let them detect the people on five photographs.

    python -m tools.check_full

It takes a few minutes on a CPU. A workflow does so before it runs notebooks at full.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model

from tutorial_lib.data import collate_fn
from tutorial_lib.engine import evaluate, pick_device
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.presets import Preset, choose_preset, fetch_weights, prepare_data
from tutorial_lib.transforms import get_transform


def check(preset: Preset, device: torch.device) -> None:
    """Print the APs of both detectors before any training.

    Raises:
        RuntimeError: as ``fetch_weights`` and ``prepare_data``.
        ValueError: a detector has a box AP50 of 0.5 or less, so its weights are not what they should be.
    """
    fetch_weights("mobilenet_v2", preset.trunk_weights)
    dataset = Subset(PennFudanDataset(prepare_data(preset), get_transform(train=False)), range(5))
    for name in (preset.faster_rcnn, preset.mask_rcnn):
        fetch_weights(name, preset.weights)
        model = get_model(name, weights=preset.weights, min_size=preset.min_size, max_size=preset.max_size).to(device)
        results = evaluate(model, DataLoader(dataset, collate_fn=collate_fn), device, progress=False)
        print(f"{name}, before training: {results}", flush=True)
        if not (results.box.AP50 or 0) > 0.5:
            raise ValueError(f"{name} with the weights {preset.weights} should detect people: box AP50 over 0.5")


if __name__ == "__main__":
    device = pick_device()
    check(choose_preset("full", device), device)
