"""Load the real weights of the full preset, and let them detect the people on five photographs.

    python -m tools.check_full

Once a week a workflow does.
"""

from __future__ import annotations

from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model

from tutorial_lib.data import collate_fn
from tutorial_lib.engine import evaluate, pick_device
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.presets import choose_preset, fetch_weights, prepare_data
from tutorial_lib.transforms import get_transform

if __name__ == "__main__":
    preset, device = choose_preset("full"), pick_device()
    fetch_weights("mobilenet_v2", preset.trunk_weights)
    dataset = Subset(PennFudanDataset(prepare_data(preset), get_transform(train=False)), range(5))
    for name in (preset.faster_rcnn, preset.mask_rcnn):
        fetch_weights(name, preset.weights)
        model = get_model(name, weights=preset.weights, min_size=preset.min_size, max_size=preset.max_size).to(device)
        results = evaluate(model, DataLoader(dataset, collate_fn=collate_fn), device)
        print(f"{name}, zero-shot: {results}")
        assert results.box.AP50 > 0.5, f"{name} with its COCO weights should find people"
