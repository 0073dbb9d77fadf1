"""Training and evaluating torchvision's detection models.

Notebook 02 builds ``train_one_epoch`` step by step, notebook 04 the rest.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from tqdm import tqdm

from tutorial_lib.coco_eval import CocoResults, coco_metrics, compare

_BFLOAT16 = ("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.mask_head", "roi_heads.mask_predictor")


def pick_device() -> torch.device:
    """CUDA where there is a card, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_num_threads(work: Callable[[], Any], repeats: int = 3) -> dict[int, float]:
    """Set PyTorch's number of threads on the CPU to the fastest for this work, by trying.

    More are not always faster: beside another program that computes, threads wait for each other at every layer.

    Args:
        work: what is to be fast, such as one training step. It is called ``repeats + 1`` times for each of
            1, 2, 4 … threads, up to the number that is set now; the first call does not count.

    Returns:
        The mean seconds of the work by number of threads; the fastest number is set.

    Source: notebook 07.
    """
    most = torch.get_num_threads()
    numbers = sorted({1, most} | {2**k for k in range(most.bit_length()) if 2**k <= most})
    seconds = {}
    try:
        for number in numbers:
            torch.set_num_threads(number)
            work()
            seconds[number] = timeit(work, number=repeats) / repeats
    except BaseException:
        torch.set_num_threads(most)
        raise
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))
    return seconds


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
        compute_in_bfloat16(module)
    return bool(modules)


def compute_in_bfloat16(module: nn.Module) -> None:
    """Put a module's forward under bfloat16 autocast, in place; the tensors that it gives are float32 again."""
    module.forward = partial(_forward_in_bfloat16, module)  # a copy of the module gets its own


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

    The device is asked for one number a step, whether the loss is finite; the losses stay on it until the end.

    Args:
        model: maps (images, targets) to a dict of losses in training mode, as
            torchvision's detection models do.
        data_loader: gives (images, targets); see :func:`tutorial_lib.penn_fudan.collate_fn`.
        lr_scheduler: stepped after every batch.
        progress: show a bar.

    Returns:
        The mean of every loss, and of their sum under ``"loss"``.

    Raises:
        FloatingPointError: the loss is not finite. The message names the images. The
            parameters are those of before the step; BatchNorm's running statistics have
            seen the batch, so go on from a checkpoint.
        ValueError: the loader gives no batches.

    Source: notebook 02.
    """
    model.train()
    history = []
    for images, targets in tqdm(data_loader, file=sys.stdout, leave=False, disable=not progress):
        with memory_advice(device):
            images, targets = to_device(images, targets, device)
            losses = model(images, targets)
            loss = sum(losses.values())
            if not torch.isfinite(loss):
                raise_non_finite(losses, targets, step=len(history) + 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
        history.append(torch.stack([loss, *losses.values()]).detach())
    if not history:
        raise ValueError("data_loader gives no batches: it is empty, or drop_last leaves nothing of it")
    means = torch.stack(history).mean(dim=0).tolist()
    return dict(zip(["loss", *losses], means, strict=True))


def raise_non_finite(losses: dict[str, Tensor], targets: Sequence[dict], step: int) -> None:
    """Raise the FloatingPointError that names the losses, the step of the epoch and the images of the batch."""
    values = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
    raise FloatingPointError(
        f"the loss is not finite at step {step} ({values}) on the images with image_id "
        f"{[target.get('image_id') for target in targets]}. Look at their pixels and boxes first "
        "(tutorial_lib.checks.check_dataset does); then lower the learning rate, or lengthen the warm-up."
    )


@contextlib.contextmanager
def memory_advice(device: torch.device) -> Iterator[None]:
    """Add to an out-of-memory error of the device what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(
            f"{device} has not enough memory for this step: lower batch_size first, then min_size and max_size. In a "
            "notebook, restart the kernel, since what this run has taken is not given back while the error is shown."
        )
        raise


@contextlib.contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into the training or evaluation mode it is in now."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def validation_loss(model: nn.Module, data_loader: DataLoader, device: torch.device) -> float:
    """The mean training loss on images that are not trained on.

    The models give losses in training mode only, so that is the mode used, with
    BatchNorm kept as in evaluation. The loss still draws random proposals: the
    generator is seeded, and set back afterwards.

    Raises:
        ValueError: the loader gives no images.
    """
    losses = []
    devices = [] if device.type == "cpu" else [device]
    with mode_kept(model), torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        torch.manual_seed(0)
        for images, targets in data_loader:
            losses.append(sum(model(*to_device(images, targets, device)).values()).item())
    if not losses:
        raise ValueError("the loader gives no images to take a validation loss of")
    return sum(losses) / len(losses)


@contextlib.contextmanager
def _masks_unpasted(model: nn.Module) -> Iterator[None]:
    """Have torchvision's Mask R-CNN give its 28 × 28 masks as ``roi_masks``: pasting them takes long on a CPU."""
    transform = getattr(model, "transform", None)
    if type(model).forward is not GeneralizedRCNN.forward or type(transform) is not GeneralizedRCNNTransform:
        yield
        return
    postprocess = transform.postprocess

    def boxes_only(predictions: list[dict], image_shapes: list, original_sizes: list) -> list[dict]:
        masks = [prediction.pop("masks", None) for prediction in predictions]
        predictions = postprocess(predictions, image_shapes, original_sizes)
        for prediction, of_image in zip(predictions, masks, strict=True):
            if of_image is not None:
                prediction["roi_masks"] = of_image
        return predictions

    transform.postprocess = boxes_only
    try:
        yield
    finally:
        del transform.postprocess


@torch.inference_mode()
def evaluate(model: nn.Module, data_loader: DataLoader, device: torch.device, *, progress: bool = True) -> CocoResults:
    """COCO box and mask AP on the images of the loader, each of which is read once.

    Only IoUs are kept of an image, so memory hardly grows with their number.

    Args:
        model: any module that maps a list of images to a list of dicts with ``boxes``,
            ``labels``, ``scores`` and, for mask AP, ``masks``. It is left in the mode it was in.
        data_loader: gives (images, targets); shuffling does not matter. Where it has a
            ``DistributedSampler``, every process has a part of the data set and has to call this; each then
            gets the results of all images, in the data set's order. An image that the sampler has repeated
            to make the parts equal counts once. A batch sampler of several processes is refused.

    Raises:
        ValueError: the loader gives no images, or a target or prediction whose parts do
            not fit each other; the message names the image. Or no process was given an image.

    Source: notebook 02 uses it, notebook 05 builds it; https://cocodataset.org/#detection-eval
    """
    batch_sampler = getattr(data_loader, "batch_sampler", None)
    if getattr(batch_sampler, "num_replicas", 1) > 1:
        raise ValueError("data_loader has a batch_sampler that leaves images to other processes; evaluation needs all")
    compared = []
    with mode_kept(model), _masks_unpasted(model):
        model.eval()
        for images, targets in tqdm(data_loader, file=sys.stdout, leave=False, disable=not progress):
            predictions = model([image.to(device) for image in images])
            for image, target, prediction in zip(images, targets, predictions, strict=True):
                try:
                    compared.append(compare(prediction, target, tuple(image.shape[-2:])))
                except ValueError as error:
                    where = f"image {len(compared)} of the loader, image_id {target.get('image_id')}"
                    raise ValueError(f"{where}: {error}") from error
    sampler = getattr(batch_sampler, "sampler", None) or getattr(data_loader, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, list(zip(sampler, compared, strict=False)))
        by_index = {index: image for part in reversed(parts) for index, image in part}
        if missing := set(range(len(sampler.dataset))) - by_index.keys():
            raise ValueError(
                f"{len(missing)} of the {len(sampler.dataset)} images, the first with index {min(missing)}, were given "
                "to no process: DistributedSampler and DataLoader need drop_last=False, and each process its own rank"
            )
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
    kept = []
    for prediction in predictions:
        keep = prediction["scores"] >= score_threshold
        kept.append({name: value[keep].cpu() for name, value in prediction.items()})
    return kept


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """A learning rate that rises linearly for ``warmup_steps``, then falls to 0 along a cosine.

    Step it after every batch. Source: notebook 04; the cosine is of arXiv 1608.03983.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return LambdaLR(optimizer, factor)


def save_checkpoint(path: str | Path, **state: Any) -> None:
    """Write a checkpoint, all or nothing: to a temporary name first, moved over ``path`` when whole.

    Args:
        state: what to keep, by name: what has a ``state_dict`` (model, optimizer, lr_scheduler,
            scaler), numbers, strings, lists, dicts. The states of the random generators of
            torch, CUDA, NumPy and Python are added under ``"random"``.

    Raises:
        OSError: it cannot be written, as on a full disk. What was at ``path`` is still there.
        TypeError: it holds something that :func:`load_checkpoint` would refuse, such as a whole model inside
            a dict, or a NumPy number; or a part is called ``random``. What was at ``path`` is still there.

    Source: notebook 04.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "random" in state:
        raise TypeError("a checkpoint keeps the random generators under the name random; give that part another one")
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
    name, keys, *rest = np.random.get_state()
    state["random"] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if refused := get_unsafe_globals_in_checkpoint(temporary):
            raise TypeError(f"{path} could not be loaded again: it would hold {', '.join(sorted(refused))}")
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        kept = "the checkpoint that was there is kept" if path.exists() else "nothing is left of it"
        raise OSError(f"{path} cannot be written ({error}); {kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, on the CPU, with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a checkpoint; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


def resume(path: str | Path, **parts: Any) -> dict[str, Any]:
    """Put a checkpoint back where it came from, so that training goes on as if it had never stopped.

    On a CPU with the same number of threads the weights at the end are the same to the last
    bit, if the checkpoint was written between two epochs.

    Args:
        path: of :func:`save_checkpoint`.
        parts: model, optimizer, lr_scheduler, … by the names that they were saved under.

    Returns:
        What else it holds: the epoch, the preset, ….

    Raises:
        FileNotFoundError, ValueError: as :func:`load_checkpoint`; or the checkpoint lacks a part, or is
            of another model. The message names the file and the first difference. All parts are
            as they were then.

    Source: notebook 04.
    """
    checkpoint = load_checkpoint(path)
    if missing := [name for name in (*parts, "random") if name not in checkpoint]:
        raise ValueError(f"{path} does not hold {', '.join(missing)}; it holds {', '.join(checkpoint)}")
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    for name, module in modules.items():
        theirs = {key: tuple(value.shape) for key, value in checkpoint[name].items()}
        ours = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        if differing := [key for key in ours | theirs if ours.get(key) != theirs.get(key)]:
            key = differing[0]
            raise ValueError(
                f"{path} is of another {name}: {len(differing)} entries differ. The first, {key}, is "
                f"{theirs.get(key, 'missing')} in the file and {ours.get(key, 'missing')} in the {name}"
            )
    others = {name: part for name, part in parts.items() if name not in modules}  # these can still fail
    before = {name: copy.deepcopy(part.state_dict()) for name, part in others.items()}
    try:
        for name, part in (others | modules).items():
            part.load_state_dict(checkpoint.pop(name))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        for other, state in before.items():
            parts[other].load_state_dict(state)
        raise ValueError(f"{path} does not fit the {name}: {error}") from error
    states = checkpoint.pop("random")
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    return checkpoint
