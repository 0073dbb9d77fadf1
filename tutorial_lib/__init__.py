"""Helpers for finetuning torchvision's detection and instance-segmentation models.

Modules, each small enough to copy into a project of your own:

- ``data``: boxes from masks, images from files, a seeded split, ``collate_fn``, batches of similar shapes
- ``penn_fudan``: the PennFudan dataset and its download
- ``coco``: a dataset class for any COCO file; ``convert``: VOC, YOLO, LabelMe, VIA and masks, to COCO and back
- ``transforms``: ``get_transform(train)``
- ``models``: replacing predictors; a backbone from any classification trunk
- ``engine``: ``train_one_epoch``, ``evaluate``, ``predict``, the schedule, device and precision
- ``checkpoint``: save, load and exact resume
- ``coco_eval``: predictions and targets to COCO box and mask AP, curves, matched pairs, intervals
- ``checks``: ``check_dataset``, which looks at every sample of your own data
- ``visualization``: images with targets or predictions, and training curves
- ``train``: notebook 04's run, or your own data's, as a script, for one process or, under PyTorch's launcher, several
- ``predict``: a folder of images, into COCO results, a table and pictures; ``export``: a detector as an ONNX file
- ``presets``: quick, laptop, full; ``info``: what a bug report needs

``offline`` holds what the notebooks need to run without a network, and ``results`` what they show as measured.
"""
