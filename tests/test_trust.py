"""Nothing damaged is believed: bits that flip, files that are cut or gone, writers that are killed, numbers
that cannot be, downloads that leave https."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import requests
import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import nn

from dpag import files, report
from dpag.config import SettingsError, generator, seed_everything
from dpag.data import Demonstrations, WindowDataset, load_demonstrations, save_demonstrations
from dpag.files import (
    CARD,
    SUMS,
    DamagedError,
    atomic,
    atomic_folder,
    check_seal,
    discard,
    exchange,
    read_text,
    restore,
    seal,
    sweep,
    write_text,
)
from dpag.methods.dp_ag import DPAGConfig
from dpag.paths import Cell, Results
from dpag.policy import Policy, build_policy, load_policy, save_policy
from dpag.report import check_tables, publish, write_published
from dpag.rollouts import WARM_UP, act_latency
from dpag.rows import SCHEMA, Measured, check_cell, check_evaluation
from dpag.tasks.base import attempts_folder, collect_successes, fetch, read_attempt, remembered
from dpag.tasks.kitchen import task as kitchen
from dpag.train import Run, TrainConfig, fit, load_state, read_state, save_state, state_checksum

CHECKPOINTS = Path(__file__).parent / "data/checkpoints"


@contextlib.contextmanager
def changed(path, content):
    "The file `path` with other bytes, or without any file for None, for a while."
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(before)


def flipped(content: bytes, bit: int) -> bytes:
    out = bytearray(content)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def some_bits(content: bytes, n: int, seed: int) -> list[int]:
    "The first and last bits and `n` others; all of a small file."
    if 8 * len(content) <= n:
        return list(range(8 * len(content)))
    drawn = np.random.default_rng(seed).integers(0, 8 * len(content), n)
    return sorted({0, 8 * len(content) - 1, *(int(b) for b in drawn)})


def refused_or_same(tried, area, read, same):
    "An attempt that ends in an error that says so, or in what was there before."
    try:
        found = read()
    except (ValueError, FileNotFoundError) as e:
        with tried.refused(area, type(e)):
            raise
    else:
        with tried.survived(area):
            assert same(found)


def break_every_file(tried, area, folder, read, same, n=12):
    "Flip bits of each file below `folder` but its card, cut it, empty it, and take it away."
    for i, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CARD)):
        content = path.read_bytes()
        for bit in some_bits(content, n, i):
            with changed(path, flipped(content, bit)):
                refused_or_same(tried, area, read, same)
        for other in (content[: len(content) // 2], b"", content + b"x", None):
            with (
                changed(path, other),
                tried.refused(area, (ValueError, FileNotFoundError), match=folder.name),
            ):
                read()


# Seals


def test_every_bit_of_a_seal_and_of_what_it_seals(tmp_path, tried):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/.zarray").write_bytes(b"{}")
    (folder / "a.txt").write_bytes(b"1.0")
    seal(folder)
    for name in (SUMS, "a.txt", "sub/.zarray"):
        content = (folder / name).read_bytes()
        for bit in range(8 * len(content)):
            with (
                changed(folder / name, flipped(content, bit)),
                tried.refused("sealed folders", DamagedError, match=str(folder)),
            ):
                check_seal(folder)
    check_seal(folder)


def test_a_seal_that_is_cut_or_has_too_few_files_is_refused(tmp_path, tried):
    for name in "abc":
        (tmp_path / name).write_text(name, encoding="utf-8")
    seal(tmp_path)
    sums = (tmp_path / SUMS).read_bytes()
    for n in range(len(sums)):
        with changed(tmp_path / SUMS, sums[:n]), tried.refused("sealed folders", DamagedError):
            check_seal(tmp_path)
    (tmp_path / "d").touch()
    with tried.refused("sealed folders", DamagedError, match="d has no checksum"):
        check_seal(tmp_path)
    (tmp_path / "d").rename(tmp_path / ".d")  # such as a file manager leaves
    (tmp_path / f".x.{os.getpid()}.tmp").touch()
    with tried.survived("sealed folders"):
        check_seal(tmp_path)
    (tmp_path / SUMS).unlink()
    check_seal(tmp_path)
    with tried.refused("sealed folders", DamagedError, match="SHA256SUMS is missing"):
        check_seal(tmp_path, required=True)


def test_a_seal_is_read_by_the_common_tool(tmp_path):
    if shutil.which("sha256sum") is None:
        pytest.skip("there is no sha256sum here")
    write_text(tmp_path / "ä b.txt", "1.0")
    seal(tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, check=True, capture_output=True)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small, shapes, dataset):
    "A checkpoint of a small policy, and what it does."
    seed_everything(0)
    policy = build_policy(DPAGConfig(), small, shapes, dataset)
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    save_policy(folder, policy, {"task": "pusht_kp"})
    obs = dataset.batch(1, generator("obs"))["obs"]
    return folder, obs, policy.eval().act(obs, generator("act"))


def test_a_damaged_checkpoint_is_refused(checkpoint, tried):
    folder, obs, expected = checkpoint

    def same(found):
        return torch.equal(found[0].act(obs, generator("act")), expected)

    break_every_file(tried, "checkpoints", folder, lambda: load_policy(folder), same, n=40)
    assert same(load_policy(folder))


def test_an_edited_checkpoint_is_refused_by_name(checkpoint, tried):
    folder, _, _ = checkpoint
    path = folder / "checkpoint.json"
    meta = json.loads(read_text(path))
    meta["method"]["guidance"]["gamma"] = 99.0
    edited = json.dumps(meta).encode()
    with changed(path, edited), tried.refused("checkpoints", match="checkpoint.json is damaged"):
        load_policy(folder)
    with (
        changed(path, edited),
        changed(folder / SUMS, None),
        tried.refused("checkpoints", match="SHA256SUMS is missing"),
    ):
        load_policy(folder)


def test_an_older_checkpoint_has_no_checksum_and_only_what_cannot_be_is_refused(tmp_path, tried):
    folder = tmp_path / "c"
    shutil.copytree(CHECKPOINTS / "dp_ag", folder)
    with tried.survived("checkpoints"):
        load_policy(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in ("net.out.weight", "action_scale.scale"):
        name = name if name in weights else next(k for k in weights if weights[k].is_floating_point())
        for value in (float("nan"), float("inf")):
            wrong = {**weights, name: torch.full_like(weights[name], value)}
            save_file(wrong, path)
            with tried.refused("checkpoints", match="damaged checkpoint: .*not finite"):
                load_policy(folder)
    save_file({k: v.flatten()[:1] for k, v in weights.items()}, path)
    with tried.refused("checkpoints", match="damaged checkpoint"):
        load_policy(folder)


# Resume files


def line() -> Run:
    torch.manual_seed(0)
    return Run(nn.Linear(3, 1))


def test_every_bit_of_a_resume_file(tmp_path, tried):
    path, run = tmp_path / "resume.safetensors", line()
    save_state(path, run, 7, "this run", "step,loss\n7,0.5\n")
    content, (state, about) = path.read_bytes(), read_state(path)
    for bit in range(0, 8 * len(content), 3):
        path.write_bytes(flipped(content, bit))
        refused_or_same(
            tried,
            "resume files",
            lambda: read_state(path),
            lambda found: found[1] == about and all(torch.equal(found[0][k], t) for k, t in state.items()),
        )


def forged(path, run, change):
    "A resume file with a right checksum and wrong tensors."
    state, about = run.state(), {"step": "7", "key": "this run", "log": ""}
    change(state, about)
    save_file(state, path, {**about, "sha256": state_checksum(state, about)})


FORGED = {
    "one weight for all": lambda state, about: state.update(param=torch.zeros(1, 1)),
    "another type": lambda state, about: state.update(ema=state["ema"].double()),
    "a tensor less": lambda state, about: state.pop("exp_avg"),
    "a tensor more": lambda state, about: state.update(more=torch.zeros(1)),
    "no step": lambda state, about: about.pop("step"),
    "no number of steps": lambda state, about: about.update(step="many"),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_resume_file_with_other_tensors_is_set_aside(tmp_path, tried, change):
    path, run = tmp_path / "resume.safetensors", line()
    forged(path, line(), change)
    before = {k: t.clone() for k, t in run.state().items()}
    with tried.survived("resume files"), pytest.warns(UserWarning, match="set aside"):
        assert load_state(path, run, "this run") == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["resume.safetensors.damaged"]
    assert all(torch.equal(t, before[k]) for k, t in run.state().items())


SETTINGS = dict(steps=6, batch_size=8, log_every=1, checkpoint_every=2, device="cpu")


def trained(small, shapes, dataset, folder, stop_after=None):
    "The weights and the log of a short run in `folder`, which may be stopped in its middle."
    stopped = stop_after is not None

    class Data:
        calls = 0

        def batch(self, n, g):
            self.calls += 1
            if stopped and self.calls > stop_after:
                raise KeyboardInterrupt
            return dataset.batch(n, g)

    seed_everything(0)
    policy = build_policy(DPAGConfig(), small, shapes, dataset)
    with contextlib.suppress(KeyboardInterrupt):
        log = fit(policy, Data(), TrainConfig(**SETTINGS), folder=folder, fingerprint="x")
        return policy.net.out.weight.detach().clone(), log.drop(columns="seconds")


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not text": lambda content: b"\xff" * 50,
    "a bit": lambda content: flipped(content, 8 * (len(content) - 3)),
    "another file": lambda content: b"step,loss,lr,seconds\n1,2,3,4\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["resume.safetensors", "log.csv"])
def test_a_run_with_a_damaged_file_ends_as_it_would_have(
    small, shapes, dataset, tmp_path, tried, name, damage
):
    whole = trained(small, shapes, dataset, tmp_path / "whole")
    trained(small, shapes, dataset, tmp_path / "run", stop_after=5)
    path = tmp_path / "run" / name
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with warnings.catch_warnings(record=True) as caught, tried.survived("resume files and logs"):
        warnings.simplefilter("always")
        weights, log = trained(small, shapes, dataset, tmp_path / "run")
        assert torch.equal(weights, whole[0])
        pd.testing.assert_frame_equal(log, whole[1])
    said = [str(w.message) for w in caught if "set aside" in str(w.message)]
    assert len(said) == 1
    assert all(name in text and "\n" not in text for text in said)
    written = pd.read_csv(tmp_path / "run/log.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(written, whole[1])
    assert (tmp_path / "run" / (name + ".damaged")).read_bytes() == damage(content)


@pytest.mark.parametrize("lines", [None, 3])
def test_a_run_goes_on_without_its_log_or_with_an_earlier_one(small, shapes, dataset, tmp_path, tried, lines):
    "As a process leaves it that is killed before it has written the log."
    whole = trained(small, shapes, dataset, tmp_path / "whole")
    trained(small, shapes, dataset, tmp_path / "run", stop_after=5)
    path = tmp_path / "run/log.csv"
    there = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    if lines:
        path.write_bytes(b"".join(there[:lines]))
    with tried.survived("resume files and logs"), warnings.catch_warnings():
        warnings.simplefilter("error")
        _, log = trained(small, shapes, dataset, tmp_path / "run")
        pd.testing.assert_frame_equal(log, whole[1])
    written = [pd.read_csv(tmp_path / d / "log.csv").drop(columns="seconds") for d in ("whole", "run")]
    pd.testing.assert_frame_equal(*written)


# Attempts of a script


def attempt(seed):
    return {"action": np.arange(3.0) + seed, "state": np.full((3, 2), seed, np.float32)}, seed % 3 > 0


@pytest.mark.parametrize("seed", [4, 6])
def test_every_bit_of_an_attempt(tmp_path, tried, seed):
    "4 succeeded, 6 failed: of it nothing but that is kept."
    expected = remembered(tmp_path, attempt, seed)
    path = tmp_path / f"{seed}.npz"
    content = path.read_bytes()

    def same(found):
        arrays, success = found
        kept = arrays.keys() == expected[0].keys()
        return kept and success == expected[1] and all((arrays[k] == expected[0][k]).all() for k in arrays)

    for bit in range(0, 8 * len(content), 2):
        path.write_bytes(flipped(content, bit))
        refused_or_same(tried, "attempts of a script", lambda: read_attempt(path, seed), same)
    for other in (content[:-1], content[: len(content) // 2], b"", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(other)
        with tried.survived("attempts of a script"), pytest.warns(UserWarning, match="made again"):
            assert same(remembered(tmp_path, attempt, seed))
        assert path.read_bytes() == content


def test_a_damaged_attempt_is_made_again_and_the_others_are_kept(tmp_path, tried):
    def made():
        return collect_successes(attempt, n_demos=4, first_seed=0, workers=1, parts=tmp_path)

    first, meta = made()
    folder = attempts_folder(tmp_path, attempt)
    others = {p: p.stat().st_mtime_ns for p in folder.glob("*.npz") if p.stem not in ("1", "2")}
    (folder / "1.npz").write_bytes((folder / "1.npz").read_bytes()[:100])
    shutil.copy(folder / "4.npz", folder / "2.npz")  # another's
    with tried.survived("attempts of a script"):
        again, meta_again = made()
        assert meta_again == meta
        for a, b in zip(first, again, strict=True):
            assert all(np.array_equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in folder.glob("*.damaged")) == ["1.npz.damaged", "2.npz.damaged"]
    assert all(p.stat().st_mtime_ns == t for p, t in others.items())


# Demonstrations


def made_up(n=40, zeros=0) -> Demonstrations:
    rng = np.random.default_rng(0)
    arrays = {
        "action": rng.uniform(50, 450, (n, 2)).astype("f4"),
        "state": rng.uniform(50, 450, (n, 5)).astype("f4"),
        "image": rng.integers(1, 255, (n, 4, 4, 3)).astype("u1"),
    }
    arrays["state"][:zeros] = 0
    shapes = {"obs": {"state": [5], "image": [4, 4, 3]}, "action_dim": 2, "action_ref": None}
    return Demonstrations(arrays, np.array([n // 2, n]), {"source": "made up", "shapes": shapes})


def test_damaged_demonstrations_are_refused(tmp_path, tried):
    demos, path = made_up(), tmp_path / "d.zarr"
    save_demonstrations(demos, path)

    def same(found):
        same = all(np.array_equal(found.arrays[k], a) for k, a in demos.arrays.items())
        return (
            same and np.array_equal(found.episode_ends, demos.episode_ends) and found.shapes == demos.shapes
        )

    break_every_file(tried, "demonstrations", path, lambda: load_demonstrations(path), same, n=6)
    assert same(load_demonstrations(path))


def test_only_arrays_that_are_asked_for_are_read_and_all_of_them_are_checked(tmp_path, tried):
    path = tmp_path / "d.zarr"
    save_demonstrations(made_up(), path)
    chunk = path / "data/image/0.0.0.0"
    with changed(chunk, flipped(chunk.read_bytes(), 99)):
        with tried.survived("demonstrations"):
            assert set(load_demonstrations(path, keys=["state", "action"]).arrays) == {"state", "action"}
        for keys in (None, ["image"], {"image": np.uint8}):
            with tried.refused("demonstrations", DamagedError, match="data/image/0.0.0.0 is damaged"):
                load_demonstrations(path, keys=keys)


def plain_store(path, demos, chunks=10):
    "As another program writes it: no seal, no hash."
    store = zarr.open_group(path, mode="w", zarr_format=2)
    for k, a in demos.arrays.items():
        store.create_array(f"data/{k}", data=a, chunks=(chunks, *a.shape[1:]))
    store.create_array("meta/episode_ends", data=demos.episode_ends)
    return store


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as z:
        for p in sorted(folder.rglob("*")):
            if p.is_file():
                z.write(p, f"replay/{p.relative_to(folder)}")
    return path


@pytest.mark.parametrize("keys", [None, ["action", "state"], {"image": np.uint8}], ids=str)
def test_chunks_that_did_not_arrive_are_refused(tmp_path, tried, keys):
    demos, path = made_up(), tmp_path / "z"
    plain_store(path, demos)
    with tried.survived("demonstrations"):
        assert (
            len(load_demonstrations(path, keys))
            == len(load_demonstrations(zipped(path, tmp_path / "z.zip")))
            == 2
        )
    wanted = [*(keys or demos.arrays)]
    for chunk in sorted(p for k in wanted for p in (path / "data" / k).iterdir() if p.name[0] != "."):
        with changed(chunk, None):
            where = zipped(path, tmp_path / "cut.zip")
            for store in (path, where):
                with tried.refused("demonstrations", DamagedError, match="1 of the 4 chunks of /.*data/"):
                    load_demonstrations(store, keys)
    with changed(path / "meta/episode_ends/0", None), tried.refused("demonstrations", DamagedError):
        load_demonstrations(path, keys)


def test_a_chunk_of_zeros_is_a_file_and_an_older_store_without_it_has_a_hash(tmp_path, tried):
    demos, path = made_up(zeros=40), tmp_path / "d.zarr"
    save_demonstrations(demos, path)
    assert (path / "data/state/0.0").exists()
    old = tmp_path / "old.zarr"
    store = plain_store(old, demos)
    assert not (old / "data/state/0.0").exists()  # zarr leaves it out
    store.attrs["hash"] = demos.data_hash()
    with tried.survived("demonstrations"):
        assert np.array_equal(load_demonstrations(old).arrays["state"], demos.arrays["state"])
    (old / "data/action/1.0").unlink()
    with tried.refused("demonstrations", DamagedError, match="the arrays' hash is"):
        load_demonstrations(old)


def test_an_older_stores_hash_is_of_values_and_not_of_an_order_of_bytes(tmp_path, tried):
    demos, path = made_up(), tmp_path / "d.zarr"
    plain_store(path, demos).attrs["hash"] = demos.data_hash()
    about = path / "data/state/.zarray"
    with changed(about, about.read_bytes().replace(b"<f4", b">f4")), tried.refused("demonstrations"):
        load_demonstrations(path)


def test_shapes_that_are_not_those_of_the_arrays_are_refused(tmp_path, tried):
    for wrong in (
        {"obs": {"state": [4]}},
        {"obs": {"state": [5], "image": [4, 4]}},
        {"action_dim": 3},
        {"obs": 3},
    ):
        path = tmp_path / "d.zarr"
        demos = made_up()
        demos.meta["shapes"] = {**demos.meta["shapes"], **wrong}
        save_demonstrations(demos, path)
        with tried.refused("demonstrations", DamagedError, match="d.zarr"):
            load_demonstrations(path)


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "u2", "u4", "u8", ">i4", "f4", "f8", "?"])
@pytest.mark.parametrize(
    "ends", [[5, 30], [20, 5, 30], [0, 30], [5, 5, 30], [5, 29], [5, 31], [30], []], ids=str
)
def test_episode_ends_are_whole_increasing_and_end_with_the_data(tmp_path, tried, dtype, ends):
    path = tmp_path / "d.zarr"
    store = zarr.open_group(path, mode="w", zarr_format=2)
    store.create_array("data/action", data=np.ones((30, 2), "f4"))
    store.create_array("data/pos", data=np.ones((30, 2), "f4"))
    store.create_array("meta/episode_ends", data=np.array(ends, dtype), config={"write_empty_chunks": True})
    if ends in ([5, 30], [30]) and np.dtype(dtype).kind in "iu":
        with tried.survived("episode ends"):
            demos = load_demonstrations(path)
            data = WindowDataset.of(demos, horizon=16, n_obs_steps=2, n_action_steps=8)
            assert demos.episode_ends.dtype == np.int64 and data.idx.dtype == torch.int64
            assert set(data.owner.tolist()) == set(range(len(ends)))
            assert data.idx.min() == 0 and data.idx.max() == 29
    else:
        with tried.refused("episode ends", DamagedError, match="d.zarr"):
            load_demonstrations(path)


def test_the_human_files_ends_are_checked_as_its_arrays(tried):
    from dpag.tasks.pusht.env import check_human

    with tried.refused("episode ends", match="meta/episode_ends has sha256"):
        check_human(Path("pusht.zip"), Demonstrations({}, np.array([161, 25650])))


# Rows


CELL = Cell("laptop-scripted", "pusht_kp", "dp", 0)
ROWS = {
    "state_seed": [7, 8, 9],
    "score": [0.5, 1.0, 0.0],
    "success": [0, 1, 0],
    "steps": [300, 20, 300],
    "jerk_agent": [1.0, np.nan, 2.0],
    "jerk_action": 1.0,
    "flow_steps": np.nan,
}


def evaluated(results, cell=CELL, sealed=True, info=None, **columns):
    "What an evaluation leaves; the folder."
    folder = results.evaluation(cell)
    folder.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame({**ROWS, **columns})
    curve = rows[["state_seed", "score"]]
    tables = {
        "episodes": rows,
        "acting": rows.assign(acting="static"),
        "curve": pd.concat([curve.assign(step=n) for n in (30, 60)]),
        "latency": rows[["state_seed"]].assign(acting="", act_ms_p50=3.0, act_ms_p99=5.0),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    about = {"run": cell.run, "task": cell.task, "method": cell.method, "seed": cell.train_seed, "step": 60}
    about = {**about, **(info or {})}
    if sealed:
        about["schema"] = SCHEMA
    write_text(folder / "run.json", json.dumps(about))
    if sealed:
        seal(folder)
    return folder


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")


def test_a_damaged_results_folder_is_refused(results, tried):
    folder = evaluated(results)

    def read():
        check_evaluation(CELL, folder)
        return Measured(results).episodes

    expected = read()
    break_every_file(tried, "results", folder, read, expected.equals, n=20)


def test_a_damaged_file_is_a_sentence_of_the_report(results, monkeypatch, tried):
    folder = evaluated(results)
    write_published(results)
    assert check_tables(results) == []
    monkeypatch.setattr(report, "published", lambda: results)
    for path in sorted(p for p in folder.iterdir() if p.name != SUMS):
        with (
            changed(path, flipped(path.read_bytes(), 50)),
            tried.refused("results", SettingsError, match=f"{path.name} is damaged"),
        ):
            report.main([])


WRONG = [
    ("episodes", "score", 7, "line 3: score = 7"),
    ("episodes", "score", np.inf, "line 3: score = inf"),
    ("episodes", "score", -np.inf, "line 3: score = -inf"),
    ("episodes", "score", np.nan, "line 3: score = nan"),
    ("episodes", "score", -0.001, "line 3: score = -0.001"),
    ("episodes", "score", "0.5x", "line 3: score = 0.5x"),
    ("episodes", "success", 2, "line 3: success = 2"),
    ("episodes", "success", 0.5, "line 3: success = 0.5"),
    ("episodes", "success", -1, "line 3: success = -1"),
    ("episodes", "success", np.nan, "line 3: success = nan"),
    ("episodes", "steps", np.nan, "line 3: steps = nan"),
    ("episodes", "steps", 0, "line 3: steps = 0"),
    ("episodes", "steps", 10.5, "line 3: steps = 10.5"),
    ("episodes", "steps", np.inf, "line 3: steps = inf"),
    ("episodes", "state_seed", 7, "line 3: state_seed = 7 stands twice"),
    ("episodes", "state_seed", 7.5, "line 3: state_seed = 7.5"),
    ("episodes", "state_seed", -1, "line 3: state_seed = -1"),
    ("episodes", "jerk_agent", np.inf, "line 3: jerk_agent = inf"),
    ("episodes", "jerk_agent", "fast", "line 3: jerk_agent = fast"),
    ("acting", "score", 7, "line 3: score = 7"),
    ("acting", "state_seed", 7, "line 3: state_seed = 7 stands twice"),
    ("curve", "score", 7, "line 3: score = 7"),
    ("curve", "step", 0, "line 3: step = 0"),
    ("curve", "state_seed", 7, "line 3: state_seed = 7 stands twice"),
    ("latency", "act_ms_p99", np.inf, "line 3: act_ms_p99 = inf"),
    ("latency", "act_ms_p50", -3, "line 3: act_ms_p50 = -3"),
    ("latency", "state_seed", 7, "line 3: state_seed = 7 stands twice"),
]


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "older"])
@pytest.mark.parametrize("file, column, value, words", WRONG, ids=lambda v: str(v)[:24])
def test_a_number_that_cannot_be_is_refused(results, tried, sealed, file, column, value, words):
    "Whatever the checksum says."
    folder = evaluated(results, sealed=False)
    path = folder / f"{file}.csv"
    rows = pd.read_csv(path).astype({column: object})
    rows.loc[1, column] = value
    rows.to_csv(path, index=False, na_rep="nan")
    if sealed:
        evaluated_again = json.loads(read_text(folder / "run.json"))
        write_text(folder / "run.json", json.dumps({**evaluated_again, "schema": SCHEMA}))
        seal(folder)
    with tried.refused("rows", DamagedError, match=f"{file}.csv, {words}"):
        check_evaluation(CELL, folder)
    (said,) = check_tables(results)
    assert f"{file}.csv, {words}" in said and str(folder) in said
    with tried.refused("rows", DamagedError, match=f"{file}.csv"):
        publish("laptop-scripted", results, Results(results.folder.with_name("published")))
    assert not results.folder.with_name("published").exists()


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "older"])
@pytest.mark.parametrize(
    "info",
    [
        {"method": "dp_ag"},
        {"task": "pusht_img"},
        {"seed": 1},
        {"run": "laptop-human"},
        {"seed": "0"},
        {"seed": None},
    ],
    ids=str,
)
def test_rows_of_another_cell_are_refused(results, tried, sealed, info):
    folder = evaluated(results, sealed=sealed, info=info)
    ((name, value),) = info.items()
    with tried.refused(
        "rows", DamagedError, match=f"s0/run.json: {name} = {value!r}, but it is in a folder of"
    ):
        Measured(results).episodes  # noqa: B018
    (said,) = check_tables(results)
    assert f"{folder}/run.json: {name}" in said


def test_a_folder_that_was_moved_is_refused(results, tried):
    "A seal travels with its folder; run.json says where it belongs."
    folder = evaluated(results)
    for cell in (Cell("laptop-scripted", "pusht_kp", "bet", 0), Cell("laptop-scripted", "pusht_kp", "dp", 1)):
        shutil.copytree(folder, results.evaluation(cell))
        with tried.refused("rows", DamagedError, match="run.json"):
            Measured(results).episodes  # noqa: B018
        shutil.rmtree(results.evaluation(cell))
    Measured(results).episodes  # noqa: B018


@pytest.mark.parametrize("text", ["{", "[]", "3", "", '{"schema": "two"}', '{"schema": 99}', '{"schema": 2}'])
def test_a_run_json_that_says_nothing_is_refused(results, tried, text):
    folder = evaluated(results, sealed=False)
    write_text(folder / "run.json", text)
    with tried.refused("rows", DamagedError, match="run.json|SHA256SUMS"):
        Measured(results).episodes  # noqa: B018


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not a csv file"),
        ("state_seed,score\n", "has no rows"),
        ("state_seed\n7\n", "has no column score"),
        ("score\n0.5\n", "has no column state_seed"),
        ("state_seed,score\n7,0.5,1\n", "more values than the first one"),
        ("state_seed,score\n7,0.5\n8,0.5,1\n", "not a csv file"),
        ("method,state_seed,score\nbet,7,0.5\n", "has a column method"),
        ("state_seed,seed,score,train_seed\n7,7,0.5,3\n", "has a column train_seed"),
        ("\xff\xfe", "episodes.csv"),
    ],
)
def test_a_file_that_is_no_rows_is_refused(results, tried, text, words):
    folder = evaluated(results, sealed=False)
    (folder / "episodes.csv").write_bytes(text.encode("latin1"))
    with tried.refused("rows", DamagedError, match=words):
        Measured(results).episodes  # noqa: B018


def test_spirals_that_cannot_be_are_refused(results, tried):
    path = results.spirals("laptop") / "runs.csv"
    head = "method,train_seed,mse\n"
    for text in (
        "base_flow,10,nan\n",
        "base_flow,10,-1\n",
        "base_flow,10,inf\n",
        "base_flow,10,1\n" * 2,
        "a\n",
    ):
        write_text(path, head + text)
        with tried.refused("rows", DamagedError, match="runs.csv, line"):
            Measured(results).spirals  # noqa: B018


def test_what_is_published_is_sealed_too_and_good_rows_pass(results, tmp_path, tried):
    target = Results(tmp_path / "published")
    folder = evaluated(results)
    write_text(folder / "notes.txt", "mine")
    with tried.refused("results", DamagedError, match="notes.txt has no checksum"):
        publish("laptop-scripted", results, target)
    (folder / "notes.txt").unlink()
    with tried.survived("results"):
        publish("laptop-scripted", results, target)
        check_seal(target.evaluation(CELL), required=True)
        assert check_tables(target) == []


def test_a_checkpoint_of_another_cell_is_not_evaluated(tried):
    info = {"run": "laptop-scripted", "task": "pusht_kp", "seed": 0, "data_hash": "x"}
    check_cell(info, CELL, Path("checkpoint"))
    for other in ({"seed": 1}, {"task": "pusht_img"}, {"run": "smoke-scripted"}, {"method": "bet"}):
        with tried.refused("checkpoints", DamagedError, match="checkpoint: "):
            check_cell({**info, **other}, CELL, Path("checkpoint"))


# Writers that are killed

WRITER = """
import json, os, sys
from pathlib import Path
from dpag import files

base, kind, steps = Path(sys.argv[1]), sys.argv[2], 0
if kind == "renaming":
    files.exchange = lambda a, b: False


def step(event="", args=()):
    "Die before the step of this number."
    global steps
    if event.partition(".")[0] in ("", "os", "open", "shutil"):
        steps += 1
        if steps == last:
            os._exit(9)


def write(place, text):
    if kind == "file":
        files.write_text(place / "c", text)
        return
    with files.atomic_folder(place / "c") as folder:
        for name in "ab":
            (folder / name).write_text(text, encoding="utf-8")
        files.seal(folder)


def read(place):
    if kind == "file":
        return [files.read_text(place / "c")]
    files.restore(place / "c")
    files.check_seal(place / "c", required=True)
    return [files.read_text(place / "c" / name) for name in "ab"]


found, last, ended = [], 0, False
while not ended:
    last, place = last + 1, base / str(last)
    write(place, "old")
    if (child := os.fork()) == 0:
        for name in ("_flush", "exchange"):  # which make no event

            def counted(*args, f=getattr(files, name)):
                step()
                done = f(*args)
                step()
                return done

            setattr(files, name, counted)
        sys.addaudithook(step)
        write(place, "new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    ended = code == 0
    texts = read(place)
    write(place, "next")
    left = sorted(p.name for p in place.iterdir())
    found.append([texts, read(place), left])
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["exchange", "renaming", "file"])
def test_a_writer_that_is_killed_between_any_two_steps_leaves_old_or_new(tmp_path, tried, kind):
    if kind == "exchange":
        for name in "ab":
            (tmp_path / name).mkdir()
        if not exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this file system cannot exchange two names")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "w"), kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    for texts, after, left in found:
        with tried.survived("writers that are killed"):
            assert set(texts) in ({"old"}, {"new"})
            assert set(after) == {"next"} and left == ["c"]
    assert len(found) > (5 if kind == "file" else 20)
    assert {texts[0] for texts, _, _ in found} == {"old", "new"}


def test_without_exchange_a_reader_finds_the_old_folder(tmp_path, tried, checkpoint):
    "As a process leaves it that is killed between the two renamings."
    for name, make, read in (
        ("c", lambda p: shutil.copytree(checkpoint[0], p), load_policy),
        ("d.zarr", lambda p: save_demonstrations(made_up(), p), load_demonstrations),
    ):
        make(tmp_path / name)
        (tmp_path / name).rename(tmp_path / f".{name}.old")
        with tried.survived("writers that are killed"):
            read(tmp_path / name)
        assert not (tmp_path / f".{name}.old").exists()


def test_an_old_folder_that_was_replaced_is_removed_and_not_restored(tmp_path):
    for name in ("c", ".c.old"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "a", name)
    restore(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and read_text(tmp_path / "c/a") == "c"
    discard(tmp_path / "c")
    restore(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_may_restore_in_the_middle_of_a_replacement(tmp_path, monkeypatch, tried):
    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    rename, calls = os.rename, []

    def slow(a, b):
        rename(a, b)
        if len(calls) < 2:
            calls.append((a, b))
            restore(tmp_path / "c")

    for text in ("old", "new"):
        if text == "new":
            monkeypatch.setattr(os, "rename", slow)
        with tried.survived("writers that are killed"), atomic_folder(tmp_path / "c") as folder:
            write_text(folder / "a", text)
    assert read_text(tmp_path / "c/a") == "new" and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_exchange_that_fails_for_another_reason_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    if sys.platform == "linux":
        with pytest.raises(FileNotFoundError):
            exchange(tmp_path / "a", tmp_path / "none")


def dead_process() -> int:
    p = subprocess.Popen([sys.executable, "-c", ""])
    p.wait()
    return p.pid


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path, tried):
    dead, alive = dead_process(), os.getppid()
    names = [f".resume.safetensors.{dead}.tmp", f".log.csv.{alive}.tmp", ".notes.tmp", "mine.tmp", ".c.x.tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f".at5.{dead}.tmp").mkdir()
    (tmp_path / f".at5.{dead}.tmp/model.safetensors").touch()
    with tried.survived("writers that are killed"):
        write_text(tmp_path / "a", "")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a", *names[1:]])
    sweep(tmp_path / "none")


def test_a_run_that_has_ended_leaves_nothing_of_one_that_was_killed(small, shapes, dataset, tmp_path, tried):
    "Though it writes nothing any more."
    trained(small, shapes, dataset, tmp_path)
    (tmp_path / f".log.csv.{dead_process()}.tmp").touch()
    with tried.survived("writers that are killed"):
        trained(small, shapes, dataset, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "resume.safetensors"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, tried):
    write_text(tmp_path / "a", "old")
    with atomic_folder(tmp_path / "c") as folder:
        write_text(folder / "a", "old")
    for error in (KeyboardInterrupt, OSError):
        with tried.refused("writers that are killed", error), atomic(tmp_path / "a") as tmp:
            tmp.write_text("half", encoding="utf-8")
            raise error
        with tried.refused("writers that are killed", error), atomic_folder(tmp_path / "c") as folder:
            raise error
    assert read_text(tmp_path / "a") == read_text(tmp_path / "c/a") == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


# Downloads


@pytest.fixture
def network(monkeypatch):
    "A network of made-up servers: {url: (status, headers, content)}; what was asked for is in `asked`."
    servers, asked = {}, []

    def send(self, request, **kw):
        asked.append(request.url)
        response = requests.Response()
        response.url, response.request = request.url, request
        response.status_code, headers, content = servers[request.url]
        response.headers.update(headers)
        response.raw = io.BytesIO(content)
        response.raw.release_conn = lambda: None
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    return servers, asked


def to(url, status=302):
    return status, {"location": url}, b""


def test_a_download_stays_on_https(network, tmp_path, tried):
    servers, asked = network
    servers["https://a.org/f"] = to("https://b.org/g")
    servers["https://b.org/g"] = to("/h", 307)
    servers["https://b.org/h"] = (200, {}, b"data")
    with tried.survived("downloads"):
        assert fetch("f", "https://a.org/f", tmp_path, retries=0).read_bytes() == b"data"
    assert len(asked) == 3


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["http://a.org/g", "HTTP://a.org/g", "ftp://a.org/g"])
def test_a_redirect_away_from_https_is_not_followed(network, tmp_path, tried, status, target):
    servers, asked = network
    servers["https://a.org/f"] = to("https://a.org/e", status)
    servers["https://a.org/e"] = to(target, status)
    for url in ("http://a.org/g", "ftp://a.org/g"):
        servers[url] = (200, {}, b"forged")
    with tried.refused("downloads", ConnectionError, match="a.org/g is not https"):
        fetch("f", "https://a.org/f", tmp_path, retries=3)
    assert asked == ["https://a.org/f", "https://a.org/e"] and not list(tmp_path.iterdir())


def test_plain_http_is_never_asked(network, tmp_path, tried):
    for url in ("http://a.org/f", "ftp://a.org/f", "file:///etc/passwd", "//a.org/f", ""):
        with tried.refused("downloads", ConnectionError, match="is not https.*DPAG_MIRROR"):
            fetch("f", url, tmp_path)
    assert network[1] == [] and not list(tmp_path.iterdir())


def test_no_address_of_data_is_plain_http():
    for path in (Path(files.__file__).parent / "tasks").rglob("*.py"):
        assert "http://" not in read_text(path), path


def test_robomimics_files_have_so_many_episodes(tmp_path, monkeypatch, tried):
    from dpag.tasks.robomimic import files as robomimic

    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    monkeypatch.setattr(robomimic, "fetch", lambda name, url, folder: folder / "f")
    monkeypatch.setattr(robomimic, "read_hdf5", lambda path, scene: made_up())
    (tmp_path / "f").touch()
    with tried.refused("downloads", match="has 2 episodes, robomimic's has 200"):
        robomimic.human_demonstrations("lift", "ph", tmp_path)
    assert not (tmp_path / "f").exists() and robomimic.HUMAN_URL.startswith("https://")


def kitchen_zip(path, time_first=True, mask=None, lengths=(5, 9, 7, 3)):
    """A made-up kitchen.zip, with the time first as the public one has it; joint 0 counts the steps from 100
    times the episode on."""
    n, steps = len(lengths), max(lengths)
    mask = np.arange(steps) < np.array(lengths)[:, None] if mask is None else mask
    obs, action = np.zeros((n, steps, 60)), np.full((n, steps, 9), 0.01)
    obs[..., 0] = 100 * np.arange(n)[:, None] + np.arange(steps)
    arrays = {"observations_seq": obs, "actions_seq": action, "existence_mask": mask.astype(float)}
    with zipfile.ZipFile(path, "w") as z:
        for k, a in arrays.items():
            b = io.BytesIO()
            np.save(b, a.swapaxes(0, 1) if time_first else a)
            z.writestr(f"kitchen/{k}.npy", b.getvalue())
    return path


@pytest.mark.parametrize("time_first", [False, True])
def test_the_kitchens_episodes_are_found_along_either_axis(tmp_path, tried, time_first):
    with tried.survived("downloads"):
        demos = kitchen.read_archive(kitchen_zip(tmp_path / "kitchen.zip", time_first))
        assert np.diff(demos.episode_ends, prepend=0).tolist() == [5, 9, 7, 3]
        for i in range(4):
            joint = demos.episode(i)["joints"][:, 0]
            assert joint[0] == 100 * i and (np.diff(joint) == 1).all()


def test_a_kitchen_file_that_is_damaged_or_another_is_refused(tmp_path, monkeypatch, tried):
    good = np.arange(9) < np.array([5, 9, 7, 3])[:, None]
    holes, empty, twos = good.copy(), good.copy(), good.astype(float)
    holes[1, 3] = holes[0, 0] = False
    empty[2] = False
    empty[0, 0] = False
    twos[0, 0] = 2
    for mask in (holes, empty, twos, good * np.nan):
        path = kitchen_zip(tmp_path / "kitchen.zip", mask=mask)
        with tried.refused("downloads", match="kitchen.zip: .*existence_mask"):
            kitchen.read_archive(path)
    path = kitchen_zip(tmp_path / "kitchen.zip")
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with tried.refused("downloads", match="has 4 episodes, the humans' has 566"):
        kitchen.human_demonstrations(tmp_path)
    content, expected = path.read_bytes(), kitchen.read_archive(path).data_hash()
    for bit in some_bits(content, 60, 0):
        path.write_bytes(flipped(content, bit))
        refused_or_same(
            tried, "downloads", lambda: kitchen.read_archive(path).data_hash(), lambda h: h == expected
        )


# Latency


def test_the_first_acts_are_not_timed(tried):
    class SlowAtFirst(Policy):
        def __init__(self, slow):
            super().__init__()
            self.slow, self.acts = slow, 0

        def act(self, obs, generator):
            self.acts += 1
            time.sleep(0.3 if self.acts <= self.slow else 0)
            return obs["pos"]

    obs = {"pos": torch.zeros(1, 2, 2)}
    with tried.survived("latency"):
        policy = SlowAtFirst(WARM_UP)
        p50, p99 = act_latency(policy, obs, 5)
        assert p50 <= p99 < 300 and policy.acts == WARM_UP + 5
    assert act_latency(SlowAtFirst(WARM_UP + 1), obs, 5)[1] > 200
    assert np.isnan(act_latency(SlowAtFirst(0), obs, 0)).all()
