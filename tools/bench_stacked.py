"""Times training K seeds together, one batched product for all, against the same seeds alone.

python tools/bench_stacked.py --out results/stacked.csv
python tools/bench_stacked.py --device cuda --processes --cases paper-core:dp paper-core:dp_ag --out FILE

Both sides do whole training steps on made-up episodes of Push-T with keypoints, with a profile's nets. On
a CPU they take turns in one process with one thread, and CPU time is compared: on n cores, n seeds can
run at once either way. On a GPU wall time is compared, with `--processes`: the seeds alone are K
processes that share the GPU, as the pipeline would run them. A ratio below 1 says that together is
faster."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import multiprocessing
import platform
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from bench import turn
from bench_subjects import count, episodes

from dpag.config import seed_everything
from dpag.data import WindowDataset
from dpag.policy import build_policy
from dpag.settings import load
from dpag.stacked import Stack
from dpag.train import Trainee, Training, pick_device, steps_together, train_step

CASES = ("laptop:dp", "laptop:dp_ag", "interplay:ab_dp", "interplay:ab_full")


def on(device: torch.device, data: WindowDataset) -> WindowDataset:
    "The data on a device."
    data.obs = {k: v.to(device) for k, v in data.obs.items()}
    data.action, data.idx, data.owner = (a.to(device) for a in (data.action, data.idx, data.owner))
    data.device = device
    return data


def trainings(profile: str, method: str, seeds: range, device: torch.device) -> list[Training]:
    "Trainings of these seeds, with nothing done yet."
    cell = load(f"{profile}-scripted").cell("pusht_kp", method)
    data, made = on(device, episodes(cell.policy)), []
    for seed in seeds:
        seed_everything(seed)
        policy = build_policy(cell.method, cell.policy, dataset=data).to(device)
        policy.diagnosing = False  # as in the steps that are not logged
        made.append(Training(Trainee(policy, seed), data, cell.train, None, None))
    return made


class Alone:
    "A call does a step of each training, one after the other."

    def __init__(self, of: list[Training]):
        self.of, self.step = of, 0

    def __call__(self):
        self.step += 1
        for t in self.of:
            train_step(t.run, t.dataset, t.settings, seed=t.own.seed, step=self.step, batch=t.draw(self.step))
        if self.of[0].run.device.type == "cuda":
            torch.cuda.synchronize()


class Together(Alone):
    "A call does a step of all trainings at once."

    def __init__(self, of: list[Training]):
        super().__init__(of)
        self.stack = Stack([t.run for t in of])

    def __call__(self):
        self.step += 1
        steps_together(self.stack, self.of, self.of[0].settings, self.step)
        if self.of[0].run.device.type == "cuda":
            torch.cuda.synchronize()


def child(seed: int, profile: str, method: str, device: str, steps: int, barrier, queue):
    "A seed in a process of its own, for `steps` steps at the same time as others."
    call = Alone(trainings(profile, method, range(seed, seed + 1), torch.device(device)))
    for _ in range(5):
        call()
    barrier.wait()
    start = time.perf_counter()
    for _ in range(steps):
        call()
    queue.put(time.perf_counter() - start)


def side_by_side(k: int, *what, steps: int) -> float:
    "Wall seconds of a step of k seeds, each in a process of its own, all at once."
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(k), context.Queue()
    children = [context.Process(target=child, args=(s, *what, steps, barrier, queue)) for s in range(k)]
    for c in children:
        c.start()
    walls = [queue.get() for _ in children]
    for c in children:
        c.join()
    return max(walls) / steps


def compare(profile: str, method: str, k: int, device: torch.device, args) -> dict:
    "A row of the table: ms of one seed's step, together and alone."
    clock = 1 if device.type == "cuda" or args.processes else 0
    together = Together(trainings(profile, method, range(k), device))
    alone = Alone(trainings(profile, method, range(k), device))
    of_both: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for times, call in zip(of_both, (together, alone)):
            if call is together or not args.processes:
                times.append(median(t[clock] for t in turn(call, args.per_turn)) / k)
        if args.processes:
            of_both[1].append(side_by_side(k, profile, method, str(device), steps=args.per_turn) / k)
    cards = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type}, {cards}",
        "clock": "wall" if clock else "CPU",
        "alone": "processes" if args.processes else "in turn",
        "profile": profile,
        "method": method,
        "parameters": count(alone.of[0].own.model),
        "seeds": k,
        "together_ms": round(1e3 * median(of_both[0]), 3),
        "alone_ms": round(1e3 * median(of_both[1]), 3),
        "ratio": round(median(a / b for a, b in zip(*of_both)), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--cases", nargs="+", default=CASES, help="profile:method")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 3, 5])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--per-turn", type=int, default=8)
    parser.add_argument(
        "--processes", action="store_true", help="alone: a process for each seed, all at once"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, rows = pick_device(args.device), []
    for case in args.cases:
        for k in args.seeds:
            rows.append(compare(*case.split(":"), k, device, args))
            print(rows[-1], flush=True)
    if args.out:
        pd.DataFrame(rows).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
