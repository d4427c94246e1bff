"""Times acting and training: dpag's methods, their peers', another checkout's. `make bench` runs it.

All subjects of a case take turns (A B C A B C …) in one process with one thread, because a shared machine's
speed changes by the minute: a ratio is the median, over the rounds, of two turns of the same round.
pytest-benchmark and asv time one subject after the other, so they would compare different minutes. Another
checkout (`--dpag-path`) has a process of its own, since two packages named dpag cannot share one, but takes
its turns like the rest and is timed inside."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
LAGGED = {"guidance": {"evolve": "lagged"}}

# ---- turns


def turn(call, n: int) -> list[tuple[float, float]]:
    "CPU and wall seconds of `n` calls. Where there are several, one before them warms the caches."
    if n > 1:
        call()
    times = []
    for _ in range(n):
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return times


@dataclass
class Entry:
    "A subject in a table: its name, how a turn is taken, what is known of its net, and its turns' times."

    what: str
    take: object
    info: dict
    turns: list[list[tuple[float, float]]] = field(default_factory=list)

    def cpu(self) -> list[float]:
        "CPU seconds, the median of each turn."
        return [median(c for c, _ in times) for times in self.turns]

    def calls(self, clock: int) -> list[float]:
        "Seconds of every call: CPU (0) or wall (1)."
        return sorted(t[clock] for times in self.turns for t in times)


def interleave(entries: list[Entry], seconds: float, rounds: int, per_turn: int):
    """Let the entries take turns for about `seconds`, `rounds` rounds at most and one at least.

    The first calls, which may set things up, are left out; where they are dear (100 steps of a large net)
    they are the first round."""
    first = [e.take(1) for e in entries]
    once = [calls[0][0] for calls in first]
    if dear := sum(once) > seconds / 3:
        for e, calls in zip(entries, first):
            e.turns.append(calls)
    lengths = [min(per_turn, max(1, round(0.1 / t))) for t in once]
    start = time.perf_counter()
    for done in range(1, rounds + 1 - dear):
        for e, n in zip(entries, lengths):
            e.turns.append(e.take(n))
        spent = time.perf_counter() - start
        if spent * (done + 1) / done > seconds:
            break


# ---- another checkout, in a process of its own


def answer(request: dict, subjects: dict, root: Path):
    "What a worker says to a request: make a subject, let it take a turn, or forget all."
    from bench_subjects import Case, dpag_subject

    if request["do"] == "forget":
        return subjects.clear()
    key = json.dumps(request["subject"])
    if request["do"] == "make":
        case, kind, changes = request["subject"]
        case = Case(**{**case, "channels": tuple(case["channels"])})
        subjects[key] = dpag_subject(case, kind, changes, root)
        return subjects[key].info()
    return turn(subjects[key].call, request["n"])


def serve(root: Path):
    "A worker: answers requests, one JSON line each, until its input ends."
    import torch

    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    subjects: dict = {}
    for line in sys.stdin:
        try:
            reply = {"ok": answer(json.loads(line), subjects, root)}
        except Exception as e:
            reply = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(reply), file=out, flush=True)


class Worker:
    "The process that times the checkout of dpag at `path`."

    def __init__(self, path: Path):
        from bench_report import revision

        self.title = revision(path)
        command = [sys.executable, str(HERE), "--serve", str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        "The answer to a request. Raises RuntimeError with the worker's error."
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline() or '{"error": "the worker has ended"}')
        if "error" in reply:
            raise RuntimeError(f"{self.title}: {reply['error']}")
        return reply["ok"]

    def entry(self, what: str, subject: list) -> Entry:
        "A subject of this checkout."
        info = self.ask(do="make", subject=subject)
        return Entry(f"{what} at {self.title}", lambda n: self.ask(do="turn", subject=subject, n=n), info)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- cases


def methods_of(case, first: bool) -> list[tuple[str, str, dict]]:
    "Title, method and changes of dpag's subjects. The flows have no sampler: they are in the `first` column."
    if case.part == "train":
        half, split = {"train": {"precision": "bfloat16"}}, {"guidance": {"denoise_on": "split"}}
        return [
            ("DP", "dp", {}),
            ("DP-AG, both latents", "dp_ag", {"guidance": {"denoise_on": "both"}}),
            ("DP-AG, split", "dp_ag", split),
            ("DP, bfloat16", "dp", half),
            ("DP-AG, split, bfloat16", "dp_ag", {**split, **half}),
        ]
    every = {"guidance": {"evolve": "every", "evolve_every": 1}}
    found = [("DP", "dp", {}), ("DP-AG, every step", "dp_ag", every), ("DP-AG, lagged", "dp_ag", LAGGED)]
    if case.part == "act" and case.steps > 8:
        rarely = {"guidance": {"evolve": "lagged", "evolve_every": 8}}
        found.append(("DP-AG, lagged, each 8th step", "dp_ag", rarely))
    if case.part == "laptop":
        found.append(("DP-AG, static", "dp_ag", {"guidance": {"evolve": "never"}}))
    if first:
        found += [("FlowPolicy", "flow_policy", {}), ("AdaFlow", "ada_flow", {})]
    return found


def peers_of(case, peer_path: str | None) -> list[tuple[str, object]]:
    "Title and maker of the peers' subjects that this environment has."
    from bench_subjects import lerobot_subject, stanford_subject

    found: list = []
    if case.part == "laptop" or peer_path == "none":
        return found
    if importlib.util.find_spec("lerobot"):
        found.append(("lerobot", lambda: lerobot_subject(case)))
        if case.part == "train":
            found.append(("lerobot, fused AdamW", lambda: lerobot_subject(case, fused=True)))
    if peer_path:
        found.append(("real-stanford", lambda: stanford_subject(case, peer_path)))
    return found


def entries_of(case, first: bool, workers: list[Worker], peer_path: str | None) -> list[Entry]:
    "The entries of a case, in the order of their turns: DP is the first; the machine's two come last."
    from bench_subjects import dpag_subject, gemm_subject, read_subject

    made = [
        (what, dpag_subject(case, kind, changes, ROOT)) for what, kind, changes in methods_of(case, first)
    ]
    made += [(what, make()) for what, make in peers_of(case, peer_path)]
    made += [("GEMM", gemm_subject()), ("read", read_subject(made[0][1].parameters))]
    entries = [Entry(w, lambda n, s=s: turn(s.call, n), s.info()) for w, s in made]
    for worker in workers:
        entries[-2:-2] = older(worker, case)
    return entries


def older(worker: Worker, case) -> list[Entry]:
    """The entries of another checkout: DP and DP-AG as here and, with the laptop's net, DP as its settings
    have it."""
    entries = [worker.entry(w, [asdict(case), k, c]) for w, k, c in methods_of(case, False)[:2]]
    if case.part == "laptop":
        own = {**asdict(case), "steps": 0}
        entries.append(worker.entry("DP as set", [own, "dp", {}]))
    return entries


def cases_of(quick: bool, full: bool) -> list[tuple[object, float, int, int]]:
    "Every case with its seconds, its most rounds, and the most calls of a turn."
    from bench_subjects import Case

    if quick:
        small = (16, 32)
        act = [Case("act", small, "ddim", 2), Case("act", small, "ddpm", 3)]
        cases = [*act, Case("train", small, batch=8), Case("laptop", (), "ddim", 2)]
        return [(case, 0.5, 2, 2) for case in cases]
    small, paper = (64, 128, 256), (256, 512, 1024)
    samplers = [("ddim", 10), ("ddim", 16), ("ddpm", 100)]
    act = [(Case("act", small, *s), seconds, 20, 5) for s, seconds in zip(samplers, (10, 12, 25))]
    large = samplers if full else samplers[:2]  # a round of 100 steps takes minutes
    act += [(Case("act", paper, *s), seconds, 10, 1) for s, seconds in zip(large, (30, 40, 60))]
    train = [(Case("train", small, batch=b), seconds, 20, 3) for b, seconds in ((64, 20), (256, 40))]
    laptop = [(Case("laptop", (), "ddim", k, b), 12, 60, 20) for b in (1, 50) for k in (8, 4, 2)]
    return [*act, *train, *laptop]


# ---- rows


def ratio(entry: Entry, other: Entry | None) -> float:
    "The median over the rounds of one's CPU time to another's; nan without the other."
    if other is None:
        return math.nan
    return median(a / b for a, b in zip(entry.cpu(), other.cpu()))


def floor_seconds(info: dict, case, gemm: Entry, read: Entry) -> float:
    """What a call's passes would take at the speed of the machine's matrix product, or, if that is longer, at
    the speed at which it reads as many weights. The encoder and what is between the passes cost nothing."""
    if not info["passes"]:
        return math.nan
    compute = case.batch * info["flops"] * median(gemm.cpu()) / gemm.info["flops"]
    memory = info["parameters"] * median(read.cpu()) / read.info["parameters"]
    return info["passes"] * max(compute, memory)


def row(entry: Entry, case, entries: dict[str, Entry]) -> dict:
    "An entry's line of the csv file."
    cpu, wall, info = entry.calls(0), entry.calls(1), entry.info
    p99 = math.ceil(0.99 * len(cpu)) - 1
    return {
        "part": case.part,
        "net": case.net,
        "batch": case.batch,
        "column": case.column,
        "what": entry.what,
        "weights": info["parameters"],
        "mflop": info["flops"] / 1e6,
        "passes": info["passes"],
        "n": len(cpu),
        "cpu_ms": 1e3 * median(cpu),
        "p50_ms": 1e3 * median(wall),
        "p99_ms": 1e3 * wall[p99],
        "p99_cpu_ms": 1e3 * cpu[p99],
        "to_dp": ratio(entry, entries["DP"]),
        "to_lerobot": ratio(entry, entries.get("lerobot")),
        "floor_ms": 1e3 * floor_seconds(info, case, entries["GEMM"], entries["read"]),
        "samples_s": case.batch / median(cpu) if case.part == "train" else math.nan,
    }


def measure(case, first: bool, plan: tuple, workers: list[Worker], peer_path: str | None) -> list[dict]:
    "The rows of a case."
    entries = entries_of(case, first, workers, peer_path)
    interleave(entries, *plan)
    for worker in workers:
        worker.ask(do="forget")
    by_name = {e.what: e for e in entries}
    return [row(e, case, by_name) for e in entries]


def arguments() -> argparse.Namespace:
    "The command line's."
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="small nets, no peers: seconds; proves that it runs")
    p.add_argument(
        "--full", action="store_true", help="DDPM with 100 steps of the paper's U-Net, too: minutes"
    )
    p.add_argument("--parts", default="act,train,laptop", help="which parts; all by default")
    p.add_argument(
        "--dpag-path", action="append", default=[], type=Path, help="another checkout of dpag to time"
    )
    p.add_argument("--peer-path", help="a checkout of real-stanford/diffusion_policy to time")
    p.add_argument("--out", type=Path, default=ROOT / "results", help="folder of bench.csv and bench.md")
    p.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return p.parse_args()


def main():
    "Measure, and write bench.csv and bench.md."
    args = arguments()
    sys.path.insert(0, str(args.serve.resolve() if args.serve else ROOT))  # whose dpag is imported
    if args.serve:
        return serve(args.serve.resolve())
    import torch
    from bench_report import machine, read_csv, report, write_csv

    torch.set_num_threads(1)
    workers = [Worker(p) for p in args.dpag_path]
    rows: list[dict] = []
    seen: set = set()
    for case, *plan in cases_of(args.quick, args.full):
        if case.part not in args.parts.split(","):
            continue
        start, group = time.perf_counter(), (case.part, case.net, case.batch)
        rows += measure(case, group not in seen, plan, workers, "none" if args.quick else args.peer_path)
        seen.add(group)
        spent = time.perf_counter() - start
        print(f"{case.part}, {case.net}, {case.column}, batch {case.batch}: {spent:.0f} s", flush=True)
    for worker in workers:
        worker.close()
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "bench.csv", rows)
    rows = read_csv(args.out / "bench.csv")  # as it is rounded there: one file says what the other does
    (args.out / "bench.md").write_text(report(rows, machine(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
