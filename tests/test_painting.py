"""Painting: what paste does, what a print wants of it, and how well the script spreads it."""

import numpy as np
import pytest

from dpag.robot.safety import RobotConfig
from dpag.tasks.ur5 import painting
from dpag.tasks.ur5.env import ArmEnv
from dpag.tasks.ur5.painting import AXIS, CELL, CELLS, COVERED, FILM, Paste, Print, overlap

SHAPES = ["circle", "heart"]
PERIOD = RobotConfig().action_seconds


def layer(thickness=0.003, radius=0.05):
    return Paste(np.where(np.hypot(AXIS, AXIS[:, None]) < radius, thickness, 0.0))


def lay(shape, seed):
    "An environment with a print and a heap."
    env = ArmEnv(lambda: painting.Painting(shape), RobotConfig(), size=96)
    env.reset(seed=seed)
    env.observing = False
    return env


def paint(env, seed, error=0.001, limit=400):
    "The script's episode: actions, tips, and the last info."
    rng = np.random.default_rng(seed)
    script = painting.expert(env.scene, rng, speed=(0.13, 0.15), error=error, period=PERIOD)
    actions, tips = [], []
    for action in script:
        obs, _, done, _, info = env.step(action)
        actions.append(action)
        tips.append(obs["tip"])
        if done or len(actions) >= limit:
            break
    return np.array(actions), np.array(tips), info


@pytest.mark.parametrize("seed", range(3))
def test_volume_is_kept_whatever_the_rod_does(seed):
    "Also at the field's border and outside of it, at any height, slow and fast."
    rng = np.random.default_rng(seed)
    paste = layer(0.006)
    paste.height += rng.uniform(0, 0.002, paste.height.shape)
    before, at = paste.height.sum(), np.zeros(3)
    for _ in range(400):
        at = np.clip(at + rng.normal(0, [0.006, 0.006, 0.002]), [-0.12, -0.12, 0], [0.12, 0.12, 0.008])
        paste.move(at)
        if rng.random() < 0.05:
            paste.last = None
    assert abs(paste.height.sum() / before - 1) < 1e-9
    assert paste.height.min() > -1e-12


@pytest.mark.parametrize("way", [(1, 0), (0, -1), (0.6, 0.8)])
@pytest.mark.parametrize("height", [0.001, 0.002])
def test_a_rod_leaves_a_film_of_its_height(way, height):
    thick = height + 0.001  # a thicker layer's walls slump into the groove
    paste = layer(thick, 0.06)
    for s in np.linspace(-0.04, 0.035, 100):
        paste.move([*np.multiply(s, way), height])
    behind = np.multiply(-0.01, way)
    column, row = np.round(behind / CELL + (CELLS - 1) / 2).astype(int)
    assert paste.height[row, column] == pytest.approx(height, rel=0.15)
    before = np.round(np.multiply(0.0435, way) / CELL + (CELLS - 1) / 2).astype(int)
    assert paste.height[before[1], before[0]] > thick + 0.0005  # a wave


def test_what_spills_spills_to_both_sides():
    paste = layer(0.003, 0.06)
    paste.settle()
    for s in np.linspace(-0.04, 0.03, 100):
        paste.move((s, 0, 0.001))
    np.testing.assert_allclose(paste.height, paste.height[::-1], atol=1e-12)
    row = int(0.008 / CELL + CELLS / 2)
    assert paste.height[row, CELLS // 2 - 7 : CELLS // 2].mean() > 0.0033


def test_heaps_slump_to_the_slope_that_holds_and_then_rest():
    paste = Paste(np.where(np.hypot(AXIS, AXIS[:, None]) < 0.02, 0.006, 0.0))
    paste.settle()
    steepest = max(np.abs(np.diff(paste.height, axis=k)).max() for k in (0, 1)) / CELL
    assert steepest == pytest.approx(painting.STEEPEST, rel=0.1)
    rest = Paste(np.add.outer(AXIS, AXIS) * 0.9 * painting.STEEPEST + 0.2)
    still = rest.height.copy()
    rest.settle()
    np.testing.assert_array_equal(rest.height, still)


def test_a_lifted_rod_moves_nothing():
    paste = layer(0.003)
    before = paste.height.copy()
    for x in np.linspace(-0.05, 0.05, 50):
        paste.move((x, 0, 0.0035))
    moved = np.abs(paste.height - before) > 0
    assert not moved[np.hypot(AXIS, AXIS[:, None]) < 0.04].any()  # only its steep border slumps


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exact_fill_has_an_overlap_of_one(shape):
    sheet = Print(shape, (0.012, -0.01), 0.3)
    full = Paste(np.where(sheet.wanted, FILM, 0.0))
    assert overlap(full.covered, sheet.wanted) == 1
    thin = Paste(np.where(sheet.wanted, 0.9 * COVERED, 0.0))
    assert overlap(thin.covered, sheet.wanted) == 0
    half = Paste(np.where(sheet.wanted & (AXIS > 0.012), FILM, 0.0))
    assert 0.3 < overlap(half.covered, sheet.wanted) < 0.7


@pytest.mark.parametrize("shape, across", [("circle", 0.11), ("heart", 0.12)])
def test_a_shape_is_as_large_as_in_the_films_and_its_heap_just_fills_it(shape, across):
    outline = painting.OUTLINES[shape]
    assert np.ptp(outline[:, 0]) == pytest.approx(across, abs=1e-3)
    sheet = Print(shape, (0.015, -0.015), -0.35)
    assert sheet.wanted[[0, -1]].sum() == sheet.wanted[:, [0, -1]].sum() == 0
    for seed in range(5):
        paste = painting.heap(sheet, np.random.default_rng(seed))
        assert paste.height.sum() == pytest.approx(painting.DEPTH * sheet.wanted.sum(), rel=1e-9)
        assert 0.35 < overlap(paste.covered, sheet.wanted) < 0.75
        assert (paste.covered & ~sheet.wanted).sum() < 0.03 * sheet.wanted.sum()


def test_the_scripts_next_sector():
    assert painting.next_sector(np.full(8, 0.4), 2) == 3
    assert painting.next_sector(np.array([0, 0.1, 0.9, 0, 0, 0.1]), 2) == 2
    sheet = Print("heart", (0.01, 0), 0.2)
    n = painting.n_sectors("heart")
    empty = painting.emptiness(sheet, np.zeros_like(sheet.wanted))
    assert len(empty) == n and empty.mean() == pytest.approx(1)
    np.testing.assert_array_equal(painting.emptiness(sheet, sheet.wanted), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_strokes_stay_inside_the_shape_and_the_box(shape):
    box = painting.Painting.box
    for place in ((0.015, 0.015), (-0.015, -0.015)):
        sheet = Print(shape, place, 0.35)
        for sector in range(painting.n_sectors(shape)):
            corners = painting.stroke(sheet, sector)
            assert all(box.outside(c) == 0 for c in corners)
            cells = np.round((corners[:, :2] - painting.FIELD_AT) / CELL + (CELLS - 1) / 2).astype(int)
            assert sheet.wanted[cells[:, 1], cells[:, 0]].all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_script_fills_the_shape(shape):
    scores = []
    for seed in (1, 2, 3):
        env = lay(shape, seed)
        _, _, info = paint(env, seed)
        assert not info["stopped"] and not env.arm.notes and info["is_success"] and env.scene.done()
        assert env.measures()["iou"] == info["score"]
        scores.append(info["score"])
        env.close()
    assert np.mean(scores) >= 0.92


def test_the_same_seed_gives_the_same_episode_and_another_another():
    env = lay("heart", 4)
    first, tips, info = paint(env, 4)
    height = env.scene.paste.height.copy()
    env.reset(seed=4)
    again, tips_again, info_again = paint(env, 4)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(tips, tips_again)
    np.testing.assert_array_equal(height, env.scene.paste.height)
    assert info["score"] == info_again["score"]
    env.reset(seed=5)
    assert np.abs(env.scene.sheet.centre).max() <= painting.PLACE
    assert env.scene.score() < 0.75 and not env.scene.done() and env.scene.paste.last is None
    env.close()


def test_an_episode_ends_when_strokes_no_longer_help():
    env = lay("circle", 1)
    x, y, _ = env.scene.start[:3]
    ends = []
    for _ in range(painting.VAIN + 2):
        for z in (0.02, 0.01, 0.0, 0.01, 0.02):
            *_, done, _, info = env.step(np.array([x, y, z]))
            ends.append(done)
            if done:
                break
        if done:
            break
    env.close()
    assert done and not info["stopped"] and not info["is_success"]
    assert np.isnan(env.measures()["seconds"])


def test_both_cameras_see_the_paste():
    env = lay("circle", 2)
    env.observing = True
    before = env.observation()
    env.scene.paste = Paste(np.where(env.scene.sheet.wanted, FILM, 0.0))
    after = env.observation()
    env.close()
    for camera in ("scene", "wrist"):
        yellow = [(o[camera][..., 2] < 100) & (o[camera][..., 0] > 130) for o in (before, after)]
        assert yellow[0].mean() > 0.01 and yellow[1].mean() < yellow[0].mean() / 4
