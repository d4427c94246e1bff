"""The arm's driver against an emulated controller: what stops it, and that it stays stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from pydantic import ValidationError

from dpag.robot.arm import Stopped
from dpag.robot.drive import drive
from dpag.robot.emulator import Emulator, EmulatorProcess
from dpag.robot.kinematics import forward, to_vector
from dpag.robot.recorder import Recorder, read_recordings
from dpag.robot.safety import (
    LOOSEST,
    Box,
    Command,
    Envelope,
    LimitsConfig,
    RobotConfig,
    RobotState,
    guard,
    state_checks,
    target_checks,
)
from dpag.robot.twin import Scene
from dpag.robot.ur import UR, Connection

BOX = Box((0.2, -0.35, 0.02), (0.7, 0.35, 0.5))
START = np.array([0.45, 0, 0.2, np.pi, 0, 0])

# A machine that is shared may pause for more than a tenth of a second. Stopping is then right, and not what a
# test is about.
in_real_time = pytest.mark.real_time


def circle(t):
    return START + [0.06 * np.sin(t), 0.06 * np.cos(t) - 0.06, 0, 0, 0, 0]


def robot_at(address):
    return RobotConfig(address=address)


def set_off(arm):
    "Start a circle, and be well under way, with actions for as long as they are taken."
    start = arm.now()
    for seconds in (0.8, 0):
        due = arm.now() + 0.1 * np.arange(1, 10)
        arm.servo(np.stack([circle(t) for t in due - start]), due)
        arm.wait_until(arm.now() + seconds)


def why_it_stops(arm, within=2.0):
    with pytest.raises(Stopped) as e:
        arm.wait_until(arm.now() + within)
    return str(e.value)


@pytest.fixture(scope="module")
def emulator(loopback):
    with EmulatorProcess(loopback(21)) as e:
        yield e


@in_real_time
@pytest.mark.parametrize(
    "fault, said",
    [
        ("protective", "protective stop"),
        ("emergency", "emergency stop"),
        ("drop", "connection"),
        ("drop control", "connection"),
        ("drop receive", "connection"),
        ("silence", "no new state"),
        ("push 0 0 90", "force"),
    ],
)
def test_a_fault_stops_the_arm_and_it_stays_stopped(emulator, fault, said):
    emulator.order("recover")
    with UR(robot_at(emulator.address), BOX) as arm:
        set_off(arm)
        emulator.order(fault)
        assert said in why_it_stops(arm)
        time.sleep(0.3)
        before = emulator.report()
        time.sleep(0.5)
        after = emulator.report()
        with pytest.raises(Stopped):
            arm.servo(circle(1)[None], [arm.now() + 0.1])
    assert before["rest_after"] < 0.5 and not after["running"]
    tolerance = 2e-3 if "push" in fault else 2e-4  # nobody moved it again
    np.testing.assert_allclose(after["tcp"][:3], before["tcp"][:3], atol=tolerance)


@in_real_time
def test_half_a_minute_at_the_controllers_pace(emulator, patient, capsys):
    emulator.order("recover")
    arm = UR(patient(robot_at(emulator.address)), BOX)
    with arm:
        start, off = arm.now(), []
        while arm.now() < start + 30:  # a chunk of eight every 0.8 s, planned three further
            now = arm.now()
            due = now + 0.1 * np.arange(1, 12)
            arm.servo(np.stack([circle(t) for t in due - start]), due)
            arm.wait_until(now + 0.8)
            tip, wanted = arm.observe(images=False).state.tcp, circle(arm.now() - start)
            off.append(np.linalg.norm(tip[:3] - wanted[:3]))
    ticks = 1000 * np.array(arm.stream.ticks)
    p50, p99 = np.percentile(ticks, [50, 99])
    with capsys.disabled():
        print(f"\n{len(ticks)} ticks: p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {ticks.max():.1f} ms")
    assert arm.stream.stopped == "closed" and abs(p50 - 8) < 0.2
    assert np.median(off) < 0.03


class FakeCamera:
    "Takes images until it hangs."

    hung = None

    def read(self):
        return self.hung or time.monotonic(), np.zeros((8, 8, 3), np.uint8)

    def close(self):
        pass


@in_real_time
def test_a_camera_that_hangs_stops_the_arm(emulator):
    emulator.order("recover")
    with UR(robot_at(emulator.address), BOX, {"wrist": FakeCamera()}) as arm:
        set_off(arm)
        arm.cameras["wrist"].hung = time.monotonic()
        assert "camera wrist" in why_it_stops(arm)
    assert not arm.camera_thread.is_alive()  # nobody reads a closed camera
    assert not emulator.report()["running"]


@in_real_time
@pytest.mark.parametrize(
    "action, said",
    [(circle(0) * np.nan, "finite"), (circle(0)[:5], "shape"), (circle(0) + [0, 0, 0.05, 0, 0, 0], "50 mm")],
)
def test_a_wrong_action_stops_the_arm_before_it_is_sent(emulator, action, said):
    emulator.order("recover")
    with UR(robot_at(emulator.address), BOX) as arm:
        before = emulator.report()["tcp"]
        if len(action) == 6:
            arm.servo(action[None], [arm.now() + 0.1])
            assert said in why_it_stops(arm)
        else:
            with pytest.raises(ValueError, match=said):
                arm.servo(action[None], [arm.now() + 0.1])
    np.testing.assert_allclose(emulator.report()["tcp"][:3], before[:3], atol=1e-3)


@in_real_time
def test_what_was_recorded_before_a_fault_is_whole(emulator, tmp_path):
    emulator.order("recover")
    recorder = Recorder(tmp_path)
    recorder.begin(who="a circle")
    with UR(robot_at(emulator.address), BOX) as arm:
        start = arm.now()
        threading.Timer(1.5, emulator.order, ["protective"]).start()
        run = drive(
            arm,
            Scene(),
            lambda recent: np.stack([circle(arm.now() - start + 0.1 * k)[:3] for k in range(1, 9)]),
            n_obs_steps=1,
            period=0.1,
            seconds=5,
            spare=2,
            recorder=recorder,
        )
    assert run.reason == "protective stop" and recorder.path.exists()
    arrays = read_recordings(tmp_path, unfinished=True).arrays  # nobody came to end the episode
    np.testing.assert_array_equal(arrays["tip"], run.measured)
    assert len(run.measured) > 10
    assert np.isfinite(arrays["force"]).all() and (np.diff(arrays["time"]) > 0).all()


@in_real_time
def test_out_of_reach_the_arm_stops_where_it_was_stretched(emulator):
    emulator.order("recover")
    with UR(robot_at(emulator.address), Box((-2, -2, -2), (2, 2, 2))) as arm:
        start = arm.now()
        with pytest.raises(Stopped) as e:
            while arm.now() < start + 8:
                due = arm.now() + 0.1 * np.arange(1, 10)
                arm.servo(START + np.outer((due - start) * 0.2, [1, 0, 0, 0, 0, 0]), due)
                arm.wait_until(arm.now() + 0.5)
        why = str(e.value)
        assert any(w in why for w in ("joint", "program has ended", "from where it was told")), why
    report = emulator.report()
    assert not report["running"] and 0.75 < report["tcp"][0] < 1.1


MOVING = """
import time
import tests.test_robot as t
if __name__ == '__main__':
    arm = t.UR(t.robot_at('ADDRESS'), t.BOX)
    arm.connect()
    t.set_off(arm)
    print('moving', flush=True)
    time.sleep(30)
"""


@in_real_time
def test_killed_without_warning_the_arm_comes_to_rest(emulator):
    emulator.order("recover")
    code = MOVING.replace("ADDRESS", emulator.address)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "moving\n"
    emulator.order("mark")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(1)
    report = emulator.report()
    assert report["rest_after"] < 0.5 and not report["running"]


CLIENT = """
import sys, json, rtde_control
c = rtde_control.RTDEControlInterface(sys.argv[1], 125.0)
found = [c.getForwardKinematics(q, [0, 0, .15, 0, 0, 0]) for q in json.loads(sys.argv[2])]
p = c.getForwardKinematics()
p[1] += .02
print(json.dumps([found, c.moveL(p, .1, .5), c.isConnected()]))
"""


def test_the_controller_and_the_table_agree_on_where_the_tip_is(emulator):
    emulator.order("recover")
    start = emulator.report()["tcp"]
    angles = np.random.default_rng(0).uniform(-1.5, 1.5, (5, 6))
    command = [sys.executable, "-c", CLIENT, emulator.address, str(angles.tolist())]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    found, moved, connected = json.loads(out.splitlines()[-1])
    assert moved and connected
    np.testing.assert_allclose(np.subtract(emulator.report()["tcp"], start)[:3], [0, 0.02, 0], atol=1e-3)
    for q, pose in zip(angles, found):
        np.testing.assert_allclose(pose, to_vector(forward(q, tool=0.15)), atol=1e-9)


def test_clear_errors():
    with pytest.raises(ValueError, match="loopback"):
        Emulator("192.168.1.10")
    with pytest.raises(ConnectionError, match="robot.address = 127.0.0.99"):
        Connection(robot_at("127.0.0.99"))


# The limits.

DOCUMENTED = {
    "step": 0.03,
    "speed": 0.25,
    "turn": 0.16,
    "acceleration": 1.0,
    "tilt": 0.35,
    "outside": 0.008,
    "tracking": 0.06,
    "force": 40.0,
    "joint_speed": 1.05,
    "stamp_age": 0.1,
    "frame_age": 0.25,
    "hold_after": 0.3,
    "stop_after": 1.0,
}


def test_the_defaults_are_the_documented_limits():
    assert LOOSEST == DOCUMENTED
    assert LimitsConfig().model_dump() == {**DOCUMENTED, "looser": False}
    robot = RobotConfig()
    assert robot.address == "sim" and robot.origin == [0] * 6
    assert robot.cameras == {"scene": "opencv:0", "wrist": "opencv:1"}
    numbers = robot.action_seconds, robot.tick_seconds, robot.lookahead, robot.gain, robot.watchdog
    assert numbers == (0.1, 0.008, 0.1, 300, 10)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_looser_limit_must_be_meant(name):
    changes = {name: 2 * DOCUMENTED[name]}
    with pytest.raises(ValidationError, match=f"{name} = .*, at most {DOCUMENTED[name]}.*looser: true"):
        LimitsConfig.model_validate(changes)
    assert getattr(LimitsConfig.model_validate({**changes, "looser": True}), name) == changes[name]
    with pytest.raises(ValidationError, match=name):
        LimitsConfig.model_validate({name: 0})


def state_of(command, **changes):
    state = {"stamp": 0.0, "changed": 0.0, "q": np.zeros(6), "qd": np.zeros(6), "tcp": command.pose}
    return RobotState(**{**state, "twist": np.zeros(6), "wrench": np.zeros(6), **changes})


@pytest.mark.parametrize(
    "limit, at",
    [
        ("tracking", lambda x: {"tcp": START + [0, x, 0, 0, 0, 0]}),
        ("force", lambda x: {"wrench": np.array([0, 0, x, 0, 0, 0])}),
        ("joint_speed", lambda x: {"qd": np.array([0, 0, -x, 0, 0, 0])}),
        ("stamp_age", lambda x: {"changed": -x}),
        ("frame_age", lambda x: {"image_times": {"wrist": -x}}),
        ("tilt", lambda x: {"tcp": START - [0, 0, 0, x, 0, 0]}),
    ],
)
def test_each_limit_of_the_state_stops_at_its_value_and_not_before(limit, at):
    "One quantity, one limit: just below it nothing is exceeded, just above it exactly one check is."
    limits, command = LimitsConfig(), Command.rest(START, 0.0)
    envelope = Envelope(BOX, limits, 0.1)
    for factor, exceeded in ((0.999, 0), (1.001, 1)):
        state = state_of(command, **at(factor * DOCUMENTED[limit]))
        checks = state_checks(state, command, limits, 0.0)
        assert sum(c.exceeded for c in checks) == exceeded
        verdict = guard(command, START, 0.0, state, envelope=envelope, now=0.0, dt=0.008)
        assert verdict.decision == ("stop" if exceeded else "move")
        assert (verdict.reason in [c.reason for c in checks]) == bool(exceeded)


@pytest.mark.parametrize(
    "limit, at",
    [("step", lambda x: START + [x, 0, 0, 0, 0, 0]), ("tilt", lambda x: START - [0, 0, 0, x, 0, 0])],
)
def test_each_limit_of_a_target_stops_at_its_value_and_not_before(limit, at):
    command, envelope = Command.rest(START, 0.0), Envelope(BOX, LimitsConfig(), 0.1)
    for factor, exceeded in ((0.999, 0), (1.001, 1)):
        target = at(factor * DOCUMENTED[limit])
        assert sum(c.exceeded for c in target_checks(target, 0.1, command, envelope)) == exceeded
        verdict = guard(command, target, 0.1, state_of(command), envelope=envelope, now=0.0, dt=0.008)
        assert verdict.decision == ("stop" if exceeded else "move")


@pytest.mark.parametrize(
    "seconds, decision", [(0.299, "move"), (0.301, "hold"), (0.999, "hold"), (1.001, "stop")]
)
def test_without_actions_the_arm_holds_and_then_stops(seconds, decision):
    command, envelope = Command.rest(START, 0.0), Envelope(BOX, LimitsConfig(), 0.1)
    state = state_of(command, changed=seconds)
    verdict = guard(command, START, 0.0, state, envelope=envelope, now=seconds, dt=0.008)
    assert verdict.decision == decision


def test_the_settings_need_no_simulator():
    code = "import sys, dpag.robot.safety; print([m for m in ('mujoco', 'cv2', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
