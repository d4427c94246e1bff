import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
# A shell's background jobs ignore Ctrl-C and hand this on to what they start; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

from jaxtyping import install_import_hook

# Before dpag is imported: the shapes in these modules' annotations are checked at every call.
CHECKED = ["encoder", "noise_net", "diffusion", "guidance", "policy", "methods"]
install_import_hook([f"dpag.{module}" for module in CHECKED], "beartype.beartype")

import pytest
import torch

from dpag.config import layered
from dpag.data import Shapes, WindowDataset
from dpag.policy import PolicyConfig

torch.set_num_threads(1)

SHAPES = Shapes(obs={"keypoints": (16,), "agent_pos": (2,)}, action_dim=2, action_ref="agent_pos")


def small_policy() -> PolicyConfig:
    return layered(
        PolicyConfig,
        {
            "action_frame": "relative",
            "encoder": {"features": "planar", "hidden": [32], "latent_dim": 8},
            "net": {"width": 48, "depth": 3, "step_dim": 16},
        },
    )


def drifting_blocks() -> WindowDataset:
    g = torch.Generator().manual_seed(0)
    steps, n = 30, 10
    t = torch.arange(steps).float()
    corners = torch.tensor([-60, 0, 60, 0, 60, 30, -60, 30, -15, 30, -15, 120, 15, 120, 15, 30.0])
    centre = 200 + 100 * torch.rand(n, 1, 2, generator=g) + t[None, :, None]
    kp = centre.repeat(1, 1, 8) + corners
    phase = torch.rand(n, 1, generator=g) * 6.28
    agent = 256 + 120 * torch.stack([torch.cos(t / 5 + phase), torch.sin(t / 5 + phase)], -1)
    action = agent + 10 * torch.stack([-torch.sin(t / 5 + phase), torch.cos(t / 5 + phase)], -1)
    return WindowDataset(
        {"keypoints": kp.flatten(0, 1).float(), "agent_pos": agent.flatten(0, 1).float()},
        action.flatten(0, 1).float().numpy(),
        torch.arange(steps, n * steps + 1, steps).numpy(),
        horizon=16,
        n_obs_steps=2,
        n_action_steps=8,
    )


@pytest.fixture(scope="session")
def shapes():
    return SHAPES


@pytest.fixture(scope="session")
def small():
    "Push-T's policy settings, small enough for tests."
    return small_policy()


@pytest.fixture(scope="session")
def dataset():
    "Ten made-up episodes of a block that drifts and an agent that circles."
    return drifting_blocks()


@pytest.fixture(scope="session")
def settings():
    "The laptop profile's settings."
    from dpag import settings

    return settings.validate(settings.compose("laptop", "scripted"))


@pytest.fixture(scope="session")
def patient():
    """An arm's settings for half a minute on a machine that is shared and pauses: nothing stops because
    it was late. The documented limits have short tests of their own."""
    late = {
        "stamp_age": 2.0,
        "frame_age": 3.0,
        "hold_after": 1.0,
        "stop_after": 3.0,
        "tracking": 0.3,
        "joint_speed": 6.0,
        "looser": True,
    }

    def patient(robot):
        limits = {**robot.limits.model_dump(), **late}
        return type(robot).model_validate({**robot.model_dump(), "watchdog": 0.5, "limits": limits})

    return patient


# Time. What is real time on purpose runs where the machine keeps it, and is skipped, with the reason, where
# it does not; nothing else depends on how fast or how idle the machine is.

TICKER = """
import select, sys, time
busy, longest, due = float(sys.argv[1]), 0.0, time.monotonic()
print(flush=True)
while not select.select([sys.stdin], [], [], max(0, due - time.monotonic()))[0]:
    now = time.monotonic()
    longest, due = max(longest, now - due), max(due + 0.008, now)
    while time.monotonic() < now + busy:
        pass
print(longest)
"""
LATE = 0.025  # s: three ticks of a controller


class Ticker:
    "A process that ticks every 8 ms, is busy for a part of each, and notes the longest delay."

    def __init__(self, busy: float):
        command = [sys.executable, "-S", "-c", TICKER, str(busy)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.process.stdout.readline()

    def longest(self) -> float:
        "End it; the longest delay, s."
        return float(self.process.communicate()[0])


def longest_delay(tries: int = 1) -> float:
    """The longest delay, s, in half a second of what a driver and an emulated controller need; the best of so
    many tries, as other work on the machine may be about to end."""
    delays = []
    while len(delays) < tries and min(delays, default=1.0) > LATE:
        tickers = [Ticker(busy=0.003) for _ in range(2)]
        time.sleep(0.5)
        delays.append(max(t.longest() for t in tickers))
    return min(delays)


def too_late(delay: float) -> str:
    return f"this machine does not keep ticks of 8 ms: one came {1000 * delay:.0f} ms late"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test in real time is skipped where ticks come late before it. A failure counts unless they did while
    it ran, or do after it."""
    if item.get_closest_marker("real_time") is None:
        return (yield)
    if (delay := longest_delay(tries=4)) > LATE:
        pytest.skip(too_late(delay))
    ticker = Ticker(busy=0.0)
    try:
        return (yield)
    except (Exception, pytest.fail.Exception):
        delay = max(ticker.longest(), longest_delay())
        if delay <= LATE:
            raise
        item.skipped_late = True
        pytest.skip(too_late(delay))
    finally:
        ticker.process.kill()
        ticker.process.wait()


def slowness() -> float:
    "How many times longer than on an idle machine a computation takes now."
    start, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < 0.2:
        pass
    return max(1.0, (time.perf_counter() - start) / 0.2)


def pytest_configure(config):
    config.addinivalue_line("markers", "real_time: needs ticks of 8 ms, and is skipped where they come late")


def pytest_collection_modifyitems(config, items):
    "The limits of time are there to end what hangs: twice as long, and longer where the machine is slow."
    if config.getoption("timeout", None) is not None:
        return
    factor, usual = 2 * slowness(), float(config.getini("timeout") or 300)
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker and marker.args else usual
        item.add_marker(pytest.mark.timeout(factor * seconds), append=False)


@pytest.fixture(scope="session")
def loopback():
    "Loopback addresses by their last number, of this process alone: other tests may run on the machine."
    pid = os.getpid()
    return lambda n: f"127.{1 + (pid >> 8) % 250}.{pid % 256}.{n}"


class Tried:
    """Counts attempts to break something, by area and outcome, for the table that tools/make_tried.py writes.

    `with tried.refused("checkpoints", ValueError, match="…"):` is an attempt that must be refused;
    `with tried.survived("resume files"):` one that must come out right."""

    def __init__(self):
        self.counts: Counter = Counter()

    @contextmanager
    def refused(self, area: str, error=ValueError, match: str | None = None):
        try:
            with pytest.raises(error, match=match) as caught:
                yield caught
        except pytest.fail.Exception:
            self.counts[area, "accepted in silence"] += 1
            raise
        self.counts[area, "refused"] += 1

    @contextmanager
    def survived(self, area: str):
        try:
            yield
        except BaseException:
            self.counts[area, "lost"] += 1
            raise
        self.counts[area, "survived"] += 1


@pytest.fixture
def tried(request):
    "Counts attempts to break something; the counts are properties of the test in `pytest --junitxml`."
    counted = Tried()
    yield counted
    if getattr(request.node, "skipped_late", False):
        return
    for (area, outcome), n in counted.counts.items():
        request.node.user_properties.append(("tried", f"{area}|{outcome}|{n}"))
