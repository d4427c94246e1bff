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

from dpag import config
from dpag.policy import build_policy
from dpag.train import fit

SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
import conftest
from dpag import config
from dpag.data import WindowDataset
from dpag.policy import build_policy, save_policy
from dpag.train import fit
s = config.validate(config.compose("laptop", "scripted"))
small = conftest.small.__wrapped__(s); shapes = conftest.shapes.__wrapped__(); data = conftest.dataset.__wrapped__()
config.seed_everything(0)
policy = build_policy(s.methods["dp_ag"], small, shapes, data)
train = s.train.model_copy(update=dict(steps=400, batch_size=16, log_every=20, checkpoint_every=50, device="cpu"))
fit(policy, data, settings=train, seed=0, folder=sys.argv[1], fingerprint="t")
save_policy(sys.argv[1] + "/checkpoint", policy, method=s.methods["dp_ag"], settings=small, info={{}})
"""


def script(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    return path


def test_killed_and_resumed_equals_never_killed(tmp_path):
    run, env = script(tmp_path), {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, run, tmp_path / "whole"], check=True, env=env)
    kills = 0
    for at in (100, 250):
        p = subprocess.Popen([sys.executable, run, tmp_path / "killed"], env=env)
        deadline = time.time() + 120
        while time.time() < deadline and p.poll() is None:
            try: reached = pd.read_csv(tmp_path / "killed/log.csv").step.iloc[-1]
            except (FileNotFoundError, pd.errors.EmptyDataError): reached = 0
            if reached >= at: break
            time.sleep(0.005)
        p.send_signal(signal.SIGKILL); kills += p.wait() == -signal.SIGKILL
    assert kills == 2, "both runs must have been killed before they ended"
    assert not list((tmp_path / "killed").glob(".*checkpoint*"))
    subprocess.run([sys.executable, run, tmp_path / "killed"], check=True, env=env)
    a, b = (load_file(tmp_path / d / "checkpoint/model.safetensors") for d in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [pd.read_csv(tmp_path / d / "log.csv").drop(columns="seconds") for d in ("whole", "killed")]
    pd.testing.assert_frame_equal(*logs)


def test_other_settings_are_not_continued(settings, small, shapes, dataset, tmp_path):
    train = settings.train.model_copy(update=dict(steps=4, batch_size=8, log_every=1, checkpoint_every=2, device="cpu"))
    for fingerprint in ("a", "b"):
        config.seed_everything(0)
        log = fit(build_policy(settings.methods["dp"], small, shapes, dataset), dataset, settings=train, seed=0, folder=tmp_path, fingerprint=fingerprint)
        assert log.step.tolist() == [1, 2, 3, 4] and log.seconds.is_monotonic_increasing


def test_a_loss_that_is_not_finite_names_step_terms_and_episodes(settings, small, shapes, dataset, tmp_path):
    policy = build_policy(settings.methods["dp_ag"], small, shapes, dataset)

    class Poisoned:
        calls = 0
        def batch(self, n, g):
            self.calls += 1
            b = dataset.batch(n, g)
            return {**b, "action": b["action"] * float("nan")} if self.calls == 3 else b

    train = settings.train.model_copy(update=dict(steps=10, batch_size=8, log_every=1, checkpoint_every=100, device="cpu"))
    with pytest.raises(FloatingPointError, match=r"step 3: loss = nan.*kl = .*episodes in the batch: \["):
        fit(policy, Poisoned(), settings=train, seed=0, folder=tmp_path, fingerprint="x")
    assert not list(tmp_path.iterdir())


def test_snapshots_hold_averaged_weights_and_do_not_disturb(settings, small, shapes, dataset, tmp_path):
    train = settings.train.model_copy(update=dict(steps=20, batch_size=8, log_every=5, checkpoint_every=50, device="cpu"))
    ends, seen = [], {}
    for name, snaps in (("with", {10: lambda m: seen.update(w=m.net.out.weight.detach().clone())}), ("without", {})):
        config.seed_everything(0)
        policy = build_policy(settings.methods["dp"], small, shapes, dataset)
        fit(policy, dataset, settings=train, seed=0, folder=tmp_path / name, fingerprint="x", snapshots=snaps)
        ends.append(policy.net.out.weight.detach().clone())
    assert torch.equal(*ends) and not torch.equal(seen["w"], ends[0])
