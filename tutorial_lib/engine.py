"""Training, evaluating and asking torchvision's detection models; device and precision.

Notebook 02 builds ``train_one_epoch`` step by step, and notebook 04 uses the rest.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.ops import FrozenBatchNorm2d
from tqdm import tqdm

from tutorial_lib.coco_eval import CocoResults, coco_metrics, compare
from tutorial_lib.models import mode_kept

_BFLOAT16 = ("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.mask_head", "roi_heads.mask_predictor")


def pick_device() -> torch.device:
    """The device that ``TUTORIAL_DEVICE`` names, else CUDA where there is a GPU, else Apple's MPS, else the CPU.

    Raises:
        ValueError: ``TUTORIAL_DEVICE`` is none of the three, or that device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = os.environ.get("TUTORIAL_DEVICE") or next(name for name, there in available.items() if there)
    if not available.get(name):
        there = ", ".join(filter(available.get, available))
        raise ValueError(f"TUTORIAL_DEVICE is {name!r}; on this machine it can be {there}")
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device computes faster in bfloat16: CUDA since Ampere, or a CPU with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def use_bfloat16(model: nn.Module, device: torch.device) -> bool:
    """Mixed precision, in place: where the device is faster in bfloat16, the layers with most arithmetic compute in it.

    These are the backbone and the heads of RPN, boxes and masks. What they give is float32 again, and all that
    is computed with boxes stays so: bfloat16 has 8 significant bits, so beyond 512 pixels a coordinate could only
    be a multiple of 4.

    Args:
        model: one of torchvision's detectors, its predictors already replaced, and not yet wrapped for several
            processes. Parts that it lacks are passed over.
        device: nothing is changed where :func:`has_fast_bfloat16` says no.

    Returns:
        Whether anything was changed.

    Source: notebook 04.
    """
    modules = [module for name, module in model.named_modules() if name in _BFLOAT16] * has_fast_bfloat16(device)
    for module in modules:
        module.forward = partial(_forward_in_bfloat16, module)  # a copy of the module gets its own
        for norm in (each for each in module.modules() if isinstance(each, FrozenBatchNorm2d)):
            norm.forward = partial(_frozen_norm, norm)
    return bool(modules)


def _frozen_norm(norm: FrozenBatchNorm2d, x: Tensor) -> Tensor:  # its own arithmetic would make x float32 again
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _forward_in_bfloat16(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    with torch.autocast(next(module.parameters()).device.type, dtype=torch.bfloat16):
        outputs = type(module).forward(module, *inputs, **named)
    return tree_map(lambda value: value.float() if isinstance(value, Tensor) else value, outputs)


def to_device(images: Iterable[Tensor], targets: Iterable[dict], device: torch.device) -> tuple[list, list]:
    """Images and the tensors of targets on the device; what is no tensor (``image_id``) stays as it is."""
    to = partial(Tensor.to, device=device, non_blocking=device.type == "cuda")  # MPS would copy from freed memory
    images = [to(image) for image in images]
    targets = [{k: to(v) if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
    return images, targets


def check_targets(model: nn.Module, targets: Iterable[dict]) -> None:
    """Refuse what torchvision's detectors would train on wrongly, or stop at without naming the image.

    Raises:
        ValueError: a target lacks ``boxes`` or ``labels``, or ``masks`` where the model has a mask predictor; the
            message names its ``image_id``. Or box and mask predictor have different numbers of classes.
    """
    layers = ("box_predictor.cls_score.bias", "mask_predictor.mask_fcn_logits.bias")
    classes = [len(bias) for name, bias in model.named_parameters() if name.endswith(layers)]
    if len(set(classes)) > 1:
        raise ValueError(f"box and mask predictors have {classes} classes: replace_predictors gives both one number")
    needed = {"boxes", "labels", "masks"} if len(classes) == 2 else {"boxes", "labels"}
    for target in targets:
        if missing := needed - target.keys():
            lacks = f"the target with image_id {target.get('image_id')} lacks {', '.join(sorted(missing))}"
            raise ValueError(f"{lacks}; without objects, boxes are [0, 4], labels [0] and masks [0, H, W]")


def why_not_finite(model: nn.Module, losses: dict[str, Tensor]) -> str:
    """After a backward pass: what is not finite, the weights, the loss or the gradient, and what to do."""
    values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        return f"the weights are already not finite ({bad[0]}), whatever the images: go on from an earlier checkpoint"
    if not all(value.isfinite() for value in losses.values()):
        return f"the loss is not finite ({values}): see check_dataset on pixels and boxes, then lower the learning rate"
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the loss is finite, the gradient of {bad[:2]} is not: try this step on a CPU; see all processes' images"


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader,
    device: torch.device,
    *,
    lr_scheduler: LRScheduler | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train for one pass over the loader.

    The device is asked for one number a step, whether the loss and the norm of its gradient are finite; the losses
    stay on it until the end.

    Args:
        model: maps (images, targets) to a dict of losses in training mode, as
            torchvision's detection models do.
        data_loader: gives (images, targets); see :func:`tutorial_lib.data.collate_fn`.
        lr_scheduler: stepped after every batch.
        progress: show a bar.

    Returns:
        The mean of every loss, and of their sum under ``"loss"``.

    Raises:
        FloatingPointError: the weights, the loss or its gradient are not finite. The message says which, and
            names the images. The parameters are those of before the step; BatchNorm's running statistics have
            seen the batch, so go on from a checkpoint.
        ValueError: the loader gives no batches, or :func:`check_targets` refuses one.
        torch.OutOfMemoryError: from PyTorch. Lower the batch size first, then ``min_size`` and
            ``max_size``. The number of objects counts too: each is compared with every anchor, and its mask has
            one byte a pixel, so leave out or crop images of many hundreds. In a notebook, restart the kernel
            (notebook 07).

    Source: notebook 02.
    """
    model.train()
    history = []
    for images, targets in tqdm(data_loader, file=sys.stdout, leave=False, disable=not progress):
        images, targets = to_device(images, targets, device)
        check_targets(model, targets)
        losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(loss + norm):
            where = f"step {len(history) + 1}, images with image_id {[target.get('image_id') for target in targets]}"
            raise FloatingPointError(f"{where}: {why_not_finite(model, losses)}")
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
        history.append(torch.stack([loss, *losses.values()]).detach())
    if not history:
        raise ValueError("data_loader gives no batches: it is empty, or drop_last leaves nothing of it")
    means = torch.stack(history).mean(dim=0).tolist()
    return dict(zip(["loss", *losses], means, strict=True))


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed the CPU's generator and the device's with 0, and set both back afterwards; no other is touched."""
    of_device = {"cuda": [torch.cuda], "mps": [torch.mps]}.get(device.type, [])
    states = [module.get_rng_state() for module in (torch, *of_device)]
    for module in (torch.default_generator, *of_device):  # torch.manual_seed would seed all devices
        module.manual_seed(0)
    try:
        yield
    finally:
        for module, state in zip((torch, *of_device), states, strict=True):
            module.set_rng_state(state)


@torch.no_grad()
def validation_loss(model: nn.Module, data_loader: DataLoader, device: torch.device) -> float:
    """The mean training loss of the images of the loader, which are not trained on.

    torchvision's models give the mean loss of a batch; a batch counts as often as it has
    images. They give losses in training mode only, so that is the mode used, with
    BatchNorm kept as in evaluation. The loss is of proposals that are sampled at random:
    the generators of the CPU and of the device are seeded, and set back afterwards.

    Raises:
        ValueError: the loader gives no images.
    """
    total = num_images = 0
    with mode_kept(model), _seeded(device):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for images, targets in data_loader:
            total += len(images) * sum(model(*to_device(images, targets, device)).values()).item()
            num_images += len(images)
    if not num_images:
        raise ValueError("the loader gives no images to take a validation loss of")
    return total / num_images


@torch.inference_mode()
def evaluate(model: nn.Module, data_loader: DataLoader, device: torch.device, *, progress: bool = True) -> CocoResults:
    """COCO box and mask AP on the images of the loader, each of which is read once.

    Only IoUs are kept of an image: with 100 detections about 0.1 MB (``results/growth.json``).

    Evaluate in a fixed order: torchvision's models pad the images of a batch to one size, and the padding changes
    their predictions a little. The APs of one model in two orders can differ, unless the batch size is 1.

    Args:
        model: any module that maps a list of images to a list of dicts with ``boxes``,
            ``labels``, ``scores`` and, for mask AP, ``masks``. It is left in the mode it was in.
        data_loader: gives (images, targets), not shuffled. Where it has a
            ``DistributedSampler``, every process has a part of the dataset and has to call this; each then
            gets the results of all images, in the dataset's order. An image that the sampler has repeated
            to make the parts equal counts once. A batch sampler of several processes is refused.

    Raises:
        ValueError: the loader gives no images, or a target or prediction whose parts do
            not fit each other; the message names the image. Or no process was given an image.

    Source: notebook 02 uses it, notebook 06 builds it; https://cocodataset.org/#detection-eval
    """
    batch_sampler = getattr(data_loader, "batch_sampler", None)
    if getattr(batch_sampler, "num_replicas", 1) > 1:
        raise ValueError("data_loader has a batch_sampler that leaves images to other processes; evaluation needs all")
    compared = []
    with mode_kept(model):
        model.eval()
        for images, targets in tqdm(data_loader, file=sys.stdout, leave=False, disable=not progress):
            predictions = model([image.to(device) for image in images])
            for image, target, prediction in zip(images, targets, predictions, strict=True):
                try:
                    compared.append(compare(prediction, target, tuple(image.shape[-2:])))
                except ValueError as error:
                    which = f"image {len(compared)} of the loader, image_id {target.get('image_id')}"
                    raise ValueError(f"{which}: {error}") from error
    sampler = getattr(batch_sampler, "sampler", None) or getattr(data_loader, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, list(zip(sampler, compared, strict=False)))
        by_index = {index: image for part in reversed(parts) for index, image in part}
        if missing := set(range(len(sampler.dataset))) - by_index.keys():
            lost = f"{len(missing)} of {len(sampler.dataset)} images, the first with index {min(missing)}"
            need = "DistributedSampler and DataLoader need drop_last=False, and each process its own rank"
            raise ValueError(f"{lost}, were given to no process: {need}")
        compared = [by_index[index] for index in range(len(sampler.dataset))]
    return coco_metrics(compared)


@torch.no_grad()
def predict(
    model: nn.Module, images: Sequence[Tensor], device: torch.device, score_threshold: float = 0.5
) -> list[dict[str, Tensor]]:
    """Detections with at least the given score, on the CPU.

    torchvision's models get the threshold as their own ``score_thresh`` meanwhile, so that the mask branch has no work
    with the others.

    Args:
        images: float32 [3, H, W] in [0, 1], of any sizes.

    Returns:
        For every image ``boxes`` float32 [N, 4] XYXY in its own pixels, ``labels`` int64
        [N], ``scores`` float32 [N], highest first, and from Mask R-CNN ``masks`` float32
        [N, 1, H, W] in [0, 1].
    """
    roi_heads = getattr(model, "roi_heads", None)
    own_threshold = getattr(roi_heads, "score_thresh", None)
    with mode_kept(model):
        model.eval()
        try:
            if own_threshold is not None:  # scores have to exceed it
                roi_heads.score_thresh = max(own_threshold, score_threshold - 1e-6)
            predictions = model([image.to(device) for image in images])
        finally:
            if own_threshold is not None:
                roi_heads.score_thresh = own_threshold
    kept = [{key: v[found["scores"] >= score_threshold].cpu() for key, v in found.items()} for found in predictions]
    return [{key: v.float() if v.is_floating_point() else v for key, v in found.items()} for found in kept]


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A learning rate that rises linearly for ``warmup_steps``, then falls to 0 along a cosine.

    Step it after every batch. Source: notebook 02; the cosine is of arXiv 1608.03983.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return LambdaLR(optimizer, factor)
