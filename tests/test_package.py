"""The wheel, in an environment of its own: train on one's own arrays, save, load, act."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from dpag.files import root

PROGRAM = """
import importlib.util
import numpy as np
from dpag import (
    DPAGConfig, DPConfig, Demonstrations, Protocol, TrainConfig, WindowDataset,
    build_policy, fit, load_policy, rollout, save_policy,
)
from dpag.paper import tables

assert importlib.util.find_spec("gymnasium") is None and importlib.util.find_spec("dvc") is None
rng = np.random.default_rng(0)
position = rng.normal(size=(400, 2)).cumsum(0).astype(np.float32)
arrays = {"position": position[:-1], "action": position[1:]}
demos = Demonstrations(arrays, np.arange(57, 400, 57))
dataset = WindowDataset.of(demos, horizon=16, n_obs_steps=2, n_action_steps=8)
for method in (DPConfig(), DPAGConfig()):
    policy = build_policy(method, dataset=dataset)
    log = fit(policy, dataset, TrainConfig(steps=3, batch_size=8, log_every=1), folder="work/" + method.kind)
    assert len(log) == 3
    save_policy(method.kind, policy)
    again, _ = load_policy(method.kind)


class Line:
    "The smallest environment: the point goes where it is told."
    def reset(self, seed=None):
        self.at = np.zeros(2)
        return {"position": self.at}, {"score": 0.0, "is_success": False, "agent_pos": self.at}
    def step(self, action):
        self.at = np.asarray(action, float)
        info = {"score": 0.5, "is_success": False, "agent_pos": self.at}
        return {"position": self.at}, 0.5, False, False, info
    def render(self): ...
    def close(self): ...


rows, _ = rollout(again, Line, range(3), Protocol(max_steps=10, n_obs_steps=2))
assert rows.score.tolist() == [0.5] * 3
print("tables of the paper:", len(tables()))
"""


@pytest.mark.timeout(900)
def test_the_wheel_works_on_its_own(tmp_path):
    dist, env, empty, source = (tmp_path / name for name in ("dist", "env", "empty", "source"))
    empty.mkdir()
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root() / name, source / name)
    shutil.copytree(root() / "dpag", source / "dpag", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "-w", dist)
    build = [sys.executable, "-m", "pip", "wheel", *options, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("dpag-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.endswith("paper_numbers.yaml") for n in names)
    assert not any(n.startswith(("nbs/", "tests/", "results/")) for n in names)
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, env], check=True)
    python = env / "bin/python"
    install = ["uv", "pip", "install", "--quiet", "--system-certs", "--python", python]
    done = subprocess.run(
        [*install, "-c", root() / "constraints.txt", wheel], capture_output=True, text=True, check=False
    )
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip("the registry of packages cannot be reached")
    assert done.returncode == 0, done.stderr
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DPAG_MIRROR")}
    out = subprocess.run(
        [python, "-c", PROGRAM], cwd=empty, env=clean, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    assert "tables of the paper: " in out.stdout
