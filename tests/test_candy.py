"""The candies: contact on the table, what counts as inside, the scene's pictures, and the script."""

import itertools

import numpy as np
import pytest

from dpag.robot.arm import Stopped
from dpag.robot.safety import RobotConfig
from dpag.robot.twin import Twin
from dpag.tasks.base import TASKS
from dpag.tasks.ur5.candy import (
    BACK,
    DOWN,
    END,
    FIELD,
    GAP,
    GOAL,
    HOVER,
    INNER,
    LONG,
    RADIUS,
    SQUARE,
    TALL,
    TAPE,
    THICK,
    TIPS,
    WIDE,
    Candies,
    CandyPush,
    candy_poses,
    expert,
    fork_bars,
    gathered,
)
from dpag.tasks.ur5.demonstrations import ShakyArm
from dpag.tasks.ur5.env import ArmEnv

TICK, FASTEST = 0.008, 0.25  # s; m/s, the guard's
AWAY = [[0.35, 0.3, 0.0], [0.4, 0.3, 0.0], [0.45, 0.3, 0.0]]


def table(*poses):
    "A table with these candies; those that are not named lie far away."
    return Candies(np.array([*poses, *AWAY[len(poses) :]]))


def drag(candies, way, speed, z=DOWN):
    "Drag the fork along the corners `way` `(n, 2)` m; the deepest overlap that there was, m."
    deepest, at = 0.0, np.array(way[0], float)
    candies.move(np.array([*at, z]), TICK)
    for corner in way[1:]:
        steps = int(np.ceil(np.linalg.norm(corner - at) / (speed * TICK)))
        for place in np.linspace(at, corner, steps + 1)[1:]:
            candies.move(np.array([*place, z]), TICK)
            deepest = max(deepest, overlap(candies))
        at = np.array(corner, float)
    return deepest


def overlap(candies):
    "How deep any candy is in another or in the fork, m."
    every = [*candies.shapes, *candies.bars]
    deepest = 0.0
    for a, b in itertools.combinations(every, 2):
        if a.body is not b.body:
            points = a.shapes_collide(b).points
            deepest = max([deepest, *(-p.distance for p in points)])
    return deepest


def between_prongs(candies):
    "Which candies have their middle between the prongs, `(3,)`."
    aside, ahead = (candies.poses[:, :2] - candies.last).T
    return (np.abs(aside) < INNER / 2) & (ahead > 0) & (ahead < TIPS)


# The table.


def test_candies_lie_apart_from_each_other_and_from_the_square():
    rng = np.random.default_rng(0)
    for _ in range(200):
        poses = candy_poses(rng)
        assert np.diff(np.sort(poses[:, 1])).min() > GAP
        for axis in (0, 1):
            assert FIELD[axis][0] <= poses[:, axis].min() and poses[:, axis].max() <= FIELD[axis][1]
        bounds = Candies(poses).bounds()
        assert bounds[:, 1, 1].max() < GOAL[1] - SQUARE / 2 - TAPE
        assert bounds[:, 0, 1].min() > CandyPush.start[1]
        assert overlap(Candies(poses)) == 0


def test_the_candies_have_the_measures_of_the_film():
    size = np.diff(table([0.4, 0, 0], [0.5, 0, np.pi / 2], [0.45, 0.1, 1]).bounds(), axis=1)[:, 0]
    np.testing.assert_allclose(size, [(LONG, WIDE), (WIDE, LONG), (2 * RADIUS, 2 * RADIUS)], atol=1e-9)
    assert (LONG, WIDE, 2 * RADIUS, SQUARE, THICK) == (0.03, 0.02, 0.02, 0.07, 0.008)
    assert abs(INNER - SQUARE) < 0.005 and 0.04 <= TIPS - THICK / 2 <= 0.05


def test_the_fork_is_a_u():
    (x, y, *back), *prongs = fork_bars()
    assert (x, y) == (0, 0) and back == [INNER + 2 * THICK, THICK]
    for sign, (x, y, across, along) in zip((-1, 1), prongs, strict=True):
        assert np.isclose(abs(x) - across / 2, INNER / 2) and np.sign(x) == sign
        assert np.isclose(y + along / 2, TIPS) and np.isclose(y - along / 2, -THICK / 2)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_nothing_rolls_or_spins_on(i):
    poses = [[0.4, 0.3, 0], [0.45, 0.3, 0], [0.5, 0.3, 0]]
    poses[i] = [0.46, 0.0, 0.7]  # hit off its middle: it turns
    candies = table(*poses)
    drag(candies, [(0.45, -0.05), (0.45, 0.05)], FASTEST)
    pushed = candies.poses
    assert pushed[i, 1] > 0.05
    candies.move(np.array([0.45, 0.05, DOWN]), TICK)
    np.testing.assert_allclose(candies.poses, pushed, atol=6e-4)  # a candy is one substep behind the fork
    pushed = candies.poses
    for _ in range(50):
        candies.move(np.array([0.45, 0.05, DOWN]), TICK)
    np.testing.assert_allclose(candies.poses, pushed, atol=1e-4)
    candies.move(np.array([0.45, 0.05, HOVER]), TICK)
    drag(candies, [(0.45, 0.05), (0.45, 0.2)], FASTEST, z=HOVER)
    np.testing.assert_allclose(candies.poses, pushed, atol=1e-4)


def test_the_others_stay_where_they_are_to_the_bit():
    candies = table([0.45, 0, 0.3], [0.36, 0.05, 0.2], [0.55, 0.05, 0.1])
    before = candies.poses
    drag(candies, [(0.45, -0.08), (0.45, 0.05)], 0.1)
    assert candies.poses[0, 1] > 0.05
    np.testing.assert_array_equal(candies.poses[1:], before[1:])


@pytest.mark.parametrize("z", [TALL, HOVER])
def test_a_lifted_fork_touches_nothing(z):
    candies = table([0.45, 0.0, 0.3])
    drag(candies, [(0.45, -0.1), (0.45, 0.1), (0.3, 0.0)], FASTEST, z=z)
    np.testing.assert_array_equal(candies.poses[0], [0.45, 0.0, 0.3])


@pytest.mark.parametrize("seed", range(12))
def test_no_candy_goes_through_the_fork_at_the_guards_speed(seed):
    "Wild strokes about the gathered candies: none is squeezed into a bar, or through one."
    rng = np.random.default_rng(seed)
    candies = Candies(
        np.array([[0.435, 0.03, 0.1], [0.468, 0.03, 1.4], [0.45, 0.06, 0]])
        + rng.uniform(-0.001, 0.001, (3, 3))
    )
    assert drag(candies, [(0.45, 0.0), (0.45, 0.02)], FASTEST) < 0.001
    has, way = between_prongs(candies), [np.array(candies.last)]
    for _ in range(12):  # sideways and forward: a fork that moves so loses nothing at its back or its sides
        way.append(way[-1] + [rng.uniform(-0.06, 0.06), rng.uniform(0, 0.02)])
    assert drag(candies, way, FASTEST) < 0.001
    aside, ahead = (candies.poses[has, :2] - candies.last).T
    assert (ahead > THICK / 2).all()  # in front of the back, whatever left through the open end
    assert has.sum() >= 2 and (np.abs(aside[ahead < TIPS - RADIUS]) < INNER / 2).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_prong_pushes_a_candy_aside_and_it_stays_on_its_side(sign):
    for start, inside in ((0.0, True), (sign * 0.06, False)):
        candies = table([0.45 + start, 0.02, 0.4])
        assert drag(candies, [(0.45, 0.0), (0.45 + sign * 0.08, 0.0)], FASTEST) < 0.001
        offset = sign * (candies.poses[0, 0] - candies.last[0])
        assert offset < -INNER / 2 + 0.02 if inside else offset > INNER / 2 + THICK


def test_three_candies_at_one_prong_are_pushed_and_not_squeezed():
    candies = Candies(np.array([[0.425, 0.02, 0], [0.455, 0.02, 0], [0.475, 0.02, 0]]))
    assert drag(candies, [(0.45, -0.06), (0.45, 0.08)], FASTEST) < 0.001
    assert (candies.poses[:, 1] > 0.08).all()


# What counts.


@pytest.mark.parametrize("i, half", [(0, LONG / 2), (1, LONG / 2), (2, RADIUS)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_candy_counts_up_to_the_tapes_outer_edge(i, half, axis, sign):
    edge = SQUARE / 2 + TAPE - half
    for off, counts in ((edge - 1e-4, True), (edge + 1e-4, False)):
        poses = np.array(AWAY)
        poses[i] = [*GOAL, np.pi / 2 * axis]
        poses[i, axis] += sign * off
        assert Candies(poses).inside().tolist() == [counts and k == i for k in range(3)]


def test_a_corner_beyond_the_edge_does_not_count():
    edge = SQUARE / 2 + TAPE - LONG / 2 - 1e-4
    assert table([GOAL[0] + edge, GOAL[1], 0]).inside()[0]
    assert not table([GOAL[0] + edge, GOAL[1], 0.3]).inside()[0]  # its middle is where it was


@pytest.fixture(scope="module")
def env():
    env = ArmEnv(CandyPush, RobotConfig(), size=96)
    yield env
    env.close()


def test_success_is_all_inside_and_the_fork_off(env):
    env.reset(seed=0)
    scene = env.scene
    scene.candies = Candies(np.array([[0.43, 0.12, 0], [0.47, 0.12, 0], [0.45, 0.15, 0]]))
    scene.tip = np.array([0.45, END, DOWN])
    assert scene.score() == 1 and not scene.success() and not scene.done()
    scene.tip = np.array([0.45, BACK - 0.001, DOWN])
    assert scene.success() and scene.done()
    scene.candies = Candies(np.array([[0.43, 0.12, 0], [0.47, 0.12, 0], [0.45, 0.0, 0]]))
    assert np.isclose(scene.score(), 2 / 3) and not scene.success()


# The scene.


def test_an_action_is_the_tips_place_and_the_fork_always_points_the_same_way():
    scene = CandyPush()
    np.testing.assert_array_equal(scene.pose_of([0.4, 0.1, 0.02]), [0.4, 0.1, 0.02, *scene.start[3:]])
    np.testing.assert_array_equal(scene.action_of(scene.start), scene.start[:3])


def test_the_pictures_show_the_candies_and_change_nothing(env):
    seen = {}
    for observing in (True, False):
        obs, _ = env.reset(seed=4)
        env.observing = observing
        for k in range(20):
            obs, *_ = env.step(np.array([0.45, -0.2 + 0.006 * k, max(DOWN, 0.04 - 0.004 * k)]))
        seen[observing] = env.scene.candies.poses, obs["tip"]
    for a, b in zip(*seen.values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_candy_that_is_moved_is_seen_by_both_cameras(env, i):
    env.reset(seed=4)
    before = env.observation()
    env.scene.candies.bodies[i].position = (0.45, -0.05)
    after = env.observation()
    for camera in ("scene", "wrist"):
        changed = np.abs(after[camera].astype(int) - before[camera]).max(-1) > 30
        assert changed.sum() >= 6, camera


def test_the_candies_are_drawn_where_they_are(env):
    env.reset(seed=4)
    simulator = env.arm.simulator
    env.scene.before_render(simulator)
    for i, (x, y, angle) in enumerate(env.scene.candies.poses):
        g = simulator.model.body(f"candy{i}").geomadr[0]
        np.testing.assert_allclose(simulator.data.geom_xpos[g, :2], [x, y], atol=1e-9)
        R = simulator.data.geom_xmat[g].reshape(3, 3)
        np.testing.assert_allclose(R[:2, 0], [np.cos(angle), np.sin(angle)], atol=1e-9)


# The script.


def attempt(twin, seed, **changes):
    "An attempt without pictures by an arm that shakes: success, seconds, and the places of the candies."
    config = TASKS["ur5_candy"].configure(changes)
    twin.reset(seed)
    scene, period, rng = twin.simulator.scene, config.robot.action_seconds, np.random.default_rng(seed)
    arm, places = ShakyArm(twin, config.shake, rng), []
    for k, action in enumerate(
        expert(scene, rng, speed=config.speed, error=config.error, period=period), start=1
    ):
        arm.servo(scene.pose_of(action)[None], np.array([k * period]))
        arm.wait_until(k * period)
        places.append(scene.candies.poses[:, :2])
    return scene.success(), k * period, np.concatenate(places)


@pytest.fixture(scope="module")
def twin():
    with Twin(CandyPush(), RobotConfig()) as twin:
        yield twin


def test_the_script_succeeds_under_a_shaking_arm_and_the_guard_refuses_nothing(twin):
    done, seconds = 0, []
    for seed in range(20):
        success, time, places = attempt(twin, seed)
        assert not twin.notes
        assert all(twin.simulator.scene.box.outside([*place, 0.01]) == 0 for place in places)
        done += success
        seconds.append(time)
    assert done >= 19
    assert 7 <= np.median(seconds) <= 12


def test_a_candy_that_escaped_is_gathered(twin):
    config = TASKS["ur5_candy"].configure()
    for seed in range(3):
        twin.reset(seed)
        scene, escaped, lifted = twin.simulator.scene, False, False
        actions = expert(scene, np.random.default_rng(seed), speed=(0.06, 0.06), error=0, period=0.1)
        for k, action in enumerate(actions, start=1):
            twin.servo(scene.pose_of(action)[None], np.array([0.1 * k]))
            twin.wait_until(0.1 * k)
            if not escaped and gathered(scene).any() and scene.tip[1] > -0.1:
                scene.candies.bodies[int(np.flatnonzero(gathered(scene))[0])].position = (0.45, -0.16)
                escaped = True
            lifted |= bool(escaped and scene.tip[2] > TALL)
        assert escaped and lifted and scene.success(), seed
    assert config.max_steps > 120


def test_the_script_gives_up_where_it_cannot_succeed(twin):
    twin.reset(0)
    scene = twin.simulator.scene
    scene.candies.bodies[0].position = (0.45, 0.26)  # beyond the square: a fork that only pushes cannot
    actions = list(expert(scene, np.random.default_rng(0), speed=(0.06, 0.06), error=0, period=0.1))
    assert len(actions) == 300 and not scene.success()


def test_the_script_depends_on_nothing_but_the_scene_and_its_draws(twin):
    ways = []
    for _ in range(2):
        twin.reset(5)
        scene, way = twin.simulator.scene, []
        for k, action in enumerate(
            expert(scene, np.random.default_rng(1), speed=(0.05, 0.06), error=0.002, period=0.1), 1
        ):
            twin.servo(scene.pose_of(action)[None], np.array([0.1 * k]))
            twin.wait_until(0.1 * k)
            way.append(action)
        ways.append(np.array(way))
    np.testing.assert_array_equal(*ways)
    assert np.linalg.norm(np.diff(ways[0], axis=0), axis=1).max() <= 0.006 + 1e-9


def test_what_is_too_fast_for_the_guard_ends_the_run(twin):
    twin.reset(0)
    scene = twin.simulator.scene
    actions = expert(scene, np.random.default_rng(0), speed=(0.4, 0.4), error=0, period=0.1)
    with pytest.raises(Stopped):
        for k, action in enumerate(actions, 1):
            twin.servo(scene.pose_of(action)[None], np.array([0.1 * k]))
            twin.wait_until(0.1 * k)
