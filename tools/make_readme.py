"""README.md from nbs/index.ipynb: its markdown as it is, the tables it shows as markdown, no code.

usage: python tools/make_readme.py [--check]
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def outputs(cell):
    for out in cell.get("outputs", []):
        data = out.get("data", {})
        if "text/markdown" in data: yield "".join(data["text/markdown"])


def readme() -> str:
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
    parts = []
    for c in cells:
        if c["cell_type"] == "markdown": parts.append("".join(c["source"]))
        elif c["cell_type"] == "code": parts.extend(outputs(c))
    text = "\n\n".join(p.strip() for p in parts if p.strip())
    return text.replace("](../", "](").replace('src="../', 'src="') + "\n"


path = ROOT / "README.md"
if "--check" in sys.argv:
    sys.exit(0 if path.exists() and path.read_text() == readme() else "README.md differs from nbs/index.ipynb: run python tools/make_readme.py")
path.write_text(readme())
