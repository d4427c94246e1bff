"""`make bench`: its smallest form runs, and its two files say the same."""

import math
import subprocess
import sys

import pytest

from dpag.files import read_text, root

sys.path.append(str(root() / "tools"))
from bench_report import read_csv, report


def check(folder):
    "The csv file is plausible, and the markdown file is what it gives."
    rows, text = read_csv(folder / "bench.csv"), read_text(folder / "bench.md")
    assert {r["part"] for r in rows} == {"act", "train", "laptop"}
    for r in rows:
        assert r["cpu_ms"] > 0 and 0 < r["p50_ms"] <= r["p99_ms"] and r["n"] >= 1, r
        assert r["what"] != "DP" or r["to_dp"] == 1
        if r["part"] == "train":
            assert math.isclose(r["samples_s"], 1e3 * r["batch"] / r["cpu_ms"], rel_tol=1e-3)
    about = next(x for x in text.splitlines() if x.startswith("`make bench` wrote this. "))
    assert text == report(rows, about.removeprefix("`make bench` wrote this. "))
    tables = [[x for x in b.splitlines() if x.startswith("|")] for b in text.split("\n\n")]
    assert all(len({x.count("|") for x in t}) <= 1 for t in tables), "lines with different numbers of cells"
    return {r["what"] for r in rows}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(root() / "tools" / "bench.py"), "--quick", "--out", str(out)]
    subprocess.run([*command, "--dpag-path", str(root())], check=True)
    return out


def test_the_smallest_benchmark_runs_with_another_checkout_beside_it(quick):
    whats = check(quick)
    assert {
        "DP",
        "DP, bfloat16",
        "DP-AG, split",
        "DP-AG, every step",
        "DP-AG, lagged",
        "FlowPolicy",
        "AdaFlow",
    } <= whats
    assert any(w.startswith("DP as set at ") for w in whats)


def test_the_committed_table_is_what_its_csv_file_gives():
    assert "lerobot" in check(root() / "results")
