"""The loop: a real SIGKILL, and what stops it."""

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpag import config
from dpag.config import generator, seed_everything
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.noise_net import MLPConfig
from dpag.policy import MethodConfig, PolicyConfig, build_policy, load_policy, save_policy
from dpag.train import (
    FlatParameters,
    Run,
    TrainConfig,
    check_fingerprint,
    ema_decay,
    fit,
    learning_rate,
    run_fingerprint,
    train_step,
)

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from dpag.config import seed_everything
from dpag.methods.dp_ag import DPAGConfig
from dpag.policy import build_policy, save_policy
from dpag.train import TrainConfig, fit
data = conftest.drifting_blocks()

class Waits:
    "The data; when the batch with the number in argv[2] is drawn, it says so, and waits to be killed."
    drawn = 0
    def batch(self, n, generator):
        self.drawn += 1
        if sys.argv[2:] == [str(self.drawn)]:
            print("drawn", flush=True)
            sys.stdin.read()
        return data.batch(n, generator)

seed_everything(0)
policy = build_policy(DPAGConfig(), conftest.small_policy(), conftest.SHAPES, data)
train = TrainConfig(steps=120, batch_size=16, log_every=5, checkpoint_every=20, device="cpu")
fit(policy, Waits(), train, seed=0, folder=sys.argv[1], fingerprint="t")
save_policy(sys.argv[1] + "/checkpoint", policy)
"""


def script(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(SCRIPT.format(tests=os.path.dirname(__file__)), encoding="utf-8")
    return path


def test_killed_and_resumed_equals_never_killed(tmp_path):
    run, env = script(tmp_path), {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, run, tmp_path / "whole"], check=True, env=env)
    for batch in ("33", "45"):  # in steps 33 and 65; the first is continued from step 20
        command = [sys.executable, run, tmp_path / "killed", batch]
        child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"drawn\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL
    reached = pd.read_csv(tmp_path / "killed/log.csv").step.iloc[-1]
    assert reached == 60, "it went on from step 20, and was killed after step 60"
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


@pytest.mark.parametrize(
    "betas,said",
    [
        ([0.9, 1.0], "betas.1 = 1.0.*less than 1"),
        ([0.9], "betas.1.*required"),
        ("0.9", "betas = '0.9'.*tuple"),
    ],
)
def test_betas_are_two_numbers_below_one(betas, said):
    assert config.layered(TrainConfig, {"betas": [0.95, 0.999]}).betas == (0.95, 0.999)
    with pytest.raises(config.SettingsError, match=said):
        config.layered(TrainConfig, {"betas": betas})


@pytest.mark.parametrize("name,other", [("betas", (0.95, 0.999)), ("val_share", 0.02)])
def test_what_came_later_leaves_older_runs_their_hash(name, other):
    "At the value that does what was done before; others change it. How often one looks never does."
    cell = ["pusht_kp", "dp", "data", PolicyConfig(), MethodConfig(kind="dp")]
    settings = TrainConfig(lr=0.01)
    later = {"betas", "val_share", "val_every", "val_windows", "processes"}
    before = {k: v for k, v in settings.model_dump().items() if k not in later}
    assert run_fingerprint(*cell, settings) == config.fingerprint(*cell, before)
    others = settings.model_copy(update={name: other, "val_every": 7, "val_windows": 8})
    with_it = config.fingerprint(*cell, {**before, name: other})
    assert run_fingerprint(*cell, others) == with_it != config.fingerprint(*cell, before)


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_names_step_terms_and_episodes(small, shapes, dataset, tmp_path, log_every):
    "Whenever it is looked at; and before a resume file is written."

    class Poisoned:
        calls = 0

        def batch(self, n, g):
            self.calls += 1
            b = dataset.batch(n, g)
            return {**b, "action": b["action"] * float("nan")} if self.calls == 3 else b

    settings = TrainConfig(steps=10, batch_size=8, log_every=log_every, checkpoint_every=4, device="cpu")
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


def by_torch(model, dataset, settings, seed):
    "The loop as torch's own parts make it; the averaged weights."
    opt = torch.optim.AdamW(model.parameters(), betas=settings.betas, weight_decay=settings.weight_decay)
    for step in range(1, settings.steps + 1):
        batch = dataset.batch(settings.batch_size, generator("batch", seed, step))
        opt.param_groups[0]["lr"] = learning_rate(step - 1, settings)
        opt.zero_grad()
        model.loss(batch, generator("noise", seed, step))["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        opt.step()
        now = [p.detach().clone() for p in model.parameters()]
        mean = now if step == 1 else mean
        mean = [m.lerp(p, 1 - ema_decay(step - 1, settings.ema)) for m, p in zip(mean, now)]
    return mean


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.98)], ids=["default", "others"])
@pytest.mark.parametrize("method", [DPConfig(), DPAGConfig()], ids=["dp", "dp_ag"])
def test_flat_parameters_learn_what_torchs_optimiser_does(small, shapes, dataset, method, betas):
    how = {"warmup_steps": 5, "lr": 1e-3, "grad_clip": 0.5, "betas": betas, "device": "cpu"}
    settings = TrainConfig(steps=30, batch_size=8, **how)
    policies = []
    for _ in range(2):
        seed_everything(0)
        policies.append(build_policy(method, small, shapes, dataset))
    first = [p.detach().clone() for p in policies[0].parameters()]
    expected = by_torch(policies[0], dataset, settings, seed=3)
    fit(policies[1], dataset, settings, seed=3)
    for p, mean in zip(policies[1].parameters(), expected):
        torch.testing.assert_close(p, mean, rtol=1e-4, atol=2e-5)
    assert max((p - b).abs().max() for p, b in zip(policies[1].parameters(), first)) > 1e-3


class Mixed(nn.Module):
    "Channels that are last, a weight with two names, a frozen one, one without a gradient, a count."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.first, self.again = nn.Linear(5, 5), nn.Linear(5, 5)
        self.again.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def loss(self, batch, g):
        self.calls += 1
        x = self.conv(torch.randn(len(batch["episode"]), 3, 4, 4, generator=g)).mean((2, 3))
        return {"loss": (self.again(self.first(x)) - 1).square().mean()}


def test_every_kind_of_parameter_keeps_its_form(dataset):
    model, snapshot = Mixed(), {}
    settings = TrainConfig(steps=6, batch_size=8, warmup_steps=0, weight_decay=0, lr=0.01, device="cpu")
    before = model.first.weight.detach().clone()
    fit(model, dataset, settings, snapshots={3: lambda m: snapshot.update(m=m)})
    for m, calls in ((snapshot["m"], 3), (model, 6)):
        assert m.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert m.again.weight is m.first.weight and not torch.equal(m.first.weight, before)
        assert torch.equal(m.frozen, torch.ones(3)) and torch.equal(m.unused, torch.ones(3))
        assert m.calls == calls and all(p.grad is None for p in m.parameters())
    whole = {p.untyped_storage().nbytes() == p.numel() * 4 for p in model.parameters()}
    assert whole == {True}, "each has memory of its own again"


def test_snapshots_and_the_result_can_be_saved(small, shapes, dataset, tmp_path):
    keep = {2: lambda m: save_policy(tmp_path / "at", m)}
    policy, _ = trained(DPConfig(), small, shapes, dataset, None, snapshots=keep)
    save_policy(tmp_path / "end", policy)
    at, end = (load_policy(tmp_path / name)[0] for name in ("at", "end"))
    assert torch.equal(end.net.out.weight, policy.net.out.weight)
    assert not torch.equal(at.net.out.weight, end.net.out.weight)


def test_memory_that_is_taken_away_is_noticed(dataset):
    class Leaves(Mixed):
        def loss(self, batch, g):
            self.again.bias.data = self.again.bias.data.clone()
            return super().loss(batch, g)

    settings = TrainConfig(steps=3, batch_size=8, log_every=1, device="cpu")
    with pytest.raises(RuntimeError, match="again.bias or its gradient was given other memory"):
        fit(Leaves(), dataset, settings)


def test_parameters_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match="of one dtype.*float32 on cpu.*float64 on cpu"):
        FlatParameters(nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1, dtype=torch.float64)]))


def test_a_resume_file_of_another_layout_is_not_continued(small, shapes, dataset, tmp_path):
    "Such as those of earlier versions, which had an entry for each weight."
    whole, _ = trained(DPConfig(), small, shapes, dataset, tmp_path, fingerprint="a")
    meta = {"step": "2", "key": "of an earlier version"}
    save_file({"param/net.out.weight": torch.zeros(3)}, tmp_path / "resume.safetensors", meta)
    again, log = trained(DPConfig(), small, shapes, dataset, tmp_path, fingerprint="a")
    assert log.step.tolist() == [1, 2, 3, 4] and torch.equal(whole.net.out.weight, again.net.out.weight)


def test_what_is_drawn_at_a_step_depends_on_seed_and_step_alone(dataset):
    seen = []

    class Recorded(Mixed):
        def loss(self, batch, g):
            seen.append((batch["episode"], torch.randn(2, generator=g)))
            return {"loss": self.first.weight.sum()}

    settings = TrainConfig(batch_size=8, device="cpu")
    run = Run(Recorded())
    for step in (5, 2):
        train_step(run, dataset, settings, seed=7, step=step)
        episode = dataset.batch(8, generator("batch", 7, step))["episode"]
        assert torch.equal(seen[-1][0], episode)
        assert torch.equal(seen[-1][1], torch.randn(2, generator=generator("noise", 7, step)))


def test_training_does_not_load_torchs_compiler(tmp_path):
    "Which would take three seconds."
    program = script(tmp_path).read_text(encoding="utf-8").replace("steps=120", "steps=3")
    program += "\nassert 'torch._dynamo' not in sys.modules\n"
    env = {**os.environ, "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, env=env)
