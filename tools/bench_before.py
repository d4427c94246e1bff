"""`make repro PROFILE=smoke` now and at an earlier commit, in turns, into results/before.csv.

python tools/bench_before.py COMMIT [--runs 3]

Each has a clone and an environment of its own, made first; before each run all that the last one has
left is removed. Nothing else should run on the machine."""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd

from dpag.files import atomic, root


def make(folder: Path, *arguments: str):
    "`make` in a clone, with its own environment alone; what it says goes to a file beside the clone."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        subprocess.run(["make", *arguments], cwd=folder, env=env, stdout=log, stderr=log, check=True)


def clone(folder: Path, commit: str):
    "A clone at a commit, with its environment."
    subprocess.run(["git", "clone", "--quiet", str(root()), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", commit], check=True)
    make(folder, "install")


def seconds(folder: Path) -> float:
    "How long the whole run takes, from nothing but the environment."
    subprocess.run(["git", "-C", str(folder), "clean", "-xdffq", "--exclude=.venv"], check=True)
    make(folder, "install")
    start = time.perf_counter()
    make(folder, "repro", "PROFILE=smoke")
    return time.perf_counter() - start


def main():
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    rev = ["git", "-C", str(root()), "rev-parse", "--short"]
    before, now = (
        subprocess.run([*rev, name], capture_output=True, text=True, check=True).stdout.strip()
        for name in (args.commit, "HEAD")
    )
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        folders = {commit: Path(tmp).resolve() / commit for commit in (before, now)}
        for commit, folder in folders.items():
            clone(folder, commit)
        for run in range(args.runs):
            took = {commit: seconds(folder) for commit, folder in folders.items()}
            row = {"before": before, "now": now, "run": run, "before_s": took[before], "now_s": took[now]}
            rows.append({**row, "ratio": took[now] / took[before]})
            print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    with atomic(root() / "results/before.csv") as part:
        pd.DataFrame(rows).round(3).to_csv(part, index=False)


if __name__ == "__main__":
    main()
