"""Floors, notebooks, and what is committed."""

import ast
import json
import re
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from dpag.data import window_indices
from dpag.files import read_text, root
from dpag.policy import Policy
from dpag.rollouts import Protocol, rollout
from dpag.tasks.base import get_task

ROBOT = ("kinematics", "safety", "arm", "cameras", "twin", "emulator", "ur", "recorder", "drive", "teleop")
METHODS = ("toy", "dp", "dp_ag", "lstm_gmm", "ibc", "bet", "flow_policy", "ada_flow")
FLOORS = [
    *(
        "libraries",
        "files",
        "hub",
        "arrays",
        "workers",
        "executor",
        "schedule",
        "books",
        "progress",
        "config",
        "parts",
        "paths",
        "provenance",
        "oddities",
        "streaming",
        "data",
        "lerobot",
        "hdf5",
        "encoder",
        "noise_net",
        "diffusion",
    ),
    *(
        "guidance",
        "residual",
        "policy",
        *(f"methods.{m}" for m in METHODS),
        "validation",
        "parallel",
        "stacked",
        "train",
        *(f"robot.{r}" for r in ROBOT),
    ),
    "tasks.base",
    *(f"tasks.pusht.{m}" for m in ("task", "expert", "simulator", "env", "dynamic", "sensor")),
    *(f"tasks.robomimic.{m}" for m in ("task", "control", "env", "expert", "files")),
    *(f"tasks.kitchen.{m}" for m in ("task", "env", "expert")),
    *(f"tasks.ur5.{m}" for m in ("env", "painting", "candy", "peg", "hole", "demonstrations", "task")),
    *(
        "tasks.spirals",
        "rollouts",
        "settings",
        "plan",
        "cost",
        "stats",
        "figures",
        "paper",
        "rows",
        "tables",
        "plots",
    ),
    *("ablation", "interplay", "report", "verdicts", "warm", "pipeline"),
    *("weights", "demo", "runner", "export"),
]


def modules():
    "Every exported module: its name within dpag, and its code."
    for path in sorted((root() / "dpag").rglob("*.py")):
        name = ".".join(path.relative_to(root() / "dpag").with_suffix("").parts)
        if not name.endswith("__init__") and name != "_modidx":
            yield name, path, read_text(path)


def targets(name: str, node: ast.ImportFrom) -> list[str]:
    "The modules of dpag that an import in module `name` is of."
    package = ["dpag", *name.split(".")][: -node.level] if node.level else []
    module = ".".join([*package, *([node.module] if node.module else [])])
    if module.split(".")[0] != "dpag":
        return []
    inside = module.removeprefix("dpag").lstrip(".")
    return [inside] if inside in FLOORS else [".".join([*filter(None, [inside]), a.name]) for a in node.names]


def test_no_module_imports_from_a_higher_floor():
    checked = 0
    for name, _, code in modules():
        tree = ast.parse(code)
        # A task's settings know its simulator only inside the functions that make the task.
        nodes = tree.body if re.fullmatch(r"tasks\.\w+\.task", name) else ast.walk(tree)
        for node in nodes:
            if not isinstance(node, ast.ImportFrom):
                continue
            for target in targets(name, node):
                if target in ("__version__", "tasks", "methods"):
                    continue
                assert FLOORS.index(target) < FLOORS.index(name), f"{name} imports {target}"
                checked += 1
    assert checked > 60


def test_mujoco_is_imported_in_one_place():
    importers = [n for n, _, code in modules() if re.search(r"^\s*(import mujoco|from mujoco)", code, re.M)]
    assert importers == ["libraries"], (
        "MuJoCo chooses its OpenGL when it is imported: take it from load_mujoco"
    )


def test_the_library_does_not_ask_where_the_project_is():
    "`root()` belongs to the pipeline: paths, settings, the plan and what runs them."
    asking = {n for n, _, code in modules() if re.search(r"\broot\(\)", code)}
    assert asking <= {"files", "paths", "settings", "plan", "pipeline", "report"}


def test_text_files_are_opened_as_utf_8():
    for name, _, code in modules():
        for node in ast.walk(ast.parse(code)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            words = {k.arg for k in node.keywords}
            if called in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
                assert "encoding" in words, f"{name}, line {node.lineno}: {called} without an encoding"
            if isinstance(node.func, ast.Name) and called == "open":
                mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r")
                assert "b" in mode or "encoding" in words, (
                    f"{name}, line {node.lineno}: open without an encoding"
                )


def test_no_line_of_code_is_longer_than_120_columns():
    files = subprocess.run(
        ["git", "-C", str(root()), "ls-files", "*.py"], capture_output=True, text=True, check=True
    )
    long = [
        f"{f}:{i}"
        for f in files.stdout.split()
        if (root() / f).exists() and not f.endswith("_modidx.py")
        for i, line in enumerate(read_text(root() / f).splitlines(), 1)
        if len(line) > 120 and not line.startswith("__all__")  # whose width nbdev fixes
    ]
    assert long == []


def test_notebooks_follow_the_house_rules():
    lengths = []
    for path in (root() / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        code = [c for c in json.loads(read_text(path))["cells"] if c["cell_type"] == "code"]
        for c in code:
            source = "".join(c["source"])
            assert not re.search(r"^#\|\s*hide\b", source, re.M), f"{path.name}: a hidden cell"
            assert not re.search(r"^from \S+ import \*", source, re.M), f"{path.name}: a star import"
            if re.match(r"#\|\s*exporti?\b", source):
                body = [x for x in source.splitlines() if x.strip() and not x.startswith("#|")]
                assert len(body) <= 60, f"{path.name}: {body[0]}: {len(body)} lines"
                if any(re.match(r"(class|def|@)", x) for x in body):
                    lengths.append(len(body))
        ran = any(c["outputs"] for c in code)
        assert ran == ("experiments" not in path.parts), (
            f"{path.name}: outputs {'present' if ran else 'missing'}"
        )
    assert np.median(lengths) < 15


def test_every_study_says_where_its_rows_come_from():
    "A notebook that writes rows of its own notes the commit, the machine and the versions beside them."
    unsigned = [
        path.name
        for path in sorted((root() / "nbs/experiments").glob("*.ipynb"))
        if "atomic(" in read_text(path) and not re.search(r"\b(sign|provenance)\(", read_text(path))
    ]
    assert unsigned == []


def test_nothing_committed_names_a_machine():
    files = subprocess.run(["git", "-C", str(root()), "ls-files"], capture_output=True, text=True, check=True)
    for f in files.stdout.split():
        p = root() / f
        if p.suffix in (".png", ".gif", ".woff2") or not p.is_file():
            continue
        assert not re.search(r"/(root|home|work)/\w", p.read_text(encoding="utf-8", errors="ignore")), f


@pytest.mark.parametrize("horizon,obs,act", [(16, 2, 8), (4, 1, 4), (8, 3, 2)])
def test_windows_cover_every_step_and_stay_inside(horizon, obs, act):
    ends = np.array([3, 40, 41, 90])
    idx, owner = window_indices(ends, horizon=horizon, n_obs_steps=obs, n_action_steps=act)
    starts = np.concatenate([[0], ends[:-1]])
    assert (idx >= starts[owner][:, None]).all() and (idx < ends[owner][:, None]).all()
    executed_first = set(idx[:, obs - 1])
    long = [i for i in range(4) if ends[i] - starts[i] >= horizon]
    for i in long:
        assert set(range(starts[i], ends[i] - horizon + act + obs - 1)) <= executed_first


def test_rollout_is_reproducible_and_counts_every_episode():
    task, protocol = get_task("pusht_kp"), Protocol(max_steps=40, n_obs_steps=2)

    class Wander(Policy):
        def act(self, obs, generator):
            step = 80 * torch.randn(len(obs["agent_pos"]), 8, 2, generator=generator)
            return obs["agent_pos"][:, -1:] + step

    a, _ = rollout(Wander(), task.make_env, range(3), protocol)
    b, films = rollout(Wander(), task.make_env, range(3), protocol, n_films=1)
    pd.testing.assert_frame_equal(a, b)
    assert a.state_seed.tolist() == [0, 1, 2] and len(films[0]) == a.steps[0] // 2 + 1


def pins(text: str) -> dict[str, str]:
    "Versions by name."
    found = re.findall(r"^([\w.-]+)==([\w.+!-]+)", text, re.M)
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in found}


def test_the_hashes_are_of_the_versions_that_are_pinned():
    "After a change of constraints.txt: make hashes."
    hashed = read_text(root() / "requirements-hashed.txt")
    versions, pinned = pins(hashed), pins(read_text(root() / "constraints.txt"))
    differ = {n: (v, pinned[n]) for n, v in versions.items() if n in pinned and v != pinned[n]}
    assert differ == {}
    # torch's build for CUDA, which the public index has, brings packages that no constraint names.
    apart = {n for n in versions if n not in pinned}
    assert all(n.startswith(("nvidia-", "cuda-", "triton", "robo")) for n in apart), apart
    entries = re.split(r"^(?=[\w.-]+==)", hashed, flags=re.M)[1:]
    assert len(entries) == len(versions) and all("--hash=sha256:" in e for e in entries)
    assert "://" not in hashed
