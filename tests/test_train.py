"""The loop: a real SIGKILL, and what stops it."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dpag.config import seed_everything
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.noise_net import MLPConfig
from dpag.policy import MethodConfig, PolicyConfig, build_policy
from dpag.train import TrainConfig, check_fingerprint, fit, run_fingerprint

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from dpag.config import seed_everything
from dpag.methods.dp_ag import DPAGConfig
from dpag.policy import build_policy, save_policy
from dpag.train import TrainConfig, fit
data = conftest.drifting_blocks()
seed_everything(0)
policy = build_policy(DPAGConfig(), conftest.small_policy(), conftest.SHAPES, data)
train = TrainConfig(steps=400, batch_size=16, log_every=20, checkpoint_every=50, device="cpu")
fit(policy, data, train, seed=0, folder=sys.argv[1], fingerprint="t")
save_policy(sys.argv[1] + "/checkpoint", policy)
"""


def script(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(SCRIPT.format(tests=os.path.dirname(__file__)), encoding="utf-8")
    return path


def test_killed_and_resumed_equals_never_killed(tmp_path):
    run, env = script(tmp_path), {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, run, tmp_path / "whole"], check=True, env=env)
    kills = 0
    for at in (100, 250):
        p = subprocess.Popen([sys.executable, run, tmp_path / "killed"], env=env)
        deadline = time.time() + 120
        while time.time() < deadline and p.poll() is None:
            try:
                reached = pd.read_csv(tmp_path / "killed/log.csv").step.iloc[-1]
            except (FileNotFoundError, pd.errors.EmptyDataError):
                reached = 0
            if reached >= at:
                break
            time.sleep(0.005)
        p.send_signal(signal.SIGKILL)
        kills += p.wait() == -signal.SIGKILL
    assert kills == 2, "both runs must have been killed before they ended"
    assert not list((tmp_path / "killed").glob(".*checkpoint*"))
    subprocess.run([sys.executable, run, tmp_path / "killed"], check=True, env=env)
    a, b = (load_file(tmp_path / d / "checkpoint/model.safetensors") for d in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [pd.read_csv(tmp_path / d / "log.csv").drop(columns="seconds") for d in ("whole", "killed")]
    pd.testing.assert_frame_equal(*logs)


def trained(method, small, shapes, dataset, folder, steps=4, **kw):
    "A policy after a short run in `folder`, and its log."
    settings = TrainConfig(steps=steps, batch_size=8, log_every=1, checkpoint_every=2, device="cpu")
    seed_everything(0)
    policy = build_policy(method, small, shapes, dataset)
    return policy, fit(policy, dataset, settings, folder=folder, **kw)


def test_other_settings_are_not_continued(small, shapes, dataset, tmp_path):
    for fingerprint in ("a", "b"):
        _, log = trained(DPConfig(), small, shapes, dataset, tmp_path, fingerprint=fingerprint)
        assert log.step.tolist() == [1, 2, 3, 4] and log.seconds.is_monotonic_increasing


def test_another_seed_is_not_continued(small, shapes, dataset, tmp_path):
    "The settings' hash has no seed in it: seeds of one cell share it."
    whole, _ = trained(DPConfig(), small, shapes, dataset, tmp_path / "whole", fingerprint="a", seed=1)
    trained(DPConfig(), small, shapes, dataset, tmp_path / "both", fingerprint="a", seed=0)
    after, _ = trained(DPConfig(), small, shapes, dataset, tmp_path / "both", fingerprint="a", seed=1)
    assert torch.equal(whole.net.out.weight, after.net.out.weight)


def test_a_run_without_a_fingerprint_is_not_continued_under_other_settings(small, shapes, dataset, tmp_path):
    one, _ = trained(DPAGConfig(), small, shapes, dataset, tmp_path)
    same, _ = trained(DPAGConfig(), small, shapes, dataset, tmp_path)
    other = DPAGConfig.model_validate({"guidance": {"gamma": 9.0}})
    differs, _ = trained(other, small, shapes, dataset, tmp_path)
    assert torch.equal(one.net.out.weight, same.net.out.weight)
    assert not torch.equal(one.net.out.weight, differs.net.out.weight)


def test_without_a_folder_nothing_is_written(small, shapes, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, log = trained(DPConfig(), small, shapes, dataset, None)
    assert len(log) == 4 and not list(tmp_path.iterdir())


def test_a_fingerprint_changes_with_every_section_and_a_mismatch_is_refused():
    cell = ["pusht_kp", "dp", "data", PolicyConfig(), MethodConfig(kind="dp"), TrainConfig()]
    others = [
        "pusht_img",
        "dp_ag",
        "x",
        PolicyConfig(horizon=32),
        MethodConfig(kind="x"),
        TrainConfig(lr=1.0),
    ]
    hashes = {run_fingerprint(*cell)}
    for i, other in enumerate(others):
        hashes.add(run_fingerprint(*cell[:i], other, *cell[i + 1 :]))
    assert len(hashes) == 7
    info = {"settings_hash": run_fingerprint(*cell), "data_hash": "data"}
    check_fingerprint(info, *cell[:2], *cell[3:])
    with pytest.raises(ValueError, match="dp on pusht_kp was trained with settings .*: train again"):
        check_fingerprint(info, *cell[:2], PolicyConfig(net=MLPConfig(width=8)), *cell[4:])


def test_a_loss_that_is_not_finite_names_step_terms_and_episodes(small, shapes, dataset, tmp_path):
    class Poisoned:
        calls = 0

        def batch(self, n, g):
            self.calls += 1
            b = dataset.batch(n, g)
            return {**b, "action": b["action"] * float("nan")} if self.calls == 3 else b

    settings = TrainConfig(steps=10, batch_size=8, log_every=1, checkpoint_every=100, device="cpu")
    policy = build_policy(DPAGConfig(), small, shapes, dataset)
    with pytest.raises(FloatingPointError, match=r"step 3: loss = nan.*kl = .*episodes in the batch: \["):
        fit(policy, Poisoned(), settings, folder=tmp_path, fingerprint="x")
    assert not list(tmp_path.iterdir())


def test_snapshots_hold_averaged_weights_and_do_not_disturb(small, shapes, dataset, tmp_path):
    ends, snapshot = [], {}
    for name, snapshots in (
        ("with", {10: lambda m: snapshot.update(w=m.net.out.weight.detach().clone())}),
        ("without", {}),
    ):
        policy, _ = trained(
            DPConfig(), small, shapes, dataset, tmp_path / name, steps=20, snapshots=snapshots
        )
        ends.append(policy.net.out.weight.detach().clone())
    assert torch.equal(*ends) and not torch.equal(snapshot["w"], ends[0])
