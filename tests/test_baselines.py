"""The five baselines: their losses against the formulas, what they can and cannot hold, checkpoints."""

import copy
import importlib
import math
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from dpag.config import generator
from dpag.files import root
from dpag.methods.ada_flow import AdaFlowConfig, follow, step_size
from dpag.methods.bet import action_centres, focal_loss, nearest
from dpag.methods.flow_policy import FlowPolicyConfig, consistency_loss, segment_end
from dpag.methods.ibc import IBCConfig, dropped, search
from dpag.methods.lstm_gmm import last_steps, robomimic_algo
from dpag.methods.toy import TOY, learn, toy_policy, two_ways, walk
from dpag.policy import METHODS, WEIGHTS, build_policy, load_policy, save_policy
from dpag.settings import load
from dpag.stats import clopper_pearson
from dpag.tasks.base import joined

KINDS = ["lstm_gmm", "ibc", "bet", "flow_policy", "ada_flow"]
SMALL = {
    "lstm_gmm": {"hidden": 32},
    "ibc": {"width": 32, "n_negatives": 32, "n_candidates": 64, "dropout": 0.1},
    "bet": {"n_bins": 6, "layers": 1, "width": 16, "dropout": 0.1},
    "flow_policy": {},
    "ada_flow": {"head": [16]},
}


@pytest.fixture(scope="module")
def methods():
    return {k: METHODS[k].config(**SMALL[k]) for k in KINDS}


@pytest.fixture(scope="module")
def made(methods):
    "Every baseline, untrained, with a batch of the toy."
    out = {}
    for k, m in methods.items():
        settings = toy_policy(m)
        data = two_ways(settings, 20)
        torch.manual_seed(0)
        out[k] = build_policy(m, settings, TOY, data), data.batch(8, generator("b")), settings
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract(made, kind):
    policy, batch, settings = made[kind]
    terms = policy.loss(batch, generator("n"))
    assert all(v.ndim == 0 for v in terms.values()) and terms["loss"].requires_grad
    again = policy.loss(batch, generator("n"))
    assert torch.equal(terms["loss"], again["loss"])  # all noise comes from the generator
    actions = policy.act(batch["obs"], generator("a"))
    assert actions.shape == (8, settings.n_action_steps, 2) and not actions.requires_grad
    assert torch.equal(actions, policy.act(batch["obs"], generator("a")))
    terms["loss"].backward()
    assert policy.encoder.heads.mu.weight.grad.abs().sum() > 0  # the loss teaches the encoder


@pytest.mark.parametrize("kind", KINDS)
def test_acting_is_the_same_while_training_and_leaves_units_in(made, kind):
    policy, batch, _ = made[kind]
    acts = []
    for training in (True, False):
        policy.train(training)
        policy.loss(batch, generator("n"))
        acts.append(policy.act(batch["obs"], generator("a")))
    policy.train()
    assert torch.equal(*acts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_leaves_the_processs_generator_alone(made, kind):
    policy, batch, _ = made[kind]
    before = torch.get_rng_state()
    policy.loss(batch, generator("n"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["ibc", "bet"])
def test_units_are_left_out_in_training(methods, made, kind):
    "Other noise leaves out other units; with a share of zero none."
    policy, batch, settings = made[kind]
    mu, g = policy.encode(batch["obs"])[0].detach(), [generator("g", i) for i in range(3)]
    if kind == "bet":
        outs = lambda p: [p.predict(mu, x)[0] for x in (g[0], g[1], None)]
    else:
        actions = torch.rand(8, 5, 2)
        outs = lambda p: [p.energy(mu, actions, x) for x in (g[0], g[1], None)]
    assert not any(torch.equal(a, b) for a, b in zip(outs(policy), outs(policy)[1:]))
    torch.manual_seed(0)
    none = methods[kind].model_copy(update={"dropout": 0.0})
    with torch.no_grad():
        a, b, c = outs(build_policy(none, settings, TOY, two_ways(settings, 20)).eval())
    torch.testing.assert_close(a, c)
    torch.testing.assert_close(b, c)


def test_what_is_left_out_is_a_share_and_the_rest_makes_up_for_it():
    x = dropped(torch.full((200, 200), 3.0), 0.25, generator("d"))
    assert x.unique().tolist() == [0.0, 4.0] and (x == 0).float().mean().item() == pytest.approx(
        0.25, abs=0.01
    )
    assert torch.equal(dropped(x, 0.25, None), x) and torch.equal(dropped(x, 0.0, generator("d")), x)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_acts_bit_identically(made, kind, tmp_path):
    policy, batch, _ = made[kind]
    save_policy(tmp_path / "c", policy)
    again, _ = load_policy(tmp_path / "c")
    policy.eval()
    assert torch.equal(again.act(batch["obs"], generator("a")), policy.act(batch["obs"], generator("a")))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_policy_is_the_same_file(made, kind, tmp_path):
    "To the byte, also where a weight has two names; and all of it comes back."
    policy, files = made[kind][0], []
    for i in range(5):
        save_policy(tmp_path / str(i), policy)
        files.append((tmp_path / str(i) / WEIGHTS).read_bytes())
    assert len(set(files)) == 1
    state, again = policy.state_dict(), load_policy(tmp_path / "0")[0].state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[k], again[k]) for k in state)


@pytest.mark.parametrize("kind", ["lstm_gmm", "bet"])
def test_episodes_side_by_side_do_not_mix(made, kind):
    """One episode's action is a function of its own observations: the others may be changed, and acted on
    before."""
    policy, batch, _ = made[kind]
    policy.eval()
    others = {k: torch.cat([v[:1], v[1:] + 0.7]) for k, v in batch["obs"].items()}
    first = policy.act(batch["obs"], generator("a"))[0]
    policy.act(others, generator("b"))
    assert torch.equal(policy.act(others, generator("a"))[0], first)


# Losses against the formulas.


def test_lstm_gmm_loss_is_robomimics_own(methods, made):
    policy, batch, _ = made["lstm_gmm"]
    algo = robomimic_algo(
        methods["lstm_gmm"], latent_dim=policy.encoder.latent_dim, action_dim=2, sequence=10
    )
    algo.nets["policy"].load_state_dict(policy.actor.state_dict())
    policy.train()
    algo.nets.train()
    theirs = {
        "obs": {"latent": policy.encode(batch["obs"], generator("n"))[0]},
        "goal_obs": None,
        "actions": policy.normalised(batch),
    }
    want = algo._compute_losses(algo._forward_training(theirs), theirs)["action_loss"]
    assert policy.loss(batch, generator("n"))["loss"].item() == pytest.approx(want.item(), rel=1e-5)


def test_ibc_loss_is_the_formula(made):
    policy, batch, _ = made["ibc"]
    policy, g = copy.deepcopy(policy), generator("n")
    policy.energy.dropout = 0.0  # a row at a time draws other units than all at once
    z = policy.encode(batch["obs"], g)[0]
    a = policy.normalised(batch)[:, policy.executes].flatten(1)
    a = a + policy.method.jitter * torch.randn(8, 1, 2, generator=g)[:, 0]
    others = 2 * torch.rand(8, policy.method.n_negatives, 2, generator=g) - 1
    total = 0.0
    for i in range(8):
        minus_energy = policy.energy(z[i : i + 1], torch.cat([a[i][None], others[i]])[None])[0]
        total -= math.log(math.exp(minus_energy[0]) / sum(math.exp(e) for e in minus_energy)) / 8
    assert policy.loss(batch, generator("n"))["loss"].item() == pytest.approx(total, rel=1e-4)


def test_bet_loss_is_the_formula(made):
    policy, batch, _ = made["bet"]
    logits, offsets = policy.predict(policy.encode(batch["obs"])[0], generator("n"))
    a, focal, error, n = policy.normalised(batch), 0.0, 0.0, 8 * 3
    for i in range(8):
        for t in range(3):
            b = min(range(6), key=lambda k: (a[i, t] - policy.centres[k]).norm().item())
            p = math.exp(logits[i, t, b]) / sum(math.exp(v) for v in logits[i, t])
            focal -= (1 - p) ** 2 * math.log(p) / n
            error += (a[i, t] - policy.centres[b] - offsets[i, t, b]).square().sum().item() / (2 * n)
    assert policy.loss(batch, generator("n"))["loss"].item() == pytest.approx(focal + 1000 * error, rel=1e-4)
    assert focal_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), 2.0).item() == pytest.approx(
        0.25 * math.log(2)
    )


def test_flow_policy_loss_is_the_formula(made):
    policy, batch, _ = made["flow_policy"]
    a, z = policy.normalised(batch), policy.encode(batch["obs"])[0]
    a0 = torch.randn(a.shape, generator=generator("a0"))
    x = lambda u: u * a + (1 - u) * a0
    v = lambda u: policy.velocity(x(u), torch.full((8,), u), z)
    for t in (0.2, 0.494, 0.7, 0.993):
        got = policy.consistency(a, a0, torch.full((8,), t), z)["loss"].item()
        r, s = min(t + 0.01, 1.0), 0.5 if t < 0.5 else 1.0
        f_r = x(s) if r >= 1 else x(r) + (s - r) * v(r)
        want = (x(t) + (s - t) * v(t) - f_r).square().mean() + (
            1e-5 * (v(t) - v(r)).square().mean() if s - t > 0.0101 else 0
        )
        assert got == pytest.approx(want.item(), rel=1e-3), t
    assert segment_end(torch.tensor([0.0, 0.49, 0.5, 0.999, 1.0]), 2).tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]


def test_flow_policy_acts_in_one_step(made):
    policy, batch, _ = made["flow_policy"]
    z = policy.encode(batch["obs"])[0]
    a0 = torch.randn(8, policy.horizon, 2, generator=generator("a"))
    want = policy.executed(a0 + policy.velocity(a0, torch.full((8,), 0.01), z), batch["obs"])
    torch.testing.assert_close(policy.act(batch["obs"], generator("a")), want)


def test_flow_policy_acts_only_at_times_that_it_was_trained_at(methods, made):
    policy, batch, settings = made["flow_policy"]
    for n, eps in ((1, 0.01), (2, 0.01), (4, 0.3)):
        p = copy.copy(policy)
        p.method = methods["flow_policy"].model_copy(update={"n_steps": n, "eps": eps})
        assert p.times(torch.device("cpu")).tolist() == pytest.approx(
            [eps + (1 - eps) * i / n for i in range(n)]
        )
        seen = []
        p.consistency = lambda clean, noise, t, z, seen=seen: seen.append(t) or {"loss": t.mean()}
        p.loss(batch, generator("n"))
        assert eps <= seen[0].min() and seen[0].max() <= 1


@pytest.mark.parametrize("stopped", [False, True])
def test_flow_policys_gradient_passes_both_sides_unless_it_is_stopped(stopped):
    "Against differences of the loss, of which the second evaluation's weight is held or not."
    clean, noise = torch.randn(2, 6, 4, 2, generator=generator("x"), dtype=torch.float64).unbind()
    t, method = torch.linspace(0.02, 0.97, 6, dtype=torch.float64), FlowPolicyConfig(stop_gradient=stopped)

    def loss(first, second):
        weights = iter([first, second])
        return consistency_loss(lambda x, t: next(weights) * x, clean, noise, t, method)["loss"]

    w, h = torch.tensor(0.4, dtype=torch.float64, requires_grad=True), 1e-5
    (found,) = torch.autograd.grad(loss(w, w), w)
    both, one = ((loss(w + h, w + h * b) - loss(w - h, w - h * b)).item() / (2 * h) for b in (1, 0))
    assert both != pytest.approx(one, rel=0.01)
    assert found.item() == pytest.approx(one if stopped else both, rel=1e-6)


def test_ada_flow_loss_is_the_formula(made):
    policy, batch, _ = made["ada_flow"]
    g = generator("n")
    a, z = policy.normalised(batch), policy.encode(batch["obs"], g)[0]
    noise = torch.randn(a.shape, generator=g)
    t, root = torch.rand(8, generator=g), math.sqrt(16 * 2)
    total = 0.0
    for i in range(8):
        v, log_sigma = policy.predict((t[i] * a[i] + (1 - t[i]) * noise[i])[None], t[i : i + 1], z[i : i + 1])
        sigma = root * log_sigma.exp()  # of the chunk, whose error is a sum
        total += ((a[i] - noise[i] - v[0]).square().sum() / (2 * sigma**2) + sigma.log()).item() / 8
    found = policy.loss(batch, generator("n"))["loss"].item()
    assert found + math.log(root) == pytest.approx(total, rel=1e-4)


# Acting.


@pytest.mark.parametrize("sigma,steps", [(0.0, 1), (0.2, 2), (1e9, 20)])
def test_ada_flow_takes_the_steps_its_variance_asks_for(methods, sigma, steps):
    policy = build_policy(
        methods["ada_flow"].model_copy(update={"eta": 0.1 if sigma != 0.0 else 1.0}),
        settings := toy_policy(methods["ada_flow"]),
        TOY,
        two_ways(settings, 20),
    )
    entrys = math.log(max(sigma, 1e-12) / math.sqrt(16 * 2))  # of a chunk whose deviation is sigma
    policy.predict = lambda x, t, z: (torch.ones_like(x), torch.full((len(x),), entrys))
    policy.act({"pos": torch.zeros(5, 2, 2)}, generator("a"))
    assert policy.mean_steps() == steps


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (16, 10)])
def test_ada_flows_eta_is_compared_to_the_deviation_of_a_whole_chunk(shape):
    "An entry's deviation of 0.3 in a chunk of n entries is one of 0.3 √n: h = η / that, until 1."
    predict = lambda x, t, z: (torch.ones_like(x), torch.full((len(x),), math.log(0.3)))
    _, n_steps = follow(
        predict, torch.zeros(2, *shape), torch.zeros(2, 1), AdaFlowConfig(eta=0.5, max_steps=50)
    )
    h = max(0.5 / (0.3 * math.sqrt(shape[0] * shape[1])), 1 / 50)
    assert n_steps == 2 * math.ceil(1 / h)


def test_ada_flows_steps_end_at_one():
    t, sigma = torch.zeros(4), torch.tensor([1e-9, 0.13, 0.7, 50.0])
    for _ in range(20):
        t = t + step_size(sigma, t, eta=0.1, max_steps=20)
    assert torch.allclose(t, torch.ones(4))


def test_ibcs_search_finds_a_known_minimum():
    goal = torch.tensor([[0.5, -0.25, 0.1], [-0.9, 0.9, 0.0]])
    method = IBCConfig(n_candidates=1024, spread=0.3, shrink=0.5)
    score = lambda a: -500 * (a - goal[:, None]).square().sum(-1)
    found = search(score, (2, 3), generator("s"), method=method)
    assert (found - goal).abs().max() < 0.12 and found.abs().max() <= 1


@pytest.mark.parametrize(
    "changes,spreads",
    [({}, [0.03, 0.03, 0.03, 0.03]), ({"spread": 0.1, "shrink": 0.5}, [0.1, 0.05, 0.025, 0.0125])],
)
def test_ibcs_search_perturbs_by_the_same_spread_in_each_round_but_the_last(changes, spreads):
    "Two candidates that are far apart: each new one lies by one of the old, as far as it was moved."
    seen = []
    score = lambda a: seen.append(a[..., 0]) or a[..., 0] * 0
    search(score, (20000, 1), generator("s"), method=IBCConfig(n_candidates=2, **changes))
    for old, new, spread in zip(seen[:-1], seen[1:], spreads, strict=True):
        apart = (old.diff(dim=1).abs()[:, 0] > 0.7) & (old.abs() < 0.7).all(1)
        moved = (new[:, :, None] - old[:, None])[apart].flatten(0, 1)
        by = moved.gather(1, moved.abs().argmin(1, keepdim=True))
        assert by.std().item() == pytest.approx(spread, rel=0.08)


def test_ibcs_search_keeps_two_minima():
    score = lambda a: 200 * torch.maximum(-(a - 0.5).square().sum(-1), -(a + 0.5).square().sum(-1))
    found = search(score, (200, 1), generator("s"), method=IBCConfig(n_candidates=64))[:, 0]
    assert 40 < (found > 0).sum() < 160 and ((found.abs() - 0.5).abs() < 0.2).all()


# Two ways: what a method can hold, and what it cannot.

LEARN = {
    "lstm_gmm": ({"hidden": 64, "min_std": 0.05}, {"steps": 400, "lr": 5e-3}),
    "ibc": ({"width": 64, "n_negatives": 64, "n_candidates": 128}, {"steps": 300}),
    "bet": ({"n_bins": 24, "width": 72, "layers": 2}, {"steps": 250}),
    "ada_flow": ({"head": [64]}, {"steps": 500}),
    "flow_policy": ({"n_steps": 2}, {"steps": 1500}),
}


@pytest.mark.parametrize("kind", LEARN)
def test_both_modes_are_reached(methods, kind):
    "FlowPolicy with a step per segment, which is what its loss asks for."
    changes, how = LEARN[kind]
    policy, _ = learn(methods[kind].model_copy(update=changes), **how)
    x = walk(policy, n_steps=1)[1, :, 0]
    assert (x > 0.2).sum() > 6 and (x < -0.2).sum() > 6, x  # each way's first step is 0.33 to 0.40 aside


@pytest.mark.parametrize(
    "kind,changes", [("lstm_gmm", {"n_modes": 1, "hidden": 64, "min_std": 0.05}), ("bet", {"n_bins": 1})]
)
def test_one_answer_is_the_mean(methods, kind, changes):
    policy, _ = learn(methods[kind].model_copy(update=changes), steps=250)
    assert walk(policy, n_steps=1)[1, :, 0].abs().max() < 0.15


def test_sequence_models_refuse_a_horizon_that_is_not_observed(methods):
    for kind in ("lstm_gmm", "bet"):
        settings = toy_policy(methods[kind]).model_copy(update={"horizon": 16})
        with pytest.raises(ValueError, match="must equal horizon"):
            build_policy(methods[kind], settings, TOY)


def test_more_bins_than_actions_is_an_error():
    with pytest.raises(ValueError, match="n_bins = 5"):
        action_centres(torch.zeros(10, 2), 5)
    centres = torch.tensor([[0.0], [1.0]])
    assert nearest(torch.tensor([[[0.2], [0.9]]]), centres).tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", ["bet", "lstm_gmm"])
def test_training_is_resumed_bit_identically(methods, tmp_path, kind):
    "A killed run of a transformer and of an LSTM goes on as if nothing had happened."
    from dpag.train import TrainConfig, fit

    train = TrainConfig(steps=8, batch_size=4, checkpoint_every=4, log_every=2)
    settings = toy_policy(methods[kind])
    data, results = two_ways(settings, 20), []

    def stop(_):
        raise KeyboardInterrupt

    def run(folder, snapshots=None):
        torch.manual_seed(0)
        policy = build_policy(methods[kind], settings, TOY, data)
        fit(policy, data, train, seed=0, folder=tmp_path / folder, fingerprint="f", snapshots=snapshots)
        results.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", {5: stop})
    assert (tmp_path / "killed/resume.safetensors").exists()
    run("killed")
    assert torch.equal(*results)


# LSTM-GMM beside robomimic's own.


@torch.no_grad()
def test_lstm_gmms_whole_context_is_the_last_step_of_the_sequence(made):
    "To the bit: a Gaussian by its weight, then its deviation, both from the generator."
    policy, batch, _ = made["lstm_gmm"]
    policy.eval()
    mixture = policy.actor.forward_train({"latent": policy.encode(batch["obs"])[0]})
    g, rows = generator("a"), torch.arange(8)
    mode = torch.multinomial(mixture.mixture_distribution.probs[:, -1], 1, generator=g)[:, 0]
    gaussians = mixture.component_distribution.base_dist
    mean, std = gaussians.loc[:, -1][rows, mode], gaussians.scale[:, -1][rows, mode]
    drawn = mean + std * torch.randn(mean.shape, generator=g)
    want = policy.executed(drawn[:, None].expand(-1, policy.horizon, -1), batch["obs"])
    assert torch.equal(policy.act(batch["obs"], generator("a")), want)


def test_reading_n_observations_is_robomimics_nth_act_after_a_start(made):
    policy, batch, _ = made["lstm_gmm"]
    policy.eval()
    z = policy.encode(batch["obs"])[0]
    for n in (1, 4, policy.horizon):
        state = policy.actor.get_rnn_init_state(8, "cpu")
        for t in range(policy.horizon - n, policy.horizon):
            theirs, state = policy.actor.forward_train_step({"latent": z[:, t]}, rnn_state=state)
        ours = policy.actor.forward_train({"latent": last_steps(z, torch.full((8,), n))})
        torch.testing.assert_close(
            ours.component_distribution.base_dist.loc[:, n - 1], theirs.component_distribution.base_dist.loc
        )
        torch.testing.assert_close(
            ours.mixture_distribution.probs[:, n - 1], theirs.mixture_distribution.probs
        )


def test_a_drawn_context_forgets_what_is_before_it(made):
    "Any number of observations is read, one as often as ten; the older ones change nothing."
    policy, batch, _ = made["lstm_gmm"]
    policy.eval()
    try:
        policy.act_as({"context": "drawn"})
        n = policy.context(4000, generator("n"))
        assert torch.equal(n.unique(), torch.arange(1, policy.horizon + 1))
        assert (n.bincount()[1:] / 4000 - 1 / policy.horizon).abs().max() < 0.02
        read = policy.context(8, generator("a"))
        assert read.min() < read.max()
        old = torch.arange(policy.horizon) < policy.horizon - read[:, None]
        others = {k: torch.where(old[..., None], v + 0.7, v) for k, v in batch["obs"].items()}
        first = policy.act(batch["obs"], generator("a"))
        assert torch.equal(policy.act(others, generator("a")), first)
    finally:
        policy.act_as({"context": "whole"})
    assert not torch.equal(policy.act(others, generator("a")), policy.act(batch["obs"], generator("a")))


# tools/robomimic_control.py: robomimic's own trainer on our demonstrations.


@pytest.fixture(scope="module")
def control():
    pytest.importorskip("robosuite")
    sys.path.append(str(root() / "tools"))
    return importlib.import_module("robomimic_control")


@pytest.fixture(scope="module")
def file_of_robomimic(control, tmp_path_factory):
    "Episodes of Can that nobody could drive, as robomimic's file, and as they are here."
    rng, episodes = np.random.default_rng(0), []
    for length in (30, 45):
        turns = Rotation.from_rotvec(0.2 * rng.normal(size=(length, 3))).as_matrix() @ np.diag([1, -1, -1])
        pos, delta = rng.normal(size=(length, 3)), rng.uniform(-1, 1, (length, 7))
        hold = np.concatenate([pos, turns[:, :2].reshape(length, 6), np.zeros((length, 1))], 1)
        action = control.to_absolute(delta, pos, turns, turns[0])
        others = {"object": 14, "gripper_qpos": 2, "sim_state": 71}
        rest = {k: rng.normal(size=(length, n)) for k, n in others.items()}
        episodes.append({**rest, "hold": hold, "action": action, "action_delta": delta})
    demos = joined(episodes, {})
    path = tmp_path_factory.mktemp("control") / "can.hdf5"
    control.write_hdf5(path, demos, "can")
    return path, demos


def test_robomimic_is_shown_what_its_file_has(control, file_of_robomimic):
    path, demos = file_of_robomimic
    seen = control.robomimic_observation(demos.episode(1))
    with h5py.File(path) as f:
        stored = {k: v[:] for k, v in f["data/demo_1/obs"].items()}
    assert seen.keys() == stored.keys()
    for k, v in stored.items():
        np.testing.assert_allclose(seen[k], v, atol=1e-12)


def test_robomimics_delta_actions_are_absolute_ones_here(control, file_of_robomimic):
    episode, starts = file_of_robomimic[1].episode(0), []

    class Fixed:
        "An algorithm of robomimic's that puts out what was demonstrated."

        def set_eval(self):
            starts.append("eval")

        def reset(self):
            starts.append("reset")

        def get_action(self, obs_dict):
            assert obs_dict["object"].shape == (30, 14) and obs_dict["object"].dtype == torch.float32
            return torch.as_tensor(episode["action_delta"]).float()

    policy = control.RobomimicPolicy(Fixed())
    policy.reset_counts()
    assert starts == ["eval", "reset"]
    obs = {k: torch.as_tensor(episode[k])[:, None] for k in ("object", "gripper_qpos", "hold")}
    actions = policy.act(obs, generator("a"))
    assert actions.shape == (30, 1, 10)
    np.testing.assert_allclose(actions[:, 0], episode["action"], atol=1e-6)


def test_robomimics_own_trainer_learns_from_our_file(control, file_of_robomimic):
    path, demos = file_of_robomimic
    asked = control.parse(["robomimic", "can_ph", "--steps", "100"])
    changes = control.changes_of("algo.rnn.hidden_dim=8 train.batch_size=4 algo.gmm.min_std=0.01")
    config = control.robomimic_config(asked.cell, path, steps=100, seed=0, changes=changes)
    rnn, gmm = config.algo.rnn, config.algo.gmm
    published = (rnn.horizon, rnn.num_layers, gmm.num_modes, gmm.low_noise_eval, config.train.seq_length)
    assert published == (10, 2, 5, True, 10) and config.algo.actor_layer_dims == ()
    assert (rnn.hidden_dim, gmm.min_std) == (8, 0.01)
    algo, obs_keys = control.robomimic_algo(config)
    before = [p.detach().clone() for p in algo.nets.parameters()]
    assert math.isfinite(control.train_robomimic(algo, obs_keys, config))
    assert not any(torch.equal(a, b) for a, b in zip(before, algo.nets.parameters()))
    policy = control.RobomimicPolicy(algo)
    obs = {k: torch.as_tensor(demos.arrays[k])[:1, None] for k in ("object", "gripper_qpos", "hold")}
    acts = []
    for _ in range(2):  # all noise comes from the generator, all memory ends with the episode
        policy.reset_counts()
        g = generator("a")
        acts.append(torch.cat([policy.act(obs, g) for _ in range(12)]))
    assert torch.equal(*acts) and not torch.equal(acts[0][0], acts[0][1])


def test_what_the_control_measures_and_how_it_is_asked(control, tmp_path):
    assert control.closings(np.array([-1, -1, 1, 1, -1, 1])) == 2
    assert control.idle(np.array([[0, 0, 0], [0, 0, 0.0005], [0, 0.1, 0], [0, 0.2, 0.0]])) == 1 / 3
    assert control.changes_of("a.b=1e-4 a.c=x d=2") == {"a": {"b": 1e-4, "c": "x"}, "d": 2}
    with pytest.raises(SystemExit):
        control.parse(["robomimic", "can_mh", "--steps", "150"])
    with pytest.raises(SystemExit):
        control.parse(["robomimic", "transport_ph"])  # two arms
    row = dict.fromkeys(control.KEY, "") | {"task": "can_ph", "seed": 0, "success": 0.25}
    for change in ({}, {"seed": 1}, {"success": 0.5}):
        control.add_row({**row, **change}, tmp_path / "t.csv")
    table = pd.read_csv(tmp_path / "t.csv")
    assert table[["seed", "success"]].values.tolist() == [[0, 0.5], [1, 0.25]]


def test_the_controls_committed_rows_carry_what_is_said():
    "Their intervals are exact, and LSTM-GMM as Can has it is not below robomimic's own."
    rows = pd.read_csv(root() / "results/robomimic_control.csv", keep_default_na=False)
    scored = rows[rows.trainer != "demonstrations"].astype({"success": float, "low": float, "high": float})
    for r in scored.itertuples():
        want = clopper_pearson(round(r.success * r.episodes), r.episodes)
        assert (r.low, r.high) == pytest.approx(want, rel=1e-3, abs=1e-9)
    least = load("laptop-scripted").cell("can_ph", "lstm_gmm").method.min_std
    said = {"dpag": f"min_std={least}", "robomimic": f"algo.gmm.min_std={least}"}
    on_can = scored[(scored.task == "can_ph") & (scored.acting == "")].set_index(["trainer", "settings"])
    ours, theirs = (on_can.loc[pair] for pair in said.items())
    assert (ours.steps, ours.demos, ours.data_hash) == (theirs.steps, theirs.demos, theirs.data_hash)
    assert ours.high >= theirs.low and ours.success >= theirs.success


# Settings, titles and the registry.

SHOWN = {
    "lstm_gmm": ("LSTM-GMM", "#8c8c8c"),
    "ibc": ("IBC", "#937860"),
    "bet": ("BET", "#da8bc3"),
    "flow_policy": ("FlowPolicy", "#55a868"),
    "ada_flow": ("AdaFlow", "#8172b3"),
}


def test_every_baseline_is_registered_with_title_and_colour():
    assert {k: (METHODS[k].title, METHODS[k].color) for k in KINDS} == SHOWN
    for kind in KINDS:
        entry = METHODS[kind]
        assert entry.config().kind == kind and entry.policy.config_class is entry.config


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_default_and_a_meaning(kind):
    for name, field in METHODS[kind].config.model_fields.items():
        assert not field.is_required()
        assert name == "kind" or field.description, name


def test_importing_a_baseline_loads_neither_robomimic_nor_sklearn():
    code = """import sys
import dpag.methods.bet, dpag.methods.lstm_gmm
print([m for m in ("robomimic", "sklearn", "torchvision") if m in sys.modules])"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


@pytest.mark.parametrize("kind", ["flow_policy", "ada_flow"])
def test_flows_refuse_a_net_that_does_not_fit_the_horizon(methods, kind):
    unet = {"kind": "unet", "channels": [16, 32, 64]}
    settings = methods[kind].policy_config({"horizon": 18, "net": unet, "action_frame": "relative"})
    with pytest.raises(ValueError, match="horizon = 18 must be divisible by 4"):
        build_policy(methods[kind], settings, TOY)


def test_ada_flow_counts_from_where_it_is_told(made):
    policy, batch, _ = made["ada_flow"]
    policy.act(batch["obs"], generator("a"))
    policy.reset_counts()
    assert policy.mean_steps() == 0
    policy.act(batch["obs"], generator("a"))
    assert 1 <= policy.mean_steps() <= policy.method.max_steps
