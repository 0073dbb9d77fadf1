"""Sphinx's settings. ``build.py`` writes the pages that these are for.

The theme is Furo. It has light, dark and automatic colours, a column with the headings of a page and a layout for
telephones, asks no other host for fonts or scripts, and has had releases every year since 2020. pydata-sphinx-theme and
sphinx-book-theme bring menus, launch buttons and version switchers too, which a book of ten notebooks does not need.
"""

import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools.address import kept  # noqa: E402

ADDRESS = kept(ROOT)
NOTEBOOKS = {path.stem[:2]: path.stem for path in ROOT.glob("notebooks/*.ipynb")}
project = "Object Detection and Segmentation with TorchVision"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
nb_execution_mode, nb_merge_streams, nb_render_markdown_format = "off", True, "myst"  # so, tables are tables
myst_enable_extensions, myst_heading_anchors = ["dollarmath"], 3
nitpick_ignore_regex = [("py:.*", r"(?!tutorial_lib).*")]  # torch.Tensor and the like have no page here
autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_typehints_format, python_use_unqualified_type_names, add_module_names = "short", True, False
maximum_signature_line_length, toc_object_entries_show_parents = 90, "hide"
napoleon_numpy_docstring, napoleon_use_rtype = False, False

html_theme, html_title, html_show_copyright = "furo", "Detection with TorchVision", False
html_static_path, html_css_files, html_copy_source = ["static"], ["site.css"], False
html_theme_options = {"top_of_page_buttons": ["view"] if ADDRESS else []}
html_math_renderer = "mathml"  # drawn by the browser; MathJax would come from another host
pygments_dark_style = "github-dark"
copybutton_selector = "div.cell_input pre, div.highlight-python pre, div.highlight-default pre, div.highlight-text pre"


def write_math(self, node):
    self.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    raise SkipNode


def in_docstrings(app, what, name, thing, options, lines):
    """A notebook's number becomes a link, and an indented command a block of code."""
    text = re.sub(r"\n\n((?: {4}python .*\n)+)", r"\n\n.. code-block:: text\n\n\1", "\n".join(lines))
    lines[:] = re.sub(
        r"\b[Nn]otebook (\d\d)\b", lambda found: f":doc:`{found[0]} </notebooks/{NOTEBOOKS[found[1]]}>`", text
    ).splitlines()


def is_left_out(app, what, name, thing, skip, options):
    """Constants and fields are: a class shows its fields in its first line, and says in its docstring what they are."""
    return skip or not (callable(thing) or isinstance(thing, property))


def view_on_github(app, page, template, context, doctree):
    """The button "View this page" leads to the file of the repository that the page is made of."""
    folder, _, name = page.partition("/")
    paths = {"notebooks": f"{page}.ipynb", "reference": name.replace(".", "/") + ".py", "CONTRIBUTING": f"{page}.md"}
    context["theme_source_view_link"] = f"{ADDRESS}/blob/main/{paths.get(folder, 'README.md')}"


def setup(app):
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-docstring", in_docstrings)
    app.connect("autodoc-skip-member", is_left_out)
    if ADDRESS:
        app.connect("html-page-context", view_on_github)
