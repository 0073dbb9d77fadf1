"""What a bug report needs: versions, device, preset, threads, bfloat16.

    python -m tutorial_lib.info

The versions come first: they are also there where PyTorch cannot be imported.
"""

import platform
from importlib.metadata import version

if __name__ == "__main__":
    print(f"python {platform.python_version()}, {platform.platform()}", flush=True)
    for name in ("torch", "torchvision", "numpy", "pillow", "pycocotools"):
        print(name, version(name), flush=True)
    import torch

    from tutorial_lib.engine import has_fast_bfloat16, pick_device
    from tutorial_lib.presets import choose_preset

    device, gpu = pick_device(), torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
    print(f"device {device} ({gpu}), bfloat16 {'fast' if has_fast_bfloat16(device) else 'not fast'}")
    print(f"preset {choose_preset().name}, {torch.get_num_threads()} threads")
