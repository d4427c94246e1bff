"""What an arm may do, whoever asks: commands, settings, states, hands and policies that are wrong in every
way that could be thought of."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpag.config import layered
from dpag.files import read_text, root
from dpag.policy import METHODS, PolicyConfig, build_policy, save_policy
from dpag.robot.arm import Follower, Stopped, n_soon
from dpag.robot.drive import demonstrate, drive
from dpag.robot.emulator import EmulatorProcess
from dpag.robot.kinematics import difference, moved
from dpag.robot.recorder import Recorder, read_recordings
from dpag.robot.safety import (
    Box,
    Check,
    Command,
    Envelope,
    LimitsConfig,
    RobotConfig,
    RobotState,
    Unit,
    approach,
    guard,
    refusal,
    state_checks,
    tilt,
)
from dpag.robot.teleop import KEY_COUNTS, REPORT_COUNTS, Keyboard, KeyState, SpaceMouse, teleoperate
from dpag.robot.twin import Scene, Twin
from dpag.robot.ur import STATE_SIZE, UR, fresh_state, publish, read_state
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.ur5.task import policy_for

BOX = Box((0.2, -0.35, 0.02), (0.7, 0.35, 0.5))
START = np.array([0.45, 0, 0.2, np.pi, 0, 0])
TICK, PERIOD = 0.008, 0.1
LIMITS = LimitsConfig()
ENVELOPE = Envelope(BOX, LIMITS, PERIOD)


def many(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


in_real_time = pytest.mark.real_time


def state_of(command, now, **changes):
    "An arm that is where it was told to be."
    state = {"stamp": now, "changed": now, "q": np.zeros(6), "qd": np.zeros(6), "tcp": command.pose}
    return RobotState(**{**state, "twist": np.zeros(6), "wrench": np.zeros(6), **changes})


def decided(target=START, due=0.1, now=0.05, dt=TICK, command=None, envelope=ENVELOPE, **changes):
    "The verdict about one action."
    command = command or Command.rest(START, 0.0)
    return guard(command, target, due, state_of(command, now, **changes), envelope=envelope, now=now, dt=dt)


# Commands: whatever is asked for, and whenever, they stay inside.


class Watch:
    "Follows targets, and checks each command against every limit."

    def __init__(self, pose, envelope):
        self.envelope, self.command, self.now = envelope, Command.rest(pose, 0.0), 0.0
        self.furthest = -np.inf

    def tick(self, target, due, dt):
        old, limits, box = self.command, self.envelope.limits, self.envelope.box
        verdict = guard(
            old, target, due, state_of(old, self.now), envelope=self.envelope, now=self.now, dt=dt
        )
        if verdict.decision == "stop":
            assert verdict.command is old
            return verdict
        new, rounding = verdict.command, 1e-9
        outside = max(*(np.array(box.low) - new.pose[:3]), *(new.pose[:3] - box.high))
        step, turned = np.linalg.norm(new.pose[:3] - old.pose[:3]), difference(new.pose, old.pose)[3:]
        assert outside <= rounding
        assert step <= limits.speed * dt + rounding
        assert np.linalg.norm(new.velocity[:3]) <= limits.speed + rounding
        assert np.linalg.norm(new.velocity[:3] - old.velocity[:3]) <= limits.acceleration * dt + rounding
        assert np.linalg.norm(turned) <= limits.turn * dt + rounding
        assert tilt(new.pose) <= limits.tilt + rounding
        self.furthest = max(self.furthest, outside)
        self.command, self.now = new, self.now + dt
        return verdict


shares = st.floats(-0.5, 1.5)  # of the box's sides, from its lowest corner
asked = st.tuples(
    st.tuples(shares, shares, shares),
    st.tuples(st.floats(0, 0.349), st.floats(-3.1, 3.1), st.floats(-3.1, 3.1)),  # lean, its direction, yaw
    st.floats(-0.05, 0.6),  # due, s from now
    st.lists(st.sampled_from([1.0, 1.0, 0.05, 0.5, 1.7, 2.0]), min_size=1, max_size=40),  # ticks
)


def pose_at(box, share, turn):
    low, high = np.array(box.low), np.array(box.high)
    lean, direction, yaw = turn
    pose = moved([0, 0, 0, np.pi, 0, 0], [0, 0, 0, 0, 0, yaw])
    pose = moved(pose, [0, 0, 0, lean * np.cos(direction), lean * np.sin(direction), 0])
    return np.concatenate([low + np.array(share) * (high - low), pose[3:]])


@many(100)
@given(
    st.lists(asked, min_size=1, max_size=12),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.tuples(*[st.sampled_from([0.001, 0.02, 0.1, 0.5])] * 3),
    st.sampled_from(
        [{}, {"speed": 1.0, "looser": True}, {"acceleration": 0.1}, {"tilt": 0.36, "looser": True}]
    ),
)
def test_no_sequence_of_actions_leaves_a_limit(tried, actions, start, sides, changes):
    limits = LimitsConfig.model_validate(changes).model_copy(update={"step": 100.0, "stop_after": 1000.0})
    box = Box((0.4, -0.1, 0.05), tuple(np.array([0.4, -0.1, 0.05]) + sides))
    with tried.survived("commands of the arm"):
        watch = Watch(pose_at(box, start, (0, 0, 0)), Envelope(box, limits, PERIOD))
        for share, turn, ahead, ticks in actions:
            target, due = pose_at(box, share, turn), watch.now + ahead
            for tick in ticks:
                verdict = watch.tick(target, due, tick * TICK)
                assert verdict.decision != "stop", verdict.reason


def test_down_to_a_wall_and_then_aside(tried):
    "A policy in steps that are allowed: it comes down to the table, and goes along it."
    rng = np.random.default_rng(0)
    for _ in range(40):
        step, n = rng.uniform(0.01, 0.03), rng.integers(3, 14)
        aside, axis = rng.normal(size=2), rng.integers(3)
        place, targets = np.array([0.45, 0, 0.3]), []
        way = np.sign(rng.normal()) * np.eye(3)[axis]
        other = np.insert(step * aside / np.linalg.norm(aside), axis, 0)
        for i in range(n + 6):
            place = BOX.clip(place + (step * way if i < n else other))
            targets.append(np.concatenate([place, START[3:]]))
        with tried.survived("commands of the arm"):
            watch = Watch(np.array([0.45, 0, 0.3, *START[3:]]), ENVELOPE)
            for k in range(round((len(targets) + 2) * PERIOD / TICK)):
                i = min(int(k * TICK / PERIOD), len(targets) - 1)
                verdict = watch.tick(targets[i], (i + 1) * PERIOD, TICK)
                assert verdict.decision != "stop", verdict.reason


def test_a_wall_is_reached_and_far_from_it_nothing_is_slower():
    watch = Watch(START, ENVELOPE)
    free = Command.rest(START, 0.0)
    for k in range(200):
        target = START - [0, 0, min(0.02 * (1 + int(k * TICK / PERIOD)), 0.18), 0, 0, 0]
        due = PERIOD * (1 + int(k * TICK / PERIOD))
        free = approach(dataclasses.replace(free, target=target, due=due), LIMITS, watch.now, TICK)
        watch.tick(target, due, TICK)
        if free.pose[2] > 0.08:
            np.testing.assert_array_equal(watch.command.pose, free.pose)
    assert abs(watch.command.pose[2] - BOX.low[2]) < 1e-6


def test_a_turn_that_would_lean_too_far_goes_around(tried):
    "Between two poses that are tilted as far as is allowed; it arrives."
    rng, around = np.random.default_rng(3), 0
    limits = LIMITS.model_copy(update={"turn": 1.0})
    for _ in range(30):
        start, end = (pose_at(BOX, [0.5] * 3, (0.3499, *rng.uniform(-3.1, 3.1, 2))) for _ in range(2))
        way, command = difference(end, start), Command.rest(start, 0.0)
        around += max(tilt(moved(start, way * share)) for share in np.linspace(0, 1, 20)) > 0.351
        command = dataclasses.replace(command, target=end)
        with tried.survived("commands of the arm"):
            for k in range(700):
                command = approach(command, limits, k * TICK, TICK, BOX)
                assert tilt(command.pose) <= limits.tilt
                if np.linalg.norm(difference(end, command.pose)[3:]) < 1e-4:
                    break
            assert k < 699
    assert around >= 4


def test_holding_an_arm_that_moves_and_turns_keeps_the_limits(tried):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        follower = Follower(ENVELOPE, START, 0.0)
        target = pose_at(BOX, rng.uniform(0, 1, 3), (rng.uniform(0, 0.34), *rng.uniform(-3, 3, 2)))
        way = difference(target, START)
        way[:3] *= 0.25 / np.linalg.norm(way[:3])
        due = PERIOD * np.arange(1, 11)
        follower.schedule.add(np.stack([moved(START, way * t) for t in due]), due)
        with tried.survived("commands of the arm"):
            decisions, turned_at_hold = [], None
            for k in range(130):
                now, old = k * TICK, follower.command
                if k == 50:
                    follower.hold(now)
                decision = follower.tick(state_of(old, now), now, TICK).decision
                change = np.linalg.norm(follower.command.velocity[:3] - old.velocity[:3])
                assert change <= LIMITS.acceleration * TICK + 1e-9
                assert BOX.outside(follower.command.pose[:3]) <= 1e-9
                decisions.append(decision)
                if k == 50:
                    turned_at_hold = follower.command.pose
            assert set(decisions[51:]) == {"hold"}
            np.testing.assert_allclose(difference(follower.command.pose, turned_at_hold)[3:], 0, atol=1e-9)
            assert np.linalg.norm(follower.command.velocity) < 1e-9


@pytest.mark.parametrize("axis, side", itertools.product(range(3), (-1, 1)))
def test_a_tip_that_is_measured_outside_stops(tried, axis, side):
    corner = BOX.high if side > 0 else BOX.low
    command = Command.rest([*BOX.clip(START[:3] + side * np.eye(3)[axis]), *START[3:]], 0.0)
    for factor, decision in ((0.99, "move"), (1.01, "stop"), (5, "stop")):
        tip = command.pose.copy()
        tip[axis] = corner[axis] + side * factor * LIMITS.outside
        with tried.survived("commands of the arm"):
            verdict = decided(command.pose, command=command, tcp=tip)
            assert verdict.decision == decision
            assert ("outside its box" in verdict.reason) == (decision == "stop")


def test_a_command_that_was_left_outside_only_comes_in():
    below = Command.rest(START - [0, 0, 0.182, 0, 0, 0], 0.0)
    for k in range(60):
        now = k * TICK
        new = decided(START - [0, 0, 0.2, 0, 0, 0], 0.1 + now, now, command=below).command
        assert new.pose[2] >= below.pose[2]
        below = new
    assert abs(below.pose[2] - BOX.low[2]) < 1e-4


@pytest.mark.parametrize(
    "low, high", [((0, 0, 0), (1, 1, 0)), ((1, 0, 0), (0, 1, 1)), ((np.nan, 0, 0), (1, 1, 1))]
)
def test_a_box_that_is_none_is_refused(tried, low, high):
    with tried.refused("commands of the arm", ValueError, match="low must be below high"):
        Box(low, high)


# Numbers that are none, or too large for any sense.

BAD = [np.nan, np.inf, -np.inf, 1e160, -1e308]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", range(6))
def test_an_action_with_a_number_out_of_sense_stops(tried, place, bad):
    target = START.copy()
    target[place] = bad
    with tried.survived("commands of the arm"):
        verdict = decided(target)
        assert verdict.decision == "stop" and verdict.reason
        assert np.isfinite(verdict.command.pose).all()


@pytest.mark.parametrize("due", [np.nan, np.inf, 1e308, 1e6, 1.3])
def test_a_time_out_of_sense_stops(tried, due):
    with tried.survived("commands of the arm"):
        verdict = decided(due=due)
        assert verdict.decision == "stop" and "due" in verdict.reason


@pytest.mark.parametrize("due", [-np.inf, -1e308, -1.0, 0.0])
def test_an_action_of_the_past_is_no_action(due):
    assert decided(START + [0.5, 0, 0, 0, 0, 0], due).decision == "move"
    assert decided(START, due, now=0.5).decision == "hold"


@pytest.mark.parametrize("dt", [np.nan, np.inf, 2.0, -0.008])
def test_a_tick_out_of_sense_stops(tried, dt):
    with tried.survived("commands of the arm"):
        assert "a tick lasts" in decided(dt=dt).reason


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("field", ["changed", "q", "qd", "tcp", "twist", "wrench", "image_times"])
def test_a_state_out_of_sense_stops(tried, field, bad):
    if field in ("q", "twist") and np.isfinite(bad):
        pytest.skip("is not limited")
    value = np.array([*START[:3], 3.0, bad, 0.0]) if field == "tcp" else np.array([0, 0, bad, 0, 0, 0])
    value = bad if field == "changed" else {"wrist": bad} if field == "image_times" else value
    with tried.survived("states of the arm"):
        verdict = decided(**{field: value})
        assert verdict.decision == "stop" and verdict.reason


@given(st.floats(), st.floats())
@many(200)
@example(np.nan, 1.0)
@example(1.0, np.nan)
def test_only_what_is_known_to_be_within_its_limit_passes(measured, limit):
    check = Check("{}", measured, limit, Unit(""))
    assert check.exceeded == (not measured <= limit)
    assert check.exceeded or not np.isnan([measured, limit]).any()


def test_jumps_stay_jumps_however_short_the_period_is(tried):
    for period, far in itertools.product((1e-6, 0.02, 0.1), (0.1, 0.36, 1.0)):
        envelope = dataclasses.replace(ENVELOPE, period=period)
        with tried.survived("commands of the arm"):
            assert decided(START + [far, 0, 0, 0, 0, 0], 0.1, envelope=envelope).decision == "stop"
            assert "from the one before" in refusal(
                START + [far, 0, 0, 0, 0, 0], 0.1, Command.rest(START, 0.0), envelope, now=0.0
            )


# Settings of the arm.

RANGES = {
    name: [next(getattr(m, side) for m in field.metadata if hasattr(m, side)) for side in ("ge", "le")]
    for section in (LimitsConfig, RobotConfig)
    for name, field in section.model_fields.items()
    if field.annotation is float
}


def section_of(name):
    return LimitsConfig if name in LimitsConfig.model_fields else RobotConfig


def test_every_number_has_a_range():
    numbers = {"action_seconds", "tick_seconds", "lookahead", "gain", "watchdog"}
    numbers |= set(LimitsConfig.model_fields) - {"looser"}
    assert set(RANGES) == numbers
    for low, high in RANGES.values():
        assert 0 < low < high < np.inf


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [0, -1, -0.0, 1e-9, 1e9, np.nan, np.inf, -np.inf, "much", None, [1.0]])
def test_a_number_out_of_its_range_is_refused(tried, name, value):
    changes = {name: value, **({"looser": True} if section_of(name) is LimitsConfig else {})}
    with tried.refused("settings of the arm", ValidationError, match=name):
        section_of(name).model_validate(changes)


@given(st.sampled_from(sorted(RANGES)), st.floats() | st.floats(0, 5))
@many(300)
def test_no_float_at_all_gets_past_a_range(tried, name, value):
    low, high = RANGES[name]
    loose = {"limits": {"looser": True, "stop_after": 5, "hold_after": 0.3, "stamp_age": 1}}
    changes = {name: value, **({"looser": True} if section_of(name) is LimitsConfig else loose)}
    try:
        made = section_of(name).model_validate(changes)
    except ValidationError as e:
        assert name in str(e)
        return
    with tried.survived("settings of the arm"):
        assert low <= value <= high and getattr(made, name) == value


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"watchdog": 0.001}, "watchdog"),
        ({"watchdog": 9}, "watchdog = 9 waits 0.111 s"),
        ({"watchdog": 100}, "two of tick_seconds are 0.016 s.*watchdog = 100 waits"),
        ({"tick_seconds": 10}, "tick_seconds"),
        ({"tick_seconds": 0.003}, "multiples of 0.002"),
        ({"action_seconds": 1e-6}, "action_seconds"),
        ({"action_seconds": 0.8, "limits": {"stop_after": 0.5}}, "action_seconds = 0.800 s must be at most"),
        ({"tick_seconds": 0.02, "limits": {"stamp_age": 0.03}}, "stamp_age"),
        ({"origin": [0, 0, np.nan, 0, 0, 0]}, "origin"),
        ({"origin": [0, 0, 0, np.inf, 0, 0]}, "origin"),
        ({"origin": [450, 0, 0, 0, 0, 0]}, "origin.*up to 2 m"),
        ({"origin": [0, 0, 0, 0, 0, 180]}, "origin.*6.28 rad"),
        ({"origin": [0] * 5}, "origin"),
        ({"cameras": {}}, "cameras"),
        ({"cameras": {"left": "opencv:0"}}, "cameras"),
        ({"address": ""}, "address"),
        ({"limits": {"hold_after": 0.3, "stop_after": 0.2}}, "hold_after = 0.3 must be at most stop_after"),
        ({"limits": {"speed": 0.3}}, "speed = 0.3, at most 0.25"),
        ({"limits": {"outside": 0.01}}, "outside = 0.01, at most 0.008"),
    ],
)
@pytest.mark.parametrize("address", ["sim", "192.168.0.7"])
def test_settings_of_the_arm_that_make_no_sense_are_refused(tried, changes, said, address):
    with tried.refused("settings of the arm", ValidationError, match=f"(?s){said}"):
        RobotConfig.model_validate({"address": address, **changes})


# Chunks: how far ahead, and what happens when nobody goes on.


@pytest.mark.filterwarnings("ignore:.*actions are due more than")
def test_no_more_than_stop_after_is_ever_queued(tried):
    with (
        tried.survived("chunks of actions"),
        pytest.warns(UserWarning, match="40 of 50 actions are due more than 1"),
    ):
        assert n_soon(PERIOD * np.arange(1, 51), 0.0, 1.0) == 10
    with Twin(Scene(), RobotConfig()) as arm, tried.survived("chunks of actions"):
        line = START + np.outer(np.arange(1, 51), [0, 0.005, 0, 0, 0, 0])
        assert arm.servo(line, PERIOD * np.arange(1, 51)) == 10
        assert "40 of 50" in arm.notes[0][2]
        with pytest.raises(Stopped, match="no action for"):
            arm.wait_until(5.0)
        assert arm.now() < 2.1 and arm.simulator.tcp[1] < 0.055
    with Twin(Scene(), RobotConfig()) as arm, tried.survived("chunks of actions"):
        assert arm.servo(START[None], [1e6]) == 0
        arm.wait_until(2.0)
        np.testing.assert_allclose(arm.simulator.tcp[:3], START[:3], atol=1e-4)


def forward(arm, n):
    "A policy that goes left at 10 cm/s, `n` actions at a time."
    return lambda recent: START[:3] + np.outer(arm.now() + PERIOD * np.arange(1, n + 1), [0, 0.1, 0])


WRONG = {"an error": ZeroDivisionError, "Ctrl-C": KeyboardInterrupt, "another shape": ValueError}


@pytest.mark.filterwarnings("ignore:.*actions are due more than")
@pytest.mark.parametrize("n", [8, 10, 50])
@pytest.mark.parametrize("end", ["it is finished", "the time is over", *WRONG])
def test_however_driving_ends_the_arm_holds(tried, end, n):
    with Twin(Scene(), RobotConfig()) as arm, tried.survived("chunks of actions"):
        go = forward(arm, n)

        def act(recent):
            if end not in WRONG or arm.now() < 0.55:
                return go(recent)
            if end == "another shape":
                return np.zeros((3, 2))
            raise WRONG[end]

        how = {"seconds": 0.6 if end == "the time is over" else 9, "n_obs_steps": 1, "spare": n - 4}
        finished = lambda: end == "it is finished" and arm.now() > 0.55
        try:
            run = drive(arm, Scene(), act, period=PERIOD, finished=finished, **how)
            assert end not in WRONG and (run.too_far > 0) == (n == 50)
        except tuple(WRONG.values()):
            assert end in WRONG
        there = arm.simulator.tcp[1]
        arm.wait_until(arm.now() + 0.6)
        assert arm.simulator.tcp[1] - there < 0.015  # 5 mm to brake, and what the arm was behind
        assert np.linalg.norm(arm.observe(images=False).state.twist[:3]) < 1e-3
        with pytest.raises(Stopped, match="no action"):
            arm.wait_until(arm.now() + 2)


def test_a_policy_with_long_chunks_is_asked_again_in_time():
    with Twin(Scene(), RobotConfig()) as arm, pytest.warns(UserWarning, match="are due more than"):
        run = drive(arm, Scene(), forward(arm, 16), n_obs_steps=1, period=PERIOD, seconds=2.5, spare=2)
        assert run.reason == "the time is over" and run.too_far == 6 * len(run.decision_seconds)
        assert [note for note in arm.notes if note[1] != "move"] == []


def test_a_demonstration_that_ends_leaves_an_arm_that_holds(tmp_path, tried):
    def hand(fail):
        for k in range(1, 8):
            yield START[:3] + [0, 0.01 * k, 0]
        if fail:
            raise ConnectionError("the SpaceMouse is gone")

    for fail in (False, True):
        recorder = Recorder(tmp_path / str(fail))
        recorder.begin()
        with Twin(Scene(), RobotConfig()) as arm, tried.survived("hands that steer"):
            try:
                demonstrate(arm, Scene(), hand(fail), recorder, period=PERIOD)
            except ConnectionError:
                assert fail
            there = arm.simulator.tcp[1]
            arm.wait_until(arm.now() + 0.5)
            assert arm.simulator.tcp[1] - there < 0.015
        recorder.end()
        assert len(read_recordings(tmp_path / str(fail)).arrays["action"]) == 7


# Hands.


class Driver:
    "A SpaceMouse's driver: pushed forward; from when it is told to, `then`."

    def __init__(self, then, **state):
        self.then, self.ended = then, False
        self.state = {"x": 0, "y": 0.6, "z": 0, "yaw": 0, "buttons": [0, 0], **state}

    def read(self):
        if self.ended:
            return self.then(self)
        self.last = SimpleNamespace(**self.state, t=time.monotonic())
        return self.last

    def close(self):
        pass


def eventually(what):
    until = time.monotonic() + 20
    while not what() and time.monotonic() < until:
        time.sleep(0.001)
    assert what()


def unplugged(driver):
    raise OSError("no such device")


ENDINGS = {
    "unplugged": unplugged,
    "hangs": lambda driver: time.sleep(2),
    "says nothing": lambda driver: None,
    "says the same again": lambda driver: driver.last,
    "a driver's bug": lambda driver: driver.nothing,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_spacemouse_that_falls_silent_stops_driving(tried, ending):
    driver = Driver(ENDINGS[ending])
    with SpaceMouse(driver) as mouse, tried.survived("hands that steer"):
        eventually(lambda: mouse.velocity()[0] > 0.5)
        driver.ended = True
        time.sleep(REPORT_COUNTS + 0.3)
        np.testing.assert_array_equal(mouse.velocity(), np.zeros(4))
        actions = teleoperate(mouse, Scene(), speed=0.08, turn=0.16, period=PERIOD, longest=1.0)
        if ending in ("unplugged", "a driver's bug"):
            with pytest.raises(ConnectionError, match="SpaceMouse is gone.*plugged in"):
                next(actions)
        else:
            np.testing.assert_array_equal(list(actions), np.tile(START[:3], (10, 1)))


def test_a_button_of_the_spacemouse_is_heard_once_and_for_all():
    driver = Driver(lambda d: SimpleNamespace(**{**d.state, "buttons": [0, 0]}), buttons=[1, 0])
    with SpaceMouse(driver) as mouse:
        eventually(lambda: mouse.outcome() == "keep")
        driver.ended = True
        time.sleep(0.1)
        assert mouse.outcome() == "keep"


def test_without_a_spacemouse_the_error_asks_for_it(monkeypatch, tried):
    for error in (RuntimeError("none found"), OSError("permission denied")):

        def refuse(error=error):
            raise error

        monkeypatch.setattr("dpag.robot.teleop.load_spacemouse", lambda: SimpleNamespace(open=refuse))
        with tried.refused("hands that steer", ConnectionError, match="Is it plugged in"):
            SpaceMouse()


def test_a_key_whose_release_is_lost_counts_for_a_moment(tried):
    now = [0.0]
    keys = KeyState(clock=lambda: now[0])
    with tried.survived("hands that steer"):
        for k in range(20):  # held, and repeated
            now[0] = 0.05 * k
            keys.press("up")
            keys.press("left")
            np.testing.assert_array_equal(keys.velocity(), [1, 1, 0, 0])
        now[0] += KEY_COUNTS + 0.01
        np.testing.assert_array_equal(keys.velocity(), np.zeros(4))
        keys.press("left")  # the other one is still not heard
        np.testing.assert_array_equal(keys.velocity(), [0, 1, 0, 0])
    real = KeyState()
    real.press("up")
    time.sleep(KEY_COUNTS + 0.1)
    np.testing.assert_array_equal(real.velocity(), np.zeros(4))


def test_a_lost_release_moves_a_simulated_arm_no_further_than_a_real_one(tried):
    "The twin lives much faster than the clock of whoever holds the key."
    keys = KeyState()
    keys.press("up")
    with tried.survived("hands that steer"):
        way = list(teleoperate(keys, Scene(), speed=0.08, turn=0.16, period=PERIOD, longest=5))
        assert 0 < way[-1][0] - START[0] < 0.05
    keys = KeyState()
    with tried.survived("hands that steer"):
        way = []
        for action in teleoperate(keys, Scene(), speed=0.08, turn=0.16, period=PERIOD, longest=2):
            keys.press("up")
            way.append(action)
        np.testing.assert_allclose(way[-1][0] - START[0], 19 * 0.008)


def test_a_keyboard_that_is_no_longer_heard_is_said(tried, monkeypatch):
    silent = SimpleNamespace(is_alive=lambda: False)
    module = SimpleNamespace(Listener=lambda **heard: silent)
    monkeypatch.setattr("dpag.robot.teleop.load_keyboard", lambda: module)
    with tried.refused("hands that steer", ConnectionError, match="no longer heard"):
        next(teleoperate(Keyboard(), Scene(), speed=0.1, turn=0.1, period=PERIOD))


class Forgotten(KeyState):
    "Somebody leans on a key, and nobody ends the episode."

    def velocity(self):
        return np.array([0, 0, 0.1, 0])


def test_an_episode_that_nobody_ends_is_over(tried):
    with tried.survived("hands that steer"):
        hand = Forgotten()
        assert len(list(teleoperate(hand, Scene(), speed=0.1, turn=0.1, period=PERIOD))) == 1200
        assert hand.outcome() == ""
        assert len(list(teleoperate(hand, Scene(), speed=0.1, turn=0.1, period=PERIOD, longest=3))) == 30
    for longest in (0, -1, np.nan, np.inf, 1e9):
        with tried.refused("hands that steer", ValueError, match="longest"):
            next(teleoperate(hand, Scene(), speed=0.1, turn=0.1, period=PERIOD, longest=longest))


# States that are old.


def published(age=0.0):
    "Shared memory with a state that is `age` s old."
    memory = multiprocessing.get_context("spawn").RawArray("d", STATE_SIZE)
    publish(memory, state_of(Command.rest(START, 0.0), time.monotonic() - age))
    return memory


class Stream:
    "A streaming process, as its reader sees it."

    def __init__(self, memory):
        self.memory, self.told = memory, []

    def check(self):
        pass

    def give_up(self, reason):
        self.told.append(reason)


@pytest.mark.parametrize("counter", [1, 7, np.nan, 2.5])
def test_a_state_that_stays_half_written_is_an_error_and_soon(tried, counter):
    memory = published()
    memory[0] = counter
    with tried.refused("states of the arm", Stopped, match="half written"):
        read_state(memory)
    stream = Stream(memory)
    with tried.refused("states of the arm", Stopped, match="half written"):
        fresh_state(stream, LIMITS, {})
    assert stream.told


def test_a_state_that_is_being_written_is_read_once_it_is():
    memory = published()
    memory[0] += 1
    threading.Timer(0.02, lambda: memory.__setitem__(0, memory[0] + 1)).start()
    np.testing.assert_array_equal(read_state(memory, tries=20000).tcp, START)


@pytest.mark.parametrize("age", [0.15, 6.0, 1e6, np.nan, -6.0])
def test_an_old_state_is_not_given_to_anybody(tried, age):
    stream = Stream(published(age))
    with tried.refused("states of the arm", Stopped, match="no new state of the arm"):
        fresh_state(stream, LIMITS, {})
    assert "no new state" in stream.told[0]


@pytest.mark.parametrize("age", [0.3, 6.0, np.nan])
def test_an_old_image_is_not_given_to_anybody(tried, age):
    with tried.refused("states of the arm", Stopped, match="camera wrist"):
        fresh_state(Stream(published()), LIMITS, {"wrist": time.monotonic() - age})


def test_state_checks_are_those_of_whoever_reads():
    checks = state_checks(state_of(Command.rest(START, 0.0), 0.0), Command.rest(START, 0.0), LIMITS, 1.0)
    assert [c.sentence for c in checks if c.exceeded] == ["no new state of the arm for {}"]


@in_real_time
def test_with_a_stream_that_stands_still_nothing_is_observed_or_recorded(tmp_path, tried):
    "In real time, against the emulated controller. First, that the arm holds when driving has ended."
    with EmulatorProcess("127.0.0.61") as emulator:
        robot = RobotConfig(address=emulator.address)
        with UR(robot, BOX) as arm:
            x = arm.observe().state.tcp[:3].copy()
            start = arm.now()
            run = drive(
                arm,
                Scene(),
                lambda recent: x + np.outer(arm.now() - start + PERIOD * np.arange(1, 11), [0, 0.08, 0]),
                n_obs_steps=1,
                period=PERIOD,
                seconds=1.0,
                spare=6,
            )
            assert run.reason == "the time is over", run.reason
            there = arm.observe().state.tcp[1]
            time.sleep(0.5)
            assert arm.observe().state.tcp[1] - there < 0.025  # what is queued leads 50 mm further
        emulator.order("recover")
        recorder = Recorder(tmp_path)
        recorder.begin()
        with UR(robot, BOX) as arm, tried.survived("states of the arm"):
            stream = arm.stream.process.pid
            threading.Timer(1.0, os.kill, [stream, signal.SIGSTOP]).start()
            begun = time.monotonic()
            here = lambda recent: np.tile(START[:3], (8, 1))
            run = drive(
                arm, Scene(), here, n_obs_steps=1, period=PERIOD, seconds=8, spare=4, recorder=recorder
            )
            still = "no new state|half written"  # the second where it stands still while it writes
            assert re.search(still, run.reason) and time.monotonic() - begun < 4
            with pytest.raises(Stopped, match=still):
                arm.observe()
        recorder.end()
        assert (np.diff(read_recordings(tmp_path).arrays["time"]) > 0).all()
        assert read_recordings(tmp_path).arrays["time"][-1] - begun < 1.4


# Policies.

UR5 = ["ur5_paint_circle", "ur5_paint_heart", "ur5_candy", "ur5_peg"]
SI = {"length": "m", "angle": "rad"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "A policy of each task that was never trained; `None` for one of which nothing is said."
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    says = {name: {"task": name, "units": SI} for name in UR5}
    says |= {"nothing": {}, "no units": {"task": "ur5_peg"}, "no task": {"units": SI}}
    says |= {"mm": {"task": "ur5_peg", "units": {**SI, "length": "mm"}}, "other": {"task": 7, "units": SI}}
    for key, info in says.items():
        task = get_task(key if key in UR5 else "ur5_peg")
        policy = layered(
            PolicyConfig,
            {"encoder": {"features": "raw", "camera": {"crop": 58}}, "net": {"width": 16, "depth": 2}},
        )
        method = METHODS["dp"].config()
        save_policy(folder / key, build_policy(method, policy, task.shapes), info=info)
        found[key] = folder / key
    return found


@pytest.mark.parametrize("task", UR5)
def test_a_policy_drives_its_own_task_and_no_other(tried, checkpoints, task):
    policy, meta = policy_for(get_task(task), checkpoints[task])
    assert meta["info"]["task"] == task and policy.n_action_steps
    for other in set(UR5) - {task}:
        with tried.refused("policies that drive", ValueError, match=f"{other}, this is {task}"):
            policy_for(get_task(task), checkpoints[other])


@pytest.mark.parametrize(
    "which, said",
    [
        ("nothing", "says no task and no units"),
        ("no units", "says no task and no units"),
        ("no task", "says no task and no units"),
        ("mm", "units are .*mm.*those of ur5_peg are"),
        ("other", "trained for 7, this is ur5_peg"),
    ],
)
def test_a_policy_that_does_not_say_whose_it_is_does_not_drive(tried, checkpoints, which, said):
    with tried.refused("policies that drive", ValueError, match=said):
        policy_for(get_task("ur5_peg"), checkpoints[which])


def test_a_policy_of_other_images_does_not_drive(tried, checkpoints):
    small = get_task("ur5_peg", TASKS["ur5_peg"].configure({"size": 32}))
    with tried.refused("policies that drive", ValueError, match="trained for .*96.*ur5_peg has .*32"):
        policy_for(small, checkpoints["ur5_peg"])


def test_a_checkpoint_folder_that_is_none_does_not_drive(tried, checkpoints, tmp_path):
    with tried.refused("policies that drive", FileNotFoundError, match="no checkpoint"):
        policy_for(get_task("ur5_peg"), tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"info": "ur5_peg"}', encoding="utf-8")
    with tried.refused("policies that drive", ValueError):
        policy_for(get_task("ur5_peg"), tmp_path)


def test_training_says_the_task_and_the_manual_asks_for_it():
    def code(path):
        cells = json.loads(read_text(root() / path))["cells"]
        return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")

    assert '"units": s.units' in code("nbs/experiments/e02_train.ipynb")
    manual = code("nbs/hardware/lab.ipynb")
    assert "policy_for(get_task(task, config), root() / checkpoint)" in manual and "load_policy" not in manual
