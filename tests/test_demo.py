"""The weights that are in the repository, and what `make demo` shows of them."""

import hashlib
import json
import pickle
import shutil
import socket
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dpag import demo, weights
from dpag.config import SettingsError
from dpag.demo import ARM, PUSH_T, main, show, side_by_side, watch
from dpag.files import DamagedError, read_text, root, seal, write_text
from dpag.libraries import can_draw
from dpag.paths import Cell, Results, published
from dpag.policy import SCHEMA, load_policy, save_policy
from dpag.provenance import processor
from dpag.rows import read_episodes
from dpag.weights import LARGEST, load_shipped, ship, shipped_cells, size_of

HUMAN = [Cell("interplay-human", "pusht_kp", method, 0) for method in ("ab_dp_50k", "ab_full_50k")]
CELLS = [*PUSH_T.cells, *ARM.cells, *HUMAN]


def committed(cell, column):
    "What is said of the committed rows."
    rows = read_episodes(published().evaluation(cell) / "episodes.csv")
    return f"committed {rows[column].mean():.3f} ({len(rows)} episodes)"


def test_what_is_shipped_is_small_and_has_no_pickles():
    assert set(CELLS) <= set(shipped_cells(published()))
    assert size_of(published().folder / "weights") < LARGEST == 20_000_000
    for cell in shipped_cells(published()):
        folder = published().shipped(cell)
        names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert {"run.json", *(f"checkpoint/{n}" for n in ("checkpoint.json", "model.safetensors"))} <= names
        assert {n.rpartition(".")[2] for n in names - {"checkpoint/SHA256SUMS"}} <= {
            "json",
            "safetensors",
            "md",
        }
        for line in read_text(folder / "checkpoint/SHA256SUMS").splitlines():
            digest, name = line.split("  ")
            assert hashlib.sha256((folder / "checkpoint" / name).read_bytes()).hexdigest() == digest
        raw = (folder / "checkpoint/model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        assert {t["dtype"] for k, t in json.loads(raw[8 : 8 + length]).items() if k != "__metadata__"} <= {
            "F32",
            "I64",
        }


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_they_load_without_a_network_or_pickles(monkeypatch, cell):
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (socket, "create_connection")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("a pickle or a network"))
    policy, run = load_shipped(cell)
    assert not policy.training and (run["task"], run["method"]) == (cell.task, cell.method)


@pytest.mark.parametrize("cell", [*PUSH_T.cells, HUMAN[1]], ids=lambda c: c.name)
def test_the_committed_rows_come_out_again(cell):
    "To the last digit where they were measured; elsewhere contacts let the last digits grow."
    shown = watch(cell)
    run = json.loads(read_text(published().shipped(cell) / "run.json"))
    off = np.abs(shown.rows.score - shown.committed.score)
    there = run.get("evaluated", {"device": "", "torch": ""})
    if processor() in there["device"] and torch.__version__ == there["torch"]:
        assert off.max() < 1e-5
    assert abs(shown.rows.score.mean() - shown.committed.score.mean()) < 0.03
    assert len(shown.rows) == len(shown.committed) and len(shown.frames) > 10


def test_an_older_schema_acts_as_it_did():
    "How far the demonstrations reach beyond the clip came with schema 5; without it the clip is the limit."
    for cell in CELLS:
        policy, meta = load_policy(published().shipped(cell) / "checkpoint")
        assert meta["schema"] <= SCHEMA
        if meta["schema"] < 5:
            assert not policy.diffusion.reach.any()


# What does not belong together is refused.


@pytest.fixture
def trees(tmp_path):
    "A run with the checkpoint of a cell, and a tree with its rows, where nothing is shipped."
    source, into, cell = Results(tmp_path / "runs"), Results(tmp_path / "results"), PUSH_T.cells[0]
    shutil.copytree(published().shipped(cell) / "checkpoint", source.checkpoint(cell))
    shutil.copytree(published().evaluation(cell), into.evaluation(cell))
    return source, into, cell


def test_a_checkpoint_is_shipped_with_its_rows(trees):
    source, into, cell = trees
    for _ in range(2):  # the second time in place of the first
        ship(cell, source, into)
        assert shipped_cells(into) == [cell]
    policy, run = load_shipped(cell, into)
    assert run == json.loads(read_text(into.evaluation(cell) / "run.json")) and not list(
        into.folder.rglob(".*")
    )


def test_a_variants_checkpoint_is_shipped_with_its_own_rows_alone(tried, tmp_path):
    "Its `kind` is DP-AG's: the settings tell it from another variant."
    source, into, other = (
        Results(tmp_path / "runs"),
        Results(tmp_path / "results"),
        published().shipped(HUMAN[0]),
    )
    for cell in HUMAN:
        shutil.copytree(published().evaluation(cell), into.evaluation(cell))
    shutil.copytree(published().shipped(HUMAN[1]) / "checkpoint", source.checkpoint(HUMAN[1]))
    ship(HUMAN[1], source, into)
    assert load_shipped(HUMAN[1], into)[0].method.kind == "dp_ag"
    shutil.rmtree(source.checkpoint(HUMAN[1]))
    shutil.copytree(other / "checkpoint", source.checkpoint(HUMAN[1]))
    with tried.refused("shipped weights", SettingsError, match="settings_hash = .* but the rows are of"):
        ship(HUMAN[1], source, into)


@pytest.mark.parametrize("field", weights.SAME)
def test_another_trainings_checkpoint_is_not_shipped(tried, trees, field):
    source, into, cell = trees
    folder = source.checkpoint(cell)
    meta = json.loads(read_text(folder / "checkpoint.json"))
    meta["info"][field] = "another"
    write_text(folder / "checkpoint.json", json.dumps(meta))
    (folder / "SHA256SUMS").unlink()
    seal(folder)
    with tried.refused("shipped weights", SettingsError, match=f"{field} = 'another', but the rows are of"):
        ship(cell, source, into)
    assert shipped_cells(into) == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"task": "pusht_img"}, {"run": "smoke-scripted"}])
def test_another_cells_checkpoint_is_not_shipped(tried, trees, change):
    source, into, cell = trees
    policy, meta = load_policy(source.checkpoint(cell))
    save_policy(source.checkpoint(cell), policy, meta["info"] | change)
    with tried.refused("shipped weights", DamagedError, match="but it is in a folder of"):
        ship(cell, source, into)


def test_another_methods_checkpoint_is_not_shipped(tried, trees):
    source, into, cell = trees
    shutil.rmtree(source.checkpoint(cell))
    shutil.copytree(published().shipped(PUSH_T.cells[1]) / "checkpoint", source.checkpoint(cell))
    with tried.refused("shipped weights", SettingsError, match="method = 'dp_ag', but the rows are of 'dp'"):
        ship(cell, source, into)


def test_what_is_too_large_is_not_shipped(tried, trees, monkeypatch):
    source, into, cell = trees
    monkeypatch.setattr(weights, "LARGEST", 1_000_000)
    with tried.refused("shipped weights", SettingsError, match=r"\d MB with what is shipped, 1 are allowed"):
        ship(cell, source, into)


def test_a_changed_byte_is_found(tried, trees):
    source, into, cell = trees
    ship(cell, source, into)
    path = into.shipped(cell) / "checkpoint/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with tried.refused("shipped weights", DamagedError, match="model.safetensors is damaged"):
        load_shipped(cell, into)


def test_rows_that_were_measured_anew_need_their_weights(tried, trees):
    source, into, cell = trees
    ship(cell, source, into)
    path = into.evaluation(cell) / "run.json"
    write_text(path, json.dumps(json.loads(read_text(path)) | {"commit": "0123456789ab"}))
    (path.parent / "SHA256SUMS").unlink()
    seal(path.parent)
    with tried.refused("shipped weights", SettingsError, match="the committed rows are of another run"):
        load_shipped(cell, into)


def test_mistakes_on_the_command_line_are_sentences(tried):
    with tried.refused("shipped weights", SettingsError, match="RUN/TASK/METHOD/sSEED is needed"):
        weights.main(["laptop-scripted/pusht_kp/dp"])
    with tried.refused("shipped weights", FileNotFoundError, match="train first"):
        weights.main(["smoke-scripted/pusht_kp/dp/s77"])
    with tried.refused("shipped weights", SettingsError, match="episodes = 0: one at least"):
        main(["--episodes", "0"])


# The films.


def frames_of(path):
    with Image.open(path) as film:
        return film.n_frames, film.size


def test_push_t_is_filmed(tmp_path, capsys):
    film, picture = main(["--episodes", "1", "--no-arm", "--out", str(tmp_path / "films")])
    said = capsys.readouterr().out
    n, size = frames_of(film)
    assert 10 < n <= 151 and size == (2 * 384 + 8, 384 + demo.BAR)
    assert frames_of(picture)[1] == (3 * size[0], 2 * size[1])
    assert "DP: " in said and "DP-AG: " in said and all(committed(c, "score") in said for c in PUSH_T.cells)
    assert film.name in said and "the grey T onto the green one" in said


@pytest.mark.skipif(not can_draw(), reason="the arm sees through cameras, and drawing needs OpenGL")
def test_the_arm_is_filmed(tmp_path, capsys):
    film, _ = show(ARM, tmp_path)
    n, _ = frames_of(film)
    assert n > 20 and committed(ARM.cells[0], "success") in capsys.readouterr().out


def test_without_opengl_the_arm_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "can_draw", lambda: False)
    monkeypatch.setattr(demo, "show", lambda scene, folder: [folder / scene.name])
    assert main(["--out", str(tmp_path)]) == [tmp_path / "push_t"]
    assert "OpenGL" in capsys.readouterr().out


def test_the_shorter_film_waits():
    black, grey = ([np.full((40, 60, 3), v, np.uint8)] * n for v, n in ((0, 3), (128, 5)))
    film = side_by_side({"short": black, "long": grey})
    assert len(film) == 5 and film[-1][60, 60].tolist() == [0] * 3 and film[-1][60, -60].tolist() == [128] * 3


def test_the_command_is_the_readmes_first():
    commands = read_text(root() / "README.md").split("## Commands")[1].split("```")[1]
    assert commands.splitlines()[1].startswith("make demo ")
    assert "python -m dpag.demo" in read_text(root() / "Makefile").split("\ndemo:")[1].split("\n\n")[0]


def test_a_cell_that_is_not_shipped_is_named(tried):
    with tried.refused("shipped weights", FileNotFoundError, match="no checkpoint at .*pusht_kp/bet/s0"):
        load_shipped(Cell("laptop-scripted", "pusht_kp", "bet", 0))
