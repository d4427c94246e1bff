"""Writes what tools/bench.py has measured: bench.csv, a line for each subject of each case, and bench.md."""

from __future__ import annotations

import csv
import math
import platform
import subprocess
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent


def revision(path: Path) -> str:
    "The short commit of a checkout, with a + where something in it has changed since."
    git = ["git", "-C", str(path)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    dirty = (
        subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "dpag"], capture_output=True).returncode == 1
    )
    return (commit or path.name) + "+" * dirty


def processor() -> str:
    "The processor's name."
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(rows: list[dict]) -> str:
    "One sentence: what was timed, where, and how fast that machine multiplies and reads."
    import torch

    gemm = [2 * 768**3 / r["cpu_ms"] / 1e6 for r in rows if r["what"] == "GEMM"]
    reads = {r["weights"]: 4 * r["weights"] / r["cpu_ms"] / 1e6 for r in rows if r["what"] == "read"}
    speeds = ", ".join(f"{v:.0f} GB/s of {4 * k / 1e6:.0f} MB" for k, v in sorted(reads.items()))
    fast = " with AVX-512" if "AVX512" in torch.backends.cpu.get_cpu_capability() else ""
    return (
        f"dpag at {revision(ROOT)}; {processor()}{fast}, one thread; torch {torch.__version__}, "
        f"Python {platform.python_version()}. Matrix product: {median(gemm):.0f} GFLOP/s; "
        f"weights are read at {speeds}."
    )


def number(x: float) -> str:
    "Three digits."
    return "" if math.isnan(x) else f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def grid(rows: list[dict], cell, extra=()) -> list[str]:
    "A markdown table: a line for each subject, a column for each case, after the `extra` columns."
    columns = list(dict.fromkeys(r["column"] for r in rows))
    names = list(dict.fromkeys(r["what"] for r in rows))
    at = {(r["what"], r["column"]): r for r in rows}
    some = {r["what"]: r for r in rows}
    lines = ["| | " + " | ".join([*(title for title, _ in extra), *columns]) + " |"]
    lines.append("|---|" + "---:|" * (len(extra) + len(columns)))
    for name in names:
        cells = [f(some[name]) for _, f in extra]
        cells += [cell(at[name, c]) if (name, c) in at else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def timed(r: dict) -> str:
    "Milliseconds of CPU time, to DP's, and to the floor."
    return f"{number(r['cpu_ms'])} · {r['to_dp']:.2f} · {number(r['cpu_ms'] / r['floor_ms'])}"


def one_act(r: dict) -> str:
    "p50 and p99 of CPU time and p99 of wall time, in milliseconds, and the CPU time to DP's."
    return " · ".join([*(number(r[k]) for k in ("cpu_ms", "p99_cpu_ms", "p99_ms")), f"{r['to_dp']:.2f}"])


def trained(r: dict) -> str:
    "Samples a second, and those to DP's."
    return f"{number(r['samples_s'])} · {1 / r['to_dp']:.2f}"


WEIGHTS = ("weights", lambda r: f"{r['weights'] / 1e6:.3f} M")
FLOPS = ("MFLOP a pass", lambda r: f"{r['mflop']:.1f}")


def summary(rows: list[dict]) -> list[str]:
    "The ratios that are asked for: of CPU times, or of samples a second."
    lines = [
        "| case | DP, fastest, to lerobot | DP-AG, cheapest, to DP | the same, to DP of another checkout |",
        "|---|---:|---:|---:|",
    ]
    for key in dict.fromkeys((r["part"], r["net"], r["batch"], r["column"]) for r in rows):
        here = [r for r in rows if (r["part"], r["net"], r["batch"], r["column"]) == key]
        fast = min((r for r in here if r["what"] in ("DP", "DP, bfloat16")), key=lambda r: r["to_dp"])
        alike = [r for r in here if " at " not in r["what"] and "bfloat16" not in r["what"]]
        guided = [r for r in alike if r["what"].startswith("DP-AG")]
        best = min((r for r in guided if "static" not in r["what"]), key=lambda r: r["to_dp"])
        old = [
            r["to_dp"] for start in ("DP as set at ", "DP at ") for r in here if r["what"].startswith(start)
        ]
        up = (lambda x: 1 / x) if key[0] == "train" else (lambda x: x)
        ratios = [up(fast["to_lerobot"]), best["to_dp"], best["to_dp"] / old[0] if old else math.nan]
        name = f"{key[0]}, {key[1]}, batch {key[2]}" + ("" if key[0] == "train" else f", {key[3]}")
        lines.append(f"| {name} | " + " | ".join("" if x != x else f"{x:.2f}" for x in ratios) + " |")
    return lines


HOW = """\
Subjects took turns in one process. Ratios are medians over the rounds and hold on other machines; absolute
times do not. Random weights, observations of Push-T with keypoints, horizon 16. dpag's latent is as wide as
what the peers' nets see, so the nets are the same; dpag's encoder and its scaling are in its times, the
scaling of lerobot is not. A call's floor is its net's FLOPs at the speed of a matrix product or, if that is
longer, its weights at the speed of reading as many; a backward pass counts like a forward one. AdaFlow
chooses its number of steps, here with random weights. The flows have no sampler: they are in the first
column only.""".replace("\n", " ")
STEP = (
    "Samples a second of CPU time · to DP's. A step is forward, backward, clipping and optimiser. dpag's "
    "also draws its batch and averages its weights; lerobot averages none; real-stanford does not clip."
)


def report(rows: list[dict], about: str) -> str:
    "The markdown file."
    shown = [r for r in rows if r["what"] not in ("GEMM", "read")]
    out = ["# Speed", "", "`make bench` wrote this. " + about, "", HOW, "", "## In short", ""]
    out += [
        "Acting: CPU time to CPU time. Training: DP's samples a second to lerobot's; DP-AG's time to DP's."
    ]
    out += ["", *summary(shown)]
    groups: dict[tuple, list[dict]] = {}
    for r in shown:
        groups.setdefault((r["part"], r["net"], r["batch"] if r["part"] == "laptop" else 0), []).append(r)
    for (part, net, batch), here in groups.items():
        title, legend, cell, extra = {
            "act": (
                f"Acting, U-Net {net}, batch 1",
                "CPU ms · to DP · to its own floor",
                timed,
                (WEIGHTS, FLOPS),
            ),
            "train": (f"Training, U-Net {net}", STEP, trained, (WEIGHTS, FLOPS)),
            "laptop": (
                f"Acting, the laptop's net, batch {batch}",
                "p50 · p99 of CPU ms · p99 of wall ms, which has other programs in it · CPU time to DP's",
                one_act,
                (WEIGHTS,),
            ),
        }[part]
        out += ["", "## " + title, "", legend, "", *grid(here, cell, extra)]
    return "\n".join(out) + "\n"


def write_csv(path: Path, rows: list[dict]):
    "Write the rows, five digits of each number."
    with open(path, "w", encoding="utf-8", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        table.writeheader()
        for r in rows:
            table.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()})


def read_csv(path: Path) -> list[dict]:
    "The rows of a file that `write_csv` wrote."
    words = {"part", "net", "column", "what"}
    whole = {"batch", "weights", "n"}
    with open(path, encoding="utf-8", newline="") as f:
        return [
            {k: v if k in words else int(v) if k in whole else float(v) for k, v in r.items()}
            for r in csv.DictReader(f)
        ]
