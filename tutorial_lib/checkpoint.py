"""Checkpoints: save all or nothing, load without running code, resume as if training had never stopped.

Notebook 04 uses them.
"""

from __future__ import annotations

import copy
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint


def _random_states() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def save_checkpoint(path: str | Path, **state: Any) -> None:
    """Write a checkpoint, all or nothing: to a temporary name first, moved over ``path`` when whole.

    Args:
        state: what to keep, by name: what has a ``state_dict`` (model, optimizer, lr_scheduler,
            scaler), numbers, strings, lists, dicts. The states of the random generators of
            torch, CUDA, NumPy and Python are added under ``"random"``.

    Raises:
        OSError: it cannot be written, as on a full disk.
        FloatingPointError: a weight or a statistic of a model, or of the ``state_dict`` of one, is not finite; the
            message names it. Other numbers may be NaN.
        TypeError: it holds something that :func:`load_checkpoint` would refuse, such as a whole model inside
            a dict, or a NumPy number; or a part is called ``random``.

    After each of them, what was at ``path`` is still there.

    Source: notebook 04.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "random" in state:
        raise TypeError("a checkpoint keeps the random generators under the name random; give that part another one")
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
    weights = [pair for part in state.values() if isinstance(part, OrderedDict) for pair in part.items()]  # of modules
    if bad := [name for name, value in weights if torch.is_tensor(value) and not value.isfinite().all()]:
        raise FloatingPointError(f"{path} is not written: {bad[0]} is not finite; go on from an earlier checkpoint")
    state["random"] = _random_states()
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
        raise ValueError(f"{path} cannot be read as a checkpoint: {error!r}".partition("\\n")[0]) from error


def resume(path: str | Path, **parts: Any) -> dict[str, Any]:
    """Put a checkpoint back where it came from, so that training goes on as if it had never stopped.

    On a CPU with the same number of threads the weights at the end are the same to the last
    bit, if the checkpoint was written between two epochs. The random generators of GPUs are set
    only where there are as many GPUs as before.

    Args:
        path: of :func:`save_checkpoint`.
        parts: model, optimizer, lr_scheduler, scaler, … by the names that they were saved under.

    Returns:
        What else it holds: the epoch, the preset, ….

    Raises:
        FileNotFoundError, ValueError: as :func:`load_checkpoint`; or the checkpoint lacks a part, or is
            of another model. The message names the file and what differs. All parts and random generators
            are then as they were.

    Source: notebook 04.
    """
    checkpoint = load_checkpoint(path)
    if missing := [name for name in (*parts, "random") if name not in checkpoint]:
        raise ValueError(f"{path} does not hold {', '.join(missing)}; it holds {', '.join(checkpoint)}")
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    generators, name = _random_states(), "random generators"
    try:
        _set_random_states(checkpoint.pop("random"))
        for name, part in parts.items():
            part.load_state_dict(checkpoint.pop(name))
    except Exception as error:
        _set_random_states(generators)
        for other, state in before.items():
            parts[other].load_state_dict(state)
        raise ValueError(f"{path} does not fit the {name}: {error}") from error
    return checkpoint
