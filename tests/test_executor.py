"""Where stages run, in which order, and what becomes of them when something is killed."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpag.executor import End, Job, Local, Machine, Ray, within
from dpag.progress import failure, last_line, place, slowness, still
from dpag.schedule import (
    Driver,
    NoBooks,
    Simulated,
    forecast,
    likely_seconds,
    longest_ways,
    read_times,
    run_all,
)

PATHS = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}


def eventually(condition, seconds=60.0):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.05)
    return condition()


def sleepers(mark):
    "Processes with this mark on their command line."
    found = []
    for p in psutil.process_iter(["cmdline", "status"]):
        if any(mark in word for word in p.info["cmdline"] or []) and p.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(p)
    return found


def marked(tmp_path, seconds=600):
    "A command that sleeps in a process of its own and in one in the background, and its mark."
    mark = f"dpag-test-{tmp_path.name}"
    program = f"{sys.executable} -c 'import time; time.sleep({seconds})' {mark}"
    return f"{program} & {program}; true", mark


# This machine


def all_ends(executor, jobs):
    ends = {}
    for job in jobs:
        while not executor.fits(job):
            ends |= {e.name: e.status for e in executor.wait(60)}
        executor.submit(job)
    while len(ends) < len(jobs):
        ends |= {e.name: e.status for e in executor.wait(60)}
    return ends


def test_statuses_logs_and_environment(tmp_path):
    executor = Local(str(tmp_path), {"SAID": "ü"}, cpus=2)
    jobs = [Job("good", "echo $SAID in $PWD", "logs/good.log"), Job("bad", "exit 3", "logs/bad.log")]
    jobs.append(Job("killed", "kill -9 $$", "logs/killed.log"))
    assert all_ends(executor, jobs) == {"good": 0, "bad": 3, "killed": 9}
    said = (tmp_path / "logs/good.log").read_text(encoding="utf-8").splitlines()
    assert said[0].startswith("on ") and said[1] == f"ü in {tmp_path}"


def test_small_trainings_share_a_gpu_and_see_no_other(tmp_path):
    executor = Local(str(tmp_path), {}, cpus=8, gpus=["3", "5"])
    command = "echo $CUDA_VISIBLE_DEVICES; sleep 0.3"
    jobs = [Job(f"half{i}", command, f"half{i}", gpus=0.5) for i in range(3)]
    jobs += [Job("both", command, "both", gpus=2), Job("none", command, "none")]
    all_ends(executor, jobs)
    seen = {j.name: (tmp_path / j.log).read_text(encoding="utf-8").splitlines()[1] for j in jobs}
    assert seen == {"half0": "3", "half1": "3", "half2": "5", "both": "3,5", "none": ""}


def test_what_asks_for_more_than_there_is_gets_what_there_is():
    job = within(Job("x", "", cpus=64, gpus=1, memory=512), [Machine(2, 8), Machine(1, 16)])
    assert job.needs == (2, 0, 8)
    wide = Job("x", "", cpus=5, gpus=2)
    assert within(wide, [Machine(2, 8, 1), Machine(4, 8), Machine(3, 8, 2)]).needs == (3, 2, 0)


@pytest.mark.parametrize("whom", ["cancel", "attendant", "parent"])
def test_nothing_goes_on_running(whom, tmp_path):
    command, mark = marked(tmp_path)
    program = "import sys, time; from dpag.executor import Job, launch; "
    program += "launch(Job('x', sys.argv[1]), sys.argv[2], {}); time.sleep(600)"
    if whom == "cancel":
        executor = Local(str(tmp_path), {}, cpus=1)
        executor.submit(Job("x", command))
    else:
        parent = subprocess.Popen([sys.executable, "-c", program, command, str(tmp_path)])
    # Both sleepers, and the shell, the attendant and the guard, on whose command lines it is as well.
    asleep = [sys.executable, "-c", "import time; time.sleep(600)", mark]
    assert eventually(lambda: sum(p.info["cmdline"] == asleep for p in sleepers(mark)) == 2)
    if whom == "cancel":
        executor.cancel()
    elif whom == "parent":
        parent.kill()
    else:
        attendants = [p for p in sleepers(mark) if p.ppid() == parent.pid]
        assert len(attendants) == 1
        attendants[0].kill()
    gone = eventually(lambda: not [p for p in sleepers(mark) if whom == "cancel" or p.pid != parent.pid])
    if whom != "cancel":
        parent.kill()
        parent.wait()
    assert gone


def test_an_interrupted_job_may_put_things_in_order(tmp_path):
    program = (
        "import pathlib, time\ntry:\n    print('ready', flush=True)\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    pathlib.Path('order').touch()\n"
    )
    (tmp_path / "x.py").write_text(program, encoding="utf-8")
    executor = Local(str(tmp_path), {}, cpus=1)
    executor.submit(Job("x", f"{sys.executable} x.py", "log"))
    assert eventually(lambda: "ready" in (tmp_path / "log").read_text(encoding="utf-8"))
    executor.cancel()
    assert (tmp_path / "order").exists()


# The order


class Recorded(Simulated):
    "Notes when each job starts; what is in `lost` loses its node so many times, what is in `bad` fails."

    def __init__(self, machines, seconds, lost=(), bad=()):
        super().__init__(machines, seconds)
        self.started, self.lost, self.bad = [], dict(lost), set(bad)

    def submit(self, job):
        self.started.append((self.now, job.name))
        super().submit(job)

    def wait(self, seconds):
        return [self.ended(end.name) for end in super().wait(seconds)]

    def ended(self, name):
        if self.lost.get(name, 0):
            self.lost[name] -= 1
            return End(name, None)
        return End(name, int(name in self.bad))


DIAMOND = {"data": set(), "long": {"data"}, "short": {"data"}, "report": {"long", "short"}}
TIMES = {"data": 1.0, "long": 9.0, "short": 2.0, "report": 1.0}


def driven(machines, graph=DIAMOND, times=TIMES, retries=0, jobs=None, **options):
    executor = Recorded(machines, times, **options)
    jobs = jobs or {s: Job(s, "") for s in graph}
    driver = Driver(graph, jobs, times, executor, NoBooks(), retries)
    run_all(driver)
    return driver, executor


def test_the_longest_way_goes_first():
    assert longest_ways(DIAMOND, TIMES) == {"data": 11, "long": 10, "short": 3, "report": 1}
    _, executor = driven([Machine(1, 8)])
    assert [name for _, name in executor.started] == ["data", "long", "short", "report"]
    with pytest.raises(ValueError, match="in a circle: a, b"):
        longest_ways({"a": {"b"}, "b": {"a"}}, {"a": 1, "b": 1})


def test_a_stage_that_fails_runs_once_and_lets_the_others_end():
    driver, executor = driven([Machine(2, 8)], bad={"short"}, retries=3)
    assert driver.failed == ["short"] and set(driver.ran) == {"data", "long"}
    assert [name for _, name in executor.started].count("short") == 1


@pytest.mark.parametrize("times,ran", [(2, True), (3, False)])
def test_a_stage_whose_node_died_runs_again(times, ran):
    driver, executor = driven([Machine(2, 8)], lost={"short": times}, retries=2)
    assert ("short" in driver.ran) == ran and driver.failed == ([] if ran else ["short"])
    assert [name for _, name in executor.started].count("short") == 3


def test_a_small_stage_takes_the_room_that_a_large_one_cannot():
    graph = {"now": set(), "large": set(), "small": set()}
    jobs = {"now": Job("now", ""), "large": Job("large", "", cpus=2), "small": Job("small", "")}
    times = {"now": 5.0, "large": 4.0, "small": 1.0}
    jobs["now"] = Job("now", "", cpus=1)
    _, executor = driven([Machine(2, 8)], graph, {**times, "now": 9.0}, jobs=jobs)
    assert executor.started == [(0.0, "now"), (0.0, "small"), (9.0, "large")]


@st.composite
def graphs(draw):
    n = draw(st.integers(1, 12))
    graph = {str(i): {str(j) for j in range(i) if draw(st.integers(0, 3)) == 0} for i in range(n)}
    jobs = {
        s: Job(s, "", cpus=draw(st.sampled_from([1, 2, 5])), gpus=draw(st.sampled_from([0, 0.25, 0.5, 1, 2])))
        for s in graph
    }
    return graph, jobs, {s: float(draw(st.integers(0, 9))) for s in graph}


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from([[(1, 0)], [(4, 2)], [(2, 1), (4, 0), (3, 2)]]))
def test_no_stage_starts_too_early_or_where_there_is_no_room(graph, sizes):
    needs, jobs, seconds = graph
    machines = [Machine(cpus, 8, gpus) for cpus, gpus in sizes]
    driver, executor = driven(machines, needs, seconds, jobs=jobs)
    start = {name: t for t, name in executor.started}
    assert driver.done == set(needs) and len(executor.started) == len(needs)
    for stage, before in needs.items():
        assert all(start[b] + seconds[b] <= start[stage] for b in before)
    for t in start.values():
        at_work = [within(jobs[s], machines) for s in needs if start[s] <= t < start[s] + seconds[s]]
        assert sum(j.cpus for j in at_work) <= sum(m.cpus for m in machines)
        assert sum(j.gpus for j in at_work) <= sum(m.gpus for m in machines) + 1e-9
    length = forecast(needs, jobs, seconds, machines)
    assert max(longest_ways(needs, seconds).values()) <= length <= sum(seconds.values())


# What a person is told


def test_the_estimate_is_of_what_was_measured(tmp_path):
    (tmp_path / "a.csv").write_text("stage,seconds,source\ntrain@laptop-scripted-x-dp-s0,10,measured\n")
    (tmp_path / "b.csv").write_text("train@laptop-scripted-x-dp-s1,20.5,measured\ntrain@laptop-scri")
    known = read_times(tmp_path / "a.csv", tmp_path / "none.csv", tmp_path / "b.csv")
    assert known == {"train@laptop-scripted-x-dp-s0": 10, "train@laptop-scripted-x-dp-s1": 20.5}
    wanted = ["train@laptop-scripted-x-dp-s1", "train@laptop-scripted-x-dp-s2", "report@laptop-scripted"]
    assert list(likely_seconds(wanted, known).values()) == [20.5, 15.25, 60]


def test_a_stage_that_nobody_measured_takes_as_long_as_the_likest():
    known = {"train@laptop-scripted-x-dp-s0": 10.0, "train@laptop-human-y-dp_ag-s0": 40.0}
    known |= {f"train@paper-human-{task}-dp-s0": 9000.0 for task in "abc"}
    wanted = [
        "train@laptop-human-z-dp-s1",
        "train@laptop-scripted-z-ibc-s0",
        "train@other-scripted-x-dp-s0",
        "data@x-scripted-y",
    ]
    assert list(likely_seconds(wanted, known).values()) == [10, 25, 9000, 60]


def test_what_is_left_counts_what_runs():
    executor = Simulated([Machine(1, 8)], TIMES)
    driver = Driver(DIAMOND, {s: Job(s, "") for s in DIAMOND}, TIMES, executor, NoBooks())
    assert still(driver, DIAMOND, TIMES) == 13
    driver.start()
    executor.now = 100.0  # `data` should have ended long ago: another second is expected of it
    assert still(driver, DIAMOND, TIMES) == 13


def test_a_full_disk_and_a_straggler_are_one_sentence_each(tmp_path):
    log = tmp_path / "log"
    log.write_text("on node7\nTraceback\nOSError: [Errno 28] No space left on device\n", encoding="utf-8")
    assert failure("train@x", log).splitlines()[0] == "stage train@x failed: the disk of node7 is full"
    assert slowness("x", 100.0, {"x": 20.0}) == " (5 times as long as expected)"
    assert slowness("x", 50.0, {"x": 20.0}) == slowness("x", 25.0, {"x": 1.0}) == ""


def test_the_last_words_are_of_the_work(tmp_path):
    log = tmp_path / "log"
    log.write_text("on node7, GPU 0\nWorking directory: .\nExecuting Cell 5---\n", encoding="utf-8")
    assert (last_line(log), place(log)) == ("", "node7, GPU 0")
    with open(log, "a", encoding="utf-8") as f:
        f.write("dp s0:  10%|#| 6/60\rdp s0:  50%|#| 30/60\nEnding Cell 5---\n")
    assert last_line(log) == "dp s0:  50%|#| 30/60"


# Clusters

CLUSTER = Path(__file__).parent.parent / "tools/cluster"
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
  scontrol*) printf 'n1\\nn2\\nn3\\n' ;;
  srun*hostname*) echo "10.0.0.1 10.0.0.2" ;;
esac
"""


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_slurm_file_starts_ray_on_every_node_and_drives_on_the_first(nodes, tmp_path):
    "With stand-ins for Slurm's, Ray's and make's commands, which note how they were called."
    calls = tmp_path / "calls"
    for name in ("scontrol", "srun", "ray", "make"):
        (tmp_path / name).write_text(STAND_IN, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_SUBMIT_DIR": str(tmp_path)}
    env |= {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(nodes)}
    env |= {"SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8"}
    subprocess.run(
        ["bash", str(CLUSTER / "slurm.sbatch"), "PROFILE=paper", "DEMOS=human"], env=env, check=True
    )
    said = calls.read_text(encoding="utf-8")
    assert "make repro RAY=10.0.0.1:20007 PROFILE=paper DEMOS=human\n" in said
    assert eventually(lambda: "ray start --head" in calls.read_text(encoding="utf-8"))
    others = "--nodes=2 --ntasks=2 --exclude=n1 ray start --address=10.0.0.1:20007"
    seconds = 60 if nodes > 1 else 0.5
    assert eventually(lambda: others in calls.read_text(encoding="utf-8"), seconds) == (nodes > 1)


def test_the_kubernetes_file_is_of_this_projects_ray():
    job = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pins = (CLUSTER.parent.parent / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={cluster['rayVersion']} " in pins and "RAY=auto" in job["spec"]["entrypoint"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [g["template"]["spec"] for g in groups]
    assert all(p["containers"][0]["volumeMounts"] == [{"name": "dpag", "mountPath": "/dpag"}] for p in pods)


# Ray

ray_needed = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="make ray")


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"RAY=auto: Ray is not installed; pip install 'dpag\[ray\]'"):
        Ray("", {}, "auto")


COUNT = """
import pathlib, sys, time
path = pathlib.Path(sys.argv[1])
n = int(path.read_text()) if path.exists() else 0
print("from", n, flush=True)
while n < 40:
    time.sleep(0.1)
    n += 1
    path.write_text(str(n))
"""


@ray_needed
@pytest.mark.timeout(300)
def test_on_a_cluster_a_job_whose_node_is_killed_goes_on_on_another(tmp_path):
    from ray.cluster_utils import Cluster

    (tmp_path / "count.py").write_text(COUNT, encoding="utf-8")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    executor = Ray(str(tmp_path), PATHS, cluster.address)
    try:
        assert sorted((m.cpus, m.gpus) for m in executor.machines()) == [(0, 0), (1, 1), (1, 1)]
        graph: dict = {"count": set(), "other": set(), "after": {"count"}}
        command = f"{sys.executable} count.py n-dpag-test"
        jobs = {"count": Job("count", command, "count.log", gpus=1), "after": Job("after", "true")}
        jobs["other"] = Job("other", "exit 0")
        driver = Driver(graph, jobs, dict.fromkeys(graph, 1.0), executor, NoBooks(), retries=2)
        killed, count = [], tmp_path / "n-dpag-test"

        def kill(driver):
            "The node on which it counts: its raylet, and the workers. What they started must end by itself."
            if not killed and count.exists() and int(count.read_text(encoding="utf-8") or 0) > 5:
                above = {q for p in sleepers("n-dpag-test") for q in p.parents()}
                rays = [q for q in above if q.name().startswith(("raylet", "ray::"))]
                raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
                assert len(raylets & {q.pid for q in rays}) == 1
                killed.extend(sorted(rays, key=lambda q: q.pid))
                for q in killed:
                    q.kill()

        run_all(driver, kill)
        assert killed and driver.failed == [] and driver.done == set(graph)
        assert ("lost", "count") in driver.events and count.read_text(encoding="utf-8") == "40"
        said = (tmp_path / "count.log").read_text(encoding="utf-8")
        assert int(said.split("from ")[1].split()[0]) > 5, "it went on where it was"
        assert eventually(lambda: not sleepers("n-dpag-test"))
    finally:
        executor.cancel()
        cluster.shutdown()
