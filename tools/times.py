"""How long stages took, into results/times.csv: what `make repro` expects before it has measured its own.

    python tools/times.py                 what evaluations say of themselves, and what was run here
    python tools/times.py paper-human     and an estimate of a profile that was never run, on an assumed H100

A line is `stage,seconds,source`. Lines that nothing new replaces stay."""

import csv
import json
import sys

from dpag.cost import H100, run_cost
from dpag.files import read_text, root, write_text
from dpag.paths import own, published
from dpag.settings import load

HEADER = ("stage", "seconds", "source")


def of_evaluations() -> dict[str, tuple[float, str]]:
    "What the committed evaluations say of how long they and their trainings took."
    found = {}
    for cell, path in published().evaluations("run.json"):
        said, name = json.loads(read_text(path)), f"{cell.run}-{cell.name}"
        for kind, seconds in (
            ("train", said.get("train_seconds")),
            ("evaluate", said.get("evaluated", {}).get("seconds")),
        ):
            if seconds is not None:
                found[f"{kind}@{name}"] = seconds, "measured"
    return found


def of_file(path) -> dict[str, tuple[float, str]]:
    "The lines of a file of times."
    rows = list(csv.reader(read_text(path).splitlines())) if path.exists() else []
    return {r[0]: (float(r[1]), r[2]) for r in rows if len(r) == 3 and r[0] != "stage"}


def estimated(run: str) -> dict[str, tuple[float, str]]:
    "Trainings and evaluations of a run by what they compute (12_cost); simulators' time is not in it."
    settings, found = load(run), {}
    methods = sorted({m for methods in settings.pipeline.values() for m in methods})
    for row in run_cost(settings, H100, methods, {}).to_dict("records"):
        for seed in settings.pipeline[row["task"]][row["method"]]:
            cell = f"{run}-{row['task']}-{row['method']}-s{seed}"
            for kind, hours in (("train", row["training, h"]), ("evaluate", row["acting, h"])):
                found[f"{kind}@{cell}"] = 3600 * hours / row["seeds"], "estimated for an H100"
    return found


def main(runs: list[str]):
    path = published().folder / "times.csv"
    times = {**of_file(path), **of_evaluations(), **of_file(own().folder / "times.csv")}
    for run in runs:
        known = {s for s, (_, source) in times.items() if source == "measured"}
        times |= {s: t for s, t in estimated(run).items() if s not in known}
    lines = [HEADER, *((s, f"{t:.1f}", source) for s, (t, source) in sorted(times.items()))]
    write_text(path, "".join(",".join(line) + "\n" for line in lines))
    print(f"{path.relative_to(root())}: {len(times)} stages")


if __name__ == "__main__":
    main(sys.argv[1:])
