"""What pytest needs here, from whichever folder it is called."""

import os
import sys
from pathlib import Path


def pytest_configure(config):
    # nbval re-runs the notebooks at quick, whatever the machine: no network, no card.
    if getattr(config.option, "nbval", False) or getattr(config.option, "nbval_lax", False):
        os.environ["TUTORIAL_PRESET"] = "quick"
        config.option.nbval_current_env = True
        config.option.nbval_cell_timeout = 600
    # A notebook opened without installing the library finds it beside the notebooks' folder.
    root = str(Path(__file__).parent)
    sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
