"""What the notebooks' prose and shape promise: short sentences, one word for one thing, a course of one sitting."""

import ast
import re

import pytest

from tools.notebooks import SOURCES, read_source

NAMES = sorted(path.stem for path in SOURCES.glob("*.py"))
COURSE = [name for name in NAMES if name < "05"]
# What is said otherwise: GPU, dataset, backbone, fix, synthetic or plotted or sampled.
OTHER_WORDS = r"\b(graphics card|CUDA card|a card|cards|data sets?|mend(ed|s)?|surest|whom)\b"


def markdown(name):
    return [cell.source for cell in read_source(SOURCES / f"{name}.py").cells if cell.cell_type == "markdown"]


def prose(name):
    """Without code, tables, badges, addresses, quotations and formulas."""
    text = re.sub(r"```.*?```", "", "\n\n".join(markdown(name)), flags=re.DOTALL)
    text = re.sub(r"^(\||>).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[!?\[?[^\]]*\]\([^)]*\)\]?\([^)]*\)|!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"<[^>]+>", " ", text)


def sentences(text):
    parts = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n(?=\s*(?:[-*#]|\d+\.)\s)", text)
    return [words for part in parts if (words := re.findall(r"[\w`'’.×-]*\w[\w`'’.×-]*", part))]


@pytest.mark.parametrize("name", NAMES)
def test_few_sentences_are_long(name):
    found = sentences(prose(name))
    long = [words for words in found if len(words) > 25]
    assert len(long) <= 0.05 * len(found), "\n".join(" ".join(words) for words in long)


@pytest.mark.parametrize("name", NAMES)
def test_one_word_for_one_thing(name):
    assert not (found := re.findall(OTHER_WORDS, prose(name), flags=re.IGNORECASE)), found


def test_the_course_is_read_in_one_sitting():
    cells = {name: len(read_source(SOURCES / f"{name}.py").cells) for name in COURSE}
    words = {name: sum(len(text.split()) for text in markdown(name)) for name in COURSE}
    assert max(cells.values()) <= 44 and sum(cells.values()) <= 170, cells
    assert sum(words.values()) <= 6000, words


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(COURSE)))
def test_a_deeper_notebook_has_at_most_60_cells(name):
    assert len(read_source(SOURCES / f"{name}.py").cells) <= 60


@pytest.mark.parametrize("name", [name for name in NAMES if name != "05_your_own_data"])  # whose settings are literal
def test_the_preset_is_named_in_the_settings_cell_only(name):
    cells = [cell.source for cell in read_source(SOURCES / f"{name}.py").cells if cell.cell_type == "code"]
    settings = [number for number, source in enumerate(cells) if "choose_preset()" in source]
    assert settings and settings[-1] == settings[0]
    for source in cells[settings[0] + 1 :]:
        names = [node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
        assert "preset" not in names, source


@pytest.mark.parametrize("name", ["02_finetuning_a_predictor", "03_swapping_the_backbone", "04_penn_fudan_mask_rcnn"])
def test_a_model_is_seen_at_work_within_the_first_dozen_cells(name):
    cells = [cell.source for cell in read_source(SOURCES / f"{name}.py").cells if cell.cell_type == "code"]
    shown = [number for number, source in enumerate(cells, start=1) if re.search(r"\bshow\(", source)]
    assert shown and shown[0] <= 12
