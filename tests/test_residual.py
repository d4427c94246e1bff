"""Residual guidance: off it changes nothing, on it agrees better with what is known, row by row."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from dpag.config import SettingsError, generator
from dpag.export import check_exportable
from dpag.noise_net import UNetConfig
from dpag.paths import Cell, published
from dpag.plan import make_plan
from dpag.policy import METHODS, Actor, Policy, build_policy, load_policy
from dpag.residual import known_weights, still_known
from dpag.rollouts import Protocol, act_latency, rollout, stack_observations
from dpag.settings import load, validate
from dpag.tasks.base import get_task

UNET = UNetConfig(channels=[16, 32], kernel_size=3, n_groups=8, step_dim=16)
METHOD = pytest.mark.parametrize("method", ["dp", "dp_ag"])
ONTO = pytest.mark.parametrize("onto", ["latent", "chunk"])


def make(small, shapes, dataset, method="dp", **changes):
    torch.manual_seed(0)
    settings = small.model_copy(update=changes)
    return build_policy(METHODS[method].config(), settings, shapes, dataset).eval()


def observations(dataset, n=6):
    return dataset.gather(torch.arange(0, 10 * n, 10))["obs"]


def known_of(policy, obs, seed="before"):
    "What is known after a plan of the unguided policy."
    with torch.no_grad():
        chunk = policy.in_units(policy.denoised(obs, generator(seed)), obs)
    return still_known(chunk, None, policy.n_obs_steps - 1, policy.n_action_steps)


# What is known


@pytest.mark.parametrize("n_past,n_executed", [(1, 1), (1, 8), (2, 1), (2, 4), (3, 1), (0, 3)])
def test_the_known_past_is_what_was_executed(n_past, n_executed):
    "Through many plans that contradict one another: each entry is a number of the step that it is about."
    horizon, executed, known = 16, {}, None
    for plan in range(6):
        start = plan * n_executed - n_past  # the step of the chunk's first entry
        chunk = (torch.arange(horizon) + start + 1000.0 * plan).view(1, horizon, 1)
        if known is not None:
            for i in range(horizon):
                value, step = known[0, i, 0].item(), start + i
                if step < plan * n_executed:  # in the past: as it was executed, or before the episode
                    assert value == executed[step] if step >= 0 else np.isnan(value)
                elif i < horizon - n_executed:
                    assert value == step + 1000.0 * (plan - 1)
                else:
                    assert np.isnan(value)
        for i in range(n_past, n_past + n_executed):
            executed[start + i] = chunk[0, i, 0].item()
        known = still_known(chunk, known, n_past, n_executed)


def test_weights_are_those_of_real_time_chunking():
    "Equation 5: 1 below d, c (e^c − 1) / (e − 1) with c = (H − s − i) / (H − s − d + 1), 0 from H − s on."
    for horizon, d, s in ((16, 1, 8), (16, 1, 1), (16, 2, 4), (8, 0, 3)):
        w, end = known_weights(horizon, d, horizon - s), horizon - s
        c = (end - np.arange(horizon)) / (end - d + 1)
        expected = np.where(np.arange(horizon) < d, 1, c * (np.exp(c) - 1) / (np.e - 1))
        expected[end:] = 0
        np.testing.assert_allclose(w, expected, atol=1e-6)
    assert known_weights(16, 1, 1).tolist() == [1.0] + [0.0] * 15  # nothing but the past


# Off


@METHOD
def test_without_it_replanning_is_acting_to_the_bit(small, shapes, dataset, method):
    policy, obs = make(small, shapes, dataset, method), observations(dataset)
    actions, known = policy.replan(obs, generator("a"), known_of(policy, obs))
    assert known is None
    assert torch.equal(actions, policy.act(obs, generator("a")))


@METHOD
@ONTO
def test_the_first_plan_of_an_episode_is_unguided_to_the_bit(small, shapes, dataset, method, onto):
    policy, obs = make(small, shapes, dataset, method), observations(dataset)
    before = policy.act(obs, generator("a"))
    actions, known = policy.act_as({"residual": {"onto": onto}}).replan(obs, generator("a"))
    assert torch.equal(actions, before) and known.shape == (6, 16, 2)
    nothing = torch.full_like(known, torch.nan)
    guided, _ = policy.replan(obs, generator("a"), nothing)
    torch.testing.assert_close(guided, before, atol=1e-3, rtol=1e-5)


# On


@METHOD
@ONTO
@pytest.mark.parametrize("net", [None, UNET], ids=["mlp", "unet"])
def test_a_plan_that_agrees_with_all_that_is_known_stays_as_it_is(
    small, shapes, dataset, method, onto, net, monkeypatch
):
    "A net that is certain: it predicts one clean chunk, whatever the noise."
    settings = {"diffusion": small.diffusion.model_copy(update={"prediction": "sample"})}
    policy = make(small, shapes, dataset, method, **settings, **({"net": net} if net else {}))
    denoise, vjp = policy.net.denoise, policy.net.vjp
    still, level = torch.zeros(6, 16, 2), policy.net.step_part(policy.diffusion.levels())[3]
    start = policy.net.latent_part(policy.encode(observations(dataset))[0]) + level
    with torch.no_grad():
        certain = denoise(still, start)
    monkeypatch.setattr(policy.net, "denoise", lambda a, c: certain + 0 * denoise(a, c))
    monkeypatch.setattr(policy.net, "vjp", lambda a, c: (certain.clone(), vjp(a, c)[1]))
    obs = observations(dataset)
    before = policy.act(obs, generator("a"))
    with torch.no_grad():
        known = policy.in_units(policy.denoised(obs, generator("a")), obs)
    policy.act_as({"residual": {"onto": onto}})
    agreeing, _ = policy.replan(obs, generator("b"), known)
    torch.testing.assert_close(agreeing, before, atol=1e-3, rtol=1e-5)


@METHOD
@ONTO
def test_a_trained_policy_agrees_better_with_what_is_known(method, onto):
    "The weights of the repository, planning a second time with other noise."
    cell = Cell("laptop-scripted", "pusht_kp", method, 0)
    policy, _ = load_policy(published().shipped(cell) / "checkpoint")
    env = get_task("pusht_kp").make_env()
    first = [env.reset(seed=50_000 + i)[0] for i in range(24)]
    obs = stack_observations([[o] * policy.n_obs_steps for o in first])
    known = known_of(policy, obs)
    weights = known_weights(16, 1, 8)[:, None]

    def apart(changes):
        policy.act_as({"residual": changes})
        with torch.no_grad():
            chunk = policy.in_units(policy.denoised(obs, generator("again"), known=known), obs)
        return (weights * (chunk - known).nan_to_num()).norm(dim=(1, 2)).mean().item()

    free = apart({"onto": "none"})
    assert free > 1  # px
    assert apart({"onto": onto, "reach": 10.0}) < {"chunk": 0.7, "latent": 0.95}[onto] * free


@ONTO
@pytest.mark.parametrize("net", [None, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize(
    "method,evolve", [("dp", ""), *(("dp_ag", e) for e in ("every", "lagged", "carried"))]
)
def test_no_row_knows_of_the_others(small, shapes, dataset, method, onto, net, evolve):
    """A whole run, step by step: six rows at once, and each alone; the rows know different parts. In 64 bits,
    since a net that is not trained makes much of a rounding."""
    policy = make(small, shapes, dataset, method, **({"net": net} if net else {}))
    known = known_of(policy, observations(dataset)).double()
    policy.double().act_as({"residual": {"onto": onto}})
    if evolve:
        policy.act_as({"guidance": {"evolve": evolve}})
    obs = {k: v.double() for k, v in observations(dataset).items()}
    noised = torch.randn(8, 6, 16, 2, generator=generator("n"), dtype=torch.float64)
    known[2] = torch.nan
    known[3, 4:] = torch.nan

    def outputs(rows):
        with torch.inference_mode():
            predict = policy.predictor({k: v[rows] for k, v in obs.items()}, known=known[rows])
            return torch.stack([predict(x[rows], i) for i, x in enumerate(noised)], 1)

    together = outputs(slice(None))
    alone = torch.cat([outputs(slice(i, i + 1)) for i in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-7, rtol=1e-7)
    known = torch.full_like(known, torch.nan)
    free = outputs(slice(None))
    torch.testing.assert_close(free[2], together[2], atol=1e-7, rtol=1e-7)
    assert (free[:, 1:] - together[:, 1:]).abs().amax((1, 2, 3))[[0, 1, 3, 4, 5]].min() > 1e-4


@METHOD
@ONTO
def test_an_actor_and_a_batch_do_the_same(small, shapes, dataset, method, onto):
    "What is known is carried from plan to plan, and forgotten with the episode."
    policy = make(small, shapes, dataset, method)
    policy.act_as({"policy": {"n_action_steps": 2}, "residual": {"onto": onto}})
    windows = [dataset.gather(torch.arange(i, i + 1))["obs"] for i in range(2, 7)]
    actor = Actor(policy, generator("a"))
    for _ in range(2):
        noise, known, expected = generator("a"), None, []
        for window in windows[::2]:
            actions, known = policy.replan(window, noise, known)
            expected += list(actions[0].numpy())
        actor.noise = generator("a")
        actor.recent.extend({k: v[0, i].numpy() for k, v in windows[0].items()} for i in range(1))
        made = [actor({k: v[0, -1].numpy() for k, v in window.items()}) for window in windows]
        np.testing.assert_array_equal(made, expected[:5])
        actor.reset()
        assert actor.known is None


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_chunk_is_moved_no_further_than_it_is_off(small, shapes, dataset, prediction):
    "And never by nothing, at any step: in terms of the clean chunk that the outputs imply."
    settings = {"diffusion": small.diffusion.model_copy(update={"prediction": prediction})}
    policy, obs = make(small, shapes, dataset, **settings), observations(dataset)
    known = known_of(policy, obs)
    policy.act_as({"residual": {"onto": "chunk"}})
    with torch.inference_mode():
        free, guided = policy.predictor(obs), policy.predictor(obs, known=known)
        for i, step in enumerate(policy.diffusion.steps):
            noised = torch.randn(6, 16, 2, generator=generator("n", i))
            out = free(noised, i)
            way = (step.clean[1] * (guided(noised, i) - out)).flatten(1).norm(dim=1)
            off = guided.residual.missing(noised, i, out).flatten(1).norm(dim=1)
            assert (way <= 1.001 * off + 1e-4).all() and ((way > 0) == (off > 0)).all()


@METHOD
@ONTO
def test_what_is_only_planned_can_be_left_aside(small, shapes, dataset, method, onto):
    policy, obs = make(small, shapes, dataset, method), observations(dataset)
    known = known_of(policy, obs)
    other = known.clone()
    other[:, 1:] += 20  # px
    plans = {}
    for which in ("executed", "planned"):
        policy.act_as({"residual": {"onto": onto, "known": which}})
        plans[which] = [policy.replan(obs, generator("a"), k)[0] for k in (known, other)]
    assert torch.equal(*plans["executed"]) and not torch.equal(*plans["planned"])


def test_it_is_no_part_of_an_exported_policy(small, shapes, dataset):
    policy = make(small, shapes, dataset)
    check_exportable(policy)
    with pytest.raises(ValueError, match="residual.onto = 'chunk' cannot be exported: allowed is none"):
        check_exportable(policy.act_as({"residual": {"onto": "chunk"}}))


# In rollouts


class Counting(gym.Env):
    "Observes who it is and its step; ends after as many steps as its seed says. A right action says both."

    def __init__(self):
        self.observation_space = gym.spaces.Dict({"at": gym.spaces.Box(-np.inf, np.inf, (2,))})
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def observe(self):
        return {"at": np.array([self.seed, self.t], np.float32)}

    def reset(self, *, seed=None, options=None):
        self.seed, self.t, self.right = seed, 0, 0
        return self.observe(), {"agent_pos": np.zeros(2)}

    def step(self, action):
        self.right += bool((action == [self.seed, self.t]).all())
        self.t += 1
        score = self.right / self.t
        info = {"agent_pos": np.zeros(2), "score": score, "is_success": score == 1}
        return self.observe(), 0.0, self.t >= self.seed, False, info


class Remembering(Policy):
    "Acts by what it was told is known of the plan; only a first plan looks at the observation."

    def replan(self, obs, generator, known=None):
        at = obs["at"][:, -1]
        if known is not None:
            assert torch.equal(known, at)
        actions = (at if known is None else known)[:, None].repeat(1, 3, 1)
        actions[:, :, 1] += torch.arange(3)
        return actions, actions[:, -1] + torch.tensor([0, 1])


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_each_episode_gets_its_own_plan_back(at_once):
    "Episodes of different lengths, of which the shorter drop out."
    seeds = [11, 3, 8, 4, 9]
    rows, _ = rollout(Remembering(), Counting, seeds, Protocol(max_steps=10, n_obs_steps=2), at_once=at_once)
    assert rows.steps.tolist() == [10, 3, 8, 4, 9] and (rows.score == 1).all()


def test_the_time_of_an_act_is_that_of_a_guided_one():
    class Seen(Policy):
        told = ()

        def replan(self, obs, generator, known=None):
            self.told = (*self.told, known)
            return obs["pos"], torch.ones(1)

    policy = Seen()
    act_latency(policy, {"pos": torch.zeros(1, 2, 2)}, 2)
    assert policy.told[0] is None and all(known is not None for known in policy.told[1:])


# Acting in other ways


@METHOD
def test_fewer_steps_of_the_same_plan(small, shapes, dataset, method):
    policy, obs = make(small, shapes, dataset, method), observations(dataset)
    eight = policy.act(obs, generator("a"))
    for n in (1, 2, 4):
        policy.act_as({"policy": {"n_action_steps": n}})
        assert torch.equal(policy.act(obs, generator("a")), eight[:, :n])
    assert policy.settings.n_action_steps == 4


@pytest.mark.parametrize(
    "method,changes,words",
    [
        ("dp", {"residual": {"onto": "plan"}}, "residual.onto = 'plan'.*'none', 'latent' or 'chunk'"),
        ("dp", {"residual": {"most": 0.0}}, "residual.most = 0.0.*greater than 0"),
        ("dp", {"residual": {"weight": 1}}, "residual.weight = 1.*not permitted"),
        ("dp_ag", {"policy": {"n_action_steps": 16}}, "policy.*n_action_steps . n_obs_steps - 1 = 17"),
        ("dp_ag", {"policy": {"n_obs_steps": 1}}, "dp_ag cannot change policy.n_obs_steps when acting"),
        ("flow_policy", {"residual": {"onto": "chunk"}}, "flow_policy cannot change residual when acting"),
        ("flow_policy", {"policy": {"n_action_steps": 4}}, "flow_policy cannot change policy when acting"),
    ],
)
def test_a_way_that_cannot_be_is_refused_by_name(small, shapes, dataset, method, changes, words):
    policy = make(small, shapes, dataset, method)
    with pytest.raises(SettingsError, match=words):
        policy.act_as(changes)
    tree = {"pipeline": {"pusht_kp": {method: [0]}}, "evaluate": {"acting": {method: {"so": changes}}}}
    with pytest.raises(SettingsError, match=f"evaluate.acting.{method}.so.*{words.removeprefix('policy.*')}"):
        validate(tree)


TRAINED = {"pipeline": {"pusht_kp": {"dp": [0, 1], "bet": [0]}}}


@pytest.mark.parametrize(
    "replanning,words",
    [
        (
            {"tasks": {"pusht_kp": {"dp": [0, 2]}}},
            r"replanning.tasks.pusht_kp.dp = \[2\]: pipeline trains no",
        ),
        ({"tasks": {"pusht": {"dp": [0]}}}, r"replanning.tasks.pusht.dp = \[0\]"),
        (
            {"tasks": {"pusht_kp": {"bet": [0]}}},
            "replanning.every = 1, bet on pusht_kp: bet cannot change policy when acting",
        ),
        ({"tasks": {"pusht_kp": {"dp": [0]}}, "every": [16]}, "n_action_steps . n_obs_steps - 1 = 17"),
        ({"tasks": {"pusht_kp": {"dp": [0]}}, "n_states": 51}, "replanning.n_states = 51: at most .* = 50"),
        (
            {"tasks": {"pusht_kp": {"dp": [0]}}, "residual": {"a": {"onto": "z"}}},
            r"replanning\.residual\.a, .*\.onto",
        ),
        ({"every": [1, 1]}, "named once"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(replanning, words):
    with pytest.raises(SettingsError, match=words):
        validate({**TRAINED, "replanning": replanning})


@pytest.mark.parametrize("study", ["replanning", "latent_scale"])
def test_a_study_of_chosen_policies_changes_no_other_stage(study):
    trained, few = {"pipeline": {"pusht_kp": {"dp": [0], "dp_ag": [0, 1]}}}, {"pusht_kp": {"dp_ag": [1]}}
    trees = trained, {**trained, study: {"tasks": few}}
    without, with_it = (make_plan(validate(tree)) for tree in trees)
    (stage,) = with_it.pop(study).values()
    assert without.pop(study) == {} and without == with_it
    assert stage["settings"]["tasks"] == few and "dpag.methods.dp_ag" in stage["code"]
    assert make_plan(load("laptop-scripted"))[study] == {}


@pytest.mark.parametrize(
    "asked,words",
    [
        ({"pusht_kp": {"dp_ag": [0, 2]}}, r"latent_scale.tasks.pusht_kp.dp_ag = \[2\]: pipeline trains no"),
        ({"lift_ph": {"dp_ag": [0]}}, r"latent_scale.tasks.lift_ph.dp_ag = \[0\]: pipeline trains no"),
        ({"pusht_kp": {"dp": [0]}}, "latent_scale.tasks.pusht_kp.dp: dp has no variational latent"),
        ({"pusht_kp": {"dp_ag": []}}, "latent_scale.tasks.pusht_kp.dp_ag"),
    ],
)
def test_the_scale_of_a_latent_is_asked_of_what_was_trained_with_one(asked, words):
    tree = {"pipeline": {"pusht_kp": {"dp": [0], "dp_ag": [0]}}, "latent_scale": {"tasks": asked}}
    with pytest.raises(SettingsError, match=words):
        validate(tree)
