"""The emulated controller under clients that say anything, or nothing: it lives, and serves the others."""

import asyncio
import contextlib
import functools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dpag.robot import emulator as emulated
from dpag.robot.emulator import (
    MOST_CLIENTS,
    NOT_EMULATED,
    Controller,
    Emulator,
    EmulatorProcess,
    Op,
    Phase,
    package,
)
from dpag.robot.kinematics import forward, to_vector

PORTS = (30004, 30003, 29999, 8080)
RATE = struct.pack(">d", 125.0)
NUMBERS = [f"input_double_register_{i}" for i in range(8)]
OUTPUTS = ["timestamp", "runtime_state", "output_int_register_0", "actual_TCP_pose"]
PROGRAM = b"def rtde_control():\n  cmd = rtde_cmd()\nend\n"
VERSION = package("V", b"\0\2")


@pytest.fixture(scope="module")
def process(loopback):
    with EmulatorProcess(loopback(51)) as e:
        yield e


@pytest.fixture
def emulator(process):
    "One for all tests, without what they did to it."
    process.order("recover")
    return process


def connect(address, port):
    return socket.create_connection((address, port), timeout=120)


def exactly(client, n):
    "The next `n` bytes."
    data = b""
    while len(data) < n:
        more = client.recv(n - len(data))
        if not more:
            raise ConnectionError("the emulator has closed the connection")
        data += more
    return data


def packages(client):
    "What comes, as letters and bodies."
    while True:
        size, letter = struct.unpack(">HB", exactly(client, 3))
        yield chr(letter), exactly(client, size - 3)


def ask(client, letter, body=b""):
    "The answer to a package, past what is streamed."
    client.sendall(package(letter, body))
    return next(body for found, body in packages(client) if found == letter)


def ends(client):
    "Whatever comes until the other side closes."
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := client.recv(65536):
            data += more
    return data


class Healthy:
    "A client that writes and reads as it should, in a thread, for as long as the context lasts."

    def __init__(self, address):
        self.address, self.state, self.states, self.stop = address, {}, 0, False

    def __enter__(self):
        self.socket = connect(self.address, 30004)
        self.thread = threading.Thread(target=self._read)
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self):
        assert ask(self.socket, "V", b"\0\2") == b"\1"
        assert ask(self.socket, "O", RATE + ",".join(OUTPUTS).encode())[0] == 1
        for recipe, names in enumerate((["input_int_register_0"], ["input_int_register_0", *NUMBERS]), 1):
            assert ask(self.socket, "I", ",".join(names).encode())[0] == recipe
        assert ask(self.socket, "S") == b"\1"
        self.write(Op.CLEARED)
        self.thread.start()
        with connect(self.address, 30003) as scripts:
            scripts.sendall(PROGRAM)
            self.until(lambda s: s["runtime"] == 2 and s["phase"] == Phase.READY)

    def _read(self):
        with contextlib.suppress(ConnectionError, OSError):
            for letter, body in packages(self.socket):
                if letter == "U":
                    stamp, runtime, phase, *pose = struct.unpack(">dIi6d", body[1:])
                    self.state = {"stamp": stamp, "runtime": runtime, "phase": phase, "pose": pose}
                    self.states += 1

    def until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not (self.state and condition(self.state)):
            assert time.monotonic() < end and self.thread.is_alive(), self.state
            time.sleep(0.005)

    def write(self, number, *arguments):
        body = struct.pack(f">Bi{len(arguments)}d", 2 if arguments else 1, number, *arguments)
        self.socket.sendall(package("U", body))

    def is_served(self):
        "Move a centimetre up or down, and be told when that is done."
        before = self.states
        goal = np.array(self.state["pose"])
        goal[2] += 0.01 if goal[2] < 0.2 else -0.01
        self.write(Op.MOVE_L, *goal, 0.2, 1.0)
        self.until(lambda s: s["phase"] == Phase.DONE)
        self.write(Op.CLEARED)
        self.until(lambda s: s["phase"] == Phase.READY)
        self.until(lambda s: abs(s["pose"][2] - goal[2]) < 2e-3)
        return self.states > before

    def __exit__(self, *exc):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        if self.thread.is_alive():
            self.thread.join()


def resident(process):
    "Megabytes that a process has in memory."
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def open_sockets(process):
    "How many it has."
    found = 0
    for path in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += os.readlink(path).startswith("socket:")
    return found


def eventually(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# Commands, through ur_rtde.

CLIENT = """
import json, os, sys, time
import rtde_control, rtde_receive
c = rtde_control.RTDEControlInterface(sys.argv[1], 125.0)
r = rtde_receive.RTDEReceiveInterface(sys.argv[1], 125.0)
out = {}

def wait(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)

def settle():
    wait(c.isSteady)
    time.sleep(0.1)

def do(name, *arguments):
    if not c.isProgramRunning():
        c.isSteady()  # clears the command before
        c.reuploadScript()
        wait(c.isProgramRunning)
    start = time.monotonic()
    try:
        answer = getattr(c, name)(*arguments)
    except Exception as e:
        answer = str(e)
    return answer, time.monotonic() - start

exec(sys.stdin.read())
print(json.dumps(out), flush=True)
os._exit(0)
"""


def through_ur_rtde(address, program):
    "What a client's `program` leaves in `out`. ur_rtde may hang, so it has a process of its own."
    command = [sys.executable, "-c", CLIENT, address]
    done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


DOES = """
q = [0.1, -1.6, -2.1, -0.9, 1.5, 0.2]
out['moveJ'] = do('moveJ', q, 2.0, 5.0)[0], settle() or r.getActualQ()
pose = c.getForwardKinematics()
pose[0] += 0.05
out['ik'] = c.getInverseKinematics(pose), pose
out['near'] = c.getInverseKinematics(pose, q), c.getInverseKinematicsHasSolution(pose)
out['out of reach'] = c.getInverseKinematicsHasSolution([3, 0, 0, 0, 0, 0])
out['moveJ_IK'] = do('moveJ_IK', pose, 2.0, 5.0)[0], settle() or r.getActualTCPPose()
out['moveL_FK'] = do('moveL_FK', q, 0.5, 2.0)[0], settle() or r.getActualQ()
out['offset'] = c.getTCPOffset()
out['trans'] = c.poseTrans([1, 2, 3, 0, 0, 0], [0, 0, 1, 0, 0, 1])
out['asynchronous'] = do('moveL', pose, 0.02, 1.0, True)[0], c.getAsyncOperationProgress(), c.isSteady()
wait(lambda: c.getAsyncOperationProgress() < 0)
out['asynchronous ends'] = settle() or r.getActualTCPPose(), pose
height = r.getActualTCPPose()[2]
out['speedL'] = do('speedL', [0, 0, 0.05, 0, 0, 0], 1.0, 0.6)[0]
wait(lambda: r.getActualTCPPose()[2] > height + 0.01)
settle()
out['speedL ends'] = r.getActualTCPPose()[2] - height, do('speedStop')[0]
out['zero'] = c.zeroFtSensor()
time.sleep(0.1)
out['force'] = r.getActualTCPForce()
out['running'] = c.isProgramRunning()
"""


def test_what_it_says_is_done_is_done(emulator, tried):
    out = through_ur_rtde(emulator.address, DOES)
    with tried.survived("commands to the emulated controller"):
        done, q = out["moveJ"]
        assert done and np.allclose(q, [0.1, -1.6, -2.1, -0.9, 1.5, 0.2], atol=5e-3)
    for angles in (out["ik"][0], out["near"][0]):
        with tried.survived("commands to the emulated controller"):
            np.testing.assert_allclose(to_vector(forward(angles, tool=0.15)), out["ik"][1], atol=1e-6)
    with tried.survived("commands to the emulated controller"):
        assert out["near"][1] is True and out["out of reach"] is False
    with tried.survived("commands to the emulated controller"):
        done, pose = out["moveJ_IK"]
        assert done and np.allclose(pose[:3], out["ik"][1][:3], atol=3e-3)
    with tried.survived("commands to the emulated controller"):
        assert out["moveL_FK"][0] and np.allclose(out["moveL_FK"][1], q, atol=5e-3)
    with tried.survived("commands to the emulated controller"):
        np.testing.assert_allclose(out["offset"], [0, 0, 0.15, 0, 0, 0])
        np.testing.assert_allclose(out["trans"], [1, 2, 4, 0, 0, 1], atol=1e-9)
    with tried.survived("commands to the emulated controller"):
        done, progress, steady = out["asynchronous"]
        assert done and progress >= 0 and not steady, "it goes on in the background"
        np.testing.assert_allclose(*(np.array(p)[:3] for p in out["asynchronous ends"]), atol=3e-3)
    with tried.survived("commands to the emulated controller"):
        gone, stopped = out["speedL ends"]
        assert out["speedL"] and stopped and 0.025 < gone < 0.04, f"{gone} m in 0.6 s, and then to rest"
    with tried.survived("commands to the emulated controller"):
        assert out["zero"] and np.linalg.norm(out["force"]) < 0.5 and out["running"]


HERE = "[.45, 0, .2, 3.14, 0, 0]"
REFUSED = {
    "forceMode": f"{HERE}, [0, 0, 1, 0, 0, 0], [0, 0, -5, 0, 0, 0], 2, [.1, .1, .1, .2, .2, .2]",
    "forceModeStop": "",
    "forceModeSetDamping": ".1",
    "moveUntilContact": "[0, 0, -.05, 0, 0, 0]",
    "servoC": f"{HERE}, .1, .5, 0",
    "setPayload": "2., [0, 0, .1]",
    "teachMode": "",
    "freedriveMode": "",
    "startContactDetection": "",
    "jogStart": "[0, 0, .05, 0, 0, 0]",
    "setGravity": "[0, 0, 9.8]",
    "isPoseWithinSafetyLimits": HERE,
    "getInverseKinematics": "[3, 0, 0, 0, 0, 0]",
    "moveL": f"{HERE}, 0., 1.",
    "moveJ": "[0, -1.7, -2, -1, 1.5, 0], .5, 0.",
    "setTcp": "[0, 0, float('nan'), 0, 0, 0]",
    "setWatchdog": "-1.",
    "triggerProtectiveStop": "",
}


def test_what_it_does_not_do_it_refuses(emulator, tried):
    "The program ends, as after an error in URScript; the client is told at once, and the log has a sentence."
    one = "out['{0}'] = do('{0}', {1})\nwait(lambda: not c.isProgramRunning())\n"
    program = "".join(one.format(*item) for item in REFUSED.items())
    out = through_ur_rtde(emulator.address, program)
    log = emulator.log()
    for name in REFUSED:
        with tried.survived("commands to the emulated controller"):
            answer, seconds = out[name]
            streamed = name in ("forceMode", "servoC")  # ur_rtde does not wait for an answer
            assert not answer or streamed or isinstance(answer, str), (name, answer)
            assert seconds < 60, f"{name}: the client waited {seconds:.0f} s"
    for said in (
        "forceMode)",
        "moveUntilContact",
        "setPayload",
        "speed = 0",
        "acceleration = 0",
        "asked for",
    ):
        assert any(said in line for line in log), (said, log)
    assert not emulator.report()["running"], "after a protective stop nothing runs"


def tell(c, number, *arguments, ticks=3):
    c.hear(
        {
            "input_int_register_0": number,
            **{f"input_double_register_{i}": v for i, v in enumerate(arguments)},
        },
        0.0,
    )
    for _ in range(ticks):
        c.tick(0.0)


@functools.cache
def controller():
    return Controller()


DOUBTFUL = (0.0, -0.0, -1.0, 1e-320, 1e-9, 0.1, 3.0, 1e6, 1e160, 1e308, np.inf, -np.inf, np.nan)


def test_doubtful_numbers_beside_any_command(tried):
    "No command with any numbers breaks the controller or makes it jump; it goes on, or ends with a sentence."
    c, rng = controller(), np.random.default_rng(0)
    numbers = [*Op, *NOT_EMULATED, -1, 77, 2**31 - 1, -(2**31)]
    for k in range(1500):
        if k % 20 == 0 or c.safety != emulated.NORMAL:
            c.recover()
        if not c.running:
            c.start()
        number, q = int(rng.choice(numbers)), c.motion.q
        arguments = np.where(
            rng.random(14) < 0.3, rng.choice(DOUBTFUL, 14), [*c.simulator.tcp, 0.1, 0.5] + 6 * [0]
        )
        c.hear({"input_int_register_1": int(rng.integers(-1, 3))}, 0.0)
        with tried.survived("commands to the emulated controller"):
            tell(c, number, *arguments)
            assert np.isfinite(c.simulator.data.qpos).all() and np.isfinite(c.simulator.tcp).all()
            assert not c.running or np.abs(c.motion.q - q).max() < 0.2, "a jump"
            assert c.running or c.why
            state = emulated.controller_state(c)
            assert len(emulated.pack(list(emulated.VARIABLE_TYPES), emulated.Packed(state))) > 1000
        tell(c, Op.CLEARED)


def test_a_refusal_says_which_command_and_why(tried):
    c, here = controller(), [0.45, 0, 0.2, np.pi, 0, 0]
    for number, arguments, said in [
        (Op.MOVE_L, [*here, 0.0, 1.0], r"command 3 \(MOVE_L\): speed = 0, 0.0001 to 3 are allowed"),
        (Op.MOVE_L, [*here, -1.0, 1.0], "speed = -1"),
        (Op.MOVE_L, [*here, 0.1, np.nan], "acceleration = nan"),
        (Op.MOVE_J, [np.inf] * 6 + [1, 1], "joint angles = "),
        (Op.SERVO_L, [np.nan] * 6, "pose = "),
        (Op.SERVO_L, [0, 0, 0, 1e160, 0, 0], "pose = "),
        (Op.SPEED_L, [1e9, 0, 0, 0, 0, 0, 1], "velocity = "),
        (Op.SET_WATCHDOG, [np.nan], "frequency = nan"),
        (Op.INVERSE_KINEMATICS, [3, 0, 0, 0, 0, 0], "no joint angles lead to the pose"),
        (51, [], r"command 51 \(moveUntilContact\): it is not emulated"),
        (77, [], r"command 77 \(unknown\): it is not emulated"),
    ]:
        c.recover()
        c.start()
        with tried.refused("commands to the emulated controller", RuntimeError, match=said):
            tell(c, number, *arguments)
            if not c.running:
                raise RuntimeError(c.log.sentences[-1])


# Clients.

NAMES = ",".join(OUTPUTS).encode()
MALFORMED = {
    "no size": (30004, b"\0\0\0"),
    "shorter than its head": (30004, b"\0\2V"),
    "unknown type": (30004, package("x", b"what")),
    "values without a recipe": (30004, package("U", b"\1\0\0\0\0")),
    "values without a number": (30004, package("U")),
    "values that are cut": (30004, package("I", b"output_int_register_1") + package("U", b"\1\0")),
    "values of a recipe that writes an output": (
        30004,
        package("I", b"actual_q") + package("U", b"\1" + bytes(48)),
    ),
    "too many names": (30004, package("I", b"actual_q," * 7000)),
    "a recipe after another": (30004, 40 * package("I", b"input_int_register_40")),
    "not a script": (30003, b"movej([0,0,0,0,0,0])\nend\n"),
    "a script too long": (30003, b"# rtde_cmd\n" * 200_000),
    "a line without an end": (29999, b"x" * 100_000),
    "half a request": (8080, b"GET\r\n\r\n"),
    "an empty request": (8080, b"\r\n\r\n"),
    "a request that is not UTF-8": (8080, b"GET /\xff\xfe?size=\xb2 HTTP/1.0\r\n\r\n"),
    "a request for no size": (8080, b"GET /scene?size=\xc2\xb2 HTTP/1.0\r\n\r\n"),
    "a request that does not end": (8080, b"GET /scene " + b"x" * 100_000),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_cannot_be_understood_is_answered_and_closed(emulator, what, tried):
    port, data = MALFORMED[what]
    before = emulator.log()
    with tried.survived("clients of the emulated controller"), connect(emulator.address, port) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        ends(client)
        log = emulator.log()
        assert len(log) > len(before) or log != before
        assert f"port {port}: " in log[-1]


def test_recipes_that_cannot_be_kept_have_the_number_0(emulator, tried):
    "The answer says which names are not found, or in use; nothing can be started or written then."
    area = "clients of the emulated controller"
    with connect(emulator.address, 30004) as one, connect(emulator.address, 30004) as two:
        for body in (
            RATE + NAMES + b",weather",
            RATE,
            RATE + b"\xff\xfe",
            RATE[:4],
            b"",
            *(struct.pack(">d", rate) + NAMES for rate in (0, -1, 1e-300, 501, np.inf, np.nan)),
        ):
            with tried.survived(area):
                assert ask(one, "O", body)[0] == 0 and ask(one, "S") == b"\0"
        for name in (b"actual_q", b"output_int_register_0", b"input_int_register_48", b"safety_mode", b""):
            with tried.survived(area):
                assert ask(one, "I", b"input_int_register_47," * bool(name) + name)[0] == 0
        with tried.survived(area):
            assert ask(one, "I", b"input_int_register_47") == b"\1INT32"
            assert ask(two, "I", b"input_int_register_47,timestamp") == b"\0IN_USE,NOT_FOUND"


def test_lines_for_the_dashboard(emulator, tried):
    with connect(emulator.address, 29999) as client:
        lines = client.makefile("rb")
        assert lines.readline().startswith(b"Connected")
        for line in (b"", b"\xff\xfe\x80", b"\0", b"play", b"x" * 5000, b"robotmode " * 3):
            with tried.survived("clients of the emulated controller"):
                client.sendall(line + b"\n")
                assert lines.readline().startswith(b"could not understand: '")
        with tried.survived("clients of the emulated controller"):
            client.sendall(b"robotmode\nquit\n")
            assert lines.readline() == b"Robotmode: RUNNING\n" and lines.readline() == b"Disconnected\n"
            assert not lines.readline()


@linux
def test_clients_that_come_and_go_leave_nothing(emulator, tried):
    "On each port: connect and close, connect and reset, half a message and away."
    assert eventually(lambda: open_sockets(emulator.process) <= 10)
    before = open_sockets(emulator.process)
    reset = struct.pack("ii", 1, 0)
    for port in PORTS:
        for k in range(60):
            with (
                tried.survived("clients of the emulated controller"),
                connect(emulator.address, port) as client,
            ):
                if k % 3:
                    client.sendall([VERSION[:2], b"def x():\n", b"robot", b"GET /scene"][PORTS.index(port)])
                if k % 2:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    assert eventually(lambda: open_sockets(emulator.process) <= before)


def test_so_many_clients_and_no_more(emulator, tried):
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_CLIENTS):
            client = stack.enter_context(connect(emulator.address, 30004))
            assert ask(client, "O", RATE + b"timestamp")[0] == 1 and ask(client, "S") == b"\1"
        with tried.survived("clients of the emulated controller"):
            told = ends(stack.enter_context(connect(emulator.address, 30004)))
            assert told[2:3] == b"M" and b"16 clients are connected, and no more are served" in told
        client.close()
        with tried.survived("clients of the emulated controller"):
            assert eventually(lambda: is_welcome(emulator.address))


def is_welcome(address):
    with contextlib.suppress(ConnectionError), connect(address, 30004) as client:
        return ask(client, "V", b"\0\2") == b"\1"
    return False


def test_those_who_say_nothing_make_room(emulator, tried):
    with contextlib.ExitStack() as stack:
        for port in PORTS:
            for _ in range(3 * MOST_CLIENTS):
                stack.enter_context(connect(emulator.address, port))
        with tried.survived("clients of the emulated controller"), Healthy(emulator.address) as healthy:
            assert healthy.is_served()


@linux
def test_who_does_not_read_is_dropped(emulator, tried):
    "States for nobody, answers for nobody, images for nobody: memory stays as it was."
    request = b"GET /scene?size=256 HTTP/1.0\r\n\r\n"
    with connect(emulator.address, 8080) as client:
        client.sendall(request)
        exactly(client, 1000)
    assert eventually(lambda: open_sockets(emulator.process) <= 10)
    sockets, before = open_sockets(emulator.process), resident(emulator.process)
    names = ",".join(n for n in emulated.VARIABLE_TYPES if "register" not in n).encode()
    clients = []
    for k in range(12):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect((emulator.address, (30004, 30004, 8080)[k % 3]))
        client.settimeout(2)
        with contextlib.suppress(TimeoutError, ConnectionError):
            if k % 3 == 0:
                client.sendall(package("O", struct.pack(">d", 500.0) + names) + package("S"))
            elif k % 3 == 1:
                client.sendall(20_000 * package("O", RATE + names))
            else:
                client.sendall(request)
        clients.append(client)
    with Healthy(emulator.address) as healthy:
        for _ in range(10):
            with tried.survived("clients of the emulated controller"):
                assert healthy.is_served()
    with tried.survived("clients of the emulated controller"):
        assert eventually(lambda: open_sockets(emulator.process) <= sockets)
        assert resident(emulator.process) - before < 25
    for client in clients:
        client.close()


def test_who_says_nothing_is_let_go(loopback, monkeypatch, tried):
    "After a while: without a word, and within a message."
    monkeypatch.setattr(emulated, "PATIENCE", 0.3)
    emulator = Emulator(loopback(52))

    async def silent(port, data):
        reader, writer = await asyncio.open_connection(emulator.address, port)
        writer.write(data)
        async with asyncio.timeout(60):
            told = await reader.read()
        writer.close()
        return told

    async def all_of_them():
        running = asyncio.create_task(emulator.run())
        while len(emulator.servers) < 4:
            await asyncio.sleep(0.01)
        said = [b"", b"\0", b"\0\x09O\1", b"def x():", b"GET /", b"robotm"]
        ports = [*PORTS, 30004, 30004, 30003, 8080, 29999]
        told = await asyncio.gather(*(silent(p, d) for p, d in zip(ports, 4 * [b""] + said[1:])))
        emulator.operator.quit = True
        await running
        return told

    for told in asyncio.run(all_of_them()):
        with tried.survived("clients of the emulated controller"):
            assert b"nothing came for 0.3 s" in told or b"without its end" in told, told


# The terminal.

NO_ORDERS = [
    *(b"", b" ", b"\t", b"\xff\xfe\x80", b"\0", b"dance", b"x" * 20_000, "stop äöü".encode()),
    *(b"push", b"push 1", b"push 1 2", b"push a b c", b"push 1 2 nan", b"push 0 0 1e9", b"push 1 2 3 4"),
    *(b"lay", b"lay x", b"lay -1", b"lay 1.5", b"lay 1 2", b"lay 99999999999999999999", "lay ٣".encode()),
    *(b"drop everything", b"drop control receive", b"stall now", b"recove", b"REPORT", b"report 1"),
]


def test_what_is_no_order_changes_nothing(emulator, tried):
    stdin, before = emulator.process.stdin, emulator.report()
    stdin.flush()
    for line in NO_ORDERS:
        with tried.survived("orders at the emulator's terminal"):
            stdin.buffer.write(line + b"\n")
            stdin.buffer.flush()
            log = emulator.log()
            word = line.split()[:1]
            assert not word or log[-1].startswith("order "), (line, log[-1:])
    after = emulator.report()
    np.testing.assert_allclose(after.pop("tcp"), before.pop("tcp"), atol=1e-6)
    assert {**after, "speed": 0} == {**before, "speed": 0}


def test_answers_that_nobody_reads_stop_nothing(loopback, tried):
    with EmulatorProcess(loopback(53)) as e:
        with tried.survived("orders at the emulator's terminal"):
            for _ in range(2000):
                e.order("report")
            for _ in range(3):
                e.order("dance")
            with Healthy(e.address) as healthy:
                assert healthy.is_served()


def test_mistakes_on_the_command_line_are_sentences(loopback, tried, emulator):
    mistakes = [
        (["10.0.0.1"], "loopback"),
        (["nowhere"], "nowhere"),
        ([emulator.address], "in use"),
        ([loopback(54), "--scene", "no_such_module:f"], "no_such_module"),
        ([loopback(54), "--scene", "json:dumps", "1"], "no scene"),
    ]
    for words, said in mistakes:
        with tried.survived("orders at the emulator's terminal"):
            command = [sys.executable, "-m", "dpag.robot.emulator", *words]
            out = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            assert out.returncode and said in out.stderr and "Traceback" not in out.stderr, out.stderr


# Anything.

SEEDS = {
    30004: [
        VERSION,
        package("v"),
        package("O", RATE + NAMES),
        package("I", b"input_int_register_0,input_double_register_0"),
        package("I", b"input_int_register_30"),
        package("S"),
        package("P"),
        package("U", b"\1" + struct.pack(">i", 3)),
        package("U", b"\1" + struct.pack(">id", 24, 0.1)),
        package("M", b"\5hello\0\0"),
    ],
    30003: [b"def x():\n  movej([0, 0, 0, 0, 0, 0])\nend\n", b"set_digital_out(1, True)\n", b"end"],
    29999: [b"robotmode\n", b"PolyscopeVersion\n", b"play\n", b"\n", b"load /programs/x.urp\n"],
    8080: [b"GET /scene?size=32 HTTP/1.0\r\n\r\n", b"GET /wrist HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /"],
}
LINES = [b"push 0 0 1", b"drop control", b"lay 3", b"report", b"recover", b"emergency", b"blind", b"stall"]


def mutated(rng, data):
    "The bytes with some of them changed, cut, doubled, or others between them."
    data = bytearray(data)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 3:
                data += bytes(data)
            case 4:
                data[at : at + 8] = struct.pack(">d", rng.choice(DOUBTFUL))
    return bytes(data)


def attempt(rng, address, left_open):
    "One client: a few messages, some of them right; then it goes, one way or another, or stays."
    port = rng.choices(PORTS, (6, 1, 2, 1))[0]
    client = connect(address, port)
    client.settimeout(0.01)
    with contextlib.suppress(OSError):
        for _ in range(rng.randrange(5)):
            seed = rng.choice(SEEDS[port])
            data = mutated(rng, seed) if rng.random() < 0.7 else seed
            client.sendall(rng.randbytes(rng.randrange(200)) if rng.random() < 0.15 else data)
            if rng.random() < 0.2:
                client.recv(4096)
    if rng.random() < 0.3:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if rng.random() < 0.1:
        left_open.append(client)
        while len(left_open) > 40:
            left_open.pop(0).close()
    else:
        client.close()


def no_order(rng):
    "A line for the terminal that is not an order, or a harmless one."
    line = rng.choice(LINES) + rng.choice([b" x", b" 1 1 x", b"\xff", b" -", b"!"])
    return (
        rng.randbytes(rng.randrange(60)).replace(b"\n", b"") + b"\n" if rng.random() < 0.5 else line + b"\n"
    )


@linux
def test_anything_at_every_port(loopback, tried):
    "Random bytes and mutated messages, from clients and at the terminal, beside one that is served."
    rng, left_open = random.Random(0), []
    with EmulatorProcess(loopback(55)) as e, Healthy(e.address) as healthy:
        sockets = open_sockets(e.process)
        for k in range(4800):
            if k == 400:  # by now everything has been loaded that ever is
                before = resident(e.process)
            with tried.survived("random bytes at the emulated controller"):
                if k % 8:
                    attempt(rng, e.address, left_open)
                else:
                    e.process.stdin.buffer.write(no_order(rng))
                    e.process.stdin.buffer.flush()
                assert e.process.poll() is None and healthy.thread.is_alive()
            if k % 200 == 0:
                with tried.survived("random bytes at the emulated controller"):
                    assert healthy.is_served()
        assert resident(e.process) - before < 25, "memory grows"
        for client in left_open:
            client.close()
        with tried.survived("random bytes at the emulated controller"):
            assert healthy.is_served() and e.report()["running"]
            assert eventually(lambda: open_sockets(e.process) <= sockets)
