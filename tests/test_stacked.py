"""Nets that are trained together come out as if each had been alone."""

import pandas as pd
import pytest
import torch
from conftest import SHAPES, drifting_blocks, small_policy
from safetensors.torch import load_file
from torch import nn

from dpag.config import SettingsError, changed, seed_everything
from dpag.data import WindowDataset
from dpag.files import read_text, root
from dpag.guidance import GuidanceConfig
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.paths import Cell
from dpag.pipeline import after_the_first, jobs_of, joined
from dpag.policy import METHODS, build_policy
from dpag.settings import ExecutionConfig, load
from dpag.train import TrainConfig, Trainee, fit, fit_together
from dpag.validation import split

DATA = drifting_blocks()
HUNDRED = TrainConfig(
    steps=100, batch_size=8, warmup_steps=10, log_every=20, checkpoint_every=20, device="cpu"
)
CASES = {
    "dp": DPConfig(),
    "split": DPAGConfig(guidance=GuidanceConfig(denoise_on="split")),
    "both": DPAGConfig(guidance=GuidanceConfig(denoise_on="both", contrastive_noise="shared")),
    "through the VJP": DPAGConfig(guidance=GuidanceConfig(vjp_detach=False)),
}


def window_data(settings):
    "The data, in windows as a method wants them."
    if settings.horizon == 16:
        return DATA
    obs = {k: v.numpy() for k, v in DATA.obs.items()}
    steps = {k: getattr(settings, k) for k in ("horizon", "n_obs_steps", "n_action_steps")}
    ends = range(30, 301, 30)
    return WindowDataset(obs, DATA.action.numpy(), list(ends), action_ref=SHAPES.action_ref, **steps)


def policies(method, n=3, **net):
    "Small policies of `n` seeds."
    made = []
    for seed in range(n):
        seed_everything(seed)
        settings = small_policy() if not net else changed(small_policy(), net)
        made.append(build_policy(method, settings, SHAPES, DATA))
    return made


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def alone(method, settings=HUNDRED, n=3, **net):
    made = policies(method, n, **net)
    logs = [fit(p, DATA, settings, seed=s) for s, p in enumerate(made)]
    return made, logs


def check_equal(together, single):
    for a, b in zip(together, single, strict=True):
        assert (weights(a) - weights(b)).abs().max() < 1e-5
    assert (weights(single[0]) - weights(single[1])).abs().max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_each_is_as_if_it_had_been_alone(case):
    single, logs = alone(CASES[case])
    together = policies(CASES[case])
    found = fit_together([Trainee(p, s) for s, p in enumerate(together)], DATA, HUNDRED)
    check_equal(together, single)
    for a, b in zip(found, logs, strict=True):
        pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), rtol=1e-3)


def test_a_u_net_is_as_if_it_had_been_alone():
    net = {"net": {"kind": "unet", "channels": [16, 32], "n_groups": 4, "kernel_size": 3, "step_dim": 16}}
    method, few = (
        DPAGConfig(guidance=GuidanceConfig(denoise_on="static", vjp="raw", gamma=1.0)),
        changed(HUNDRED, {"steps": 20}),
    )
    single, _ = alone(method, few, 2, **net)
    together = policies(method, 2, **net)
    fit_together([Trainee(p, s) for s, p in enumerate(together)], DATA, few)
    check_equal(together, single)


class Stops:
    "The data, until so many batches are drawn."

    def __init__(self, left):
        self.left = left

    def batch(self, n, generator):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return DATA.batch(n, generator)


def trainees(made, folder):
    return [Trainee(p, s, folder / f"s{s}") for s, p in enumerate(made)]


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    method = CASES["split"]
    whole, again = policies(method), policies(method)
    fit_together(trainees(whole, tmp_path / "whole"), DATA, HUNDRED)
    with pytest.raises(KeyboardInterrupt):
        fit_together(trainees(policies(method), tmp_path / "again"), Stops(3 * 50), HUNDRED)
    fit_together(trainees(again, tmp_path / "again"), DATA, HUNDRED)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(weights(a), weights(b))


def test_a_seed_goes_on_alone_and_together(tmp_path):
    "One folder is a seed's, whoever trains it; who is behind catches up."
    method, single = CASES["dp"], alone(CASES["dp"])[0]
    with pytest.raises(KeyboardInterrupt):
        fit_together(trainees(policies(method), tmp_path), Stops(3 * 30), HUNDRED, fingerprint="x")
    with pytest.raises(KeyboardInterrupt):
        fit(policies(method)[1], Stops(50), HUNDRED, seed=1, folder=tmp_path / "s1", fingerprint="x")
    steps = [load_file(tmp_path / f"s{s}/resume.safetensors")["done"].item() for s in range(3)]
    assert steps == [20, 60, 20]
    together = policies(method)
    found = fit_together(trainees(together, tmp_path), DATA, HUNDRED, fingerprint="x")
    check_equal(together, single)
    for s, log in enumerate(found):
        assert list(log.step) == [20, 40, 60, 80, 100]
        kept = pd.read_csv(tmp_path / f"s{s}/log.csv")
        pd.testing.assert_frame_equal(kept, log, check_exact=True)
    last = policies(method)[2]
    fit(last, Stops(0), HUNDRED, seed=2, folder=tmp_path / "s2", fingerprint="x")
    assert torch.equal(weights(last), weights(together[2]))


def test_what_is_set_aside_and_snapshots_are_each_ones_own():
    learned, aside = split(DATA, 0.2)
    how, seen = changed(HUNDRED, {"steps": 40, "val_every": 20}), []
    made, single = policies(CASES["dp"], 2), policies(CASES["dp"], 2)
    keep = {30: lambda model: seen.append(weights(model))}
    logs = fit_together(
        [Trainee(p, s, None, keep) for s, p in enumerate(made)], learned, how, validation=aside
    )
    for s, policy in enumerate(single):
        log = fit(policy, learned, how, seed=s, validation=aside, snapshots=keep)
        assert (seen[s] - seen[-1]).abs().max() < 1e-5
        assert abs(log.val_loss.iloc[-1] - logs[s].val_loss.iloc[-1]) < 1e-4


def test_each_acts_and_differentiates_as_before():
    "What vmap asks for is over when the training is: the generators draw, and the VJP is the ordinary one."
    made = policies(CASES["both"], 2)
    few = changed(HUNDRED, {"steps": 3})
    fit_together([Trainee(p, s) for s, p in enumerate(made)], DATA, few)
    assert not any(p.functional for p in made)
    assert all(p.grad is None and p.data.storage_offset() == 0 for m in made for p in m.parameters())
    assert made[0].act(DATA.batch(2, torch.Generator())["obs"], torch.Generator()).shape == (2, 8, 2)


@pytest.mark.parametrize("method", sorted({"lstm_gmm", "ibc", "bet"}))
def test_a_method_that_cannot_is_refused(method):
    config = METHODS[method].config()
    settings = config.policy_config(small_policy().model_dump())
    made = [build_policy(config, settings, SHAPES, window_data(settings)) for _ in range(2)]
    with pytest.raises(ValueError, match=f"{type(made[0]).__name__} .*cannot be trained together"):
        fit_together([Trainee(p, s) for s, p in enumerate(made)], window_data(settings), HUNDRED)


def test_a_u_net_and_split_are_refused():
    net = {"net": {"kind": "unet", "channels": [16, 32], "n_groups": 4}}
    made = policies(CASES["split"], 2, **net)
    with pytest.raises(ValueError, match="cannot be trained together"):
        fit_together([Trainee(p, s) for s, p in enumerate(made)], DATA, HUNDRED)


def test_nets_of_other_shapes_or_settings_are_refused():
    one, other = policies(CASES["both"], 1), policies(CASES["split"], 1)
    small = policies(CASES["both"], 1, net={"width": 32})
    for second in (other, small):
        with pytest.raises(ValueError, match="one shape and one method's settings"):
            fit_together([Trainee(one[0]), Trainee(second[0], 1)], DATA, HUNDRED)


class Breaks(nn.Module):
    "Its loss is no number once its weight is beyond a limit of its own."

    stackable = True

    def __init__(self, start: float):
        super().__init__()
        self.w = nn.Parameter(torch.full((2,), start))

    def loss(self, batch, g):
        return {"loss": (1 - self.w).sqrt().sum() + 0 * batch["episode"].sum()}


class Episodes:
    def batch(self, n, g):
        return {"episode": torch.randint(9, (n,), generator=g)}


def test_the_seed_whose_loss_is_no_number_is_named(tmp_path):
    made = [Trainee(Breaks(start), seed) for start, seed in ((0.0, 4), (2.0, 7))]
    with pytest.raises(FloatingPointError, match="seed 7: the loss or its gradient is not finite at step 1"):
        fit_together(made, Episodes(), changed(HUNDRED, {"lr": 1e-4}))


def test_the_first_seeds_stage_trains_those_that_are_to_be_trained():
    run, off = "interplay-scripted", load("interplay-scripted")
    on = off.model_copy(update={"execution": ExecutionConfig(together=True)})
    dp = [f"train@{run}-pusht_kp-ab_dp-s{s}" for s in range(5)]
    todo = {
        s: {"data"} for s in (dp[0], dp[1], dp[3], f"train@{run}-pusht_kp-ab_dp_slow-s0", f"evaluate@{run}")
    }
    assert joined(off, todo) == {}
    more = joined(on, todo)
    assert {s: [c.train_seed for c in cells] for s, cells in more.items()} == {dp[0]: [1, 3]}
    after = after_the_first(todo, more)
    assert {s: needs - {"data"} for s, needs in after.items() if needs - {"data"}} == {
        dp[1]: {dp[0]},
        dp[3]: {dp[0]},
    }


class Commands:
    "What is asked of DVC's books."

    def command(self, stage, more=""):
        return f"train {stage}{more}"


def test_the_seeds_are_a_parameter_of_the_first_ones_notebook():
    cells = [Cell("r", "t", "m", seed) for seed in (1, 3)]
    jobs = jobs_of(Commands(), ["train@a", "train@b"], load("smoke-scripted"), {"train@a": cells})
    assert jobs["train@a"].command == 'train train@a -y "together: [1, 3]"'
    assert jobs["train@b"].command == "train train@b"
    assert "together" in read_text(root() / "nbs/experiments/e02_train.ipynb")


@pytest.mark.parametrize("n", [1, 2])
def test_only_fit_starts_several_processes(n):
    two = changed(HUNDRED, {"processes": 2}, where="train")
    with pytest.raises(
        SettingsError, match=r"train\.processes = 2: nets that train together share one process"
    ):
        fit_together([Trainee(None)] * n, DATA, two)


def test_the_first_seeds_notebook_starts_them():
    book = read_text(root() / "nbs/experiments/e02_train.ipynb")
    assert "log = fit(trainees[0].model" in book and "if len(trainees) > 1" in book
