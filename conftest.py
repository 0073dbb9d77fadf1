"""What pytest needs here, from whichever folder it is called."""

import os
import sys
from pathlib import Path


def pytest_configure(config):
    # nbval re-runs the notebooks at quick, whatever the machine: no network, no GPU.
    if getattr(config.option, "nbval", False) or getattr(config.option, "nbval_lax", False):
        os.environ["TUTORIAL_PRESET"] = "quick"
        config.option.nbval_current_env = True
        config.option.nbval_cell_timeout = 600
    if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # GitHub's macOS machines say that they have MPS, and cannot allocate on it.
    os.environ.setdefault("TUTORIAL_DEVICE", "cpu")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # notebook 10
    # A notebook opened without installing the library finds it beside the notebooks' folder.
    root = str(Path(__file__).parent)
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
