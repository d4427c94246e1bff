"""Dynamic Push-T: the ball keeps going, trajectories repeat, and the authors' file is read."""

import gymnasium as gym
import numpy as np
import pygame
import pytest
import zarr
from gym_pusht.envs.pusht import PushTEnv
from gymnasium.utils.env_checker import check_env

from dpag.config import SettingsError, generator, layered
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.pusht.dynamic import DynamicPushTEnv, authors_demonstrations
from dpag.tasks.pusht.env import PushTDictEnv
from dpag.tasks.pusht.expert import distance_to_block, rotation, run_expert
from dpag.tasks.pusht.task import BallConfig, PushTExpertConfig

SMALL = TASKS["dynamic_pusht_kp_small"].configure().ball
BOTH = pytest.mark.parametrize("ball", [BallConfig(), SMALL], ids=["film", "small"])
FILM_STEPS = 196


def walk(env, seed, steps=150, still=False, **kw):
    """States of a finger that goes anywhere, or of one that rests."""
    env.reset(seed=seed, **kw)
    rng, states = np.random.default_rng(seed), [env.state]
    for _ in range(steps):
        env.step(env.state[:2] if still else rng.uniform(0, 512, 2))
        states.append(env.state)
    return np.array(states)


def gaps(states, radius=25.0):
    """Between ball and block, and between ball and finger, px; negative where they overlap."""
    block = [distance_to_block((s[5:7] - s[2:4]) @ rotation(s[4])) - radius for s in states]
    return np.array(block), np.linalg.norm(states[:, 5:7] - states[:, :2], axis=1) - radius - 15


def unfolded(place, velocity, seconds, low=30.0, high=482.0):
    """Where a ball is after `seconds`, with walls taken for mirrors, and its velocity there."""
    along = (place + velocity * seconds - low) % (2 * (high - low))
    back = along > high - low
    return np.where(back, 2 * (high - low) - along, along) + low, np.where(back, -velocity, velocity)


@pytest.mark.parametrize("observation", ["keypoints", "image"])
def test_gymnasiums_checker_has_no_complaint(observation):
    check_env(gym.make("dpag/DynamicPushT-v0", observation=observation).unwrapped, skip_render_check=False)


@BOTH
def test_one_seed_one_trajectory_to_the_bit(ball):
    env = DynamicPushTEnv(ball=ball)
    a = walk(env, 3)
    assert np.array_equal(a, walk(DynamicPushTEnv(ball=ball), 3)) and np.array_equal(a, walk(env, 3))
    assert not np.array_equal(a[0, 5:], walk(env, 4, steps=1)[0, 5:])


@pytest.mark.parametrize("seed", range(12))
def test_the_balls_path_is_of_the_films_kind(seed):
    """Over as many steps as the film has pictures: away from finger and block the path is what straight lines
    and mirrors give, and the speed is one."""
    states = walk(DynamicPushTEnv(), seed, FILM_STEPS, still=True)
    assert np.abs(np.linalg.norm(states[:, 7:], axis=1) - 102).max() < 1e-9
    assert states[:, 5:7].min() >= 30 and states[:, 5:7].max() <= 482
    # In a step the ball goes 10.2 px; a hit may jerk the block back by twice its momentum.
    far = np.min(gaps(states), axis=0) > 10.3
    flies = far[:-1] & far[1:]
    place, velocity = unfolded(states[:-1, 5:7], states[:-1, 7:], 0.1)
    assert flies.mean() > 0.5
    np.testing.assert_allclose(states[1:, 5:7][flies], place[flies], atol=1e-9)
    np.testing.assert_allclose(states[1:, 7:][flies], velocity[flies], atol=1e-9)


def test_the_ball_bounces_off_all_walls_for_196_steps_without_an_error_that_grows():
    env, ways = DynamicPushTEnv(), np.random.default_rng(0).uniform(0, 2 * np.pi, 40)
    alone = 0
    for way in ways:
        env.reset(seed=0)
        start = np.array([20.0, 20.0, 60.0, 60.0, 0.0, 300.0, 300.0, 102 * np.cos(way), 102 * np.sin(way)])
        env.set_state(start)
        for step in range(1, FILM_STEPS + 1):
            env.step(start[:2])
            if np.min(gaps(env.state[None])) < 10.3:
                break
            place, velocity = unfolded(start[5:7], start[7:], 0.1 * step)
            np.testing.assert_allclose(env.state[5:], [*place, *velocity], atol=1e-8)
        else:
            alone += 1
    assert alone >= 10


def hit(velocity, angle=0.0, offset=(0.0, 175.0), ball=None):
    """The states before and 0.8 s after a block rests at `angle` (rad), and a ball starts with `velocity` at
    `offset` from it, in the block's frame."""
    env = DynamicPushTEnv(ball=ball)
    env.reset(seed=0)
    before = np.r_[470.0, 470.0, 256.0, 216.0, angle, [256.0, 216.0] + rotation(angle) @ offset, velocity]
    env.set_state(before)
    env.step(before[:2])  # the simulator still pulls apart what touched after the reset
    env.set_state(before)
    for _ in range(8):
        env.step(before[:2])
    return before, env.state


def test_a_face_at_20_degrees_turns_60_degrees_into_minus_20():
    going = 102 * np.array([np.cos(np.pi / 3), np.sin(np.pi / 3)])
    _, after = hit(going, angle=np.radians(20 - 90), offset=(70.0, 55.0))  # the stem lies at 20 degrees
    np.testing.assert_allclose(np.degrees(np.arctan2(after[8], after[7])), -20, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(after[7:]), 102, atol=1e-9)


def test_the_block_gets_the_momentum_that_the_ball_loses():
    for mass in (0.1, 1.0, 10.0):
        # Through the centre of gravity: the block does not turn, and moves for one physics step, 0.01 s.
        before, after = hit([0.0, -102.0], ball=BallConfig(mass=mass))
        np.testing.assert_allclose(after[2:5] - before[2:5], [0, -2 * mass * 102 * 0.01, 0], atol=1e-6)
        np.testing.assert_allclose(after[7:], [0, 102], atol=1e-6)


def test_the_finger_reflects_the_ball():
    env = DynamicPushTEnv()
    env.reset(seed=0)
    env.set_state(np.array([100.0, 300.0, 380.0, 100.0, 0.0, 200.0, 320.0, -102.0, 0.0]))
    for _ in range(12):
        env.step([100.0, 300.0])
    # The centres are 40 px apart at the touch, 20 of them across: the normal is 30 degrees off, the way 60.
    # The touch is found up to 1 px late, which turns the normal of a disc by a degree and a half at most.
    np.testing.assert_allclose(np.degrees(np.arctan2(*env.state[:6:-1])), 60, atol=3)


def test_random_play_never_traps_the_ball_nor_lets_it_out():
    runs = []
    for seed in range(20):
        env, rng = DynamicPushTEnv(), np.random.default_rng(seed)
        env.reset(seed=seed)
        states = [env.state]
        for step in range(FILM_STEPS):
            if step % 4 == 0:
                target = rng.uniform(0, 512, 2)
            env.step(target)
            states.append(env.state)
        path = np.array(states)
        assert path[:, 5:7].min() >= 30 and path[:, 5:7].max() <= 482
        assert np.abs(np.linalg.norm(path[:, 7:], axis=1) - 102).max() < 1e-9
        block, finger = gaps(path)
        assert finger.min() > -1e-6 and block.min() > -10
        runs.append("".join("x" if gap < -2 else " " for gap in block))
    assert max(len(deep) for run in runs for deep in run.split(" ")) <= 2  # steps of 0.1 s


@pytest.mark.parametrize("where", [(482.0, 256.0), (256.0, 30.0), (482.0, 482.0), (470.0, 36.0)])
def test_a_finger_that_presses_the_ball_to_a_wall_shoves_it_aside(where):
    env = DynamicPushTEnv()
    env.reset(seed=0)
    env.set_state(np.array([256.0, 400.0, 150.0, 200.0, 0.0, *where, 102.0, 0.0]))
    for _ in range(30):
        env.step(where)
        assert gaps(env.state[None])[1] > -1e-6
        assert env.state[5:7].min() >= 30 and env.state[5:7].max() <= 482


def test_a_block_that_is_pressed_on_the_ball_gives_way():
    """The finger pushes the bar to the right wall; the ball is between them."""
    env = DynamicPushTEnv()
    env.reset(seed=0)
    env.set_state(np.array([360.0, 256.0, 430.0, 256.0, np.pi / 2, 478.0, 256.0, 102.0, 0.0]))
    deep = []
    for _ in range(40):
        env.step([430.0, 256.0])
        deep.append(gaps(env.state[None])[0][0])
        assert env.state[5:7].min() >= 30 and env.state[5:7].max() <= 482
    assert min(deep[5:]) > -10


def test_the_ball_starts_near_the_finger_and_touches_nothing():
    env = DynamicPushTEnv()
    for seed in range(300):
        env.reset(seed=seed)
        apart = np.linalg.norm(env.state[5:7] - env.state[:2])
        assert 45 <= apart <= 80 and min(gaps(env.state[None]))[0] > 0


# The small ball of older versions: what it was, to the bit.

# State seed: the ball's first state, and all of the last one, of a finger that goes anywhere for 100 steps.
OLDER = {
    0: (
        [338.398802032759, 428.05417701244113, 8.482390328992453, 117.35396994165347],
        [288.966705971488, 303.6313590213718, 92.11049662901519, 422.5520780616878, -1.5961534506966861,
         488.34232093541027, 320.4119027027343, 16.246918093474633, -116.53301188600516],
    ),
    1: (
        [185.6025561983019, 281.2329787362604, 18.470728214934198, 124.14022235867452],
        [138.35128264511573, 221.3420735055105, 292.2883004985627, 452.76305042663665, -2.114853234865196,
         174.28941779987014, 428.0787533945251, 116.45179240821808, 46.80750637413193],
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", OLDER)
def test_the_small_ball_is_that_of_older_versions(seed):
    states = walk(DynamicPushTEnv(ball=SMALL), seed, 100)
    np.testing.assert_allclose(states[0, 5:], OLDER[seed][0], rtol=1e-12)
    np.testing.assert_allclose(states[-1], OLDER[seed][1], rtol=1e-6)


def test_the_small_ball_keeps_its_speed_and_its_place():
    low, high = SMALL.speed
    for seed in range(8):
        path = walk(DynamicPushTEnv(ball=SMALL), seed)
        speed = np.linalg.norm(path[:, 7:], axis=1)
        assert low <= speed[0] <= high and np.allclose(speed, speed[0])
        assert (
            np.linalg.norm(np.diff(path[:, 5:7], axis=0), axis=1) < 0.1 * speed[0] + 20
        ).all()  # a hit may shove it, not throw it
        assert (path[:, 5:7] > 5).all() and (path[:, 5:7] < 507).all()


def test_the_expert_succeeds_in_spite_of_the_ball():
    runs = [
        run_expert(DynamicPushTEnv(), seed=seed, plan_seed=0, expert=PushTExpertConfig(), max_steps=300)
        for seed in range(500000, 500040)
    ]
    assert np.mean([success for *_, success in runs]) >= 0.95


def test_the_initial_state_is_push_ts_and_the_ball_can_be_another():
    plain, env = PushTDictEnv(), DynamicPushTEnv()
    plain.reset(seed=11)
    env.reset(seed=11)
    assert np.array_equal(env.state[:5], plain.state)
    first = env.state
    env.reset(seed=11, options={"ball_seed": 1})
    assert np.array_equal(env.state[:5], first[:5]) and not np.array_equal(env.state[5:], first[5:])


@BOTH
def test_a_heavier_ball_moves_the_block_farther(ball):
    def moved(mass):
        env, total = DynamicPushTEnv(ball=ball.model_copy(update={"mass": mass})), 0.0
        for seed in range(6):
            env.reset(seed=seed)
            start = env.state
            for _ in range(100):
                env.step(start[:2])
            total += np.linalg.norm(env.state[2:4] - start[2:4])
        return total / 6

    assert moved(0.01) < 3 < 10 < moved(ball.mass)


def test_the_ball_is_in_the_image_and_yellow():
    env = DynamicPushTEnv("image")
    obs, _ = env.reset(seed=2)
    x, y = (env.state[5:7] * 96 / 512).astype(int)
    r, g, b = obs["image"].astype(int).transpose(2, 0, 1)
    assert r[y, x] > 240 and 150 < g[y, x] < 220 and b[y, x] < 30
    yellow = (r > 200) & (g > 120) & (g < 230) & (b < 80)
    assert 50 < yellow.sum() < 80  # a disc of 4.7 pixels has 69
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


@BOTH
def test_set_state_puts_the_ball_back(ball):
    env = DynamicPushTEnv(ball=ball)
    states = walk(env, 5, steps=20)
    env.set_state(states[7])
    np.testing.assert_allclose(env.state, states[7], atol=1e-9)


def test_a_state_that_is_set_goes_on_as_it_did():
    """Up to what the simulator has left to pull apart after a touch, which is no part of a state."""
    env = DynamicPushTEnv()
    states = walk(env, 6, steps=40, still=True)
    env.set_state(states[10])
    for want in states[11:]:
        env.step(env.state[:2])
        np.testing.assert_allclose(env.state, want, atol=0.01)


def test_no_room_for_the_ball_is_said():
    with pytest.raises(RuntimeError, match="ball.radius must be smaller, or ball.start farther"):
        DynamicPushTEnv(ball=BallConfig(radius=100.0)).reset(seed=0)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"radius": 240.0}, r"bounds = \[30.0, 482.0\]: must .* wider than ball and finger"),
        ({"bounds": [30.0, 600.0]}, r"bounds = \[30.0, 600.0\]: must end at 512 px"),
        ({"bounces": "soft"}, "ball.bounces = 'soft'.*'mirror' or 'solver'"),
        ({"color": "yellow"}, "ball.color = 'yellow'"),
        ({"start": [80.0, 45.0]}, r"must be \[lowest, highest\]"),
    ],
)
def test_a_wrong_ball_is_named(wrong, said):
    with pytest.raises(SettingsError, match=said):
        TASKS["dynamic_pusht_kp"].configure({"ball": wrong})


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
