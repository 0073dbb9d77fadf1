"""The library as a whole: which module knows which, and what importing one does."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

from tests.processes import REPOSITORY, run_python

PATHS = sorted((REPOSITORY / "tutorial_lib").rglob("*.py"))
NAMES = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in PATHS]


def imports_of(path):
    """What a module imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_dependencies_run_one_way():
    knows = {}
    for name, path in zip(NAMES, PATHS, strict=True):
        imports = set(imports_of(path))
        assert not {i.split(".")[0] for i in imports} & {"tests", "tools", "notebooks"}, path
        if name == "tutorial_lib.engine":
            assert [i for i in imports if i.startswith("tutorial_lib.models.")] == ["tutorial_lib.models.mode_kept"]
        knows[name] = {i if i in NAMES else i.rpartition(".")[0] for i in imports if i.startswith("tutorial_lib")}
    tuple(TopologicalSorter(knows).static_order())  # raises where there is a circle
    knows = {name[13:]: {other[13:] for other in others} for name, others in knows.items()}
    assert not any(knows[name] for name in ("", "data", "transforms", "models", "coco_eval", "checkpoint"))
    assert knows["penn_fudan"] <= {"data"} and knows["engine"] == {"coco_eval", "models"}
    for name, others in knows.items():
        if name.startswith("offline"):
            assert all(other.startswith("offline") for other in others), name
        elif name != "presets":
            assert not any(other.startswith("offline") for other in others), name


def test_only_offline_registers_and_any_module_can_be_the_first():
    """Each in turn is the first of the library that a process imports."""
    code = """
import importlib, os, sys
import matplotlib.pyplot, pycocotools.mask, torch.distributed, torchvision, tqdm
from torchvision.models import get_model, list_models

before = set(list_models()), dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()
for first in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "tutorial_lib"]:
        del sys.modules[name]
    for name in set(list_models()) - before[0]:
        del torchvision.models._api.BUILTIN_MODELS[name]
    importlib.import_module(first)
    new = set(list_models()) - before[0]
    registers = first.split(".")[1:2] in (["offline"], ["presets"], ["predict"], ["train"])
    assert new == ({"fasterrcnn_mini_fpn", "maskrcnn_mini_fpn"} if registers else set()), (first, new)
    assert (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()) == before[1:], first
    from tutorial_lib.presets import choose_preset, fetch_weights
    preset = choose_preset("quick")
    fetch_weights(preset.mask_rcnn, preset.weights)
    get_model("maskrcnn_mini_fpn", weights="DEFAULT")
    import tutorial_lib.offline
    importlib.reload(tutorial_lib.offline.mini_models)
    get_model("fasterrcnn_mini_fpn")
print("done")
"""
    finished = run_python("-c", code, *NAMES)
    assert finished.returncode == 0 and finished.stdout == "done\n", finished.stderr
