"""Training and evaluation on a device that is not the CPU, pretended where there is none.

Its tensors say that they are on ``meta``, and hold their values on the CPU. An operation on tensors of both devices
is an error, as on a GPU, and what a GPU would have to be waited for is counted.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Subset
from torchvision.ops import MultiScaleRoIAlign

from tutorial_lib.data import collate_fn
from tutorial_lib.engine import evaluate, has_fast_bfloat16, predict, to_device, train_one_epoch, validation_loss
from tutorial_lib.offline.mini_models import maskrcnn_mini_fpn
from tutorial_lib.penn_fudan import PennFudanDataset
from tutorial_lib.transforms import get_transform

CPU, GPU = torch.device("cpu"), torch.device("meta")
NUMBER, COPY = "_local_scalar_dense", "_to_copy"  # one number read, as by .item(); a tensor copied to the CPU
WAITS = (NUMBER, "nonzero", "nms", "equal", "masked_select", "_unique2")


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, value: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=GPU
        )

    def __init__(self, value: torch.Tensor):
        self.value = value

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of PretendedGPU")


class PretendedGPU(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits: Counter = Counter()
        self.bytes_copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, OnGPU)]
        on_gpu = len(others) < len(tensors)
        if on_gpu and name != "copy_":
            assert not any(tensor.dim() for tensor in others), f"{func} has tensors of two devices"
        device = torch.device(kwargs.get("device") or (GPU if on_gpu else CPU))
        chosen = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        waits = name in WAITS or chosen or device == CPU or (name == "copy_" and bool(others))
        self.waits["nonzero" if chosen else name] += on_gpu and waits
        self.bytes_copied += sum(tensor.nbytes for tensor in tensors) * (on_gpu and name == COPY and device == CPU)
        if "device" in kwargs:
            kwargs["device"] = CPU
        result = func(*tree_map(value_of, args), **tree_map(value_of, kwargs))
        if name.endswith("_"):  # in place
            return args[0]
        return tree_map(on_gpu_too, result) if device == GPU else result


def value_of(thing):
    return thing.value if isinstance(thing, OnGPU) else thing


def on_gpu_too(thing):
    return OnGPU(thing) if isinstance(thing, torch.Tensor) else thing


class Creation(TorchFunctionMode):
    """Two functions that make a tensor of a list on a device, and one that reads a list, without being dispatched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and (device := kwargs.pop("device", None)):
            return func(*args, **kwargs).to(device)
        return func(*(value.cpu() for value in args) if func is torch.Tensor.tolist else args, **kwargs)


@pytest.fixture
def gpu():
    with Creation(), PretendedGPU() as mode:
        yield mode


@pytest.fixture
def batches(sample_root):
    dataset = PennFudanDataset(sample_root, get_transform(train=False))
    return list(DataLoader(Subset(dataset, range(4)), 2, collate_fn=collate_fn))


def model_on(device):
    torch.manual_seed(0)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)  # our own is this one on every device but the CPU
    mask_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
    sizes = {"num_classes": 2, "min_size": 96, "max_size": 160, "box_detections_per_img": 10}
    own = {} if device == GPU else {"box_roi_pool": pool, "mask_roi_pool": mask_pool}
    return maskrcnn_mini_fpn(weights=None, **sizes, **own).to(device)


@pytest.mark.parametrize(("major", "fast"), [(7, False), (8, True), (9, True)])
def test_turing_computes_in_float32_and_ampere_in_bfloat16(monkeypatch, major, fast):
    """A T4 has the compute capability 7.5; PyTorch would emulate bfloat16 there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_fast_bfloat16(torch.device("cuda")) is fast


def test_tensors_of_two_devices_are_an_error_and_waits_are_counted(gpu):
    one = torch.ones(2).to(GPU)
    with pytest.raises(AssertionError, match="add.Tensor has tensors of two devices"):
        one + torch.ones(2)
    assert one.device == (one + 1).device == (one * torch.tensor(2.0)).device == GPU and not +gpu.waits
    assert one.sum().item() == 2 and one[one > 0].cpu().device == CPU and one.tolist() == [1, 1]
    assert +gpu.waits == {NUMBER: 1, "nonzero": 1, COPY: 2}


def test_a_step_waits_for_one_number_more_than_the_model_does(gpu, batches):
    def steps(model, optimizer):
        for batch in batches:
            losses = model.train()(*to_device(*batch, GPU))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

    waits = []
    for train in (steps, lambda *parts: train_one_epoch(*parts, batches, GPU, progress=False)):
        model = model_on(GPU)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        gpu.waits.clear()
        torch.manual_seed(1)
        losses = train(model, optimizer)
        waits.append(gpu.waits.copy())
        assert {p.device for p in model.parameters()} == {p.grad.device for p in model.parameters()} == {GPU}
    assert waits[1] - waits[0] == {NUMBER: len(batches), COPY: 1}  # the losses, at the end

    model = model_on(CPU)
    torch.manual_seed(1)
    on_cpu = train_one_epoch(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches, CPU, progress=False)
    assert losses == pytest.approx(on_cpu, rel=1e-3)


def test_validation_loss_waits_for_one_number_a_batch_and_evaluation_for_its_predictions(gpu, batches):
    model, on_cpu = model_on(GPU), model_on(CPU)
    with torch.no_grad():
        other = model_on(GPU).train()
        for batch in batches:
            other(*to_device(*batch, GPU))
    of_model, _ = gpu.waits.copy(), gpu.waits.clear()
    assert validation_loss(model, batches, GPU) == pytest.approx(validation_loss(on_cpu, batches, CPU), rel=1e-4)
    assert gpu.waits - of_model == {NUMBER: len(batches)}

    gpu.waits.clear()
    gpu.bytes_copied = 0
    with torch.no_grad():  # what is dispatched in inference mode cannot be pretended
        results = evaluate.__wrapped__(model, batches, GPU, progress=False)
    expected = evaluate(on_cpu, batches, CPU, progress=False)
    assert gpu.waits[COPY] == 4 * results.num_images  # boxes, labels, scores and masks
    pixels = sum(image.shape[1] * image.shape[2] for images, _ in batches for image in images)
    assert 0 < gpu.bytes_copied < 1.1 * 10 * pixels  # ten masks an image, a byte a pixel
    assert results.box.AR == pytest.approx(expected.box.AR, abs=0.01) and results.mask is not None

    images = batches[0][0]
    for found, other in zip(predict(model, images, GPU, 0.3), predict(on_cpu, images, CPU, 0.3), strict=True):
        assert {value.device for value in found.values()} == {CPU}
        assert len(found["scores"]) and all(torch.allclose(found[key], other[key], atol=1e-3) for key in other)
