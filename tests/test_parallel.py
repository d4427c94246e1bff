"One training in several processes: the same loss and the same weights as in one, whoever dies."

import os
import pickle
import signal

import numpy as np
import pytest
import torch
from torch import nn

from dpag.config import SettingsError, changed, generator, layered
from dpag.data import Demonstrations, WindowDataset, load_demonstrations, save_demonstrations, windows_at
from dpag.methods.bet import BETConfig
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.methods.flow_policy import FlowPolicyConfig
from dpag.methods.ibc import IBCConfig
from dpag.parallel import here, in_processes
from dpag.parts import Part, WholeDraws, check_parts, whole
from dpag.plan import make_plan, processes_of
from dpag.policy import build_policy
from dpag.settings import NeedsConfig, load
from dpag.streaming import TensorOnDisk
from dpag.train import TrainConfig, fit, plain_fingerprint, read_state, trained_with

STEPS, SAME = 20, 1e-5
TRAIN = TrainConfig(
    steps=STEPS, batch_size=16, warmup_steps=5, log_every=1, checkpoint_every=10, val_every=4, val_windows=24
)


def made_up(eyes: bool, **steps) -> WindowDataset:
    "Episodes of a point that moves at random, with a small picture of noise or without."
    rng, n = np.random.default_rng(0), 120
    obs = {"agent_pos": rng.normal(size=(n, 2)).astype(np.float32)}
    if eyes:
        obs["image"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    action, ends = rng.normal(size=(n, 2)).astype(np.float32), np.arange(30, n + 1, 30)
    return WindowDataset(obs, action, ends, **steps, action_ref="agent_pos")


def build(method, eyes: bool = False, over: dict | None = None):
    "A small policy, always with the same weights, and its data."
    small = {
        "action_frame": "relative",
        "encoder": {"hidden": [32], "latent_dim": 8, "camera": {"crop": 28, "n_keypoints": 4}},
        "net": {"width": 48, "depth": 3, "step_dim": 16},
    }
    settings = method.policy_config(small, over or {})
    steps = {k: getattr(settings, k) for k in ("horizon", "n_obs_steps", "n_action_steps")}
    dataset = made_up(eyes, **steps)
    torch.manual_seed(0)
    return build_policy(method, settings, dataset=dataset), dataset


def guided(**guidance) -> DPAGConfig:
    return DPAGConfig(guidance={"contrastive_weight": 1.0, **guidance})


CASES = {
    "dp": (DPConfig(),),
    "dp, pictures": (DPConfig(), True),
    "dp, several noises": (DPConfig(), False, {"n_noise_samples": 3}),
    "dp_ag": (guided(),),
    "dp_ag, pictures": (guided(), True),
    "dp_ag, halves": (guided(denoise_on="split"),),
    "dp_ag, halves, several noises": (guided(denoise_on="split"), True, {"n_noise_samples": 3}),
    "dp_ag, shared noise, through the VJP": (guided(contrastive_noise="shared", vjp_detach=False),),
    "dp_ag, authors": (guided(contrastive_detach=True, learn_from="mean", positive_in_denominator=True),),
    "flow": (FlowPolicyConfig(),),
    "ibc": (IBCConfig(dropout=0.1),),
    "bet": (BETConfig(n_bins=4),),
}


def train(settings, case, **how):
    policy, dataset = build(*CASES[case])
    log = fit(policy, dataset, settings, validation=dataset, **how)
    return policy.state_dict(), log


@in_processes
def every_case(model, dataset, settings, *, seed=0, validation=None, folder=None):
    "All trainings in the same processes, as starting these takes seconds; and one that goes on."
    found = {case: train(settings, case) for case in CASES}
    folder = folder if here().leads else None
    return {**found, "resumed": train(settings, "dp_ag, pictures", folder=folder)}


# In front of a softmax or a norm, which takes them out again: the loss does not depend on them. Their
# gradient is rounding, of which AdamW makes whole steps.
FREE = ("backbone.7.bias", "backbone.8.bias", "energy.rest.7.bias", "self_attn.in_proj_bias")


def differences(one, two) -> tuple[float, float]:
    "The largest in the terms of the log, leverage left out, and in the weights, but for those that are FREE."
    (weights, log), (others, other_log) = one, two
    terms = log.drop(columns=["seconds", "leverage", "val_leverage"], errors="ignore")
    apart = (terms - other_log[terms.columns]).abs() / terms.abs().clip(lower=1)
    kept = [k for k in weights if not k.endswith(FREE)]
    return apart.max().max(), max((weights[k] - others[k]).abs().max().item() for k in kept)


def stop(model):
    raise KeyboardInterrupt


def test_two_processes_learn_what_one_does(tmp_path):
    pytest.importorskip("accelerate")
    often = changed(TRAIN, {"checkpoint_every": 7})
    with pytest.raises(KeyboardInterrupt):
        train(often, "dp_ag, pictures", folder=tmp_path, snapshots={9: stop})
    assert read_state(tmp_path / "resume.safetensors")[1]["step"] == "7"
    two = every_case(*build(*CASES["dp"]), changed(often, {"processes": 2}), folder=tmp_path)
    for case in CASES:
        one = train(TRAIN, case)
        assert max(differences(one, two[case])) < SAME, case
        assert one[1].val_loss.notna().sum() == two[case][1].val_loss.notna().sum() == STEPS // 4
    assert max(differences(train(TRAIN, "dp_ag, pictures"), two["resumed"])) < SAME


class Dies:
    "The data of a training whose second process dies at a step."

    def __init__(self, dataset, how: str, step: int):
        self.dataset, self.how, self.step, self.calls = dataset, how, step, 0

    def __len__(self):
        return len(self.dataset)

    def batch(self, n, generator):
        self.calls += 1
        if here().rank == 1 and self.calls == self.step:
            if self.how == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.how)
        return self.dataset.batch(n, generator)


@pytest.mark.parametrize(("how", "said"), [("SIGKILL", "SIGKILL"), ("no disk", "OSError: no disk")])
def test_a_process_that_dies_ends_the_training_and_one_goes_on(how, said, tmp_path, tried):
    pytest.importorskip("accelerate")
    policy, dataset = build(*CASES["dp_ag, pictures"])
    dying = Dies(dataset, how, step=13)
    with tried.refused(
        "processes that are killed", RuntimeError, match=f"process 1 .* ended: {said}; started"
    ) as e:
        fit(policy, dying, changed(TRAIN, {"processes": 2}), folder=tmp_path, fingerprint="x")
    assert "\n" not in str(e.value) and here() == Part()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "resume.safetensors"]
    assert read_state(tmp_path / "resume.safetensors")[1]["step"] == "10"
    ends = []
    for folder in (tmp_path, None):
        policy, dataset = build(*CASES["dp_ag, pictures"])
        log = fit(policy, Dies(dataset, how, 13), TRAIN, folder=folder, fingerprint="x")
        ends.append((policy.state_dict(), log))
    assert max(differences(*ends)) < SAME


def test_parts_of_a_draw_make_up_the_whole():
    for draw in (
        lambda n, g: torch.randn(n, 3, generator=g),
        lambda n, g: torch.rand((n, 2), generator=g),
        lambda n, g: torch.randint(7, (n,), generator=g),
        lambda n, g: torch.randint(-3, 7, size=(n, 1), generator=g),
    ):
        for per_window in (1, 3):
            whole_draw = draw(12 * per_window, generator("draw")).unflatten(0, (12, per_window))
            for rank in range(3):
                with WholeDraws(rank, 3, rows=4):
                    part = draw(4 * per_window, generator("draw"))
                assert torch.equal(part, whole_draw[rank::3].flatten(0, 1))


def test_parts_of_a_batch_have_different_windows():
    _, dataset = build(*CASES["dp"])
    drawn = []
    for rank in (0, 1):
        with Part(rank, 2).drawing(16):
            drawn.append(dataset.batch(8, generator("batch"))["action"])
    expected = dataset.batch(16, generator("batch"))["action"]
    assert torch.equal(torch.stack(drawn, 1).flatten(0, 1), expected)
    assert torch.equal(whole(expected), expected)


@pytest.mark.parametrize("memory", [None, 100_000])
def test_data_go_to_another_process_whether_in_memory_or_on_the_disk(memory, tmp_path):
    rng, n = np.random.default_rng(0), 60
    image, position = (
        rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8),
        rng.normal(size=(n, 2)).astype("f4"),
    )
    arrays = {"image": image, "position": position, "action": position}
    save_demonstrations(Demonstrations(arrays, np.array([30, 60])), tmp_path / "z")
    steps = {"horizon": 8, "n_obs_steps": 2, "n_action_steps": 4}
    here_is = WindowDataset.of(load_demonstrations(tmp_path / "z", memory=memory), **steps)
    assert isinstance(here_is.obs["image"], TensorOnDisk) == (memory is not None)
    there = windows_at(pickle.loads(pickle.dumps(here_is)), "cpu")
    one, other = (d.batch(9, generator("b")) for d in (here_is, there))
    assert torch.equal(one["action"], other["action"])
    assert all(torch.equal(one["obs"][k], other["obs"][k]) for k in one["obs"])


class Careless(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def loss(self, batch, g):
        return {"loss": (self.w * torch.randn(len(batch["action"]))).sum()}


def test_what_cannot_be_split_is_refused(tried):
    area = "settings"
    for n, size in ((2, 18), (3, 16), (2, 3)):
        with tried.refused(
            area, match=f"batch_size = {size} must be divisible by {2 * n}, twice .*processes = {n}"
        ):
            TrainConfig(processes=n, batch_size=size)
    with tried.refused(area, SettingsError, match="processes = 0: .*greater than 0"):
        layered(TrainConfig, {"processes": 0})
    for layer in (nn.BatchNorm1d(3), nn.Dropout(0.1), nn.MultiheadAttention(4, 2, dropout=0.1)):
        with tried.refused(area, match=r"train.processes = 2: the layer 0 \(.*allowed is 1"):
            check_parts(nn.Sequential(layer), 2)
    for method in (BETConfig(n_bins=4, dropout=0.1), DPConfig()):
        policy, dataset = build(method)
        if method.kind == "dp":
            policy.net.layers.append(nn.BatchNorm1d(3))
        with tried.refused(area, match="train.processes = 2: the layer"):
            fit(policy, dataset, changed(TRAIN, {"processes": 2}))
    with tried.refused(area, match="the loss draws by randn; .*with the step's generator"):
        with Part(0, 2).drawing(8):
            Careless().loss({"action": torch.zeros(4)}, generator("g"))


def test_the_number_of_processes_is_not_part_of_what_is_trained():
    two = changed(TRAIN, {"processes": 2})
    assert trained_with(TRAIN) == trained_with(two)
    policy, dataset = build(*CASES["dp"])
    assert plain_fingerprint(policy, dataset, TRAIN) == plain_fingerprint(policy, dataset, two)


def test_a_stage_gets_a_gpu_for_each_process():
    quarter, none = NeedsConfig(cpus=2.0, gpus=0.25, memory=4.0), NeedsConfig()
    assert quarter.times(3) == NeedsConfig(cpus=6.0, gpus=3.0, memory=12.0)
    assert (none.times(2).gpus, quarter.times(1), NeedsConfig(gpus=2.0).times(2).gpus) == (0.0, quarter, 4.0)


def test_only_the_training_that_asks_for_it_is_in_several_processes():
    settings = load("laptop-scripted")
    several = changed(settings, {"tasks": {"pusht_img": {"train": {"processes": 2}}}})
    found = processes_of(several)
    assert {stage for stage, n in found.items() if n == 2} == {
        f"train@laptop-scripted-pusht_img-{method}-s0" for method in ("dp", "dp_ag")
    }
    assert make_plan(several) == make_plan(settings)


def test_without_accelerate_one_is_told_what_to_install(monkeypatch, tried):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    policy, dataset = build(*CASES["dp"])
    with tried.refused(
        "settings", RuntimeError, match=r"processes = 2: accelerate is not installed; pip .*\[parallel\]"
    ):
        fit(policy, dataset, changed(TRAIN, {"processes": 2}))
