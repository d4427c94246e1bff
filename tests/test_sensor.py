"""Push-T seen through a worse sensor, and learned from fewer demonstrations."""

import numpy as np
import pytest

from dpag.config import SettingsError
from dpag.data import Demonstrations
from dpag.interplay import interplay_rows, levels_of, ways_of, with_lengths
from dpag.settings import load
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.pusht.env import PushTDictEnv, as_demonstrations
from dpag.tasks.pusht.sensor import SensedEnv, chosen_episodes, only, sensed
from dpag.tasks.pusht.task import DIFFICULTIES, SensorConfig, as_seen

KINDS = [SensorConfig(hidden=0.4), SensorConfig(noise=7.0), SensorConfig(delay=3)]
LEVELS = [f"pusht_kp_{kind}_{level}" for kind, (_, levels) in DIFFICULTIES.items() for level in levels]


def recorded(n_episodes=6, steps=80) -> Demonstrations:
    rng = np.random.default_rng(0)
    states = 200 + np.cumsum(rng.normal(0, 3, (n_episodes * steps, 5)), 0)
    ends = np.arange(1, n_episodes + 1) * steps
    return as_demonstrations(states, states[:, :2], ends, {"source": "human"})


def episode(env, seed, n=40):
    "Observations of an episode in which the finger wanders, and what there was to see."
    rng = np.random.default_rng(9)
    found = [env.reset(seed=seed)[0]]
    truth = [env.unwrapped.observe()]
    for action in rng.uniform(100, 400, (n, 2)):
        found.append(env.step(action)[0])
        truth.append(env.unwrapped.observe())
    return [{k: np.array([o[k] for o in obs]) for k in obs[0]} for obs in (found, truth)]


def test_a_sensor_that_takes_nothing_changes_nothing():
    demos = recorded()
    assert sensed(demos, SensorConfig(), 0) is demos
    found, truth = episode(SensedEnv(PushTDictEnv(), SensorConfig()), 3)
    assert found.keys() == truth.keys()
    assert all(np.array_equal(found[k], truth[k]) for k in truth)


@pytest.mark.parametrize("config", KINDS, ids=["hidden", "noise", "late"])
def test_what_is_learned_from_is_worse_in_the_same_way_as_what_is_acted_on(config):
    demos = recorded()
    seen = sensed(demos, config, 0)
    found, truth = episode(SensedEnv(PushTDictEnv(), config), 3, n=400)
    for arrays, real in ((seen.episode(2), demos.episode(2)), (found, truth)):
        points, true = arrays["keypoints"], real["keypoints"]
        if config.delay:
            assert np.allclose(points[3:], true[:-3]) and np.allclose(points[:3], true[:1])
            assert np.allclose(arrays["agent_pos"][3:], real["agent_pos"][:-3])
        elif config.noise:
            assert (points - true).std() == pytest.approx(7, rel=0.1)
        else:
            visible = arrays["visible"].repeat(2, 1) > 0
            assert np.allclose(points, np.where(visible, true, 0))
            assert 1 - visible.mean() == pytest.approx(0.4, abs=0.06)
            assert visible[:, 0].std() > 0 and not np.array_equal(visible[:, 0], visible[:, 2])


def test_an_episode_draws_by_its_seed_and_no_two_alike():
    config = SensorConfig(hidden=0.3, noise=2.0)
    first, again, other = (episode(SensedEnv(PushTDictEnv(), config), seed)[0] for seed in (3, 3, 4))
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["visible"], other["visible"])
    seen = sensed(recorded(), config, 0)
    assert not np.array_equal(seen.episode(0)["visible"], seen.episode(1)["visible"])
    assert not np.array_equal(seen.arrays["visible"], sensed(recorded(), config, 1).arrays["visible"])


def test_what_was_done_is_recorded_as_it_was():
    demos = recorded()
    seen = sensed(demos, SensorConfig(hidden=0.3, noise=9.0, delay=2), 0)
    for k in ("action", "state"):
        assert np.array_equal(seen.arrays[k], demos.arrays[k])
    assert np.array_equal(seen.episode_ends, demos.episode_ends)


@pytest.mark.parametrize("name", ["pusht_kp_hidden_30", "pusht_kp_noise_5", "pusht_kp_late_2"])
def test_a_task_and_its_demonstrations_have_the_same_shapes(name):
    task, config = get_task(name), TASKS[name].configure()
    demos = as_seen(config, lambda **_: recorded(), "human", parts=None, folder=None)
    obs, _ = task.make_env().reset(seed=0)
    for shapes in ({k: v.shape for k, v in obs.items()}, {k: demos.arrays[k].shape[1:] for k in obs}):
        assert shapes == task.shapes.obs


def test_fewer_episodes_are_among_more_and_the_rest_is_left_out():
    demos = recorded(20, 5)
    few, rest = chosen_episodes(demos, 4)
    more, _ = chosen_episodes(demos, 9)
    assert set(few) < set(more) and sorted([*few, *rest]) == list(range(20))
    chosen = only(demos, few)
    for i, number in enumerate(few):
        assert np.array_equal(chosen.episode(i)["action"], demos.episode(int(number))["action"])
    assert chosen_episodes(demos, None)[0].tolist() == list(range(20))
    with pytest.raises(ValueError, match="n_human = 21: there are 20 episodes"):
        chosen_episodes(demos, 21)


def test_only_human_demonstrations_are_counted():
    config = TASKS["pusht_kp_few_10"].configure()
    source = lambda **_: recorded(20, 5)
    assert len(as_seen(config, source, "human")) == 10 and len(as_seen(config, source, "scripted")) == 20


def test_images_have_no_keypoints_to_hide():
    for name in ("pusht_img", "dynamic_pusht_img"):
        with pytest.raises(SettingsError, match=f"tasks.{name}.sensor: .*has no keypoints"):
            get_task(name, TASKS[name].configure({"sensor": {"noise": 1.0}}))


def test_every_level_is_a_task_that_the_profile_measures():
    settings = load("interplay-human")
    assert set(LEVELS) <= set(settings.pipeline)
    for name in LEVELS:
        config = settings.task(name)
        level = float(name.rpartition("_")[2])
        said = [config.n_human, 100 * config.sensor.hidden, config.sensor.noise, config.sensor.delay]
        assert level in said and sum(bool(x) for x in said) == (level > 0)
        steps = {m: settings.cell(name, m).train.steps for m in settings.pipeline[name]}
        assert steps["ab_dp"] == steps["ab_latent"] == steps["ab_full"] < steps["ab_dp_long"]


def test_levels_are_in_order_of_difficulty():
    import pandas as pd

    rows = [
        {"profile": "interplay+mine", "demos": "human", "run": "r", "task": task, "method": method}
        | {"train_seed": seed, "state_seed": state, "score": 0.5, "success": 0, "jerk_agent": 1.0}
        for task in ("pusht_kp_few_10", "pusht_kp_few_100", "pusht_kp_noise_10", "pusht_kp_noise_2")
        for method in ("ab_dp", "ab_full")
        for seed in (0, 1)
        for state in range(3)
    ]
    long = interplay_rows(pd.DataFrame(rows))
    assert list(levels_of("few", long)) == ["pusht_kp_few_100", "pusht_kp_few_10"]
    assert list(levels_of("noise", long)) == ["pusht_kp_noise_2", "pusht_kp_noise_10"]
    assert list(levels_of("late", long)) == []
    alone = interplay_rows(
        pd.DataFrame([r | {"task": "pusht_kp_noise_0"} for r in rows if r["task"].endswith("_2")])
    )
    assert not levels_of("noise", alone) and not levels_of("few", alone)
    both = levels_of("few", pd.concat([long, alone]))
    assert list(both) == ["pusht_kp_noise_0", "pusht_kp_few_100", "pusht_kp_few_10"]
    ball = interplay_rows(pd.DataFrame([r | {"task": "dynamic_pusht_kp"} for r in rows if "_2" in r["task"]]))
    assert [list(way) for way in ways_of(pd.concat([long, ball]))] == [
        ["pusht_kp_few_100", "pusht_kp_few_10"],
        ["pusht_kp_noise_2", "pusht_kp_noise_10"],
        ["dynamic_pusht_kp"],
    ]
    assert not ways_of(alone)
    longer = interplay_rows(
        pd.DataFrame(
            [
                r | {"task": "pusht_kp", "method": r["method"] + end}
                for r in rows
                for end in ("", "_50k")
                if "_2" in r["task"]
            ]
        )
    )
    assert list(ways_of(pd.concat([longer, alone]))[0]) == ["pusht_kp_noise_0", "pusht_kp", "pusht_kp_50k"]
    of_longer = with_lengths(longer).query("task == 'pusht_kp_50k'")
    assert set(of_longer.method) == {"ab_dp", "ab_full"} and "score_minus_dp" in set(of_longer.metric)
