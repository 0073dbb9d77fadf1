"""The lowest versions that pyproject.toml allows, for pip.

    python -m pip install $(python -m tools.lowest)

A workflow runs the tests with them.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def lowest(text: str) -> list[str]:
    """From the text of pyproject.toml: ``torch==2.10`` where a dependency, or one of an extra, says ``torch>=2.10``.

    An extra of the project itself, as ``tutorial-lib[export]``, is left out: what it stands for is there anyway.

    Raises:
        ValueError: a requirement has no lower bound, or something else beside it.
    """
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    wanted = [requirement for requirement in wanted if not requirement.startswith(f"{project.get('name')}[")]
    if unclear := [requirement for requirement in wanted if not re.fullmatch(r"[\w.-]+>=[\d.]+", requirement)]:
        raise ValueError(f"only NAME>=VERSION is understood, not {', '.join(unclear)}")
    return [requirement.replace(">=", "==") for requirement in wanted]


if __name__ == "__main__":
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    print(*lowest(pyproject.read_text(encoding="utf-8")))
