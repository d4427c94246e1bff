"""What is killed leaves nothing that goes on running."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

ATTEMPT = """
import time


def attempt(seed):
    time.sleep(600)
"""
DEMONSTRATIONS = """
from dpag.tasks.base import collect_successes
from slow import attempt

if __name__ == "__main__":
    collect_successes(attempt, n_demos=8, first_seed=0, workers=2, start={start!r})
"""


def two_children(process: psutil.Process) -> list[psutil.Process]:
    "A process's workers, once there are two; its helper that tracks what is shared is none."
    while True:
        assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        found = [c for c in process.children() if "resource_tracker" not in " ".join(c.cmdline())]
        if len(found) == 2:
            return found
        time.sleep(0.1)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(number, start, tmp_path, tried):
    (tmp_path / "slow.py").write_text(ATTEMPT, encoding="utf-8")
    (tmp_path / "make.py").write_text(DEMONSTRATIONS.format(start=start), encoding="utf-8")
    with subprocess.Popen([sys.executable, "make.py"], cwd=tmp_path, stderr=subprocess.PIPE) as parent:
        workers = two_children(psutil.Process(parent.pid))
        with tried.survived("processes that are killed"):
            parent.send_signal(number)
            assert parent.wait(60) != 0
            assert psutil.wait_procs(workers, timeout=60)[1] == []
