"""Write results/tried.md, the table of what was tried to break dpag, from a test run's own report:

pytest --junitxml=report.xml && python tools/make_tried.py report.xml
"""

import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from dpag.files import write_text

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = ["survived", "refused", "lost", "accepted in silence"]
HEAD = """# What was tried

Attempts of the test suite to break dpag: damaged files, doubtful settings, commands that would leave an
arm's limits, processes that are killed. An attempt *survived* when what came out is right, and was *refused*
when it ended in an error that says what is wrong. It is *lost* when the result was wrong or gone, and
*accepted in silence* when nothing was said. `python tools/make_tried.py` makes this page from a report of
the tests' own.

"""


def counts(report: Path) -> Counter:
    "Attempts by area and outcome."
    found: Counter = Counter()
    for p in ElementTree.parse(report).iter("property"):
        if p.get("name") == "tried":
            area, outcome, n = p.get("value", "").split("|")
            found[area, outcome] += int(n)
    return found


def table(found: Counter) -> str:
    "The rows by area, and their sum."
    areas = sorted({area for area, _ in found})
    rows = [[area, *(found[area, o] for o in OUTCOMES)] for area in areas]
    rows.append(["**all**", *(sum(r[i + 1] for r in rows) for i in range(len(OUTCOMES)))])
    lines = ["| what | attempts | " + " | ".join(OUTCOMES) + " |", "|---|" + "---:|" * (1 + len(OUTCOMES))]
    for name, *values in rows:
        lines.append(f"| {name} | " + " | ".join(f"{v:,}" for v in (sum(values), *values)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_text(ROOT / "results/tried.md", HEAD + table(counts(Path(sys.argv[1]))))
