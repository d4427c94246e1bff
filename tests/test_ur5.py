"""The UR5's tasks: settings, sources of demonstrations, the lab's manual, and the loop that runs a policy, in
real time against the emulated controller and its cameras."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest

from dpag.config import SettingsError
from dpag.data import load_demonstrations, save_demonstrations
from dpag.files import read_text, root
from dpag.robot import teleop
from dpag.robot.drive import Replay, drive, open_arm
from dpag.robot.emulator import EmulatorProcess
from dpag.robot.kinematics import to_matrix
from dpag.robot.recorder import Recorder
from dpag.robot.safety import Box, RobotConfig
from dpag.robot.twin import Twin
from dpag.robot.ur import UR
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.ur5.demonstrations import perform
from dpag.tasks.ur5.task import expert_actions, make_scene

NAMES = ["ur5_paint_circle", "ur5_paint_heart", "ur5_candy", "ur5_peg", "ur5_hole"]


def on_the_twin(name, config, seed):
    "A scene that is done, and the actions of its script."
    scene = make_scene(name, config)
    twin = Twin(scene, config.robot)
    twin.reset(seed)
    exact = config.model_copy(update={"error": 0.0})
    actions = expert_actions(name, scene, exact, np.random.default_rng(seed))
    return scene, perform(twin, scene, actions, config.robot.action_seconds)["action"]


def replay(arm, scene, actions, *, size, spare, period):
    "Let the recorded actions drive, as a policy's would."
    policy = Replay(actions, spare=spare)

    def act(recent):
        assert recent[-1]["scene"].shape == recent[-1]["wrist"].shape == (size, size, 3)
        return policy(recent)

    return drive(
        arm, scene, act, n_obs_steps=2, period=period, seconds=60, spare=spare, finished=policy.finished
    )


@pytest.mark.real_time
@pytest.mark.parametrize("name", NAMES)
def test_half_a_minute_of_every_task_in_real_time(name, patient, loopback, capsys):
    """What a script does on the twin is done again through the driver, with what is late dropped; as well
    as on the twin."""
    config = TASKS[name].configure()
    period, ticks, scores, late = config.robot.action_seconds, [], [], 0
    words = "dpag.tasks.ur5.task:load_scene", name, config.model_dump_json()
    with EmulatorProcess(loopback(31), *words) as emulator:
        address = f"opencv:http://{emulator.address}:8080"
        cameras = {k: f"{address}/{k}?size={config.size}" for k in ("scene", "wrist")}
        robot = patient(RobotConfig(address=emulator.address, cameras=cameras))
        for seed in itertools.count():
            if sum(ticks) > 30:
                break
            done, actions = on_the_twin(name, config, seed)
            emulator.order("recover")
            emulator.order(f"lay {seed}")
            with open_arm(make_scene(name, config), robot, config.size) as arm:
                again = make_scene(name, config)
                run = replay(arm, again, actions, size=config.size, spare=2, period=period)
            assert run.reason == "done"
            ticks += arm.stream.ticks
            late += run.late
            scores.append((emulator.report()["score"], done.score()))
    ms = 1000 * np.array(ticks)
    p50, p99 = np.percentile(ms, [50, 99])
    real, twin = np.mean(scores, 0)
    with capsys.disabled():
        print(f"\n{name}: {sum(ticks):.0f} s, {len(scores)} times; score {real:.2f}, on the twin {twin:.2f}")
        print(f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {ms.max():.1f} ms; {late} actions late")
    assert abs(p50 - 8) < 0.2
    assert real > twin - 0.1


@pytest.mark.real_time
def test_the_work_may_lie_anywhere(loopback):
    "With an origin, the tip is where the base's frame has the task's place."
    origin = [0.05, -0.1, 0.03, 0, 0, 0.4]
    box = Box((0, -0.6, 0), (1, 0.6, 0.6))
    with (
        EmulatorProcess(loopback(32)) as emulator,
        UR(RobotConfig(address=emulator.address, origin=origin), box) as arm,
    ):
        here = arm.observe(images=False).state.tcp
        reported = to_matrix(emulator.report()["tcp"])
        np.testing.assert_allclose(to_matrix(origin) @ to_matrix(here), reported, atol=1e-6)
        goal = here + [0.03, 0, 0, 0, 0, 0]
        arm.servo(here + np.outer([0.5, 1], goal - here), arm.now() + np.array([0.3, 0.6]))
        arm.wait_until(arm.now() + 1)
        there = emulator.report()["tcp"]
    np.testing.assert_allclose(to_matrix(there), to_matrix(origin) @ to_matrix(goal), atol=2e-3)


# Settings.

SHARED = {
    "size": 96,
    "variety": 1.0,
    "clearance": 0.0018,
    "max_steps": 150,
    "n_demos": 60,
    "demo_seed": 100000,
    "speed": (0.05, 0.08),
    "error": 0.001,
    "shake": 0.003,
}
PAINTING = {"max_steps": 450, "n_demos": 40, "speed": (0.13, 0.15), "shake": 0.002}
CHANGED = {
    "ur5_paint_circle": PAINTING,
    "ur5_paint_heart": PAINTING,
    "ur5_candy": {"speed": (0.045, 0.06), "error": 0.002, "shake": 0.005, "max_steps": 250},
    "ur5_peg": {"speed": (0.03, 0.05), "error": 0.006, "shake": 0.002, "max_steps": 200},
    "ur5_hole": {"error": 0.002, "shake": 0.001, "max_steps": 120},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_with_which_the_committed_results_were_made(name):
    config = TASKS[name].configure()
    assert {k: getattr(config, k) for k in SHARED} == {**SHARED, **CHANGED.get(name, {})}
    assert config.policy["encoder"] == {"features": "raw", "camera": {"crop": 86}}
    assert (config.policy["n_obs_steps"], config.policy["n_noise_samples"]) == (1, 8)
    steps = 6000 if name == "ur5_paint_heart" else 3000
    assert config.train == {"steps": steps, "batch_size": 32, "lr": 0.002}
    assert config.evaluate == {
        "n_episodes": 20,
        "first_seed": 81_000,
        "at_once": 10,
        "n_films": 1,
        "curve": [],
    }
    assert config.robot == RobotConfig()


def pictured(name, variety, seed):
    "An initial state's pictures, and everything that moves in it."
    config = TASKS[name].configure({"variety": variety})
    env = get_task(name, config).make_env()
    obs, _ = env.reset(seed=seed)
    moving = env.arm.simulator.data.qpos.copy(), env.arm.simulator.data.mocap_pos.copy()
    env.close()
    return np.stack([obs["scene"], obs["wrist"]]).astype(int), moving


@pytest.mark.parametrize("name", NAMES)
def test_the_look_varies_and_the_layout_does_not(name):
    plain, layout = pictured(name, 0.0, 3)
    varied, same = pictured(name, 1.0, 3)
    assert all(np.array_equal(a, b) for a, b in zip(layout, same))
    assert np.abs(plain - varied).mean() > 1
    assert np.array_equal(pictured(name, 1.0, 3)[0], varied), "the look is the seed's"


def test_what_is_measured():
    painting, peg = ([m.name for m in TASKS[n].metrics] for n in ("ur5_paint_heart", "ur5_peg"))
    assert peg == ["jerk", "jerk_measured", "jerk_si", "seconds"] and painting == ["iou", *peg]
    env = get_task("ur5_paint_heart").make_env()
    env.reset(seed=0)
    env.step(np.array([0.45, 0, 0.06]))
    assert set(painting) <= env.measures().keys()
    env.close()


def test_the_settings_of_a_task_need_no_simulator():
    code = (
        "import sys, dpag.tasks.ur5.task;"
        "print([m for m in ('mujoco', 'pymunk', 'gymnasium', 'cv2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


# Demonstrations.


def steps(task, n=5, **changes):
    "Steps as the recorder of a lab writes them."
    rng = np.random.default_rng(0)
    for t in range(n):
        images = {k: rng.integers(0, 256, s, np.uint8) for k, s in task.shapes.obs.items() if len(s) == 3}
        step = {"time": 0.1 * t, "force": rng.normal(size=6), **images}
        step |= {"tip": rng.normal(size=task.shapes.obs["tip"]), "action": np.full(task.shapes.action_dim, t)}
        yield {k: v for k, v in {**step, **changes}.items() if v is not None}


def record(folder, episode, end=True, **about):
    recorder = Recorder(folder)
    recorder.begin(**about)
    for step in episode:
        recorder.add(**step)
    if end:
        recorder.end()
    return recorder.path


@pytest.mark.parametrize("name", NAMES)
def test_recorded_demonstrations_are_read_from_the_labs_folder(name, tmp_path):
    task = get_task(name)
    folder = tmp_path / "recorded" / name
    record(folder, steps(task, 5), who="Ada")
    record(folder, steps(task, 3), who="Ben")
    record(folder, steps(task, 4), end=False)  # interrupted
    demos = task.demonstrations("recorded", folder=tmp_path)
    assert demos.episode_ends.tolist() == [5, 8]
    about = {"source": "recorded", "episodes": [{"who": "Ada"}, {"who": "Ben"}]}
    assert demos.meta == {**about, "shapes": asdict(task.shapes)}
    first = list(steps(task, 5))
    for key, shape in {**task.shapes.obs, "action": (task.shapes.action_dim,)}.items():
        assert demos.arrays[key].shape == (8, *shape)
        wanted = np.stack([step[key] for step in first])
        np.testing.assert_allclose(demos.arrays[key][:5], wanted, rtol=1e-6)
        assert demos.arrays[key].dtype == (np.uint8 if len(shape) == 3 else np.float32)
    save_demonstrations(demos, tmp_path / "d.zarr")
    assert load_demonstrations(tmp_path / "d.zarr").meta["source"] == "recorded"


def test_without_recordings_the_way_to_them_is_named(tmp_path):
    task = get_task("ur5_hole")
    folder = tmp_path / "recorded/ur5_hole"
    with pytest.raises(FileNotFoundError, match=f"{folder}: there is no such folder.*lab.ipynb"):
        task.demonstrations("recorded", folder=tmp_path)
    record(folder, steps(task), end=False)
    with pytest.raises(ValueError, match=f"{folder}: no complete episode, 1 unfinished"):
        task.demonstrations("recorded", folder=tmp_path)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"scene": np.zeros((64, 64, 3), np.uint8)}, r"scene has the shape \(64, 64, 3\), \(96, 96, 3\) is"),
        ({"wrist": np.zeros((96, 96, 3), np.float32)}, "wrist has the type float32, uint8 is allowed"),
        ({"wrist": None}, "the field wrist is missing; it has action, force, scene, time, tip"),
        ({"action": None}, "the field action is missing"),
        (
            {"front": np.zeros((96, 96, 3), np.uint8)},
            "it has the field front; allowed are action, tip, scene",
        ),
        ({"action": np.zeros(4)}, r"action has the shape \(4,\), \(3,\) is allowed"),
        ({"tip": np.zeros(6)}, r"tip has the shape \(6,\), \(3,\) is allowed"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(changes, said, tmp_path):
    task = get_task("ur5_hole")
    record(tmp_path / "recorded/ur5_hole", steps(task))
    record(tmp_path / "recorded/ur5_hole", steps(task, **changes))
    with pytest.raises(ValueError, match=f"episode_00001.steps: {said}"):
        task.demonstrations("recorded", folder=tmp_path)


def test_recorded_images_of_another_size_are_read_with_that_size_in_the_settings(tmp_path):
    small = get_task("ur5_hole", TASKS["ur5_hole"].configure({"size": 32}))
    record(tmp_path / "recorded/ur5_hole", steps(small))
    assert small.demonstrations("recorded", folder=tmp_path).arrays["scene"].shape == (5, 32, 32, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["human", "authors", ""])
def test_another_source_is_an_error_that_names_the_sources(name, source, tmp_path):
    with pytest.raises(SettingsError, match=f"demos = '{source}': {name} has scripted, recorded"):
        get_task(name).demonstrations(source, folder=tmp_path)


def test_scripted_demonstrations_say_how_they_were_made(tmp_path):
    config = TASKS["ur5_hole"].configure({"n_demos": 2})
    task = get_task("ur5_hole", config)
    demos = task.demonstrations("scripted", parts=tmp_path / "parts", folder=tmp_path)
    assert len(demos) == 2 and demos.meta["source"] == "scripted"
    made_with = {k: demos.meta[k] for k in ("error", "shake", "clearance")}
    assert made_with == {"error": 0.002, "shake": 0.001, "clearance": 0.0018}
    folders = list((tmp_path / "parts").iterdir())
    trained_otherwise = get_task("ur5_hole", config.model_copy(update={"train": {"steps": 1}}))
    again = trained_otherwise.demonstrations("scripted", parts=tmp_path / "parts", folder=tmp_path)
    assert list((tmp_path / "parts").iterdir()) == folders  # how it is trained does not make them anew
    np.testing.assert_array_equal(again.arrays["action"], demos.arrays["action"])


# The lab's manual.


def manual():
    "The cells of the lab's notebook, `(type, text)`."
    notebook = json.loads(read_text(root() / "nbs/hardware/lab.ipynb"))
    return [(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]]


def chapter(title):
    return next(text for kind, text in manual() if kind == "markdown" and title in text)


class Pushing(teleop.KeyState):
    "Pushes forward, keeps one episode after the other."

    def __init__(self):
        super().__init__()
        self.asked = 0

    def outcome(self):
        self.asked += 1
        return "keep" if self.asked > 10 else ""

    def velocity(self):
        return np.array([1.0, 0, 0, 0])


def test_what_the_manual_records_is_what_the_tasks_read(tmp_path, monkeypatch):
    "The manual's own code, with a device that a script moves, and the twin as the arm."
    code = re.search(r"```python\n(.*?)```", chapter("## 6. Recording"), re.S)[1]
    imports = next(t for k, t in manual() if k == "code" and "from dpag.robot.recorder import" in t)
    names = {}
    for line in imports.splitlines():
        if line.startswith(("from dpag.robot", "from dpag.tasks.ur5.task")):
            exec(line, names)
    monkeypatch.setattr(teleop, "SpaceMouse", Pushing)
    config = TASKS["ur5_peg"].configure()
    names |= {"root": lambda: tmp_path, "task": "ur5_peg", "config": config, "confirm": True}
    names |= {"mine": config.robot, "size": config.size, "period": config.robot.action_seconds}
    exec(code, names)
    demos = get_task("ur5_peg", config).demonstrations("recorded", folder=tmp_path / "data")
    assert demos.episode_ends.tolist() == [10] and demos.meta["episodes"] == [{"who": "a name"}]
    assert demos.arrays["action"][-1, 0] > 0.5


def test_the_manuals_commands_name_what_there_is():
    text = "\n".join(text for _, text in manual())
    scene, task = re.search(r"--scene (\S+) (\w+)", text).groups()
    assert (scene, task) == ("dpag.tasks.ur5.task:load_scene", "ur5_peg")
    training = chapter("## 7. Training")
    assert "`data/recorded/<task>`" in training and "DEMOS=human" not in text
    assert "recorded" in TASKS["ur5_peg"].sources
    for source in re.findall(r"DEMOS=(\w+)|-p run laptop-(\w+)", training):
        assert set(source) - {""} <= set(TASKS["ur5_peg"].sources)
    for notebook, given in re.findall(r"papermill (nbs/\S+) out.ipynb ([^`]*)`", training):
        cells = json.loads(read_text(root() / notebook))["cells"]
        parameters = next(
            "".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])
        )
        for name in re.findall(r"-p (\w+) ", given):
            assert re.search(rf"^{name} = ", parameters, re.M), f"{notebook} has no parameter {name}"
