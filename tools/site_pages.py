"""The site's pages, for mkdocs (`hooks` in mkdocs.yml): notebooks as markdown, and a page of reference for
each module.

A page is made of what a notebook holds: text, code without nbdev's directives, and the outputs that are saved
in it. Nothing is run. Links are written as they are in the repository, so that they also work in JupyterLab:
here they are turned to the site's pages, and a file that is linked to or shown is copied along.
"""

import base64
import functools
import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"#\|")
HIDDEN = ("#| hide", "#| include: false", "#| default_exp")
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)"\s]+)')
FENCED = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$", re.M | re.S)
CODE_SPAN = re.compile(r"(?<![\[`])`([^`\n]+)`(?![\]`])")
LINK_OR_CODE = re.compile(f"{CODE_SPAN.pattern}|{LINK.pattern}")
TITLES = {"pusht": "Push-T", "ur5": "UR5", "kitchen": "Franka Kitchen", "README": "Data"}
IMAGES = {"image/png": "png", "image/gif": "gif", "image/jpeg": "jpg", "image/svg+xml": "svg"}


# What becomes a page, and where


def page_uri(path: str) -> str | None:
    "The page, as mkdocs names its source, that a file of the repository becomes; None if it becomes none."
    if path.startswith("nbs/") and path.endswith(".ipynb"):
        return path.removeprefix("nbs/").removesuffix(".ipynb") + ".md"
    if path.startswith("dpag/") and path.endswith(".py"):
        return f"reference/{module_name(path)}.md"
    return path if path.endswith(".md") else None


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def expand(nav: list, taken: set[str]) -> list:
    "`nav` with each pattern replaced by the pages of the files that match and that nothing before has named."
    pages = []
    for entry in nav:
        if isinstance(entry, dict):
            (title, inside), *_ = entry.items()
            inside = expand(inside if isinstance(inside, list) else [inside], taken)
            pages += [{title: inside[0] if len(inside) == 1 else inside}] if inside else []
            continue
        found = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob(entry))]
        found = [p for p in found if p not in taken and ".ipynb_checkpoints" not in p and has_page(p)]
        taken.update(found)
        pages += [{module_name(p): page_uri(p)} if p.endswith(".py") else page_uri(p) for p in found]
    return pages


def has_page(path: str) -> bool:
    "Of the modules, those that define something public."
    if Path(path).name.startswith("_") and "__all__" not in (ROOT / path).read_text(encoding="utf-8"):
        return False
    return page_uri(path) is not None


@functools.cache
def notebooks() -> dict[str, str]:
    "The notebooks' paths, by each of the names that the text has for them: `05_guidance`, `hardware/ur`."
    names = {}
    for path in sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/**/*.ipynb")):
        short = path.removeprefix("nbs/").removesuffix(".ipynb")
        stem = posixpath.basename(short)
        aliases = {short, f"{short}.ipynb", path, path.removesuffix(".ipynb")} if "/" in short else {path}
        if re.match(r"e?\d\d_", stem):
            aliases |= {stem, f"{stem}.ipynb", path}
        names.update(dict.fromkeys(aliases, path))
    return names


# A page's text


class Page:
    "One page while it is written: `text`, the images in it, and the repository's files that it needs."

    def __init__(self, path: str):
        self.path, self.uri = path, page_uri(path)
        self.images: dict[str, bytes] = {}
        self.needs: set[str] = set()

    def relative(self, uri: str) -> str:
        return posixpath.relpath(uri, posixpath.dirname(self.uri) or ".")

    def target(self, link: str) -> str:
        "A link as it stands in the repository, as the site needs it."
        address, hash_, anchor = link.partition("#")
        if not address or re.match(r"[a-z]+:|/", address):
            return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.path), address))
        if not (ROOT / path).is_file():
            return link  # mkdocs says that it leads nowhere
        if (uri := page_uri(path)) is None:
            uri = path
            self.needs.add(path)
        return self.relative(uri) + hash_ + anchor

    def named(self, span: re.Match) -> str:
        "A notebook's or a table's name in the text, as a link."
        path = notebooks().get(span[1])
        if path is None and re.fullmatch(r"[\w./-]+\.md", span[1]) and (ROOT / span[1]).is_file():
            path = span[1]
        return f"[{span[0]}]({self.relative(page_uri(path))})" if path and path != self.path else span[0]

    def line(self, text: str) -> str:
        "A line of prose with the site's links; no names become links in a heading."

        def link(found: re.Match) -> str:
            if found[1] is None:
                return found[2] + self.target(found[3])
            return found[0] if text.startswith("#") else self.named(found)

        return LINK_OR_CODE.sub(link, text)

    def linked(self, text: str) -> str:
        "Markdown with the site's links; code blocks stay as they are."
        done, rest = [], 0
        for block in [*FENCED.finditer(text), None]:
            prose = text[rest : block.start() if block else None]
            lines = [self.line(x) for x in prose.split("\n")]
            done += ["\n".join(lines), block[0] if block else ""]
            rest = block.end() if block else 0
        # Python-Markdown wants an empty line before a list and between formulae; Jupyter and GitHub do not.
        text = re.sub(r"\$\$\n(?=\$\$)", "$$\n\n", "".join(done))
        return re.sub(r"^(?![-*] |\d+\. |\s|\|)(.+)\n(?=(?:[-*]|\d+\.) )", r"\1\n\n", text, flags=re.M)

    def code(self, source: str) -> str:
        "A code cell's code."
        lines = source.split("\n")
        directives = [x.strip() for x in lines if DIRECTIVE.match(x)]
        body = "\n".join(x for x in lines if not DIRECTIVE.match(x)).strip("\n")
        if not body or "#| echo: false" in directives or any(d.startswith(HIDDEN) for d in directives):
            return ""
        exported = any(d.startswith("#| export") for d in directives)
        return block(body, ".python .exported" if exported else ".python")

    def output(self, out: dict, name: str) -> str:
        "One output; what a program writes to stderr (progress bars) is left out."
        data = out.get("data", {})
        if out["output_type"] == "stream":
            return "" if out["name"] == "stderr" else block(joined(out["text"]), ".text .output")
        if out["output_type"] == "error":
            return block(f"{out['ename']}: {out['evalue']}", ".text .output")
        for mime, ending in IMAGES.items():
            if mime in data:
                raw = joined(data[mime])
                image = f"images/{self.uri.removesuffix('.md')}/{name}.{ending}"
                self.images[image] = raw.encode() if ending == "svg" else base64.b64decode(raw)
                return f"![Output of the cell above]({self.relative(image)}){{: .output }}"
        if "text/markdown" in data:
            return self.linked(joined(data["text/markdown"]))
        if "text/html" in data:
            return table(joined(data["text/html"]))
        return block(joined(data["text/plain"]), ".text .output") if "text/plain" in data else ""


def joined(text) -> str:
    return "".join(text)


def block(text: str, classes: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip("\n")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {{ {classes} data-search-exclude='' }}\n{text}\n{fence}" if text.strip() else ""


def table(html: str) -> str:
    "pandas' HTML without its style, in one block."
    html = re.sub(r"<style.*?</style>", "", html, flags=re.S)
    html = re.sub(r"<table[^>]*>", "<table>", html)
    return re.sub(r"\n\s*", "\n", html).strip()


def notebook_page(path: str) -> tuple[str, Page]:
    "A notebook's page."
    page = Page(path)
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    sources = [joined(c["source"]) for c in cells]
    parts = []
    for i, (cell, source) in enumerate(zip(cells, sources)):
        if cell["cell_type"] == "markdown":
            parts.append(page.linked(source))
        elif cell["cell_type"] == "code":
            parts.append(page.code(source))
            hidden = any(x.startswith(HIDDEN) for x in source.split("\n"))
            outputs = [] if hidden else cell.get("outputs", [])
            parts += [page.output(out, f"{i}-{j}") for j, out in enumerate(outputs)]
    text = "\n\n".join(p for p in parts if p)
    page.needs.add(path)
    links = [f"[The notebook]({page.relative(path.removeprefix('nbs/'))}){{: download }}"]
    exported = re.search(r"^#\| default_exp (\S+)", "\n".join(sources), re.M)
    module = f"dpag.{exported[1]}".removesuffix(".__init__") if exported else None
    if module and has_page(f"{module.replace('.', '/')}.py"):
        links.append(f"reference of [`{module}`]({page.relative(f'reference/{module}.md')})")
    where = f'<p class="where" markdown>{" · ".join(links)}</p>'
    return re.sub(r"\A(# .*)$", lambda m: f"{m[1]}\n\n{where}", text, count=1, flags=re.M), page


def reference_page(path: str) -> str:
    "A module's page; mkdocstrings fills it in from the docstrings."
    name, text = module_name(path), (ROOT / path).read_text(encoding="utf-8")
    source = re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)", text)
    where = ""
    if source and (ROOT / source[1]).is_file():
        where = f'<p class="where" markdown>Explained in [{source[1]}](../{page_uri(source[1])})</p>\n\n'
    return f"# {name}\n\n{where}::: {name}\n"


def text_page(path: str) -> tuple[str, Page]:
    "A markdown file's page; the tables in results/ get a title."
    page = Page(path)
    text = page.linked((ROOT / path).read_text(encoding="utf-8"))
    if not text.startswith("# "):
        title = TITLES.get(Path(path).stem, Path(path).stem.replace("_", " ").capitalize())
        text = f"# {title}\n\n{text}"
    return text, page


# What mkdocs calls


def on_config(config):
    config["nav"] = expand(config["nav"], set())
    return config


def listed(nav) -> list[str]:
    "The pages in the navigation."
    if isinstance(nav, str):
        return [nav]
    inside = nav.values() if isinstance(nav, dict) else nav
    return [uri for entry in inside for uri in listed(entry)]


def on_files(files, config):
    notebooks.cache_clear()
    pages, shown, needed = set(listed(config["nav"])), {}, {"LICENSE": "LICENSE"}
    for path in sorted(p.relative_to(ROOT).as_posix() for p in candidates()):
        uri = page_uri(path)
        if uri not in pages:
            continue
        if path.endswith(".py"):
            files.append(File.generated(config, uri, content=reference_page(path)))
            continue
        text, page = notebook_page(path) if path.endswith(".ipynb") else text_page(path)
        files.append(File.generated(config, uri, content=text))
        shown |= page.images
        needed |= {n.removeprefix("nbs/"): n for n in page.needs}
    for uri, content in shown.items():
        files.append(File.generated(config, uri, content=content))
    for uri, path in sorted(needed.items()):
        files.append(File.generated(config, uri, abs_src_path=os.fspath(ROOT / path)))
    return files


def candidates():
    for pattern in (
        "nbs/**/*.ipynb",
        "dpag/**/*.py",
        "results/tables/*.md",
        "results/*.md",
        "*.md",
        "data/README.md",
    ):
        yield from (p for p in ROOT.glob(pattern) if ".ipynb_checkpoints" not in p.parts)
