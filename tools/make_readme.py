"""README.md from nbs/index.ipynb: its markdown and the tables it shows, no code, and links from the root.

usage: python tools/make_readme.py [--check]
"""

import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)')


def outputs(cell):
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if "text/markdown" in data:
            yield "".join(data["text/markdown"])


def from_root(link: re.Match) -> str:
    "A link as it has to be written one folder above nbs/."
    return link[1] + posixpath.normpath(posixpath.join("nbs", link[2]))


def readme() -> str:
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for c in cells:
        if c["cell_type"] == "markdown":
            parts.append("".join(c["source"]))
        elif c["cell_type"] == "code":
            parts.extend(outputs(c))
    text = "\n\n".join(p.strip() for p in parts if p.strip())
    return LINK.sub(from_root, text) + "\n"


path = ROOT / "README.md"
if "--check" in sys.argv:
    same = path.exists() and path.read_text(encoding="utf-8") == readme()
    sys.exit(0 if same else "README.md differs from nbs/index.ipynb: run python tools/make_readme.py")
path.write_text(readme(), encoding="utf-8")
