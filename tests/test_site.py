"""The site (`make docs`): every link leads somewhere, and a real browser shows what is meant.

What needs a browser is skipped where there is none: install Chromium or Chrome, or name one in CHROME."""

import functools
import html.parser
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [p for p in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


class Html(html.parser.HTMLParser):
    "What a page points to, what can be pointed to in it, and its text outside of scripts."

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.text = set(), set(), set(), []
        self.inside = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "style"):
            self.inside.append(tag)
        if "id" in attrs:
            self.anchors.add(attrs["id"])
        for name in ("href", "src"):
            if attrs.get(name):
                (self.links if tag == "a" else self.loaded).add(attrs[name])

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not importlib.util.find_spec("mkdocs_autorefs"):
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", os.fspath(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {p: Html(p) for p in sorted(site.rglob("*.html")) if p.name != "404.html"}


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if not browser.find():
        pytest.skip("no Chromium or Chrome here")
    pytest.importorskip("websocket")
    b = browser.Browser(tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


# Without a browser


def broken(page: Path, link: str, anchors: dict) -> bool:
    "Whether an internal link leads nowhere."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_file():
        return True
    return bool(parts.fragment and target in anchors and unquote(parts.fragment) not in anchors[target])


def test_every_internal_link_leads_somewhere(pages):
    anchors = {page: {*html.anchors, "__search", "__drawer"} for page, html in pages.items()}
    dead = {
        f"{page.name}: {link}"
        for page, html in pages.items()
        for link in html.links | html.loaded
        if broken(page, link, anchors)
    }
    assert not dead, "\n".join(sorted(dead))


def test_a_dead_link_would_be_seen(tmp_path):
    page = tmp_path / "a.html"
    page.write_text('<h1 id="here">x</h1><a href="#here">a</a><a href="#there">b</a><a href="c.html">c</a>')
    html = Html(page)
    assert {x for x in html.links if broken(page, x, {page: html.anchors})} == {"#there", "c.html"}


def test_nothing_is_loaded_from_a_network(pages):
    assert not {(p.name, x) for p, html in pages.items() for x in html.loaded if urlsplit(x).netloc}


def test_every_notebook_has_a_page_that_the_navigation_names(site, pages):
    navigation = pages[site / "index.html"].links
    for notebook in NOTEBOOKS:
        name = notebook.relative_to(ROOT / "nbs").with_suffix("")
        assert (site / name).with_suffix(".html") in pages, name
        assert f"{name.as_posix()}.html" in navigation or name.name == "index", name
        assert (site / name).with_suffix(".ipynb").read_bytes() == notebook.read_bytes()


def test_pages_have_no_directives_and_no_prompts(pages):
    for page, parsed in pages.items():
        assert not re.search(r"^\s*#\|", parsed.text, re.M), page.name
        assert not re.search(r"\b(In|Out) ?\[\d* ?\]:", parsed.text), page.name


def test_every_public_name_is_in_the_reference(site, pages):
    for module in sorted(ROOT.glob("dpag/**/*.py")):
        source = module.read_text(encoding="utf-8")
        if module.name.startswith("_") or "__all__" not in source:
            continue
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        page = pages[site / f"reference/{name}.html"]
        defined = re.findall(r"^(?:class|def) ([A-Za-z]\w*)", source, re.M)
        assert not [x for x in defined if f"{name}.{x}" not in page.anchors], name


def test_the_page_on_extending_shows_the_package_that_is_tested():
    cells = json.loads((ROOT / "nbs/14_extending.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = ["".join(o["data"]["text/markdown"]) for c in cells for o in c.get("outputs", [])]
    for path in sorted((ROOT / "tests/plugin").rglob("*.*")):
        if path.suffix in (".py", ".toml") and path.name != "__init__.py":
            text = path.read_text(encoding="utf-8")
            assert any(text in x for x in shown), f"run nbs/14_extending.ipynb again: {path.name} has changed"


def relative_links(text: str) -> list[str]:
    "The relative addresses that markdown links to or shows."
    text = re.sub(r"^```.*?^```|`[^`\n]+`(?!\])", "", text, flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [unquote(urlsplit(x).path) for x in links if not urlsplit(x).scheme and not x.startswith("#")]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_of_notebooks_lead_somewhere_in_jupyterlab(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert not [x for x in relative_links(text) if not (notebook.parent / x).exists()]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"])
def test_links_of_markdown_files_lead_somewhere(name):
    path = ROOT / name
    assert not [x for x in relative_links(path.read_text(encoding="utf-8")) if not (path.parent / x).exists()]


# In a browser

RAW_FORMULAE = r"""(() => {
  const found = [], walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (node.parentElement.closest("code, pre, script, style, .katex")) continue;
    found.push(...(node.textContent.match(/\$[^$\n]+\$|\\\(|\\\[|\\begin\{/g) ?? []));
  }
  return found.concat([...document.querySelectorAll(".katex-error")].map((e) => e.textContent));
})()"""
BAD_IMAGES = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src)"
OVERFLOW = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth"


@pytest.mark.timeout(600)
def test_every_page_in_a_browser(window, pages):
    wrong = {}
    for page in pages:
        window.size(1280, 900)
        window.open(page.as_uri())
        seen = {"formulae": window.evaluate(RAW_FORMULAE), "images": window.evaluate(BAD_IMAGES)}
        seen["overflow at 1280"] = max(0, window.evaluate(OVERFLOW))
        window.size(400, 800)
        seen["overflow at 400"] = max(0, window.evaluate(OVERFLOW))
        seen["errors"] = list(window.errors)
        seen["network"] = [x for x in window.requests if not x.startswith(("file:", "data:", "blob:"))]
        if found := {k: v for k, v in seen.items() if v}:
            wrong[page.name] = found
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_formulae_of_05_guidance_are_typeset(window, site):
    source = (ROOT / "nbs/05_guidance.ipynb").read_text(encoding="utf-8")
    cells = [c for c in json.loads(source)["cells"] if c["cell_type"] == "markdown"]
    dollars = sum(len(re.findall(r"\$\$?[^$]+\$\$?", "".join(c["source"]))) for c in cells)
    window.open((site / "05_guidance.html").as_uri())
    assert window.evaluate("document.querySelectorAll('article .katex-html').length") == dollars > 20


def first_results(window, address: str) -> list[str]:
    "Titles of what the site's search finds."
    window.size(1280, 900)
    window.open(address)
    window.until("document.querySelectorAll('.md-search-result__item').length > 0")
    return window.evaluate(
        "[...document.querySelectorAll('.md-search-result__item')].map((e) => e.innerText)"
    )


def test_search_finds_vjp_from_disk(window, site):
    found = first_results(window, (site / "index.html").as_uri() + "?q=VJP")
    assert any("VJP" in text for text in found) and not window.errors


def test_search_finds_vjp_from_a_server(window, site):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=os.fspath(site))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            found = first_results(window, f"http://127.0.0.1:{server.server_port}/index.html?q=VJP")
        finally:
            server.shutdown()
    assert any("VJP" in text for text in found)


METHOD_COLUMN = """(() => {
  const wide = (t) => t.closest(".md-typeset__scrollwrap").scrollWidth > innerWidth;
  const tables = [...document.querySelectorAll("table[data-wide]")].filter(wide);
  return tables.map((t) => {
    const box = t.closest(".md-typeset__scrollwrap");
    const column = [...t.tHead.rows[0].cells].findLastIndex((c) => c.hasAttribute("data-sticky"));
    box.scrollLeft = 1e4;
    const cell = t.tBodies[0].rows[0].cells[column].getBoundingClientRect();
    return [t.tHead.rows[0].cells[column].innerText, cell.left >= 0 && cell.right <= innerWidth];
  });
})()"""


@pytest.mark.parametrize("width", [400, 1280])
def test_wide_tables_scroll_with_the_method_in_sight(window, site, width):
    window.size(width, 800)
    window.open((site / "13_results.html").as_uri())
    window.until("document.querySelectorAll('[data-sticky]').length > 0")
    columns = window.evaluate(METHOD_COLUMN)
    assert len(columns) >= 4 and all(inside for _, inside in columns), columns
    assert {title for title, _ in columns} <= {"method", "model", "variant", ""}
