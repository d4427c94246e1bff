"""The pipeline on two Ray nodes of this machine, whole and with something killed, into results/cluster.csv.

python tools/bench_cluster.py [--profile smoke] [--only PART] [--cases "this machine,two nodes,…"]

Each case runs in a fresh clone of what is committed here. A node is killed when a training that runs on it
has a checkpoint, the driver when half of the stages have ended. Weights, rows of episodes and tables are
compared with those of the first case: all but measured times must be equal, to the byte."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
from ray.cluster_utils import Cluster

from dpag.files import atomic, root

CASES = ("this machine", "two nodes", "a node killed", "the driver killed")
EQUAL = ("checkpoint/model.safetensors", "episodes.csv", "acting.csv", "curve.csv")
TIMES = ("act_", "train_")  # metrics that begin so are measured times


def driver(clone: Path, args: argparse.Namespace, ray: str = "") -> subprocess.Popen:
    "`make repro`'s command in a clone, with this environment."
    options = [
        "--profile",
        args.profile,
        "--only",
        args.only,
        "--jobs",
        "2",
        *(["--ray", ray] if ray else []),
    ]
    log = open(clone.with_suffix(".log"), "a", encoding="utf-8")  # noqa: SIM115 (the driver's, as long as it runs)
    return subprocess.Popen(
        [sys.executable, "-m", "dpag.pipeline", *options],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def attendants(clone: Path) -> dict[str, psutil.Process]:
    "The processes under which stages of a clone run, by stage."
    found = {}
    for p in psutil.process_iter(["cmdline", "cwd"]):
        words = p.info["cmdline"] or []
        if "dpag.executor" in words and p.info["cwd"] == str(clone):
            found[words[-1].rpartition("dpag/")[2].removesuffix(".ended")] = p
    return found


def kill_a_node(clone: Path) -> str:
    "Kill the node of a training that has a checkpoint, Ray's raylet and workers; the stage, if there is one."
    for stage, attendant in attendants(clone).items():
        kind, _, cell = stage.partition("@")
        if kind != "train":
            continue
        folder = clone / "results/runs/train"
        resumes = folder.rglob("resume.safetensors")
        if not any(cell == "-".join(r.parent.relative_to(folder).parts) for r in resumes):
            continue
        above = [p for p in attendant.parents() if p.name().startswith(("raylet", "ray::"))]
        raylet = next(p for p in above if p.name() == "raylet")
        for p in [raylet, *raylet.children(recursive=False)]:
            p.kill()
        return stage
    return ""


def ended(log: Path) -> tuple[int, int]:
    "How many stages have ended, of how many."
    lines = [x for x in log.read_text(encoding="utf-8").splitlines() if x.startswith("[")]
    n, of = lines[-1][1:].split("]")[0].split("/") if lines else ("0", "1")
    return int(n), int(of)


def kill_the_driver(clone: Path, process: subprocess.Popen) -> str:
    "Kill the driver once half of the stages have ended; when that was, if it was."
    n, of = ended(clone.with_suffix(".log"))
    if 2 * n < of:
        return ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    return f"after {n} of {of} stages"


def results(clone: Path) -> dict[str, bytes]:
    "What must be equal, by name."
    out = clone / "results/runs"
    found = {p.relative_to(out): p for p in out.rglob("*") if str(p).endswith(EQUAL)}
    kept = {str(name): path.read_bytes() for name, path in found.items()}
    for path in sorted(out.glob("tables/*.csv")):
        rows = pd.read_csv(path)
        kept[path.name] = rows[~rows.metric.str.startswith(TIMES)].to_csv().encode()
    return kept


def run(case: str, clone: Path, args: argparse.Namespace) -> dict:
    "A row: how long a case took, and what was killed."
    subprocess.run(["git", "clone", "--quiet", str(root()), str(clone)], check=True)
    cluster, killed = None, ""
    if case != "this machine":
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
    address = cluster.address if cluster else ""
    start = time.time()
    process = driver(clone, args, address)
    while process.poll() is None:
        time.sleep(0.02)
        if killed or "killed" not in case:
            continue
        killed = kill_a_node(clone) if "node" in case else kill_the_driver(clone, process)
        if killed and "driver" in case:
            process = driver(clone, args, address)
    took = time.time() - start
    if cluster:
        cluster.shutdown()
    n, of = ended(clone.with_suffix(".log"))
    if process.returncode or ("killed" in case and not killed):
        said = clone.with_suffix(".log").read_text(encoding="utf-8")
        raise SystemExit(f"{said}\n{case}: status {process.returncode}, killed: {killed or 'nothing'}")
    return {"case": case, "killed": killed, "seconds": round(took, 1), "stages": of}


def main():
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--only", default="")
    parser.add_argument(
        "--cases", default=",".join(CASES), help="the first is what the others are compared with"
    )
    args = parser.parse_args()
    path, rows = root() / "results/cluster.csv", list[dict]()
    known = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame()
    if len(known):
        known = known[(known.profile != args.profile) | (known.only != args.only)]
    first: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for i, case in enumerate(args.cases.split(",")):
            clone = Path(tmp).resolve() / f"case{i}"
            row = run(case, clone, args)
            found = results(clone)
            first = first or found
            unlike = sorted(name for name in first | found if first.get(name) != found.get(name))
            row |= {"compared": len(found), "unlike": " ".join(unlike)}
            rows.append({"profile": args.profile, "only": args.only, **row})
            print(pd.DataFrame(rows).to_string(index=False), flush=True)
            with atomic(path) as part:
                pd.concat([known, pd.DataFrame(rows)]).to_csv(part, index=False)


if __name__ == "__main__":
    main()
