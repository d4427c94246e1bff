"""A real arm is asked for, and the whole way without one: steered, recorded, read, trained, driven."""

import json
import re
import shutil

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

from dpag.config import SettingsError
from dpag.data import load_demonstrations, main
from dpag.files import DamagedError, read_text, root, write_text
from dpag.robot import drive as driving
from dpag.robot.arm import Stopped
from dpag.robot.drive import Replay, check_checkpoint, confirm_motion, demonstrate, drive, open_arm
from dpag.robot.emulator import EmulatorProcess
from dpag.robot.recorder import Recorder
from dpag.robot.safety import LOOSEST, UNITS, LimitsConfig, RobotConfig, limits_table
from dpag.robot.twin import Scene, Twin

LAB = root() / "nbs/hardware/lab.ipynb"
REAL = ["192.168.0.7", "10.1.2.3", "fe80::1", "ur5e", "arm.example.org", "1270.0.0.1"]
OURS = ["sim", "localhost", "127.0.0.1", "127.3.4.5", "::1"]


def cells(kind="code"):
    "The sources of the lab's notebook."
    return ["".join(c["source"]) for c in json.loads(read_text(LAB))["cells"] if c["cell_type"] == kind]


def cell(text, kind="code"):
    return next(c for c in cells(kind) if text in c)


@pytest.fixture(autouse=True)
def nobody_has_answered():
    driving.confirmed.clear()
    yield
    driving.confirmed.clear()


# With a real address.


@pytest.mark.parametrize("address", REAL)
@pytest.mark.parametrize("checkpoint", ["", "  "])
def test_a_real_arm_needs_a_trained_policy(tried, address, checkpoint):
    at = RobotConfig(address=address)
    with tried.refused(
        "real arms", SettingsError, match=f"^checkpoint = '{checkpoint}': robot.address = {address} "
    ):
        check_checkpoint(at, checkpoint)
    check_checkpoint(at, "results/a checkpoint")


@pytest.mark.parametrize("address", OURS)
def test_a_simulated_arm_needs_none_and_asks_nobody(address):
    check_checkpoint(RobotConfig(address=address), "")
    confirm_motion(RobotConfig(address=address), lambda question: pytest.fail(question))


@pytest.mark.parametrize(
    "answer", ["", "y", "no", "yes!", "move", EOFError(), RuntimeError("no stdin"), OSError()]
)
def test_without_a_yes_nothing_is_opened(tried, monkeypatch, answer):
    def ask(question):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(driving, "open_cameras", lambda *a: pytest.fail("a camera was opened"))
    with tried.refused(
        "real arms", Stopped, match="robot.address = 192.168.0.7: .*(not confirmed|nobody is there)"
    ):
        open_arm(Scene(), RobotConfig(address="192.168.0.7"), 32)


def test_a_person_is_asked_once_for_each_arm(monkeypatch):
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or " Yes\n")
    monkeypatch.setattr(driving, "open_cameras", lambda *a: {})
    first, second = RobotConfig(address="192.168.0.7"), RobotConfig(address="192.168.0.8")
    for robot in (first, first, second):
        assert open_arm(Scene(), robot, 32).real  # nothing is connected before `with`
    assert [re.search(r"address = (\S+):", q)[1] for q in questions] == ["192.168.0.7", "192.168.0.8"]
    assert "250 mm/s" in questions[0] and "stop button" in questions[0]
    driving.confirmed.clear()
    open_arm(Scene(), first, 32, confirm=False)
    assert len(questions) == 2


def test_what_was_made_before_is_not_done_on_a_real_arm(tried, tmp_path):
    arm, way = Twin(Scene(), RobotConfig()), np.tile(Scene.start[:3], (5, 1))
    recorder = Recorder(tmp_path)
    recorder.begin()
    for real in (True, False):
        arm.real = real
        replay = Replay(way)
        run = dict(n_obs_steps=1, period=0.1, seconds=1.0, finished=replay.finished)
        if not real:
            assert drive(arm, Scene(), replay, **run).reason == "done"
            demonstrate(arm, Scene(), way, recorder, period=0.1)
            continue
        with tried.refused("real arms", ValueError, match="Replay"):
            drive(arm, Scene(), replay, **run)
        with tried.refused("real arms", ValueError, match="a person demonstrates"):
            demonstrate(arm, Scene(), way, recorder, period=0.1)
    arm.close()


def execute(notebook, **parameters):
    "Do what papermill does with a notebook, in this process, which has its imports done."
    names: dict = {}
    for c in json.loads(read_text(notebook))["cells"]:
        if c["cell_type"] == "code":
            exec("".join(c["source"]), names)
            if "parameters" in c["metadata"].get("tags", []):
                assert set(parameters) <= set(names)
                names |= parameters
    plt.close("all")


def test_the_manual_ends_at_once_without_a_policy(tried):
    first = cells()[:3]  # parameters, their types, settings: before anything is opened or computed
    assert "check_checkpoint(mine, checkpoint)" in first[2] and "open_arm(" not in "".join(first)
    for address, refused in (("192.168.0.7", True), ("127.0.0.7", False), ("sim", False)):
        names = {"task": "ur5_peg", "robot": address, "checkpoint": ""}
        if not refused:
            exec(first[2], names)
            assert (names["mine"].cameras == names["config"].robot.cameras) == (address == "sim")
            continue
        with tried.refused("real arms", SettingsError, match="checkpoint = '': robot.address = 192.168.0.7"):
            exec(first[2], names)


def test_the_manual_asks_before_it_opens_an_arm():
    for kind, text in (("code", "act = Replay(actions"), ("markdown", "SpaceMouse() as device")):
        opened = re.findall(r"open_arm\(scene, mine, size(.*?)\)", cell(text, kind))
        assert opened == [", confirm=confirm"]
    assert re.search(r"^confirm = True\b", cell("rehearse = True"), re.M)


def test_each_limit_is_shown_with_its_unit():
    assert set(UNITS) == set(LOOSEST) == set(LimitsConfig.model_fields) - {"looser"}
    for name, unit in UNITS.items():
        in_si = unit.name[1:] if unit.per_si == 1000 else unit.name
        assert LimitsConfig.model_fields[name].description.split()[0] == in_si
    table = limits_table(LimitsConfig(speed=0.1, turn=0.1, force=30))
    rows = {r.split(" | ")[0].strip("| `"): r.split(" | ")[1:4] for r in table.splitlines()[2:]}
    assert list(rows) == list(LOOSEST)
    assert rows["speed"] == ["100", "mm/s", "250"] and rows["turn"] == ["0.1", "rad/s", "0.16"]
    assert rows["force"] == ["30", "N", "40"] and rows["stop_after"] == ["1000", "ms", "1000"]


# Recordings are demonstrations.


def record(folder, n=6, **changes):
    recorder, rng = Recorder(folder), np.random.default_rng(0)
    recorder.begin(who="Ada")
    for t in range(n):
        images = {k: rng.integers(0, 255, (16, 16, 3), np.uint8) for k in ("scene", "wrist")}
        step = {"time": 0.1 * t, "force": rng.normal(size=6), "tip": rng.normal(size=3), **images}
        recorder.add(**{**step, "action": rng.normal(size=3), **changes})
    recorder.end()
    return recorder.path.with_suffix(".steps")


def test_a_folder_of_recordings_is_read_like_any_other_data(tmp_path, capsys):
    record(tmp_path, 6)
    record(tmp_path, 4)
    recorder = Recorder(tmp_path)
    recorder.begin()  # and never ended
    demos = load_demonstrations(tmp_path)
    assert demos.episode_ends.tolist() == [6, 10] and demos.shapes.obs["scene"] == (16, 16, 3)
    assert demos.meta == {"source": "recorded", "episodes": [{"who": "Ada"}] * 2, "fps": 10.0}
    some = load_demonstrations(tmp_path, {"action": np.float32, "wrist": None})
    assert {k: a.dtype for k, a in some.arrays.items()} == {"action": np.float32, "wrist": np.uint8}
    main(["info", str(tmp_path)])
    said = capsys.readouterr().out
    assert "2 episodes, 10 steps" in said and "wrist" in said and "10.0 steps a second" in said


DAMAGES = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:20]), "episode_00001.steps: not an episode"),
    "no numbers": (lambda p: (p.unlink(), record(p.parent, force=np.full(6, np.nan))), "data/force has nan"),
    "another field": (lambda p: (p.unlink(), record(p.parent, grip=1.0)), "00001.steps: grip is float64"),
    "another shape": (
        lambda p: (p.unlink(), record(p.parent, tip=np.zeros(6))),
        "00001.steps: tip is float64 of",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_recordings_that_are_damaged_are_refused(tried, tmp_path, damage):
    record(tmp_path)
    change, said = DAMAGES[damage]
    change(record(tmp_path))
    with tried.refused("recordings", DamagedError, match=said):
        load_demonstrations(tmp_path)


def test_without_a_finished_episode_there_is_nothing_to_read(tried, tmp_path):
    Recorder(tmp_path).begin()
    with tried.refused("recordings", DamagedError, match="no finished episodes .1 unfinished"):
        load_demonstrations(tmp_path)


# The whole way.

TINY = {
    "size": 32,
    "max_steps": 20,
    "policy": {
        "n_noise_samples": 1,
        "encoder": {"hidden": [32], "latent_dim": 8, "camera": {"crop": 28}},
        "net": {"width": 48, "depth": 2, "step_dim": 16},
    },
    "train": {"steps": 30, "warmup_steps": 5, "log_every": 10},
}


@pytest.fixture
def lab(tmp_path, monkeypatch, patient):
    "The names of the lab's notebook, in a project of its own with tiny policies and patient limits."
    folder = tmp_path / "lab"
    for name in (
        "conf",
        "settings.ini",
        "params.yaml",
        "nbs/experiments/e00_data.ipynb",
        "nbs/experiments/e02_train.ipynb",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (root() / name).is_dir() else shutil.copy
        copy(root() / name, folder / name)
    params = yaml.safe_load(read_text(folder / "params.yaml"))
    params["tasks"]["ur5_peg"] = TINY
    params["pipeline"] = {"ur5_peg": {"dp_ag": [0]}}
    calm = patient(RobotConfig())
    params["robot"] = {"limits": calm.limits.model_dump(), "watchdog": calm.watchdog}
    write_text(folder / "params.yaml", yaml.safe_dump(params))
    monkeypatch.chdir(folder)
    names = {"task": "ur5_peg", "robot": "sim", "checkpoint": "", "seed": 0, "confirm": True}
    for text in ("from dpag.robot.recorder import", "def script(scene", "class Hand(InputDevice)"):
        exec(cell(text), names)
    return folder, names


@pytest.mark.real_time
@pytest.mark.timeout(300)
def test_steered_recorded_read_trained_and_driven(lab, loopback, capsys):
    folder, names = lab
    chapter = cell("## 9. The whole way", "markdown")
    code, commands = (re.search(rf"```{k}\n(.*?)```", chapter, re.S)[1] for k in ("python", "bash"))
    code = code.replace('"127.0.0.1"', repr(loopback(61))).replace("range(10)", "range(1)")
    exec(code, names)
    recorded = folder / "data/recorded/ur5_peg"
    info, data, train, *_ = commands.splitlines()
    main(["info", info.split()[-1]])
    assert "1 episode" in capsys.readouterr().out
    for command in (data, train):
        notebook, _, given = command.removeprefix("papermill ").partition(" out.ipynb -p ")
        execute(folder / notebook, **dict(g.split() for g in given.split(" -p ")))
    demos = load_demonstrations(folder / "data/laptop-recorded/ur5_peg.zarr")
    assert demos.meta["source"] == "recorded"
    np.testing.assert_array_equal(demos.arrays["wrist"], load_demonstrations(recorded).arrays["wrist"])
    checkpoint = re.search(r"-p checkpoint (\S+)", commands)[1]
    with EmulatorProcess(loopback(62), "dpag.tasks.ur5.task:load_scene", "ur5_peg") as emulator:
        names |= {
            "robot": emulator.address,
            "mine": names["emulated"](emulator.address),
            "checkpoint": checkpoint,
        }
        exec(cell("policy, meta = policy_for("), names)
        there = np.array(emulator.report()["tcp"])
    run = names["run"]
    assert len(run.measured) > 10 and len(run.decision_seconds) > 1
    assert np.linalg.norm(there[:3] - names["scene"].start[:3]) > 1e-3  # it has moved
    assert len(load_demonstrations(folder / "data/runs/ur5_peg").arrays["tip"]) == len(run.measured)
