"""A package outside of this repository adds a method and a task, and the pipeline runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dpag.files import read_text, root, write_text

PLUGIN = Path(__file__).parent / "plugin"
PARAMS = """
profile: laptop
demos: scripted
pipeline: {point: {dp: [0], consistency: [0, 1]}}
policy: {horizon: 8, n_action_steps: 4, net: {kind: mlp, width: 64, depth: 3, step_dim: 16}}
train: {steps: 400, batch_size: 64, warmup_steps: 20, checkpoint_every: 400}
evaluate: {n_episodes: 8, n_films: 0, latency_repeats: 1, curve: []}
spirals: {n_spirals: 60, n_test: 20, seeds: [0, 1], train: {steps: 4, log_every: 2, checkpoint_every: 4}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of what git tracks or would track, and the plugin installed beside it."
    folder, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    listed = ["git", "-C", str(root()), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0"):
        needed = not name.startswith("results/") or name == "results/spirals/tuning.csv"
        if name and needed and (root() / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root() / name, folder / name)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    source = tmp_path_factory.mktemp("plugin") / "dpag-example"
    shutil.copytree(PLUGIN, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(site), str(source)], check=True, capture_output=True)
    write_text(folder / "params.yaml", PARAMS)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}
    return folder, env


def run(project, *command):
    folder, env = project
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(900)
def test_a_method_and_a_task_from_outside_run_from_data_to_report(project):
    folder, _ = project
    out = run(project, "-m", "dpag.pipeline", "--jobs", "2")
    assert out.returncode == 0, out.stdout + out.stderr
    results = folder / "results/runs"
    rows = pd.read_csv(results / "eval/laptop-scripted/point/consistency/s0/episodes.csv")
    assert len(rows) == 8 and rows.score.mean() > 0.8 and "left" in rows
    provenance = json.loads(read_text(results / "eval/laptop-scripted/point/consistency/s0/run.json"))
    assert provenance["demos"] == "scripted"
    tables = "\n".join(read_text(p) for p in (results / "tables").glob("*.md"))
    assert "Consistency" in tables and "Point" in tables and "distance left, units" in tables
    again = run(project, "-m", "dpag.pipeline")
    assert "everything is up to date" in again.stdout, again.stdout + again.stderr


def test_an_unknown_name_lists_the_ones_from_outside(project):
    out = run(project, "-c", "from dpag.policy import METHODS; METHODS['consistancy']")
    assert "allowed are" in out.stderr and "consistency" in out.stderr
