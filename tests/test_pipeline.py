"""What must run, what must not, and what a person is told."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml

from dpag import books, pipeline, plan, warm
from dpag.books import DvcBooks
from dpag.config import SettingsError
from dpag.executor import Job, Local
from dpag.files import read_text, root, write_text
from dpag.schedule import Driver, run_all
from dpag.settings import ExecutionConfig, Kind, NeedsConfig, load, validate

DVC = yaml.safe_load(read_text(root() / "dvc.yaml"))["stages"]


COPIED = ("nbs", "conf", "params.yaml", "dvc.yaml", "dvc.lock", "settings.ini", ".dvc", ".dvcignore", "dpag")
LEFT = shutil.ignore_patterns("tmp", "cache", "__pycache__", "config.local")


@pytest.fixture
def project(tmp_path):
    "A copy of the files that the pipeline reads, with git and DVC."
    folder = tmp_path / "a place with spaces, ü"
    for name in (*COPIED, "results/spirals/tuning.csv"):
        source, target = root() / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=LEFT)
        else:
            shutil.copy(source, target)
    write_text(folder / "dvc.lock", "schema: '2.0'\nstages: {}\n")
    write_text(folder / ".gitignore", read_text(root() / ".gitignore"))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "x")
    return folder


def git(folder, *args):
    return subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
    ).stdout


def python(folder, *args, **env):
    env = {**os.environ, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", **env}
    return subprocess.run(
        [sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_pipeline_graph(project):
    "In a copy: the plan of a run that is at work in this folder is not the tests' to change."
    program = "import json; from dpag import pipeline as p; p.write_plan('laptop-scripted'); "
    program += "graph = p.DvcBooks(p.root()).graph; "
    program += "print(json.dumps({s: sorted(needs) for s, needs in graph.items()}))"
    out = python(project, "-c", program)
    assert out.returncode == 0, out.stderr
    graph = {stage: set(needs) for stage, needs in json.loads(out.stdout).items()}
    trains = [s for s in graph if s.startswith("train@")]
    assert trains and all(any(d.startswith("data@") for d in graph[s]) for s in trains)
    report = next(s for s in graph if s.startswith("report@"))
    evaluations = {s for s in graph if s.startswith("evaluate@")}
    assert evaluations <= graph[report] and any(s.startswith("spirals") for s in graph[report])
    assert all("settings" in pipeline.needed_by({s}, graph) for s in graph)


# What a stage depends on


def test_each_stage_depends_on_the_code_that_it_imports_and_on_no_more():
    cells = plan.make_plan(load("laptop-scripted"))["cells"]
    bet, dp_ag = cells["laptop-scripted-pusht_kp-bet-s0"], cells["laptop-scripted-pusht_kp-dp_ag-s0"]
    lift = cells["laptop-scripted-lift_ph-dp-s0"]
    core = {"dpag.data", "dpag.encoder", "dpag.policy", "dpag.train"}
    for cell in (bet, dp_ag, lift):
        assert core <= cell["train"]["code"].keys()
    assert "dpag.methods.bet" in bet["train"]["code"] and "dpag.guidance" not in bet["train"]["code"]
    assert {"dpag.guidance", "dpag.noise_net"} <= dp_ag["train"]["code"].keys()
    every = [code for c in cells.values() for code in (c["train"]["code"], c["evaluate"]["code"])]
    unwanted = {"dpag.settings", "dpag.config", "dpag.plan", "dpag.paths", "dpag.pipeline"}
    assert not any(unwanted & code.keys() for code in every)
    assert not any(m.startswith("dpag.tasks") for m in bet["train"]["code"])
    assert (
        "dpag.tasks.pusht.env" in bet["evaluate"]["code"]
        and "dpag.tasks.robomimic.env" in lift["evaluate"]["code"]
    )
    assert not any(m.startswith("dpag.tasks.robomimic") for m in bet["evaluate"]["code"])


def test_the_plan_knows_every_import_of_what_a_stage_runs():
    "An independent look: run the imports of a stage's modules and compare what was loaded."
    for key, modules in (("bet", "dpag.methods.bet"), ("dp_ag", "dpag.methods.dp_ag")):
        cell = plan.make_plan(load("laptop-scripted"))["cells"][f"laptop-scripted-pusht_kp-{key}-s0"]
        program = (
            f"import sys, dpag.train, {modules}; print(*[m for m in sys.modules if m.startswith('dpag')])"
        )
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        loaded = (
            {m for m in out.stdout.split() if "." in m} - plan.SETTINGS_CODE - {"dpag.methods", "dpag.tasks"}
        )
        assert loaded <= cell["train"]["code"].keys()


def test_dvc_reads_settings_and_code_from_the_plan_alone():
    for name, stage in DVC.items():
        stage = stage.get("do", stage)
        deps = [d for d in stage["deps"] if d.startswith(("dpag", "conf", "params"))]
        assert name == "settings" or deps == []
        assert name == "settings" or list(stage["params"][0]) == ["results/runs/stages.json"]


def test_a_changed_setting_changes_its_own_cells(tmp_path):
    settings = load("laptop-scripted")
    before = plan.make_plan(settings)["cells"]
    methods = {**settings.methods, "bet": {"width": 144}}
    after = plan.make_plan(settings.model_copy(update={"methods": methods}))["cells"]
    assert {k for k in before if before[k]["train"] != after[k]["train"]} == {
        "laptop-scripted-pusht_kp-bet-s0"
    }
    assert all(before[k]["evaluate"] == after[k]["evaluate"] for k in before)


def test_columns_without_such_demonstrations_are_not_run():
    tasks = {c.task for c in plan.wanted_cells(load("workstation-human"))}
    assert tasks >= {"pusht_kp", "pusht_img", "can_mh", "kitchen"} and "dynamic_pusht_img" not in tasks


# DVC by hand


@pytest.mark.timeout(300)
def test_dvc_repro_notices_an_edit_of_the_pipeline(project):
    assert python(project, "-m", "dpag.plan", "--run", "laptop-scripted").returncode == 0
    text = read_text(project / "params.yaml")
    write_text(project / "params.yaml", text.replace("lift_ph: {dp: [0], dp_ag: [0]}", "lift_ph: {dp: [5]}"))
    first = python(project, "-m", "dvc", "repro", "settings")
    assert first.returncode and "ask for other stages than before" in first.stdout + first.stderr
    assert python(project, "-m", "dvc", "repro", "settings").returncode == 0
    assert (
        "laptop-scripted-lift_ph-dp-s5"
        in json.loads(read_text(project / "results/runs/stages.json"))["stages"]["cells"]
    )


@pytest.mark.timeout(300)
def test_dvc_exp_run_changes_a_setting_and_leaves_params_valid(project):
    "The spirals are the one stage that needs no demonstrations: small here, and changed by -S."
    text = read_text(project / "params.yaml")
    text = text.replace(
        "train: {steps: 500}",
        "train: {steps: 4, log_every: 2, checkpoint_every: 4}, n_spirals: 60, n_test: 20",
    )
    text = re.sub(r"(?m)^spirals:\n  seeds: .*\n  (.*)$", r"spirals: {seeds: [0, 1], \1}", text)
    write_text(project / "params.yaml", text)
    git(project, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-am", "small")
    assert python(project, "-m", "dpag.plan", "--run", "laptop-scripted").returncode == 0
    out = python(project, "-m", "dvc", "exp", "run", "-S", "spirals.train.steps=6", "spirals@laptop-scripted")
    assert out.returncode == 0, out.stdout + out.stderr
    assert load("laptop-scripted", project).spirals.train.steps == 6
    runs = read_text(project / "results/runs/spirals/laptop/runs.csv").splitlines()
    assert runs[0].split(",")[runs[0].split(",").index("steps")] == "steps" and ",6," in runs[1]


# make repro


def test_a_second_profile_in_the_same_folder_is_refused_before_anything_is_touched(project):
    python(project, "-m", "dpag.plan", "--run", "laptop-scripted")
    before = read_text(project / "results/runs/stages.json"), read_text(project / "params.yaml")
    with pipeline.alone(project):
        out = python(project, "-m", "dpag.pipeline", "--profile", "smoke")
    assert out.returncode and pipeline.BUSY in out.stderr
    assert before == (read_text(project / "results/runs/stages.json"), read_text(project / "params.yaml"))


def test_dvc_at_work_keeps_its_plan(tmp_path, monkeypatch):
    path = tmp_path / "stages.json"
    write_text(path, "of the run that is at work")

    def busy(folder):
        raise RuntimeError(pipeline.BUSY)

    monkeypatch.setattr(pipeline, "plan_path", lambda: path)
    monkeypatch.setattr(pipeline, "write_plan", lambda run: write_text(path, run))
    monkeypatch.setattr(pipeline, "DvcBooks", busy)
    with pytest.raises(RuntimeError, match="at work in this folder"):
        pipeline.examine("smoke-scripted")
    assert read_text(path) == "of the run that is at work"


def test_a_part_that_does_not_exist_is_named(project):
    out = python(project, "-m", "dpag.pipeline", "--only", "pushtt")
    assert out.returncode and "ONLY = 'pushtt' matches no stage" in out.stderr and "train@" in out.stderr
    out = python(project, "-m", "dpag.pipeline", "--profile", "huge")
    assert out.returncode and "profile = 'huge': allowed are laptop" in out.stderr


@pytest.mark.parametrize(
    "env", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"HOME": "/nonexistent"}], ids=["locale", "home"]
)
def test_it_works_without_git_in_any_locale_and_home(project, env):
    "A download as a ZIP."
    shutil.rmtree(project / ".git")
    out = python(project, "-m", "dpag.pipeline", "--profile", "smoke", "--dry", "1", **env)
    assert out.returncode == 0, out.stderr
    changed, n = map(int, re.match(r"smoke-scripted: (\d+) of (\d+) stages to run", out.stdout).groups())
    assert n == changed > 10


def test_no_films_are_asked_for_where_none_are_drawn():
    assert load("laptop-scripted").evaluate.get("n_films") == 3
    outs = [o if isinstance(o, str) else next(iter(o)) for o in DVC["evaluate"]["do"]["outs"]]
    assert not any("strip" in o for o in outs)


def test_git_does_not_see_what_a_run_leaves(project):
    "dvc.lock is the machine's, results/runs and data are the run's."
    pipeline.settle_git(project)
    write_text(project / "dvc.lock", "schema: '2.0'\nstages: {}\n# mine\n")
    for name in (
        "results/runs/tables/pusht.md",
        "data/smoke-scripted/pusht_kp.zarr/.zattrs",
        "results/runs/x",
    ):
        write_text(project / name, "x")
    assert git(project, "status", "--porcelain") == ""


def test_every_kind_of_stage_may_say_what_it_needs():
    assert set(typing.get_args(Kind)) == set(DVC)
    for wrong, said in (({"trian": {}}, "execution.needs.trian"), ({"train": {"gpus": 1.5}}, "whole number")):
        with pytest.raises(SettingsError, match=said):
            validate({"execution": {"needs": wrong}})


def test_what_a_stage_needs_is_no_part_of_what_it_depends_on():
    s = load("smoke-scripted")
    more = s.model_copy(update={"execution": ExecutionConfig(needs={"train": NeedsConfig(cpus=7)})})
    assert s.execution.needs["train"].gpus == 0.25 and plan.make_plan(s) == plan.make_plan(more)


def test_dry_says_what_would_run_and_runs_nothing(project):
    out = python(project, "-m", "dpag.pipeline", "--profile", "smoke", "--only", "data@", "--dry", "1")
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert re.match(r"smoke-scripted: 7 of \d+ stages to run, about \d+:\d\d:\d\d on \d+ cores", lines[0])
    assert len(lines) == 8 and "settings (1 cores, 1 GB)" in lines[1]
    assert not (project / "data").exists() and not (project / ".dvc/tmp/logs").exists()


# DVC's books

STAGES = """
stages:
  count:
    cmd: mkdir -p many && seq $(cat n) > many/numbers && echo ran >> ../ran
    deps: [n]
    outs: [many]
  add:
    cmd: test "$(cat n)" != 13 && paste -sd+ many/numbers > sum && echo ran >> ../ran
    deps: [many]
    outs:
      - sum: {cache: false}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A DVC project of two stages; each notes that it ran in the folder above."
    folder = tmp_path / "small"
    folder.mkdir()
    monkeypatch.chdir(folder)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True)
    write_text(folder / "dvc.yaml", STAGES)
    write_text(folder / "n", "4")
    return folder


def dvc(*args):
    command = [sys.executable, "-m", "dvc", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def lock(folder):
    return yaml.safe_load(read_text(folder / "dvc.lock"))


def drive(folder):
    "Run what there is to do, as `make repro` does."
    with contextlib.closing(DvcBooks(folder)) as books:
        graph = pipeline.to_run(books.graph, books.changed())
        jobs = {s: Job(s, books.command(s), str(folder / f".dvc/tmp/{s}.log")) for s in graph}
        driver = Driver(graph, jobs, dict.fromkeys(graph, 1.0), Local(str(folder), {}, 2), books)
        run_all(driver)
    return driver


def n_runs(folder):
    path = folder.parent / "ran"
    return len(read_text(path).splitlines()) if path.exists() else 0


def test_the_books_are_what_dvc_itself_would_have_written(small):
    assert set(drive(small).ran) == {"count", "add"} and n_runs(small) == 2
    ours, ours_cached = lock(small), sorted(p.name for p in (small / ".dvc/cache").rglob("*"))
    assert dvc("status").strip() == "Data and pipelines are up to date."
    assert drive(small).done == set()
    (small / "dvc.lock").unlink()
    shutil.rmtree(small / ".dvc/cache")
    dvc("repro", "--force")
    assert lock(small) == ours
    assert sorted(p.name for p in (small / ".dvc/cache").rglob("*")) == ours_cached


def test_what_comes_out_as_before_holds_nothing_up(small):
    drive(small)
    write_text(small / "dvc.yaml", STAGES.replace("seq $(cat n)", "true; seq $(cat n)"))
    driver = drive(small)
    assert set(driver.ran) == {"count"} and ("same", "add") in driver.events and n_runs(small) == 3
    assert dvc("status").strip() == "Data and pipelines are up to date."


def test_the_run_cache_is_used(small):
    drive(small)
    write_text(small / "n", "5")
    drive(small)
    write_text(small / "n", "4")
    driver = drive(small)
    assert set(driver.ran) == {"add"} and read_text(small / "sum") == "1+2+3+4\n"
    assert dvc("status").strip() == "Data and pipelines are up to date."


def test_a_stage_that_fails_leaves_the_others_in_dvc(small):
    write_text(small / "n", "13")
    driver = drive(small)
    assert driver.failed == ["add"] and set(lock(small)["stages"]) == {"count"}


@pytest.mark.parametrize("known", [True, False])
def test_a_driver_that_is_killed_while_it_writes_dvcs_lock_loses_nothing(known, small, monkeypatch):
    "As a SIGKILL leaves it: half of the file is there."
    from dvc.dvcfile import ProjectFile

    if known:
        drive(small)
        write_text(small / "n", "5")
    dump = ProjectFile.dump_stages

    def killed(*args, **options):
        dump(*args, **options)
        text = read_text(small / "dvc.lock")
        (small / "dvc.lock").write_text(text[: len(text) // 2], encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProjectFile, "dump_stages", killed)
        drive(small)
    before = n_runs(small)
    drive(small)
    assert dvc("status").strip() == "Data and pipelines are up to date."
    assert n_runs(small) == before + 1, "the stage that had ended did not run again"


def test_dvcs_lock_is_written_once_for_many_stages_and_what_is_unwritten_is_not_forgotten(small, monkeypatch):
    monkeypatch.setattr(books, "WRITING", 1e-9)  # after the first time not again
    own = DvcBooks(small)
    for name in ("count", "add"):
        assert own.begin(name)
        subprocess.run(own.command(name), shell=True, check=True)
        own.end(name)
        while not own.kept():
            time.sleep(0.01)
    assert set(lock(small)["stages"]) == {"count"}
    own.repo.close()  # killed
    again = drive(small)
    assert n_runs(small) == 2 and not again.ran and set(lock(small)["stages"]) == {"count", "add"}
    assert dvc("status").strip() == "Data and pipelines are up to date."


@pytest.mark.parametrize("half", ["", '{"/a/b": {"read": [{"pi'])
def test_a_driver_that_was_killed_while_dvc_noted_who_reads_what_goes_on(half, small):
    drive(small)
    (small / ".dvc/tmp/rwlock").write_text(half, encoding="utf-8")
    write_text(small / "n", "5")
    assert set(drive(small).ran) == {"count", "add"}
    assert dvc("status").strip() == "Data and pipelines are up to date."


@pytest.mark.parametrize("meanwhile", ["nothing", "its input changed", "its result changed"])
def test_a_stage_that_ended_after_the_driver_was_killed_need_not_run_again(meanwhile, small):
    books = DvcBooks(small)
    assert books.begin("count")
    subprocess.run(books.command("count"), shell=True, check=True)
    books.repo.close()  # killed: nobody has kept it
    if meanwhile == "its input changed":
        write_text(small / "n", "5")
    elif meanwhile == "its result changed":
        time.sleep(0.05)
        write_text(small / "many/numbers", "by hand")
    drive(small)
    assert n_runs(small) == (2 if meanwhile == "nothing" else 3)
    assert dvc("status").strip() == "Data and pipelines are up to date."
    assert not list((small / ".dvc/tmp/dpag").iterdir())


def test_a_person_who_uses_dvc_is_waited_for_except_at_the_beginning(small):
    write_text(small / "dvc.yaml", STAGES.replace("cmd: test", "cmd: sleep 5 && test"))
    program = "import sys, time; from dvc.repo import Repo\n"
    program += "with Repo().lock:\n    print('held', flush=True)\n    time.sleep(6)"
    person = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert person.stdout.readline() == "held\n"
    with pytest.raises(RuntimeError, match="at work in this folder"):
        DvcBooks(small).changed()
    waiting = DvcBooks(small, wait=True)
    assert waiting.begin("count") and person.wait(60) == 0


# Starting warm


linux = pytest.mark.skipif(sys.platform != "linux", reason="programs start warm on Linux alone")


def started(*program, **options):
    return subprocess.Popen([sys.executable, "-m", "dpag.warm", *program], **options)


def eventually(condition, seconds=300.0):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.1)
    return condition()


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    "A program that says its process's id, sleeps, and says how that ended."
    write_text(
        tmp_path / "sleeper.py",
        "import os, sys, time\ntry:\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    sys.exit(7)\n",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def test_every_stage_starts_warm():
    text = read_text(root() / "dvc.yaml")
    book = re.search(r"(?m)^  - book: (.*)$", text)[1]
    for name, stage in DVC.items():
        command = stage.get("do", stage)["cmd"].replace("${book}/", f"{book} ").split(" && ")[-1]
        assert command.startswith("python -m dpag.warm "), name


def test_the_caller_imports_nothing_that_takes_long():
    program = "import sys, dpag.warm; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert {m for m in loaded if m.startswith("dpag.")} == {"dpag.warm"}
    assert not loaded & {"numpy", "torch", "pandas", "dvc", "papermill", "ipykernel", "pydantic", "yaml"}


@linux
def test_a_kernel_is_forked_with_its_imports_done():
    from jupyter_client.manager import run_kernel

    look = "import os, sys; print(*('+' if m in sys.modules else '-' for m in "
    look += (
        "('torch', 'pandas', 'dpag.train', 'dpag.report', 'mujoco', 'matplotlib_inline.backend_inline')), "
    )
    look += "len(os.listdir(f'/proc/{os.getppid()}/task')), sys.modules['torch'].cuda.is_initialized())"
    said = []
    with warm.warm(pipeline.environment()), run_kernel(startup_timeout=300) as client:
        for code in (look, "import matplotlib.pyplot as plt; plt.plot([0, 1]);"):
            client.execute_interactive(code, timeout=300, output_hook=said.append)
    content = [m["content"] for m in said if m["msg_type"] in ("stream", "display_data")]
    assert content[0].get("text", "").split() == ["+", "+", "+", "+", "-", "-", "1", "False"]
    assert "image/png" in content[-1]["data"], "figures are drawn into the notebook"


@linux
@pytest.mark.parametrize("number,status", [(signal.SIGINT, 7), (signal.SIGKILL, -signal.SIGKILL)])
def test_what_is_done_to_the_caller_is_done_to_the_program(number, status, sleeper):
    with warm.warm(pipeline.environment()):
        caller = started("sleeper", stdout=subprocess.PIPE, text=True)
        pid = int(caller.stdout.readline())
        assert pid != caller.pid and alive(pid)
        caller.send_signal(number)
        assert caller.wait(300) == status
        assert eventually(lambda: not alive(pid))


@linux
def test_a_program_whose_callers_parent_is_killed_ends(sleeper):
    with warm.warm(pipeline.environment()):
        program = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'dpag.warm', 'sleeper'])"
        parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        pid = int(parent.stdout.readline())
        parent.kill()
        assert eventually(lambda: not alive(pid))


@linux
def test_a_program_ends_as_it_would_without_a_server():
    programs = [("calendar", "2024", "2"), ("calendar", "2024", "13"), ("no_such_program",)]

    def run(program):
        out = subprocess.run([sys.executable, "-m", "dpag.warm", *program], capture_output=True, text=True)
        return out.returncode, out.stdout, out.stderr.strip().splitlines()[-1:]

    cold = [run(p) for p in programs]
    assert [status for status, *_ in cold] == [0, 1, 1]
    with warm.warm(pipeline.environment()):
        assert os.path.exists(os.environ[warm.SERVER])
        assert [run(p) for p in programs] == cold
    assert warm.SERVER not in os.environ


@linux
@pytest.mark.timeout(300)
@pytest.mark.parametrize("whom", ["everyone", "make alone", "killed"])
def test_an_interrupted_run_leaves_no_process(whom, project):
    "Ctrl-C interrupts the whole group; a signal from elsewhere may reach the first process alone."
    command = [
        sys.executable,
        "-m",
        "dpag.pipeline",
        "--profile",
        "smoke",
        "--only",
        "data@smoke-scripted-pusht_kp",
    ]
    env = {**os.environ, "PYTHONPATH": str(project)}
    run = subprocess.Popen(
        command,
        cwd=project,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def left():
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if Path(os.readlink(folder / "cwd")) == project and alive(int(folder.name)):
                    found.append(folder.name)
        return found

    log = project / ".dvc/tmp/logs/data@smoke-scripted-pusht_kp.log"
    assert eventually(lambda: log.exists() and "Ending Cell" in read_text(log)), run.poll()
    assert len(left()) > 4  # make repro, its server, DVC, papermill, and the kernel
    if whom == "everyone":
        os.killpg(run.pid, signal.SIGINT)
    else:
        run.send_signal(signal.SIGKILL if whom == "killed" else signal.SIGINT)
    said = run.communicate(timeout=300)[1].decode()
    assert run.returncode and (whom == "killed" or "make repro: interrupted" in said)
    assert eventually(lambda: not left()), left()


# Notebooks by hand


@pytest.mark.parametrize(
    "wrong,word",
    [
        (["sead", "7"], "sead = 7: there is no such parameter"),
        (["seed", "seven"], "seed = 'seven': int is needed"),
        (["seed", "True"], "seed = True: int is needed"),
        (["method", "dp-ag"], "method = 'dp-ag': allowed are"),
        (["task", "pusht-kp"], "task = 'pusht-kp': allowed are"),
        (["run", "laptop"], "run = 'laptop': <profile>-<demonstrations> is needed"),
    ],
)
def test_papermill_refuses_a_wrong_parameter_before_any_work(wrong, word, project):
    book = project / "nbs/experiments/e02_train.ipynb"
    out = python(
        project, "-m", "papermill", str(book), str(project / "out.ipynb"), "-p", *wrong, "--cwd", str(project)
    )
    assert out.returncode and word in out.stdout + out.stderr, (out.stdout + out.stderr)[-2000:]
    assert not (project / "results/runs/train").exists()


def test_every_experiment_checks_its_parameters():
    for path in sorted((root() / "nbs/experiments").glob("*.ipynb")):
        cells = json.loads(read_text(path))["cells"]
        at = next((i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", [])), None)
        if at is None:
            continue
        names = re.findall(r"(?m)^(\w+) =", "".join(cells[at]["source"]))
        asked = "".join(cells[at + 1]["source"])
        assert "check_parameters(" in asked and all(f"{n}=" in asked for n in names), path.name


def test_settings_errors_are_sentences():
    with pytest.raises(SettingsError, match="allowed are"):
        load("laptop-scripted").cell("pusht_kp", "dp-ag")
