"""The site: built as `make site` builds it, every link followed, and looked at in a real browser.

    python -m pytest -m site -n 0 tests/test_site.py

It needs ``pip install ".[site,browser]"``, and for the browser an installed Chromium or Chrome, as test_jupyterlab.py.
"""

from __future__ import annotations

import ast
import functools
import html
import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from tests.processes import REPOSITORY, run_python
from tests.test_jupyterlab import browser  # noqa: F401  (a fixture)

pytestmark = pytest.mark.site
NAMES = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
COLAB = "https://colab.research.google.com/"  # badges, where the project has an address


def need_sphinx():
    for name in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"NO SITE WAS BUILT: {name} is missing; pip install '.[site]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of a new site, built where no network can be reached."""
    need_sphinx()
    folder = tmp_path_factory.mktemp("site") / "site"
    built = run_python("docs/build.py", folder, timeout=400, **NO_NETWORK)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    return folder


class Page(HTMLParser):
    """What a page leads to, what it loads, its anchors, and its pictures without an alternative text."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.anchors, self.mute = [], [], {""}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found["href"]] if found.get("href") else []
        self.loaded += [found["src"]] if found.get("src") else []
        self.loaded += [found["href"]] if tag == "link" and found.get("rel") in ("stylesheet", "icon") else []
        self.mute += [found["src"]] if tag == "img" and "alt" not in found else []


@functools.cache
def read_pages(folder: Path) -> dict[str, Page]:
    return {
        path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")
    }


def broken_links(folder: Path) -> list[str]:
    """Links and files inside the site that lead nowhere, as "page: link"."""
    pages, broken = read_pages(folder), []
    for name, page in pages.items():
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(urlsplit(urljoin(f"/{name}", parts.path)).path).lstrip("/") or "index.html"
            there = (folder / target).is_file()
            if not there or target in pages and unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{name}: {link}")
    return broken


def test_every_link_inside_the_site_leads_somewhere(site):
    assert broken_links(site) == []


@pytest.mark.parametrize("link", ["no.html", "b.html#no", "#no", "../index.html", "no.png", "file.ipynb"])
def test_a_link_that_leads_nowhere_is_noticed(tmp_path, link):
    good = '<a href="b.html#yes"></a><a href="#here" id="here"></a><a href="https://x.org/#y"></a><img src="p.png">'
    (tmp_path / "a.html").write_text(f'{good}<a href="{link}"></a>')
    (tmp_path / "b.html").write_text('<p id="yes"></p><a href="a.html"></a>')
    (tmp_path / "p.png").touch()
    assert broken_links(tmp_path) == [f"a.html: {link}"]


def test_nothing_is_loaded_from_another_host(site):
    loaded = {link for page in read_pages(site).values() for link in page.loaded}
    assert not [link for link in loaded if urlsplit(link).netloc and not link.startswith(COLAB)]


def test_every_picture_has_an_alternative_text(site):
    assert [picture for page in read_pages(site).values() for picture in page.mute] == []


def test_every_notebook_is_a_page_with_its_own_file_and_outputs(site):
    front = Page((site / "index.html").read_text(encoding="utf-8"))
    for name in NAMES:
        notebook = REPOSITORY / "notebooks" / f"{name}.ipynb"
        assert (site / "notebooks" / notebook.name).read_bytes() == notebook.read_bytes()
        assert f"notebooks/{name}.html" in front.links
        outputs = [output for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] for output in
                   cell.get("outputs", [])]  # fmt: skip
        pictures = sum(key.startswith("image/") for output in outputs for key in output.get("data", {}))
        text = (site / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        assert "| --- |" not in text, "a table is shown as text"
        page = Page(text)
        assert sum("_images" in link and not link.endswith(".svg") for link in page.loaded) == pictures
        assert any(name in link for link in front.loaded) == (pictures > 0)


def test_every_cell_to_be_copied_is_on_one_page(site):
    text = (site / "take_this.html").read_text(encoding="utf-8")
    shown = [html.unescape(re.sub(r"<[^>]*>", "", code)).strip() for code in re.findall(r"(?s)<pre>(.*?)</pre>", text)]
    wanted = []
    for name in NAMES:
        cells = json.loads((REPOSITORY / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        wanted += ["".join(c["source"]).strip() for c in cells if "copy-me" in c["metadata"].get("tags", [])]
    assert shown == wanted and wanted


def test_the_reference_has_every_module_function_and_class(site):
    anchors = set().union(*(page.anchors for page in read_pages(site / "reference").values()))
    for path in (REPOSITORY / "tutorial_lib").rglob("*.py"):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        if module == "tutorial_lib":
            continue
        defined = [n.name for n in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(n, "name")]
        wanted = {f"module-{module}", *(f"{module}.{name}" for name in defined if not name.startswith("_"))}
        assert wanted <= anchors, wanted - anchors


@pytest.mark.parametrize(
    ("text", "without", "address"),
    [
        ("[a](https://x.org/b.py)", None, None),
        ("[a](06_evaluating_detections.ipynb)", None, None),
        ("[a](07_when_it_breaks.ipynb#nan)", '<a href="07_when_it_breaks.html#nan">a</a>', None),
        ("[a](#recap)", None, None),
        ("[a](py)", "a", None),
        ("![a](images/mask_rcnn.svg)", None, None),
        ("[a](../tutorial_lib/data.py)", "[a](/reference/tutorial_lib.data.rst)", None),
        ("[a](../LICENSE)", None, "[a](https://github.com/o/r/blob/main/LICENSE)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(tmp_path, text, without, address):
    need_sphinx()
    spec = importlib.util.spec_from_file_location("build_of_docs", REPOSITORY / "docs" / "build.py")
    spec.loader.exec_module(build := importlib.util.module_from_spec(spec))
    link = functools.partial(build.with_links, text, "notebooks/01_dataset.ipynb", tmp_path)
    assert link("") == (without or text)
    assert link("https://github.com/o/r") == (address or without or text)


def test_a_folder_of_something_else_is_not_emptied(tmp_path):
    need_sphinx()
    (tmp_path / "mine.txt").touch()
    refused = run_python("docs/build.py", tmp_path, timeout=120)
    assert refused.returncode == 1 and "not a site" in refused.stderr and (tmp_path / "mine.txt").exists()


@pytest.fixture(scope="module")
def server(site) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def page(request, server) -> Iterator:
    """A page in Chromium; what goes wrong in it, or is asked of another host, fails the test."""
    page = request.getfixturevalue("browser").new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.set_default_timeout(20_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((server, "data:", COLAB)) or wrong.append(asked.url))
    page.on("response", lambda got: got.status < 400 or "favicon" in got.url or wrong.append(got.url))
    yield page
    page.close()
    assert wrong == []


def test_the_front_page_shows_its_pictures(server, page):
    page.goto(f"{server}/index.html")
    pictures = page.locator("article img")
    for number in range(pictures.count()):
        pictures.nth(number).scroll_into_view_if_needed()
        page.wait_for_function("n => document.querySelectorAll('article img')[n].naturalWidth > 0", arg=number)
    assert page.locator("a.card").count() == len(NAMES) and pictures.count() > len(NAMES) // 2


def test_the_search_finds_a_word(server, page):
    page.goto(f"{server}/index.html")
    page.locator("input[name=q]").first.fill("RoIAlign")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a")
    found.first.wait_for()
    page.wait_for_function("() => /finished/.test(document.querySelector('#search-results').textContent)")
    assert any("08_inside_mask_rcnn" in link.get_attribute("href") for link in found.all())


def test_dark_mode_is_switched_and_kept(server, page):
    def brightness():
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    page.goto(f"{server}/index.html")
    assert brightness() > 230
    for _ in range(3):  # automatic, dark, light
        if brightness() > 230:
            page.locator(".theme-toggle:visible").first.click()
    assert brightness() < 50
    page.goto(f"{server}/take_this.html")
    assert brightness() < 50


@pytest.mark.parametrize("width", [400, 1280, 1600])
def test_no_page_is_wider_than_the_window(server, page, site, width):
    page.set_viewport_size({"width": width, "height": 900})
    for name in read_pages(site):
        if not name.startswith("_modules"):
            page.goto(f"{server}/{name}")
            assert page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth") <= 0, name
