"""Episodes that are set aside, and the loss on them."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from dpag.config import SettingsError, generator, layered, seed_everything
from dpag.data import Demonstrations, Shapes, WindowDataset, set_apart
from dpag.files import read_text, root
from dpag.methods.dp import DPConfig
from dpag.methods.toy import TOY, toy_policy, two_ways
from dpag.policy import METHODS, PolicyConfig, build_policy
from dpag.report import TRAINING
from dpag.settings import load
from dpag.tasks.pusht.sensor import only
from dpag.train import Run, TrainConfig, fit, loss_of, validate
from dpag.validation import Validation, least_validation, n_set_aside, split, validation_summary, windows_of

STEPS = {"horizon": 16, "n_obs_steps": 2, "n_action_steps": 8}
SMALL = {
    "dp": {},
    "dp_ag": {},
    "lstm_gmm": {"hidden": 32},
    "ibc": {"width": 32, "n_negatives": 32, "n_candidates": 64, "dropout": 0.1},
    "bet": {"n_bins": 6, "layers": 1, "width": 16, "dropout": 0.1},
    "flow_policy": {},
    "ada_flow": {"head": [16]},
}


def marked(n: int = 10, far: tuple = ()) -> WindowDataset:
    "Episodes of 30 steps; the first number that is seen, and done, says which one it is. Some are far away."
    number = np.arange(n).repeat(30).astype(np.float32)
    numbers = np.stack([number, np.random.default_rng(0).normal(size=30 * n)], 1).astype(np.float32)
    numbers[np.isin(number, far), 1] += 1e6
    return WindowDataset({"seen": numbers}, numbers, np.arange(30, 30 * n + 1, 30), data_hash="all", **STEPS)


def in_windows(dataset: WindowDataset) -> set[int]:
    "The episodes that any window of a data set shows, by what it shows."
    every = dataset.gather(torch.arange(len(dataset)))
    return set(every["action"][..., 0].int().flatten().tolist()) | set(
        every["obs"]["seen"][..., 0].int().flatten().tolist()
    )


@pytest.mark.parametrize(
    "n,share,expected",
    [(600, 0.02, 12), (10, 0.02, 1), (2, 0.5, 1), (1, 0.5, 0), (75, 0.02, 2), (600, 0.0, 0), (3, 0.5, 2)],
)
def test_a_share_is_one_episode_at_least_and_never_all(n, share, expected):
    assert n_set_aside(n, share) == expected


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
def test_whole_episodes_are_set_aside_and_none_is_in_a_window_that_is_learned_from(share):
    everything = marked()
    learned, aside = split(everything, share)
    assert in_windows(learned) | in_windows(aside) == set(range(10))
    assert not in_windows(learned) & in_windows(aside)
    assert in_windows(aside) == set(aside.owner.tolist()) and len(learned) + len(aside) == len(everything)
    drawn = learned.batch(2000, generator("any"))["action"][..., 0]
    assert set(drawn.int().flatten().tolist()) == in_windows(learned)
    assert len({everything.data_hash, learned.data_hash, aside.data_hash}) == 3
    assert learned.action is everything.action, "no copy"


def test_what_is_set_aside_moves_no_scale(small):
    "Far away, where the scales of all would be others."
    _, aside = split(marked(), 0.2)
    far = tuple(aside.owner.unique().tolist())
    shapes = Shapes({"seen": (2,)}, 2)
    settings = layered(
        PolicyConfig, small.model_dump(), {"action_frame": "absolute", "encoder": {"features": "raw"}}
    )
    states = []
    for data in (split(marked(), 0.2)[0], split(marked(far=far), 0.2)[0], marked(far=far)):
        policy = build_policy(DPConfig(), settings, shapes, data)
        states.append({k: v for k, v in policy.state_dict().items() if "scale" in k})
    assert states[0] and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(not torch.equal(v, states[2][k]) for k, v in states[0].items())


def test_without_a_share_or_with_one_episode_nothing_is_set_aside():
    everything = marked()
    assert split(everything, 0.0) == (everything, None)
    alone = marked(1)
    assert split(alone, 0.5) == (alone, None)


def test_a_part_of_a_data_set_can_be_split_again():
    learned, _ = split(marked(), 0.3)
    again, aside = split(learned, 0.3)
    assert in_windows(again) | in_windows(aside) == in_windows(learned) and len(in_windows(aside)) == 2
    assert in_windows(windows_of(marked(), np.array([3, 4]))) == {3, 4}


def test_the_windows_of_episodes_are_those_of_a_file_that_has_no_others():
    "What is left out of a file and what is left out of its windows are the same, to the order."
    everything, numbers = marked(), np.array([2, 5, 7])
    arrays = {k: v.numpy() for k, v in (("seen", everything.obs["seen"]), ("action", everything.action))}
    cut = WindowDataset.of(only(Demonstrations(arrays, np.arange(30, 301, 30)), numbers), **STEPS)
    drawn = [data.batch(50, generator("any")) for data in (cut, windows_of(everything, numbers))]
    assert torch.equal(drawn[0]["action"], drawn[1]["action"]) and len(cut) > 50
    assert torch.equal(drawn[0]["obs"]["seen"], drawn[1]["obs"]["seen"])
    assert torch.equal(torch.tensor(numbers)[drawn[0]["episode"]], drawn[1]["episode"])


def test_the_order_is_that_of_the_rows_that_learned_from_few_episodes():
    assert set_apart(20, 5)[0].tolist() == [6, 7, 9, 11, 16]
    assert set(set_apart(206, 10)[0]) <= set(set_apart(206, 202)[0])


@pytest.mark.parametrize("share", [-0.01, 0.51, "0.02", None, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(SettingsError, match=r"val_share"):
        layered(TrainConfig, {"val_share": share})


@pytest.mark.parametrize("field", ["val_every", "val_windows"])
def test_how_often_and_how_much_are_counts(field):
    with pytest.raises(SettingsError, match=f"{field} = 0"):
        layered(TrainConfig, {field: 0})


def test_which_profiles_set_episodes_aside():
    "Rows that were measured with every demonstration keep their settings."
    shares = {run: load(run).cell("pusht_kp", "dp").train.val_share for run in RUNS}
    assert shares == RUNS


RUNS = {
    "laptop-scripted": 0.02,
    "paper-human": 0.02,
    "paper-core-human": 0.02,
    "workstation-scripted": 0.0,
    "interplay-human": 0.0,
}


def weights(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.fixture(params=SMALL)
def cell(request):
    "A method's settings, what its toy learns from, and what is set aside."
    method = METHODS[request.param].config(**SMALL[request.param])
    settings = toy_policy(method)
    return method, settings, *split(two_ways(settings, 20), 0.2)


def trained(cell, folder=None, *, aside=True, snapshots=None):
    method, settings, learned, unseen = cell
    train = TrainConfig(
        steps=10, batch_size=4, log_every=4, val_every=3, val_windows=20, checkpoint_every=5, warmup_steps=2
    )
    seed_everything(0)
    policy = build_policy(method, settings, TOY, learned)
    how = {"folder": folder, "fingerprint": "f", "snapshots": snapshots}
    return policy, fit(policy, learned, train, validation=unseen if aside else None, **how)


def test_every_method_has_the_same_curve_and_weights_whether_looked_at_killed_or_neither(cell, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    whole, log = trained(cell, tmp_path / "whole")
    plain, without = trained(cell, aside=False)
    with pytest.raises(KeyboardInterrupt):
        trained(cell, tmp_path / "killed", snapshots={8: stop})
    assert (tmp_path / "killed/resume.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed, again = trained(cell, tmp_path / "killed")
    assert torch.equal(weights(whole), weights(plain)), "looking changes nothing"
    assert torch.equal(weights(whole), weights(resumed))
    pd.testing.assert_frame_equal(log.drop(columns="seconds"), again.drop(columns="seconds"))
    files = [pd.read_csv(tmp_path / name / "log.csv").drop(columns="seconds") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*files)
    assert log.step.tolist() == [3, 4, 6, 8, 9, 10] and without.step.tolist() == [4, 8, 10]
    assert log.val_loss.notna().tolist() == [True, False, True, False, True, True]
    terms = set(without) - {"step", "lr", "seconds"}
    assert {f"val_{term}" for term in terms} == {c for c in log if c.startswith("val_")}


def test_the_averaged_weights_are_looked_at_and_the_same_noise_each_time(cell):
    "At the end they are what the model has; nothing of the process's generators is used."
    policy, log = trained(cell)
    train = TrainConfig(batch_size=4, device="cpu")
    validation = Validation(cell[3], n_windows=20, batch_size=4)
    state = torch.get_rng_state()
    means = [validation(lambda batch, noise: loss_of(policy, batch, noise, train))["loss"] for _ in range(2)]
    run = Run(policy)
    before = weights(policy).clone()
    looked = validate(run, validation, train)["val_loss"]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(weights(policy), before)
    assert means[0] == means[1] == looked
    assert log.val_loss.iloc[-1] == pytest.approx(looked.item(), rel=1e-6)


def test_a_validation_has_distinct_windows_in_parts_like_those_of_training():
    _, aside = split(marked(), 0.5)
    for n, batch in ((1000, 16), (40, 16), (3, 16), (1, 2), (17, 2)):
        parts = Validation(aside, n_windows=n, batch_size=batch).parts
        drawn = torch.cat(parts).tolist()
        assert len(drawn) == len(set(drawn)) == min(n, len(aside))
        assert min(map(len, parts)) >= min(n, batch)


def test_the_mean_is_over_windows_whatever_the_parts():
    _, aside = split(marked(), 0.3)

    def number(batch, noise):
        return {"loss": batch["action"][:, 0, 0].mean()}

    means = [Validation(aside, n_windows=10_000, batch_size=n)(number)["loss"].item() for n in (5, 7, 64)]
    expected = aside.gather(torch.arange(len(aside)))["action"][:, 0, 0].mean().item()
    assert means == pytest.approx([expected] * 3, rel=1e-5)


def test_a_policy_that_learns_by_heart_shows_it_before_the_end(small):
    "Two episodes of a random walk: there is little in them that another one has, too."
    rng = np.random.default_rng(0)
    walk = rng.normal(size=(4, 25, 2)).cumsum(1).reshape(-1, 2).astype(np.float32)
    data = WindowDataset({"seen": walk}, walk, np.arange(25, 101, 25), **STEPS)
    learned, aside = split(data, 0.5)
    settings = layered(
        PolicyConfig, small.model_dump(), {"action_frame": "absolute", "encoder": {"features": "raw"}}
    )
    seed_everything(0)
    policy = build_policy(DPConfig(), settings, data.shapes, learned)
    train = TrainConfig(steps=400, batch_size=16, warmup_steps=20, log_every=20, val_every=20, lr=5e-3)
    log = fit(policy, learned, train, validation=aside)
    found = validation_summary(log, aside)
    assert 20 < found["least_step"] < 300 and found["val_loss"] > 1.2 * found["least_val_loss"]
    assert log.loss.iloc[-3:].mean() < 0.5 * log.loss.iloc[0]
    assert found["set_aside"] == aside.owner.unique().tolist() and len(found["set_aside"]) == 2


def test_a_log_without_validation_has_no_least_loss():
    log = pd.DataFrame({"step": [1, 2], "loss": [1.0, 2.0]})
    assert least_validation(log) is None and validation_summary(log, None) == {}
    assert least_validation(log.assign(val_loss=float("nan"))) is None


def test_dvcs_template_draws_what_the_report_writes():
    template = json.loads(read_text(root() / ".dvc/plots/curves.json"))
    drawn = {part["field"] for part in template["encoding"].values() if "<" not in part["field"]}
    assert drawn == {"cell", "windows"} and drawn < set(TRAINING)
