"""The rod and the ring on its stand, and the tight hole: where things lie, what counts as success, what
moves, and the scripts."""

import json

import numpy as np
import pytest

from dpag.config import SettingsError
from dpag.robot.safety import RobotConfig
from dpag.robot.twin import Simulator, simulated_state
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.ur5 import hole, peg
from dpag.tasks.ur5.env import ArmEnv, straight
from dpag.tasks.ur5.task import WORK, UR5Config, attempt, expert_actions, load_scene, make_scene

SEEDS = range(70000, 70030)


@pytest.fixture(scope="module")
def env():
    "The rod, the ring and the arm; no images."
    env = ArmEnv(peg.PegInRing, RobotConfig(), size=64)
    yield env
    env.close()


def begin(env, seed):
    env.reset(seed=seed)
    env.observing = False
    return env.scene.ring


def go(env, *places):
    "Move the tip from place to place in steps of 3 mm; the last info and the largest force, N."
    most, at, info = 0.0, env.tcp[:3], {}
    for place in places:
        for action in straight(at, place, 0.003):
            *_, info = env.step(action)
            most = max(most, np.linalg.norm(simulated_state(env.arm.simulator).wrench[:3]))
        at = place
    return info, most


# Where things lie.


def test_every_task_of_the_arm_has_a_scene_and_a_script():
    assert set(WORK) == {name for name in TASKS.names() if name.startswith("ur5")}
    for name in WORK:
        scene = make_scene(name, TASKS[name].configure())
        assert callable(WORK[name].load().expert) and scene.box.outside(scene.start[:3]) == 0


def test_the_ring_is_within_the_stated_bounds_and_uses_them(env):
    places, sides = [], []
    for seed in range(300):
        env.scene.reset(env.arm.simulator, np.random.default_rng(seed))
        places.append(env.scene.ring)
        w, *_, z = env.arm.simulator.data.joint("stand").qpos[3:]
        sides.append(2 * np.arctan2(z, w))
    low = np.array([*np.subtract(peg.MIDDLE, peg.SPREAD), peg.HEIGHTS[0]])
    high = np.array([*np.add(peg.MIDDLE, peg.SPREAD), peg.HEIGHTS[1]])
    assert (np.array(places) >= low).all() and (np.array(places) <= high).all()
    assert (np.ptp(places, axis=0) > 0.95 * (high - low)).all()
    off = np.array(sides) - peg.SIDE
    assert np.abs(off).max() <= peg.TURN and np.ptp(off) > 1.9 * peg.TURN


def test_the_same_seed_is_the_same_layout_whatever_was_before(env):
    first = begin(env, 7).copy()
    go(env, first + [0, 0, 0.05])
    begin(env, 8)
    np.testing.assert_array_equal(begin(env, 7), first)
    assert env.scene.most_moved == env.scene.deepest == 0


def test_the_ring_is_where_the_scene_says_and_rests(env):
    for seed in range(5):
        ring = begin(env, seed)
        np.testing.assert_allclose(env.arm.simulator.data.site("ring").xpos, ring, atol=1e-9)
        for _ in range(20):
            env.step(np.array(env.scene.start[:3]))
        assert env.scene.most_moved < 0.0003


def test_the_box_holds_every_way_of_the_script(env):
    for seed in SEEDS:
        begin(env, seed)
        for action in expert_actions("ur5_peg", env.scene, UR5Config(error=0.006), np.random.default_rng(0)):
            assert env.scene.box.outside(action) == 0


def test_the_opening_is_as_wide_as_stated():
    "The boxes' inner faces are `OPENING` m from the middle."
    model = Simulator(peg.PegInRing()).model
    body = model.body("ring")
    boxes = range(body.geomadr[0], body.geomadr[0] + body.geomnum[0])
    inner = [np.linalg.norm(model.geom_pos[i][:2]) - model.geom_size[i][0] for i in boxes]
    assert len(inner) == 16
    np.testing.assert_allclose(inner, peg.OPENING, atol=1e-9)
    assert peg.OPENING - max(peg.ROD) == pytest.approx(0.007)
    assert list(peg.ROD) == sorted(peg.ROD, reverse=True)


def test_the_rod_stays_at_its_place_in_the_wrist_cameras_picture(env):
    "Above a white table, with the stand out of the way: what is black at one pose is black at the other."
    simulator, pictures = env.arm.simulator, []
    for place in (env.scene.start[:3], [0.47, 0.03, 0.2]):
        begin(env, 0)
        at = simulator.model.joint("stand").qposadr[0]
        simulator.data.qpos[at] = -0.5
        go(env, np.array(place))
        pictures.append(simulator.render("wrist", 64).max(axis=2) < 60)
    both = (pictures[0] & pictures[1]).sum()
    assert both > 100 and both > 0.95 * (pictures[0] | pictures[1]).sum()


# Success.


@pytest.mark.parametrize("depth, through", [(0.015, False), (0.026, False), (0.034, True)])
def test_success_is_two_centimetres_below_the_ring(env, depth, through):
    ring = begin(env, 3)
    face = ring + [0, 0, peg.HEIGHT]
    info, _ = go(env, face + [0, 0, 0.02], face - [0, 0, depth], face - [0, 0, depth])
    assert info["is_success"] is through is env.scene.done()
    assert info["score"] == pytest.approx(min(1, depth / (peg.HEIGHT + peg.ENOUGH)), abs=0.1)


def test_beside_the_opening_is_no_depth(env):
    ring = begin(env, 3)
    info, _ = go(env, ring + [0, -0.05, 0.05], ring + [0, -0.05, -0.03])
    assert (info["score"], info["is_success"]) == (0, False)


def test_the_depth_is_that_of_the_ring_where_it_is_now(env):
    "A stand that was moved a little, within what is allowed, takes the ring along."
    ring = begin(env, 3)
    data = env.arm.simulator.data
    at = env.arm.simulator.model.joint("stand").qposadr[0]
    data.qpos[at] += 0.004
    go(env, ring + [0.0, 0, 0.04])
    assert env.scene.moved() == pytest.approx(0.004, abs=0.0005)
    info, _ = go(env, ring + [0.004, 0, 0.04], ring + [0.004, 0, -0.025])
    assert info["is_success"]


def test_after_the_ring_was_moved_nothing_counts(env):
    ring = begin(env, 3)
    data = env.arm.simulator.data
    data.qpos[env.arm.simulator.model.joint("stand").qposadr[0]] += 0.006
    moved = ring + [0.006, 0, 0]
    info, _ = go(env, moved + [0, 0, 0.04], moved - [0, 0, 0.026])
    assert env.scene.depth() > peg.HEIGHT + peg.ENOUGH  # it is through
    assert (info["score"], info["is_success"], env.scene.done()) == (0, False, False)


def test_it_does_not_help_to_put_the_ring_back(env):
    ring = begin(env, 3)
    data, at = env.arm.simulator.data, env.arm.simulator.model.joint("stand").qposadr[0]
    data.qpos[at] += 0.006
    go(env, ring + [0, 0, 0.04])
    data.qpos[at] -= 0.006
    info, _ = go(env, ring + [0, 0, -0.026])
    assert env.scene.moved() < 0.001 and not info["is_success"]


# What moves.


def test_a_push_from_the_side_moves_the_stand(env):
    ring = begin(env, 3)
    beside = ring + [0.06, 0, 0]
    _, force = go(env, beside + [0, 0, 0.05], beside, ring + [0.02, 0, 0])
    assert env.scene.most_moved > peg.MOVED and force > 5


@pytest.mark.parametrize("off", [0, 4, 8])
def test_within_the_room_nothing_touches(env, off):
    for angle in np.linspace(0, 2 * np.pi, 6, endpoint=False):
        ring = begin(env, 3)
        way = ring + [0.001 * off * np.cos(angle), 0.001 * off * np.sin(angle), 0]
        info, force = go(env, way + [0, 0, 0.04], way - [0, 0, 0.024])
        assert info["is_success"] and env.scene.most_moved < 0.0005 and force < 5


def test_beside_the_room_it_fails(env):
    for off in (15, 22, 30):
        ring = begin(env, 3) + [0, -0.001 * off, 0]
        info, _ = go(env, ring + [0, 0, 0.04], ring - [0, 0, 0.024])
        assert not info["is_success"] and (info["stopped"] or env.scene.most_moved > peg.MOVED)


# The script.


def test_the_script_succeeds_and_the_guard_has_nothing_to_say(env):
    config, lengths = TASKS["ur5_peg"].configure(), []
    for seed in SEEDS:
        begin(env, seed)
        for action in expert_actions("ur5_peg", env.scene, config, np.random.default_rng(seed)):
            *_, done, _, info = env.step(action)
            if done:
                break
        assert info["is_success"] and not env.arm.notes and env.scene.most_moved < 0.001
        lengths.append(len(env.commanded))
    assert max(lengths) < config.max_steps / 2


def test_the_script_does_the_same_again_and_differs_from_seed_to_seed(env):
    config = TASKS["ur5_peg"].configure()

    def actions(seed):
        return np.array(list(expert_actions("ur5_peg", env.scene, config, np.random.default_rng(seed))))

    begin(env, 0)
    np.testing.assert_array_equal(actions(1), actions(1))
    assert len(actions(1)) != len(actions(2)) or np.abs(actions(1) - actions(2)).max() > 0.001


def test_the_way_is_smooth(env):
    "Steps change by less than a third of the step, corners included."
    begin(env, 4)
    config = UR5Config(speed=(0.04, 0.04), error=0.006)
    way = np.array(list(expert_actions("ur5_peg", env.scene, config, np.random.default_rng(0))))
    change = np.linalg.norm(np.diff(way, 2, axis=0), axis=1)
    assert change.max() < 0.004 / 3
    np.testing.assert_allclose(way[-1], env.scene.ring - [0, 0, peg.BELOW])


def test_corners_are_rounded_by_means():
    way = np.arange(1.0, 11)[:, None] * [1, 0]
    way = peg.rounded(way, np.zeros(2), n=4)
    assert way.shape == (14, 2)
    np.testing.assert_allclose(way[:3, 0], [0.25, 0.75, 1.5])
    np.testing.assert_allclose(way[-2:, 0], [10, 10])


def test_demonstrations_come_back_from_where_the_arm_shook():
    "What is recorded points from the shaken tip to the way."
    config = TASKS["ur5_peg"].configure()
    arrays, done = attempt("ur5_peg", config, 100000)
    assert done and arrays["wrist"].shape[1:] == arrays["scene"].shape[1:] == (96, 96, 3)
    off = arrays["tip"][1:, :2] - arrays["action"][:-1, :2]
    assert 0.001 < off.std() < 0.005 and np.abs(off.mean(axis=0)).max() < 0.004


# The tight hole.


def test_the_emulators_scene_has_the_settings_it_is_given():
    assert load_scene("ur5_hole").bodies == make_scene("ur5_hole", UR5Config()).bodies
    tight = load_scene("ur5_hole", UR5Config(clearance=0.001).model_dump_json())
    assert tight.bodies == make_scene("ur5_hole", UR5Config(clearance=0.001)).bodies
    assert tight.bodies != load_scene("ur5_hole").bodies
    with pytest.raises(SettingsError, match="clearence"):
        load_scene("ur5_hole", json.dumps({"clearence": 0.001}))


def test_the_hole_is_as_wide_as_the_peg_and_the_clearance():
    model = Simulator(hole.PegInHole(0.0018)).model
    body = model.body("block")
    boxes = range(body.geomadr[0], body.geomadr[0] + body.geomnum[0])
    inner = [np.linalg.norm(model.geom_pos[i][:2]) - model.geom_size[i][0] for i in boxes]
    assert len(inner) == 24
    np.testing.assert_allclose(inner, hole.PEG + 0.0018, atol=1e-9)


def test_the_script_of_the_hole_succeeds():
    task, config = get_task("ur5_hole"), TASKS["ur5_hole"].configure()
    env = task.make_env()
    for seed in range(70000, 70010):
        begin_hole(env, seed)
        for action in expert_actions("ur5_hole", env.scene, config, np.random.default_rng(seed)):
            *_, done, _, info = env.step(action)
            if done:
                break
        assert info["is_success"] and info["score"] == 1 and not info["stopped"]
    env.close()


def begin_hole(env, seed):
    env.reset(seed=seed)
    env.observing = False


def test_beside_the_hole_the_peg_slides_over_the_block():
    env = ArmEnv(lambda: hole.PegInHole(0.0018), RobotConfig(), size=64)
    begin_hole(env, 0)
    beside = np.array([*env.scene.hole + [0.02, 0], hole.DEPTH - 0.0025])
    info, force = go(env, beside + [0, 0, 0.03], beside)
    assert not info["stopped"] and info["score"] == 0 and force < 40
    env.close()
