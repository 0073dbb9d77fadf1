"""What lets every cell run with no network: synthetic street scenes, the mini models, and their starter weights.

- ``sample``: makes pedestrians in PennFudan's folder layout
- ``mini_models``: ``fasterrcnn_mini_fpn`` and ``maskrcnn_mini_fpn``
- ``roi_align``: the RoIAlign that they use on a CPU

Importing it registers the mini models with torchvision. Your own project does not need it.
"""

import tutorial_lib.offline.mini_models  # noqa: F401  (registers)
