"""Helpers for finetuning torchvision's detection and instance-segmentation models.

Modules, each small enough to copy into a project of your own:

- ``penn_fudan``: the PennFudan data set, its download, a seeded split, batches of similar shapes, ``collate_fn``
- ``sample``: draws pedestrians in PennFudan's folder layout, for work without a network
- ``transforms``: ``get_transform(train)``
- ``models``: the mini models and their weights; replacing predictors
- ``engine``: ``train_one_epoch``, ``evaluate``, ``predict``, checkpoints, exact resume
- ``coco_eval``: predictions and targets to COCO box and mask AP, curves, matched pairs, intervals
- ``checks``: ``check_dataset``, which looks at every sample of your own data
- ``visualization``: images with targets or predictions, and training curves
- ``presets``: quick, laptop, full
- ``train``: the full run as a script, for one process or, under PyTorch's launcher, several
"""

import os

# PyTorch reads this at its first tensor: large ones in pages of 2 MB, where Linux has them (notebook 07).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
