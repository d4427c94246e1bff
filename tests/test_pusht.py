"""Push-T: the tasks and their settings, exact states, the human data, the expert."""

import hashlib
import os
import subprocess
import sys
import zipfile

import numpy as np
import pygame
import pytest
from gym_pusht.envs.pusht import PushTEnv

from dpag.config import SettingsError
from dpag.tasks.base import TASKS, fetch, get_task
from dpag.tasks.pusht import env as pusht
from dpag.tasks.pusht.env import PushTDictEnv, human_demonstrations, keypoints_of, replay
from dpag.tasks.pusht.expert import run_expert, scripted_demonstrations
from dpag.tasks.pusht.task import PushTConfig

needs_human = pytest.mark.skipif(
    not os.environ.get("DPAG_MIRROR"), reason="DPAG_MIRROR names no folder with pusht.zip"
)


def test_set_state_is_exact_and_at_rest():
    env, rng = PushTDictEnv(), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(20):
        state = rng.uniform([50, 50, 100, 100, -3], [450, 450, 400, 400, 3])
        obs = env.set_state(state)
        np.testing.assert_allclose(env.state, state, atol=1e-9)
        np.testing.assert_allclose(obs["keypoints"], keypoints_of(state[None])[0], atol=1e-9)
        assert tuple(env.simulator.block.velocity) == (0, 0)


def test_physics_corners_and_pictures_are_gym_pushts_to_the_bit():
    theirs, ours, rng = PushTEnv(obs_type="pixels"), PushTDictEnv("image"), np.random.default_rng(0)
    for seed in range(6):
        theirs.reset(seed=seed)
        ours.reset(seed=seed)
        for action in rng.uniform(-20, 532, (40, 2)):  # the finger crosses the walls
            pixels, _, success, _, info = theirs.step(action)
            obs, score, *_, said = ours.step(action)
            state = [*theirs.agent.position, *theirs.block.position, theirs.block.angle]
            assert np.array_equal(ours.state, state) and said["is_success"] == success
            assert score == pytest.approx(min(info["coverage"] / 0.95, 1), abs=1e-12)
            assert np.array_equal(
                ours.simulator.keypoints(), theirs.get_keypoints(theirs._block_shapes).ravel()
            )
            assert np.array_equal(obs["image"], pixels)
        whole = pygame.surfarray.array3d(theirs._draw())
        assert np.array_equal(pygame.surfarray.array3d(ours.simulator._draw()), whole)


def test_coverage_is_shapelys():
    theirs, ours, rng = PushTEnv(), PushTDictEnv(), np.random.default_rng(0)
    for env in (theirs, ours):
        env.reset(seed=0)
    covered = 0
    for i in range(1000):
        spread = ([3, 3, 0.05], [60, 60, 3], [250, 250, 9])[i % 3]
        state = np.array([50, 50, *rng.normal([256, 256, np.pi / 4], spread)])
        for simulator in (theirs, ours.simulator):
            pusht.set_exact_state(simulator, state)
        assert abs(ours.simulator._get_coverage() - theirs._get_coverage()) < 1e-12
        covered += theirs._get_coverage() > 0
    assert covered > 600


@needs_human
def test_human_episodes_replay_exactly():
    demos, env, scores = human_demonstrations(), PushTDictEnv(), []
    assert len(demos) == 206
    for i in range(60):
        e = demos.episode(i)
        passed, score = replay(env, e["state"].astype(np.float64), e["action"].astype(np.float64))
        turned = np.abs(passed[:, 4] - e["state"][:, 4])
        turned = np.minimum(turned % (2 * np.pi), -turned % (2 * np.pi))
        if i < 20:
            assert np.abs(passed[:, :4] - e["state"][:, :4]).max() < 0.005 and turned.max() < 1e-3
        scores.append(score)
    assert np.mean(scores) == pytest.approx(0.949, abs=0.002)


@needs_human
def test_human_keypoints_are_the_environments():
    e, env = human_demonstrations().episode(3), PushTDictEnv()
    env.reset(seed=0)
    for t in (0, 50):
        np.testing.assert_allclose(
            env.set_state(e["state"][t].astype(float))["keypoints"], e["keypoints"][t], atol=1e-2
        )


def test_no_network_and_no_mirror_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    with pytest.raises(ConnectionError, match="(?s)Connect to a network.*DPAG_MIRROR"):
        fetch("pusht.zip", "https://127.0.0.1:9/pusht.zip", tmp_path, retries=0)
    assert not list(tmp_path.iterdir())


def test_mirror_without_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no pusht.zip in it"):
        human_demonstrations()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half an archive"])
def test_damaged_archive_is_refused(tmp_path, monkeypatch, content):
    (tmp_path / "pusht.zip").write_bytes(content)
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with pytest.raises(ValueError, match="damaged"):
        human_demonstrations()
    assert (tmp_path / "pusht.zip").exists()  # a user's own file is not ours to remove


def test_wrong_data_and_hostile_names_are_refused(tmp_path, monkeypatch):
    from dpag.data import Demonstrations, save_demonstrations

    save_demonstrations(
        Demonstrations(
            {"action": np.zeros((9, 2), np.float32), "state": np.zeros((9, 5), np.float32)}, np.array([9]), {}
        ),
        tmp_path / "p.zarr",
    )
    with zipfile.ZipFile(tmp_path / "pusht.zip", "w") as z:
        for f in (tmp_path / "p.zarr").rglob("*"):
            if f.is_file():
                z.write(f, f"pusht/x.zarr/{f.relative_to(tmp_path / 'p.zarr')}")
        z.writestr("../../escaped", "boo")
    # Downloaded once, it fails the check and is removed; nothing was unpacked anywhere.
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    folder = tmp_path / "raw"
    folder.mkdir()
    (tmp_path / "pusht.zip").rename(folder / "pusht.zip")
    monkeypatch.setattr(pusht, "fetch", lambda name, url, folder: folder / name)
    with pytest.raises(ValueError, match="sha256"):
        human_demonstrations(folder)
    assert (
        not list(folder.iterdir())
        and not (tmp_path.parent / "escaped").exists()
        and not (tmp_path / "escaped").exists()
    )


def test_expert_succeeds_and_is_reproducible():
    config = PushTConfig(n_demos=8, demo_seed=7000)
    states, actions, ends, meta = scripted_demonstrations(PushTDictEnv, config, workers=2)
    again = scripted_demonstrations(PushTDictEnv, config, workers=1)
    np.testing.assert_array_equal(states, again[0])
    np.testing.assert_array_equal(actions, again[1])
    assert meta["success_rate"] >= 0.8 and len(ends) == 8


ATTEMPTS = """import sys
from pathlib import Path
from dpag.tasks.pusht.env import PushTDictEnv
from dpag.tasks.pusht.expert import scripted_demonstrations
from dpag.tasks.pusht.task import PushTConfig
config = PushTConfig(n_demos=2, demo_seed=7000)
scripted_demonstrations(PushTDictEnv, config, workers=1, parts=Path(sys.argv[1]))"""


def test_a_later_process_goes_on_from_the_attempts_of_an_earlier_one(tmp_path):
    subprocess.run([sys.executable, "-c", ATTEMPTS, str(tmp_path)], check=True)
    left = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.npz")}
    config = PushTConfig(n_demos=4, demo_seed=7000)
    states, actions, _, meta = scripted_demonstrations(PushTDictEnv, config, workers=1, parts=tmp_path)
    fresh = scripted_demonstrations(PushTDictEnv, config, workers=1)
    np.testing.assert_array_equal(states, fresh[0])
    np.testing.assert_array_equal(actions, fresh[1])
    assert meta == fresh[3] and len(left) >= 2
    assert len(list(tmp_path.iterdir())) == 1  # one folder: the same kind of attempts
    assert all(f.stat().st_mtime_ns == t for f, t in left.items())


def test_expert_plans_differ_by_plan_seed():
    env, expert = PushTDictEnv(), PushTConfig().expert
    runs = [run_expert(env, seed=11, plan_seed=i, expert=expert, max_steps=300)[1] for i in range(4)]
    assert len({hashlib.sha256(a.tobytes()).hexdigest() for a in runs}) > 1


def test_evaluation_never_sees_training_states():
    from dpag.rollouts import EvaluateConfig

    e, t = EvaluateConfig(), PushTConfig()
    tested = range(e.first_seed, e.first_seed + e.n_episodes)
    assert set(tested).isdisjoint(range(t.demo_seed, t.demo_seed + 10 * t.n_demos))


# The tasks.

SMALL = ["dynamic_pusht_kp_small", "dynamic_pusht_img_small"]
NAMES = ["pusht_kp", "pusht_img", "dynamic_pusht_kp", "dynamic_pusht_img", *SMALL]


def test_settings_need_no_simulator():
    code = """import sys
from dpag.tasks.base import TASKS
import dpag.tasks.pusht.task
TASKS.entries["pusht_kp"].configure({"n_demos": 3})
print([m for m in ("pygame", "pymunk", "gym_pusht", "shapely", "torchvision") if m in sys.modules])"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_what_its_registration_says(name):
    entry, task = TASKS[name], get_task(name, TASKS[name].configure({"max_steps": 17}))
    assert (task.name, task.title, task.max_steps) == (name, entry.title, 17)
    assert tuple(task.sources) == entry.sources and entry.length_unit == "px"
    with pytest.raises(SettingsError, match=f"demos = 'people': {name} has {', '.join(entry.sources)}"):
        task.demonstrations("people")


def test_only_the_authors_have_recorded_the_dynamic_task():
    assert TASKS["dynamic_pusht_kp"].sources == ("scripted",)
    assert TASKS["dynamic_pusht_img"].sources == ("scripted", "authors")
    assert all(TASKS[name].sources == ("scripted",) for name in SMALL)


def test_what_a_task_sets_for_every_method():
    for name in NAMES:
        config, images = TASKS[name].configure(), "_img" in name
        assert config.policy == {"encoder": {"features": "raw" if images else "planar"}}
        assert config.n_demos == (150 if images else 600) and config.max_steps == 300
        assert config.train == ({"steps": 1500, "batch_size": 64, "lr": 0.002} if images else {})
        assert set(config.methods) == ({"lstm_gmm", "bet", "ibc", "flow_policy"} if images else set())
        assert config.ball.radius == (15 if name in SMALL else 25)
    changed = TASKS["pusht_img"].configure({"methods": {"bet": {"train": {"steps": 9}}}})
    assert changed.methods["bet"] == {"train": {"steps": 9, "batch_size": 48}}


def test_a_wrong_setting_is_named():
    with pytest.raises(SettingsError, match=r"tasks.pusht_kp.ball.speed = .*must be \[lowest, highest\]"):
        TASKS["pusht_kp"].configure({"ball": {"speed": [9, 1]}})


# Another goal


def test_coverage_and_picture_follow_the_goal():
    env = PushTDictEnv("image", goal=(150.0, 300.0, 2.0))
    env.reset(seed=0)
    image = env.set_state(np.array([60.0, 60.0, 150.0, 300.0, 2.0]))["image"]
    assert env.simulator._get_coverage() == pytest.approx(1)
    env.simulator.goal_pose = np.array([256.0, 256.0, np.pi / 4])  # under a block that rests
    assert env.simulator._get_coverage() < 0.5
    assert (env.observe()["image"] != image).any()
    env.reset(seed=0)  # its own goal again
    assert (env.set_state(np.array([60.0, 60.0, 150.0, 300.0, 2.0]))["image"] == image).all()
    assert env.simulator._get_coverage() == pytest.approx(1)


def test_a_table_turned_by_a_quarter_scores_the_same():
    turned = PushTDictEnv(goal=(256.0, 256.0, np.pi / 4 + np.pi / 2))
    usual = PushTDictEnv()
    rng = np.random.default_rng(0)
    for env in (usual, turned):
        env.reset(seed=0)
    usual.set_state(np.array([200.0, 150.0, 280.0, 250.0, 1.0]))
    turned.set_state(np.array([512 - 150.0, 200.0, 512 - 250.0, 280.0, 1.0 + np.pi / 2]))
    for x, y in rng.uniform(200, 312, (10, 2)):
        _, score, *_ = usual.step(np.array([x, y]))
        _, again, *_ = turned.step(np.array([512 - y, x]))
        assert score > 0 and again == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("goal", [(600.0, 0.0, 0.0), (1.0, 2.0), (float("nan"), 1.0, 1.0)])
def test_a_goal_off_the_table_is_refused(goal):
    with pytest.raises(ValueError, match="goal = .*allowed"):
        PushTDictEnv(goal=goal)
