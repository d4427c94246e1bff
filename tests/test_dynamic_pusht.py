"""Dynamic Push-T: the ball keeps going, trajectories repeat, and the authors' file is read."""

import gymnasium as gym
import numpy as np
import pygame
import pytest
import zarr
from gym_pusht.envs.pusht import PushTEnv
from gymnasium.utils.env_checker import check_env

from dpag.config import generator, layered
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.pusht.dynamic import DynamicPushTEnv, authors_demonstrations
from dpag.tasks.pusht.env import PushTDictEnv
from dpag.tasks.pusht.task import BallConfig


def walk(env, seed, steps=150, **kw):
    env.reset(seed=seed, **kw)
    rng, states = np.random.default_rng(seed), [env.state]
    for _ in range(steps):
        env.step(rng.uniform(0, 512, 2))
        states.append(env.state)
    return np.array(states)


@pytest.mark.parametrize("observation", ["keypoints", "image"])
def test_gymnasiums_checker_has_no_complaint(observation):
    check_env(gym.make("dpag/DynamicPushT-v0", observation=observation).unwrapped, skip_render_check=False)


def test_one_seed_one_trajectory_to_the_bit():
    env = DynamicPushTEnv()
    a = walk(env, 3)
    assert np.array_equal(a, walk(DynamicPushTEnv(), 3)) and np.array_equal(a, walk(env, 3))
    assert not np.array_equal(a[0, 5:], walk(env, 4, steps=1)[0, 5:])


def test_the_ball_keeps_its_speed_and_its_place():
    low, high = BallConfig().speed
    for seed in range(8):
        path = walk(DynamicPushTEnv(), seed)
        speed = np.linalg.norm(path[:, 7:], axis=1)
        assert low <= speed[0] <= high and np.allclose(speed, speed[0])
        assert (
            np.linalg.norm(np.diff(path[:, 5:7], axis=0), axis=1) < 0.1 * speed[0] + 20
        ).all()  # a hit may shove it, not throw it
        assert (path[:, 5:7] > 5).all() and (path[:, 5:7] < 507).all()


def test_the_initial_state_is_push_ts_and_the_ball_can_be_another():
    plain, env = PushTDictEnv(), DynamicPushTEnv()
    plain.reset(seed=11)
    env.reset(seed=11)
    assert np.array_equal(env.state[:5], plain.state)
    first = env.state
    env.reset(seed=11, options={"ball_seed": 1})
    assert np.array_equal(env.state[:5], first[:5]) and not np.array_equal(env.state[5:], first[5:])


def test_a_heavier_ball_moves_the_block_farther():
    def moved(mass):
        env, total = DynamicPushTEnv(ball=BallConfig(mass=mass)), 0.0
        for seed in range(6):
            env.reset(seed=seed)
            start = env.state
            for _ in range(100):
                env.step(start[:2])
            total += np.linalg.norm(env.state[2:4] - start[2:4])
        return total / 6

    assert moved(0.01) < 3 < 15 < moved(BallConfig().mass)


def test_the_ball_is_in_the_image():
    env = DynamicPushTEnv("image")
    obs, _ = env.reset(seed=2)
    x, y = (env.state[5:7] * 96 / 512).astype(int)
    r, g, b = obs["image"][y, x].astype(int)
    assert r > 200 and g < 150 and b < 150
    other, _ = env.reset(seed=2, options={"ball_seed": 5})
    assert not np.array_equal(other["image"], obs["image"])


def test_the_picture_is_gym_pushts_to_the_bit():
    env, rng = DynamicPushTEnv("image"), np.random.default_rng(0)
    for seed in range(4):
        env.reset(seed=seed)
        for _ in range(40):
            env.step(rng.uniform(0, 512, 2))
            theirs = pygame.surfarray.array3d(PushTEnv._draw(env.simulator))
            assert np.array_equal(pygame.surfarray.array3d(env.simulator._draw()), theirs)


def test_set_state_puts_the_ball_back():
    env = DynamicPushTEnv()
    states = walk(env, 5, steps=20)
    env.set_state(states[7])
    np.testing.assert_allclose(env.state, states[7], atol=1e-9)


def test_no_room_for_the_ball_is_said():
    with pytest.raises(RuntimeError, match="ball.radius must be smaller"):
        DynamicPushTEnv(ball=BallConfig(radius=240.0)).reset(seed=0)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("where", ["mirror", "folder"])
def test_the_authors_file_loads(tmp_path, monkeypatch, dtype, where):
    folder = tmp_path / ("mirror" if where == "mirror" else "data/raw")
    folder.mkdir(parents=True)
    store = zarr.storage.ZipStore(folder / "single_ball_pusht.zarr.zip", mode="w")
    z, rng = zarr.open_group(store, mode="w", zarr_format=2), np.random.default_rng(0)
    arrays = {
        "img": rng.integers(0, 256, (9, 96, 96, 3)).astype(dtype),
        "state": rng.uniform(0, 500, (9, 5)).astype(np.float32),
        "action": rng.uniform(0, 500, (9, 2)).astype(np.float32),
    }
    for k, a in arrays.items():
        z.create_array(f"data/{k}", data=a, chunks=(4, *a.shape[1:]))
    z.create_array("meta/episode_ends", data=np.array([4, 9]))
    store.close()
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    if where == "mirror":
        monkeypatch.setenv("DPAG_MIRROR", str(folder))
    d = get_task("dynamic_pusht_img").demonstrations("authors", folder=tmp_path / "data")
    assert len(d) == 2 and d.meta["source"] == "authors" and d.arrays["image"].dtype == np.uint8
    assert np.array_equal(d.arrays["image"], arrays["img"].astype(np.uint8))
    assert np.array_equal(d.arrays["agent_pos"], arrays["state"][:, :2])


def test_without_the_authors_file_the_error_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    with pytest.raises(FileNotFoundError, match="no single_ball_pusht.zarr.zip in .*: put the authors' file"):
        authors_demonstrations(tmp_path)
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no single_ball_pusht.zarr.zip in it"):
        authors_demonstrations(tmp_path / "raw")


def test_the_keypoint_variant_trains_and_acts_on_the_ball():
    import torch

    from dpag.data import WindowDataset
    from dpag.policy import METHODS, PolicyConfig, build_policy
    from dpag.rollouts import Protocol, rollout

    config = TASKS["dynamic_pusht_kp"].configure({"n_demos": 2})
    task = get_task("dynamic_pusht_kp", config)
    d = task.demonstrations("scripted")
    assert d.arrays["ball"].shape == (d.episode_ends[-1], 4) and d.arrays["state"].shape[1] == 9
    settings = layered(PolicyConfig, {"action_frame": "relative"}, config.policy)
    ds = WindowDataset(
        {k: d.arrays[k] for k in task.shapes.obs},
        d.arrays["action"],
        d.episode_ends,
        horizon=16,
        n_obs_steps=2,
        n_action_steps=8,
    )
    torch.manual_seed(0)
    policy = build_policy(METHODS["dp_ag"].config(), settings, task.shapes, ds)
    assert policy.loss(ds.batch(8, generator("b")), generator("n"))["loss"].isfinite()
    rows, _ = rollout(policy, task.make_env, range(2), Protocol(max_steps=16, n_obs_steps=2))
    assert rows.steps.tolist() == [16, 16]
