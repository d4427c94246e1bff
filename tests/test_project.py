"""Floors, tables, pipeline, and what is committed."""
import ast
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpag.config import root
from dpag.data import load_demonstrations, window_indices
from dpag.pipeline import stage_graph
from dpag.report import PUSHT_TASKS, check_tables, task_rows
from dpag.rollout import rollout
from dpag.stats import bootstrap_mean, clopper_pearson, matrix
from dpag.tasks.base import get_task

FLOORS = ["libraries", "config", "data", "encoder", "noise_net", "diffusion", "guidance", "policy", *[f"robot.{r}" for r in ("kinematics", "safety", "arm", "twin", "emulator", "cameras", "ur", "recorder", "drive", "teleop")], *[f"baselines.{b}" for b in ("toy", "lstm_gmm", "ibc", "bet", "flow_policy", "ada_flow")], "tasks.base", "tasks.pusht.expert", "tasks.pusht.env", "tasks.pusht.dynamic", "tasks.robomimic.env", "tasks.robomimic.expert", "tasks.robomimic.files", "tasks.robomimic.tasks", "tasks.kitchen.env", "tasks.kitchen.expert", "tasks.kitchen.tasks", *[f"tasks.ur5.{u}" for u in ("env", "painting", "candy", "peg", "tasks")], "tasks.spirals", "train", "rollout", "stats", "ablation", "report", "pipeline"]


def test_no_module_imports_from_a_higher_floor():
    checked = 0
    for path in (root() / "dpag").rglob("*.py"):
        parts = ("dpag", *path.relative_to(root() / "dpag").with_suffix("").parts)
        name = ".".join(parts[1:])
        if name.endswith("__init__") or name == "_modidx": continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom): continue
            module = ".".join([*parts[:len(parts) - node.level], *([node.module] if node.module else [])]) if node.level else node.module
            if module.split(".")[0] != "dpag": continue
            inside = module.removeprefix("dpag").lstrip(".")
            for target in [inside] if inside else [a.name for a in node.names if a.name != "__version__"]:
                assert FLOORS.index(target) < FLOORS.index(name), f"{name} imports {target}"
                checked += 1
    assert checked > 30


def test_mujoco_is_imported_in_one_place():
    importers = [p.name for p in (root() / "dpag").rglob("*.py") if re.search(r"^\s*(import mujoco|from mujoco)", p.read_text(), re.M)]
    assert importers == ["libraries.py"], "MuJoCo chooses its OpenGL when it is imported: take it from load_mujoco"


def test_tables_follow_from_the_committed_rows():
    assert check_tables(root() / "results") == []


def test_a_changed_row_is_noticed(tmp_path):
    import shutil
    shutil.copytree(root() / "results", tmp_path / "results", ignore=shutil.ignore_patterns("train", "notebooks"))
    path = sorted((tmp_path / "results/eval").glob("*/pusht_kp/*/*/episodes.csv"))[0]
    rows = pd.read_csv(path); rows.loc[0, "score"] = 1 - rows.loc[0, "score"]; rows.to_csv(path, index=False)
    assert any("pusht.csv" in w for w in check_tables(tmp_path / "results"))


def test_committed_rows_have_the_promised_columns():
    files = list((root() / "results/eval").glob("*/*/*/*/episodes.csv"))
    assert files
    for f in files:
        task = f.parts[-4]
        of_the_arm = ["jerk", "jerk_measured", "jerk_si", "seconds"] if task.startswith("ur5") else []
        columns = ["seed", "score", "success", "steps", *of_the_arm, *["iou"] * ("paint" in task), "jerk_agent", "jerk_action", "act_ms_p50", "act_ms_p99"]
        assert list(pd.read_csv(f, nrows=1).columns) in (columns, [*columns, "flow_steps"])             # the last came with the flows
        run = pd.read_json(f.parent / "run.json", typ="series")
        assert set(pd.read_csv(f.parent / "curve.csv").step) <= {run.step, *(max(1, round(share * run.step)) for share in (0.25, 0.5))}, f        # no points of an earlier run
        assert {"profile", "demos", "data_hash", "settings_hash", "commit", "device", "n_parameters", "step", "train_seconds"} <= set(run.index)


@pytest.mark.parametrize("name", ["index", "13_results"])
def test_the_tables_that_are_shown_follow_from_the_committed_ones(name):
    "README and the results notebook keep their tables as outputs; each cell ends in one."
    import json
    namespace = {}
    for c in json.loads((root() / f"nbs/{name}.ipynb").read_text())["cells"]:
        if c["cell_type"] != "code": continue
        *before, last = "".join(c["source"]).splitlines()
        exec("\n".join(before), namespace)
        (out,) = c["outputs"]
        assert eval(last, namespace).data == "".join(out["data"]["text/markdown"]), f"a table has changed: run nbs/{name}.ipynb again"


def test_pipeline_graph():
    graph = stage_graph()
    trains = [s for s in graph if s.startswith("train@")]
    assert trains and all(any(d.startswith("data@") for d in graph[s]) for s in trains)
    report = next(s for s in graph if s.startswith("report@"))
    assert {s for s in graph if s.startswith("evaluate@")} <= graph[report] and any(s.startswith("spirals") for s in graph[report])


def test_notebook_cells_are_readable():
    "Exported cells stay under 40 lines unless they are one class; library notebooks are saved with outputs, experiments without."
    import json
    for path in (root() / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts: continue
        code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        for c in code:
            src = "".join(c["source"])
            if not re.match(r"#\|\s*export", src): continue
            body = [l for l in src.splitlines() if l.strip() and not l.startswith("#|")]
            assert len(body) <= 40 or body[0].startswith("class ") , f"{path.name}: {body[0]}: {len(body)} lines"
        ran = any(c["outputs"] for c in code)
        assert ran == ("experiments" not in path.parts), f"{path.name}: outputs {'present' if ran else 'missing'}"


def test_nothing_committed_names_a_machine():
    files = subprocess.run(["git", "-C", str(root()), "ls-files"], capture_output=True, text=True).stdout.split()
    for f in files:
        p = root() / f
        if p.suffix in (".png", ".gif") or not p.exists(): continue
        assert not re.search(r"/(root|home|work)/\w", p.read_text(errors="ignore")), f


@pytest.mark.parametrize("horizon,obs,act", [(16, 2, 8), (4, 1, 4), (8, 3, 2)])
def test_windows_cover_every_step_and_stay_inside(horizon, obs, act):
    ends = np.array([3, 40, 41, 90])
    idx, owner = window_indices(ends, horizon=horizon, n_obs_steps=obs, n_action_steps=act)
    starts = np.concatenate([[0], ends[:-1]])
    assert (idx >= starts[owner][:, None]).all() and (idx < ends[owner][:, None]).all()
    executed_first = {t for t in idx[:, obs - 1]}
    long = [i for i in range(4) if ends[i] - starts[i] >= horizon]
    for i in long: assert set(range(starts[i], ends[i] - horizon + act + obs - 1)) <= executed_first


def test_rollout_is_reproducible_and_counts_every_episode(settings):
    task = get_task("pusht_kp", settings)
    class Wander:
        def act(self, obs, generator):
            import torch
            return obs["agent_pos"][:, -1:] + 80 * torch.randn(len(obs["agent_pos"]), 8, 2, generator=generator)
    a, _ = rollout(Wander(), task.make_env, range(3), max_steps=40, n_obs_steps=2)
    b, films = rollout(Wander(), task.make_env, range(3), max_steps=40, n_obs_steps=2, n_films=1)
    pd.testing.assert_frame_equal(a, b)
    assert a.seed.tolist() == [0, 1, 2] and len(films[0]) == a.steps[0] // 2 + 1


def test_interval_of_a_certain_score_is_a_point():
    assert bootstrap_mean(np.ones((3, 5)), n_boot=50) == (1, 1, 1)
    low, high = clopper_pearson(7, 10)
    assert low == pytest.approx(0.3475, abs=1e-3) and high == pytest.approx(0.9333, abs=1e-3)


def test_tasks_and_tables_have_the_same_titles(settings):
    from dpag.report import TASK_TITLES
    from dpag.tasks.base import TASKS
    assert {name: get_task(name, settings).title for name in TASKS} == TASK_TITLES


def test_cells_that_were_not_run_stay_empty():
    from dpag.report import readable_pusht
    rows = pd.DataFrame([dict(profile="laptop", demos="scripted", task="pusht_kp", method="dp", train_seed=s, seed=i, score=.5, success=0, steps=3, jerk_agent=1., jerk_action=1., act_ms_p50=1., act_ms_p99=1.) for s in (0, 1) for i in range(4)])
    table = readable_pusht(task_rows(rows, PUSHT_TASKS)).set_index("method")
    assert table.loc["DP", "Push-T kp"].startswith("0.500") and table.loc["IBC", "Push-T kp"] == "–" and table.loc["DP", "Push-T img"] == "–"
    with pytest.raises(ValueError, match="same initial states"): matrix(rows.iloc[1:], "score")


def test_other_ways_of_acting_are_rows_of_their_own():
    from dpag.report import readable_details, readable_pusht
    rows = pd.DataFrame([dict(profile="laptop", demos="scripted", task="pusht_kp", method=m, train_seed=0, seed=i, score=v, success=0, steps=3, jerk_agent=1., jerk_action=1., act_ms_p50=1., act_ms_p99=1., flow_steps=n)
                         for m, v, n in (("dp", .5, np.nan), ("ada_flow", .7, 9.5), ("ada_flow/coarse", .6, 3.), ("ab_dp", .1, np.nan)) for i in range(4)])
    long = task_rows(rows, PUSHT_TASKS)
    assert "ab_dp" not in set(long.method) and readable_pusht(long).set_index("method").loc["AdaFlow", "Push-T kp"].startswith("0.700")
    details = readable_details(long).set_index("method")
    assert details.loc["AdaFlow, coarse", "score"].startswith("0.600") and details.loc["AdaFlow, coarse", "steps of the flow"] == "3.0" and details.loc["AdaFlow", "score − DP, paired"].startswith("0.200")
