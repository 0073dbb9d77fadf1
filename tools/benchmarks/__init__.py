"""Measurements that take minutes: each module is a command that writes a file of ``tutorial_lib/results``.

What it was measured on is in every row.
"""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path

import torch
import torchvision

from tools.notebooks import ROOT, library_hash

RESULTS = ROOT / "tutorial_lib" / "results"


def provenance(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(": ")[2] if models else name
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "library_hash": library_hash(),
    }


def write_results(name: str, results: dict) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
