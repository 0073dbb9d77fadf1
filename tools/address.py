"""Write the project's address on GitHub to every place that needs it.

    python -m tools.address [URL]    the same as: python -m tools.notebooks address [URL]

It is kept in pyproject.toml, under [project.urls]. From there it goes into CITATION.cff, README's badges, and the badge
and the set-up cell of each notebook: its source and the stored notebook, whose outputs stay. Without URL it is that of
``git remote get-url origin``. "" takes it out again, and the badges with it.

Only the standard library is needed: a workflow calls this before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SET_UP = """import importlib.util

ADDRESS = "{}"
if importlib.util.find_spec("tutorial_lib") is None:
    assert ADDRESS, "tutorial_lib is missing: set ADDRESS, or pip install a clone of this project"
    packages = f"tutorial_lib@git+{{ADDRESS}} pycocotools defusedxml"
    get_ipython().run_line_magic("pip", f"install -q --no-deps {{packages}}")"""
# Notebook 03 installs more below.
ANY_SET_UP = re.compile(r'import importlib\.util\n\nADDRESS = (?:.*\n)*?.*--no-deps \{packages\}"\)')


def kept(root: Path = ROOT) -> str:
    """The address in pyproject.toml, or "" where none is set."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "")


def on_github(url: str) -> str:
    """``https://github.com/OWNER/NAME`` from any form that git knows; "" stays as it is.

    Raises:
        ValueError: it is not a repository on GitHub, from which Colab's badges open notebooks.
    """
    forms = r"(?:https?://(?:[^@/]+@)?|(?:ssh://)?git@)(?:www\.)?github\.com[:/]([\w-]+/[\w.-]+?)(?:\.git)?/?"
    if url and not (found := re.fullmatch(forms, url)):
        shown = re.sub(r"//[^@/]+@", "//", url)  # without a password
        raise ValueError(f"{shown} is not a repository on GitHub, as https://github.com/OWNER/NAME; nothing is changed")
    return url and f"https://github.com/{found[1]}"


def of_origin(root: Path = ROOT) -> str:
    """The address of the remote named origin.

    Raises:
        ValueError: there is none, or it is not on GitHub.
    """
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if asked.returncode:
        raise ValueError(f"git has no address for origin ({asked.stderr.strip()}); give it as URL")
    return on_github(asked.stdout.strip())


def badge(name: str, address: str) -> str:
    """The badge that opens notebooks/NAME.ipynb in Colab."""
    picture = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    page = address.replace("https://github.com/", "https://colab.research.google.com/github/")
    return f"{picture}({page}/blob/main/notebooks/{name}.ipynb)"


def in_title(text: str, name: str, address: str, prefix: str = "") -> str:
    """A notebook's first cell with this badge below its title, or none; a source has it as comments, by ``prefix``."""
    empty = prefix.strip()
    text = re.sub(rf"^{prefix}\[!\[Open In Colab\].*\n{empty}\n", "", text, count=1, flags=re.MULTILINE)
    if not address:
        return text
    below = f"\n{empty}\n{prefix}{badge(name, address)}"
    return re.sub(rf"^{prefix}# .*", lambda title: title[0] + below, text, count=1, flags=re.MULTILINE)


def in_set_up(text: str, address: str) -> str:
    """A set-up cell, or a source, with what all set-up cells begin with."""
    return ANY_SET_UP.sub(lambda _: SET_UP.format(address), text, count=1)


def in_source(text: str, name: str, address: str) -> str:
    """A notebook's source with this badge and set-up cell; one without a set-up cell stays as it is."""
    return in_title(in_set_up(text, address), name, address, prefix="# ") if ANY_SET_UP.search(text) else text


def in_notebook(text: str, name: str, address: str) -> str:
    """The same for the text of an .ipynb. Its outputs and what is known of its run stay."""
    notebook = json.loads(text)
    for number, cell in enumerate(notebook["cells"]):
        written = "".join(cell["source"])
        if number == 0:
            written = in_title(written, name, address)
        elif "set-up" in cell["metadata"].get("tags", []):
            written = in_set_up(written, address)
        cell["source"] = written.splitlines(keepends=True)
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def in_readme(text: str, address: str) -> str:
    """README with a third column of badges in the tables whose rows begin with a link to a notebook, or without."""

    def table(found: re.Match) -> str:
        head, line, *rows = (re.match(r"\|[^|]*\|[^|]*\|", row)[0] for row in found[0].splitlines())
        if address:
            names = [re.search(r"\(notebooks/(\w+)\.ipynb\)", row)[1] for row in rows]
            rows = [f"{row} {badge(name, address)} |" for row, name in zip(rows, names, strict=True)]
            head, line = head + " |", line + "---|"
        return "\n".join([head, line, *rows]) + "\n"

    return re.sub(r"(?:^\|.*\n){2}(?:^\| \[[^|]*\]\(notebooks/\w+\.ipynb\).*\n)+", table, text, flags=re.MULTILINE)


def write(path: Path, text: str) -> bool:
    """Whether that changes the file."""
    if different := path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8", newline="\n")
    return different


def set_address(address: str, root: Path = ROOT) -> list[Path]:
    """Write the address (from :func:`on_github`) to all places under `root`; returns the files that this changes."""
    places = [("pyproject.toml", r"(\[project\.urls\]\n)(?:Repository = .*\n)?", 'Repository = "{}"\n')]
    places += [("CITATION.cff", r"(^type: software\n)(?:repository-code: .*\n)?", 'repository-code: "{}"\n')]
    wanted = {}
    for name, before, line in places:
        text = (root / name).read_text(encoding="utf-8")
        line = line.format(address) if address else ""
        wanted[root / name] = re.sub(before, lambda found, line=line: found[1] + line, text, flags=re.MULTILINE)
    wanted[root / "README.md"] = in_readme((root / "README.md").read_text(encoding="utf-8"), address)
    for folder, ending, written in (("notebooks/py", "py", in_source), ("notebooks", "ipynb", in_notebook)):
        for path in sorted((root / folder).glob(f"*.{ending}")):
            wanted[path] = written(path.read_text(encoding="utf-8"), path.stem, address)
    return [path for path, text in wanted.items() if write(path, text)]


def main(url: str | None) -> None:
    address = of_origin() if url is None else on_github(url)
    changed = set_address(address)
    print(f"{address or 'no address'}: {len(changed)} files changed", *changed, sep="\n  ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help='of the project on GitHub; "" for none')
    try:
        main(parser.parse_args().url)
    except ValueError as error:
        parser.error(str(error))
