"""What the pipeline's driver costs, and how good its order is: python tools/bench_pipeline.py

Nothing is trained. The schedule is that of the profile `paper` with the times in results/times.csv, on a
clock that is not real; the overhead is that of stages that take no time, first without DVC, then with it.
Written to results/pipeline.md."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml
from dvc.repo import Repo

from dpag.books import DvcBooks
from dpag.executor import End, Job, Machine
from dpag.files import write_text
from dpag.paths import published
from dpag.plan import make_plan
from dpag.schedule import (
    Driver,
    NoBooks,
    Simulated,
    forecast,
    likely_seconds,
    longest_ways,
    read_times,
    run_all,
)
from dpag.settings import load


def cells_graph(run: str) -> dict[str, set[str]]:
    "The data, trainings and evaluations of a run, and its report, without DVC."
    graph: dict[str, set[str]] = {}
    for name, cell in make_plan(load(run))["cells"].items():
        data = f"data@{run}-{cell['task']}"
        graph[data] = set()
        graph[f"train@{name}"] = {data}
        graph[f"evaluate@{name}"] = {f"train@{name}"}
    return {**graph, f"report@{run}": set(graph)}


def schedule(run: str, machines: list[Machine]) -> dict:
    "A row: how long the run takes on these machines, beside the lower bound."
    graph = cells_graph(run)
    needs, seconds = (
        load(run).execution.needs,
        likely_seconds(graph, read_times(published().folder / "times.csv")),
    )
    jobs = {}
    for stage in graph:
        kind = stage.partition("@")[0]
        jobs[stage] = Job(stage, "", **(needs[kind].model_dump() if kind in needs else {}))
    start = time.perf_counter()
    length = forecast(graph, jobs, seconds, machines)
    took = time.perf_counter() - start
    gpus = sum(m.gpus for m in machines)
    work = sum(seconds[s] * jobs[s].gpus for s in graph) / gpus
    path = max(longest_ways(graph, seconds).values())
    return {
        "cells": sum(s.startswith("train@") for s in graph),
        "GPUs": gpus,
        "longest way, h": path / 3600,
        "work / GPUs, h": work / 3600,
        "schedule, h": length / 3600,
        "ratio to the bound": length / max(path, work),
        "computed in, s": took,
    }


def chains(n: int, width: int) -> dict[str, set[str]]:
    "`n` stages in `width` chains."
    return {str(i): {str(i - width)} if i >= width else set() for i in range(n)}


def overhead(n: int, width: int = 100) -> dict:
    "A row: what the driver takes for `n` stages of no time, in chains of which `width` run side by side."
    graph = chains(n, width)
    jobs, seconds = {s: Job(s, "") for s in graph}, dict.fromkeys(graph, 0.0)
    executor = Simulated([Machine(width, 1e6)], seconds)
    start = time.perf_counter()
    run_all(Driver(graph, jobs, seconds, executor, NoBooks()))
    took = time.perf_counter() - start
    return {"stages": n, "seconds": took, "ms a stage": 1e3 * took / n}


class Writing(Simulated):
    "Stages that take no time and write one small file each."

    def submit(self, job: Job):
        super().submit(job)
        Path(job.name).write_text(job.name, encoding="utf-8")

    def wait(self, seconds: float) -> list[End]:
        if not self.running:
            time.sleep(0.001)  # DVC's thread is at work
        return super().wait(seconds)


def with_dvc(n: int, width: int = 100) -> dict:
    "A row: the same with DVC, which hashes what each stage has made, caches it and writes dvc.lock."
    graph = chains(n, width)
    stages = {s: {"cmd": f"echo {s} > {s}", "deps": sorted(needs), "outs": [s]} for s, needs in graph.items()}
    jobs, seconds = {s: Job(s, "") for s in graph}, dict.fromkeys(graph, 0.0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Repo.init(no_scm=True).close()
        write_text(Path("dvc.yaml"), yaml.safe_dump({"stages": stages}))
        start = time.perf_counter()
        with contextlib.closing(DvcBooks(Path(folder))) as books:
            opened = time.perf_counter() - start
            run_all(Driver(graph, jobs, seconds, Writing([Machine(width, 1e6)], seconds), books))
        took = time.perf_counter() - start
    return {"stages": n, "opened in, s": opened, "seconds": took, "ms a stage": 1e3 * took / n}


TEXT = """# The pipeline's driver

By `python tools/bench_pipeline.py`, in one process, on a machine of {cpus} cores that had other work too.

## The profile `paper` on clusters that are not real

{cells} cells. Times of trainings and of acting are estimates for an H100 ([12_cost](../nbs/12_cost.ipynb)).
The bound is the longer of two: the longest way, and all work on GPUs shared evenly.

{schedules}

## Stages that take no time

{overheads}

## The same with DVC's books

Each stage writes a file of a few bytes, which is hashed and cached; dvc.lock is written
once for all stages of a while.

{books}
"""


def main():
    clusters = [[Machine(64, 512, 8) for _ in range(n)] for n in (1, 3, 4, 8)]
    rows = pd.DataFrame([schedule("paper-human", machines) for machines in clusters])
    zero = pd.DataFrame([overhead(n) for n in (1000, 10_000)])
    dvc = pd.DataFrame([with_dvc(n) for n in (100, 1000, 10_000)])
    text = TEXT.format(
        cpus=os.cpu_count(),
        cells=rows.pop("cells")[0],
        schedules=rows.to_markdown(index=False, floatfmt=".4g"),
        overheads=zero.to_markdown(index=False, floatfmt=".4g"),
        books=dvc.to_markdown(index=False, floatfmt=".4g"),
    )
    write_text(published().folder / "pipeline.md", text)
    print(text)


if __name__ == "__main__":
    main()
