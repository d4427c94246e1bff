"""LeRobot datasets: what LeRobot wrote is read as LeRobot reads it, what dpag wrote comes back and is read by
LeRobot, and nothing that is wrong passes.

`tests/data/lerobot` was written and read by lerobot itself (its README says how). Tests beside a live LeRobot
run where DPAG_LEROBOT_V21 and DPAG_LEROBOT_V30 name the Pythons of environments with lerobot 0.3.3 and 0.4.4
(`make lerobot`)."""

import contextlib
import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("av")

import pyarrow as pa

from dpag import lerobot
from dpag.config import generator, layered
from dpag.data import Demonstrations, WindowDataset, load_demonstrations, save_demonstrations
from dpag.files import DamagedError, read_text
from dpag.lerobot import INFO, OURS, PATHS, VideoCoding, is_lerobot, read_lerobot, write_lerobot
from dpag.methods.dp_ag import DPAGConfig
from dpag.policy import PolicyConfig, build_policy, load_policy, save_policy
from dpag.train import TrainConfig, fit

DATA = Path(__file__).parent / "data/lerobot"
PEER = Path(__file__).parent / "lerobot/peer.py"
VERSIONS = list(PATHS)
CAMERA = "observation.images.top"
refused = partial(pytest.raises, DamagedError)


def made_up(size=(64, 80), seed=0) -> Demonstrations:
    "Arrays of every kind, and episodes of one step and more."
    rng, ends = np.random.default_rng(seed), np.array([6, 7, 19])
    n = int(ends[-1])
    rows, columns = np.mgrid[: size[0], : size[1]]
    shades = [np.stack([rows * 2, columns * 2, np.full_like(rows, 9 * t)], -1) for t in range(n)]
    arrays = {
        "state": rng.normal(size=(n, 3)).astype(np.float32),
        "image": np.stack(shades).astype(np.uint8),
        "depth": rng.normal(size=(n, 2, 3)),
        "touch": rng.integers(0, 2, (n, 1)).astype(bool),
        "count": rng.integers(-9, 9, n).astype(np.int16),
        "action": rng.normal(size=(n, 2)).astype(np.float32),
    }
    meta = {"source": "made up", "seed": 7, "task": "Stir."}
    return Demonstrations(arrays, ends, meta)


def same(a: Demonstrations, b: Demonstrations, keys=None):
    np.testing.assert_array_equal(a.episode_ends, b.episode_ends)
    assert keys or a.arrays.keys() == b.arrays.keys()
    for k in keys or a.arrays:
        assert a.arrays[k].dtype == b.arrays[k].dtype, k
        np.testing.assert_array_equal(a.arrays[k], b.arrays[k], err_msg=k)


def same_values(ours: np.ndarray, theirs: np.ndarray, key: str):
    "As LeRobot gives them, which makes single numbers 32-bit and drops their axis."
    np.testing.assert_array_equal(ours.astype(theirs.dtype), theirs.reshape(ours.shape), err_msg=key)


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def written(version, tmp_path_factory):
    "What dpag wrote, with a video."
    folder = tmp_path_factory.mktemp("written") / version
    write_lerobot(made_up(), folder, 10, version)
    return folder


# What LeRobot wrote


def test_a_dataset_of_lerobots_is_read_as_lerobot_reads_it(version):
    found = read_lerobot(DATA / version)
    with np.load(DATA / f"{version}.npz") as read:
        assert set(found.arrays) == set(read.files) - {*lerobot.BOOKKEEPING, "task", "steps", "means"}
        for k in found.arrays.keys() - {CAMERA}:
            same_values(found.arrays[k], read[k], k)
        images = found.arrays[CAMERA].astype(int)
        # Equal where they were made; another processor's conversion of colours may round otherwise.
        assert np.abs(images[read["steps"]] - read[CAMERA]).max() <= 1
        np.testing.assert_allclose(images.mean((1, 2)), read["means"], atol=0.2)
        np.testing.assert_array_equal(
            np.flatnonzero(np.diff(read["episode_index"])) + 1, found.episode_ends[:-1]
        )
    meta = found.meta
    assert (meta["fps"], meta["robot_type"], meta["codebase_version"]) == (10, "disc", version)
    assert [t for (t,) in meta["episode_tasks"]] == ["push", "push", "pull"] and set(meta["tasks"]) == {
        "push",
        "pull",
    }
    assert meta["names"] == {"observation.state": ["x", "y", "z"]}
    assert found.arrays[CAMERA].shape == (16, 64, 64, 3) and found.arrays[CAMERA].dtype == np.uint8
    assert set(found.shapes.obs) == {k for k in found.arrays if k.startswith("observation")}


def test_keys_limit_what_is_read_and_say_as_what(version):
    found = read_lerobot(DATA / version, {"action": None, "next.reward": np.float64, "task_index": "int8"})
    assert {k: a.dtype.name for k, a in found.arrays.items()} == {
        "action": "float32",
        "next.reward": "float64",
        "task_index": "int8",
    }
    with refused(match="do not fit into int8"):
        read_lerobot(DATA / version, {"action": "int8"})
    with refused(match="has no 'reward' to read; there are action, "):
        read_lerobot(DATA / version, ["reward"])


def test_other_names_and_a_drift_of_the_video(tmp_path):
    found = read_lerobot(DATA / "v3.0", names={"next.reward": "reward", CAMERA: "top"})
    assert {"reward", "top"} <= set(found.arrays) and set(found.shapes.obs) >= {"top", "observation.state"}
    for names, says in (({"x": "y"}, "no feature 'x'"), ({CAMERA: "action"}, "two features get one name")):
        with pytest.raises(ValueError, match=says):
            read_lerobot(DATA / "v3.0", names=names)
    for tolerance in (0, 0.05, -1, float("nan")):
        with pytest.raises(ValueError, match="allowed is above 0, and below half a step, 0.05"):
            read_lerobot(DATA / "v3.0", tolerance=tolerance)
    shutil.copytree(DATA / "v3.0", tmp_path / "d")
    key = f"videos/{CAMERA}/from_timestamp"
    cell(key, 1, 0.51, "meta/episodes")(tmp_path / "d")
    with refused(match="no step's"):
        read_lerobot(tmp_path / "d")
    np.testing.assert_array_equal(
        read_lerobot(tmp_path / "d", tolerance=0.02).arrays[CAMERA], found.arrays["top"]
    )


def test_a_dataset_of_lerobots_goes_to_zarr_and_trains(version, tmp_path):
    "DP-AG from numbers and the camera; LeRobot's keys have dots, and modules' names must not."
    demos = read_lerobot(DATA / version, ["observation.state", CAMERA, "action"])
    save_demonstrations(demos, tmp_path / "d.zarr")
    again = load_demonstrations(tmp_path / "d.zarr")
    same(demos, again)
    dataset = WindowDataset.of(again, horizon=8, n_obs_steps=2, n_action_steps=4)
    settings = {"horizon": 8, "n_action_steps": 4, "encoder": {"camera": {"crop": 60}}}
    policy = build_policy(DPAGConfig(), layered(PolicyConfig, settings), dataset=dataset)
    fit(policy, dataset, TrainConfig(steps=2, batch_size=4, log_every=1), folder=tmp_path / "t")
    save_policy(tmp_path / "p", policy)
    for p in (policy, load_policy(tmp_path / "p")[0]):
        action = p.eval().act(dataset.batch(1, generator("obs"))["obs"], generator("act"))
        assert action.shape == (1, 4, 2)


# Round trips


@pytest.mark.parametrize("seed", range(3))
def test_zarr_to_lerobot_and_back_is_exact(version, seed, tmp_path):
    save_demonstrations(made_up((5, 7), seed), tmp_path / "a.zarr")
    demos = load_demonstrations(tmp_path / "a.zarr")
    write_lerobot(demos, tmp_path / "b", 12.5, version, videos=False)
    again = read_lerobot(tmp_path / "b")
    same(demos, again)
    assert again.data_hash() == demos.data_hash() == demos.meta["hash"]
    assert (
        again.meta["seed"] == 7
        and again.meta["episode_tasks"] == [["Stir."]] * 3
        and again.meta["fps"] == 12.5
    )
    save_demonstrations(again, tmp_path / "c.zarr")
    same(demos, load_demonstrations(tmp_path / "c.zarr"))
    write_lerobot(again, tmp_path / "d", 12.5, version, videos=False)
    for f in sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.parquet")):
        assert (tmp_path / "d" / f).read_bytes() == (tmp_path / "b" / f).read_bytes(), f


def test_videos_lose_a_little_and_numbers_nothing(written):
    demos, again = made_up(), read_lerobot(written)
    same(demos, again, set(demos.arrays) - {"image"})
    error = np.abs(again.arrays["image"].astype(int) - demos.arrays["image"])
    assert error.mean() < 4 and again.arrays["image"].shape == demos.arrays["image"].shape
    for t in (0, 6, 18):  # each frame is the one of its step: 9 levels of blue from one to the next
        assert abs(again.arrays["image"][t, ..., 2].mean() - 9 * t) < 4


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_other_codecs_and_less_loss(tmp_path, codec):
    demos = made_up()
    errors = []
    for crf in (0, 40):
        write_lerobot(demos, tmp_path / "d", 10, coding=VideoCoding(codec=codec, crf=crf))
        images = read_lerobot(tmp_path / "d").arrays["image"]
        errors.append(np.abs(images.astype(int) - demos.arrays["image"]).mean())
    assert errors[0] < 3 and errors[0] < errors[1]


@pytest.mark.parametrize("videos", [True, False])
def test_many_files_and_folders_hold_the_same_as_one(version, videos, tmp_path, monkeypatch):
    write_lerobot(made_up(), tmp_path / "one", 10, version, videos)
    for name, n in {"DATA_MB": 0, "VIDEO_MB": 0, "FILES": 2}.items():
        monkeypatch.setattr(lerobot, name, n)
    write_lerobot(made_up(), tmp_path / "many", 10, version, videos)
    assert len(list((tmp_path / "many/data").glob("*/*.parquet"))) == 3
    assert len(list((tmp_path / "many/data").iterdir())) == 2
    one, many = read_lerobot(tmp_path / "one"), read_lerobot(tmp_path / "many")
    same(one, many, set(one.arrays) - {"image"})
    difference = np.abs(one.arrays["image"].astype(int) - many.arrays["image"])
    assert difference.mean() < (2 if videos else 1e-9)


def test_tasks_per_episode_and_per_step(version, tmp_path):
    write_lerobot(made_up((4, 4)), tmp_path / "d", 10, version, False, task=["a", "b", "a"])
    again = read_lerobot(tmp_path / "d", ["action", "task_index"])
    assert again.meta["tasks"] == ["a", "b"] and again.meta["episode_tasks"] == [["a"], ["b"], ["a"]]
    assert again.arrays["task_index"][:, 0].tolist() == [0] * 6 + [1] + [0] * 12
    again.arrays["task_index"][9:] = 1
    write_lerobot(again, tmp_path / "e", 10, version)
    per_step = read_lerobot(tmp_path / "e")
    assert per_step.meta["episode_tasks"] == [["a"], ["b"], ["a", "b"]]
    with pytest.raises(ValueError, match="read the key task_index, too"):
        write_lerobot(per_step, tmp_path / "f", 10, version)
    for wrong in (["a"], ["a", "b", 3]):
        with pytest.raises(ValueError, match="allowed is a text, or one for each of the 3 episodes"):
            write_lerobot(made_up((4, 4)), tmp_path / "f", 10, version, False, task=wrong)
    assert not (tmp_path / "f").exists()


# What cannot be written


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(fps=0), "fps = 0: allowed"),
        (dict(fps=float("nan")), "fps = nan: allowed"),
        (dict(fps=True), "fps = True: allowed"),
        (dict(version="v2.0"), "version = 'v2.0': allowed are v2.1, v3.0"),
        (dict(keys={"position": "x"}), "there is no data/position"),
        (dict(keys={"state": "action"}), "'action': this name is taken"),
        (dict(keys={"state": "index"}), "'index': this name is taken"),
        (dict(keys={"state": "a/b"}), "has a slash"),
    ],
)
def test_a_request_that_cannot_be_is_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        write_lerobot(made_up(), tmp_path / "d", **{"fps": 10, **change})
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "array, says",
    [
        (np.full((19, 2), np.nan), r"\[nan, nan\] in step 0: numbers must be finite"),
        (np.zeros((19, 2), complex), "dtype = 'complex128'"),
        (np.full((19, 2), "a"), "dtype = 'str"),
        (np.zeros((19, 1, 1, 1, 1, 1, 1)), "one to five axes"),
        (np.zeros((19, 63, 64, 3), np.uint8), "even sides of 64 at least; videos=False"),
    ],
)
def test_an_array_that_lerobot_cannot_hold_is_refused(tmp_path, array, says):
    demos = made_up((4, 4))
    arrays = {"odd": array, "action": demos.arrays["action"]}
    with pytest.raises(ValueError, match=says):
        write_lerobot(Demonstrations(arrays, demos.episode_ends), tmp_path / "d", 10)


@pytest.mark.parametrize(
    "meta, says",
    [
        ({"robot_type": 7}, "robot_type = 7"),
        ({"note": np.float32(1)}, "meta has what JSON cannot hold"),
        ({"note": float("nan")}, "meta has what JSON cannot hold"),
    ],
)
def test_provenance_that_cannot_be_kept_is_refused(tmp_path, meta, says):
    demos = made_up((4, 4))
    with pytest.raises(ValueError, match=says):
        write_lerobot(
            Demonstrations(demos.arrays, demos.episode_ends, meta), tmp_path / "d", 10, videos=False
        )
    assert not (tmp_path / "d").exists()


def test_what_a_policy_must_know_comes_back(version, tmp_path):
    demos = made_up((4, 4))
    shapes = {"obs": {"state": [3], "image": [4, 4, 3]}, "action_dim": 2, "action_ref": "state"}
    known = Demonstrations(demos.arrays, demos.episode_ends, {**demos.meta, "shapes": shapes})
    write_lerobot(known, tmp_path / "d", 10, version, videos=False, task="Stir\u2028twice\x85.")
    again = read_lerobot(tmp_path / "d")
    assert again.shapes == known.shapes and again.meta["tasks"] == ["Stir\u2028twice\x85."]
    fewer = read_lerobot(tmp_path / "d", ["image", "action"]).shapes
    assert (set(fewer.obs), fewer.action_ref) == ({"image"}, None)


def test_what_is_there_stays_unless_it_is_a_dataset(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is no LeRobot dataset"):
        write_lerobot(made_up((4, 4)), tmp_path / "mine", 10, videos=False)
    assert (tmp_path / "mine/thesis.txt").exists()
    write_lerobot(made_up((4, 4)), tmp_path / "d", 10, videos=False)
    monkeypatch.setattr(lerobot, "number_stats", lambda a, version: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_lerobot(made_up((4, 4), seed=1), tmp_path / "d", 10, videos=False)
    same(read_lerobot(tmp_path / "d"), made_up((4, 4)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "mine"]


# What cannot be read


def test_no_dataset_is_no_dataset(tmp_path):
    assert not is_lerobot(tmp_path) and is_lerobot(DATA / "v3.0")
    with pytest.raises(FileNotFoundError, match="no LeRobot dataset"):
        read_lerobot(tmp_path)


def info(**fields):
    def change(folder: Path):
        path = folder / INFO
        path.write_text(json.dumps(json.loads(read_text(path)) | fields), encoding="utf-8")

    return change


def feature(key, **fields):
    def change(folder: Path):
        features = json.loads(read_text(folder / INFO))["features"]
        features[key] = {**features[key], **fields} if fields else None
        info(features={k: f for k, f in features.items() if f})(folder)

    return change


def rows(change, name="data"):
    "A change of the first parquet file under `name`: `change(table) -> table`."

    def edit(folder: Path):
        path = sorted((folder / name).rglob("*.parquet"))[0]
        pq.write_table(change(pq.read_table(path)), path)

    return edit


def cell(column, row, value, name="data"):
    "One value of a column replaced."

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        at = table.schema.names.index(column)
        return table.set_column(at, column, pa.array(values, table[column].type))

    return rows(change, name)


def remove(pattern):
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


def cut(pattern):
    def change(folder: Path):
        path = sorted(folder.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def double(folder: Path):
    path = sorted((folder / "data").rglob("*.parquet"))[0]
    shutil.copy(path, path.with_name("x.parquet"))


WRONG = [
    (info(codebase_version="v1.6"), "info.json: codebase_version = 'v1.6': Input should be 'v2.1' or 'v3.0'"),
    (info(codebase_version=None), "info.json: codebase_version"),
    (info(fps=0), "info.json: fps = 0: Input should be greater than 0"),
    (info(fps="10"), "info.json: fps = '10'"),
    (info(fps=20), "timestamp = 0.1 s in step 1 after 0 s; at 20 fps"),
    (info(total_episodes=4), "total_episodes = 4, but the metadata has 3 episodes"),
    (info(total_episodes=2), "total_episodes = 2, but the metadata has 3 episodes"),
    (info(total_frames=17), "total_frames = 17, the episodes have 16"),
    (info(total_frames=1.5), "info.json: total_frames = 1.5"),
    (info(data_path="/etc/{episode_index:06d}{chunk_index:03d}"), "info.json: data_path"),
    (info(data_path="../../secret.parquet"), "data_path = .*allowed are paths inside the dataset's folder"),
    (info(data_path="data/{0.__class__}"), "data_path = .*allowed fields are"),
    (info(data_path="data/{episode_index:0999999999d}.parquet"), "data_path = .*allowed fields are"),
    (info(data_path="elsewhere/a.parquet"), "elsewhere/a.parquet|no episode refers to this file"),
    (info(video_path="../{video_key}.mp4"), "video_path = .*allowed are paths inside"),
    (info(video_path=None), "video_path = '' gives ''"),
    (info(features=[]), "info.json: features"),
    (feature("timestamp"), r"features\['timestamp'\] is missing: it must be float32 \[1\]"),
    (feature("index", dtype="float32"), r"features\['index'\] is float32 \[1\]: it must be int64"),
    (feature("action", dtype="pickle"), r"features\['action'\]: dtype = 'pickle'"),
    (feature("action", dtype="float16"), "action has the type float32, which does not fit into float16"),
    (feature("action", shape=[3]), r"action has lists of \[2\] entries on axis 0, expected \[3\]"),
    (feature("action", shape=[0]), "features.action.shape.0 = 0"),
    (feature("observation.state", shape=[3, 1]), r"has rows of shape \[3\], expected \[3, 1\]"),
    (feature("action", shape=[1, 2]), "the action has several axes; allowed is one row"),
    (feature("action"), "features has no 'action' to read; .*names={'actions': 'action'}"),
    (feature(CAMERA, shape=[64, 64, 1]), "a camera has"),
    (feature(CAMERA, shape=[32, 64, 3]), r"has frames \(64, 64, 3\), expected \(32, 64, 3\)"),
    (lambda d: (d / INFO).write_bytes(b"\xff{}"), "info.json is not UTF-8"),
    (lambda d: (d / INFO).write_text("{", encoding="utf-8"), "info.json: "),
    (remove("data/*/*.parquet"), r"\.parquet is missing"),
    (remove("videos/**/*.mp4"), r"\.mp4 is missing"),
    (remove("meta/tasks*"), r"tasks\..* is missing"),
    (cut("data/*/*.parquet"), r"\.parquet is damaged"),
    (cut("videos/**/*.mp4"), r"\.mp4"),
    (double, "x.parquet: no episode refers to this file"),
    (rows(lambda t: t.slice(0, len(t) - 1)), r"has \d+ rows, the metadata says"),
    (rows(lambda t: t.take([1, 0, *range(2, len(t))])), "index = 1 in row 0, expected 0"),
    (rows(lambda t: t.drop_columns(["action"])), "has no column 'action'"),
    (cell("episode_index", 2, 7), "episode_index = 7 in row 2, expected 0"),
    (cell("frame_index", 2, 3), "frame_index = 3 in row 2, expected 2"),
    (cell("task_index", 2, 9), "task_index = 9 in row 2"),
    (cell("timestamp", 2, 0.25), "timestamp = 0.25 s in step 2 after 0.1 s"),
    (cell("timestamp", 0, float("nan")), r"timestamp = \[nan\] in row 0: numbers must be finite"),
    (cell("action", 1, [1.0, float("inf")]), r"action = \[1.0, inf\] in row 1: numbers must be finite"),
    (cell("next.reward", 1, None), "next.reward has rows without a value"),
]


@pytest.mark.parametrize("change, says", WRONG)
def test_what_does_not_fit_together_is_refused(version, tmp_path, tried, change, says):
    shutil.copytree(DATA / version, tmp_path / "d")
    change(tmp_path / "d")
    with tried.refused("LeRobot datasets", DamagedError, match=says):
        read_lerobot(tmp_path / "d")


def test_episodes_that_overlap_or_miss_frames_in_a_video_are_refused(tmp_path):
    starts, key = "from_timestamp", f"videos/{CAMERA}/from_timestamp"
    for values, says in {
        (0.0, 0.0, 1.2): "two episodes, by from_timestamp, have the frame",
        (0.0, 0.5, 1.3): "no step's",
        (0.0, 0.51, 1.2): "no step's",
        (0.0, float("nan"), 1.2): f"{CAMERA}.*{starts}",
    }.items():
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(DATA / "v3.0", tmp_path / "d")

        def change(table, values=values):
            return table.set_column(table.schema.names.index(key), key, pa.array(values))

        rows(change, "meta/episodes")(tmp_path / "d")
        with refused(match=says):
            read_lerobot(tmp_path / "d")


def test_a_video_with_more_or_fewer_frames_than_steps_is_refused(version, written, tmp_path):
    name = next(p.relative_to(written) for p in sorted(written.rglob("*.mp4")))
    for n, says in ((5, "has no frame at 0.5 s"), (40, "has a frame at .* which is no step's")):
        shutil.copytree(written, tmp_path / str(n))
        (tmp_path / str(n) / OURS).unlink()
        video = lerobot.VideoWriter(tmp_path / str(n) / name, 10, (64, 80), VideoCoding())
        video.add(np.zeros((n, 64, 80, 3), np.uint8))
        video.close()
        with refused(match=says):
            read_lerobot(tmp_path / str(n))


def test_images_in_parquet_must_be_what_info_says(version, tmp_path):
    write_lerobot(made_up((6, 8)), tmp_path / "d", 10, version, videos=False)
    (tmp_path / "d" / OURS).unlink()
    key = "observation.images.image"
    other = lerobot._png(np.zeros((6, 9, 3), np.uint8))
    grey = lerobot._png(np.zeros((6, 8), np.uint8))
    for value, says in (
        ({"bytes": None, "path": "/etc/passwd"}, "no bytes of an image"),
        ({"bytes": b"GIF89a", "path": "a"}, "is no PNG or JPEG"),
        ({"bytes": other[:40], "path": "a"}, "is no PNG or JPEG"),
        ({"bytes": other, "path": "a"}, r"RGB \(6, 9, 3\), expected RGB \(6, 8, 3\)"),
        ({"bytes": grey, "path": "a"}, "image L"),
    ):
        shutil.copytree(tmp_path / "d", tmp_path / "e")
        cell(key, 3, value)(tmp_path / "e")
        with refused(match=f"{key} in row 3.*{says}"):
            read_lerobot(tmp_path / "e")
        shutil.rmtree(tmp_path / "e")


def flips(content: bytes, n: int, seed: int):
    for bit in np.random.default_rng(seed).integers(0, 8 * len(content), n):
        out = bytearray(content)
        out[bit // 8] ^= 1 << bit % 8
        yield bytes(out)


def test_no_bit_of_what_dpag_wrote_is_believed_damaged(written, tmp_path, tried):
    shutil.copytree(written, tmp_path / "d")
    for i, path in enumerate(sorted(p for p in (tmp_path / "d").rglob("*") if p.is_file())):
        content = path.read_bytes()
        for other in (*flips(content, 3, i), content[:-1], b""):
            path.write_bytes(other)
            with tried.refused("LeRobot datasets", DamagedError, match=path.name.split(".")[0]):
                read_lerobot(tmp_path / "d")
        path.write_bytes(content)
    same(read_lerobot(tmp_path / "d"), read_lerobot(written))
    (tmp_path / "d/README.md").touch()
    read_lerobot(tmp_path / "d")


def test_damage_to_what_lerobot_wrote_ends_in_one_kind_of_error(version, tmp_path):
    "Without checksums a changed number may pass; nothing else may come out."
    shutil.copytree(DATA / version, tmp_path / "d")
    for i, path in enumerate(sorted(p for p in (tmp_path / "d").rglob("*") if p.is_file())):
        content = path.read_bytes()
        for other in (*flips(content, 12, i), content[: len(content) // 3], b""):
            path.write_bytes(other)
            with contextlib.suppress(DamagedError):
                assert len(read_lerobot(tmp_path / "d")) == 3
        path.write_bytes(content)


# Beside a live LeRobot


@pytest.fixture(scope="module")
def live(version, tmp_path_factory):
    """A folder with datasets that LeRobot wrote (`theirs1` with videos, `many` in many files, `theirs0`
    without videos), that dpag wrote (`ours1`, `ours0`, and `again`, which is `theirs0`), and what LeRobot
    reads from each (`NAME.npz`)."""
    python = os.environ.get(f"DPAG_LEROBOT_{version.upper().replace('.', '')}")
    if not python:
        pytest.skip(f"no environment with lerobot for {version} is named")
    python = os.path.abspath(python)
    folder = tmp_path_factory.mktemp("live")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*commands):
        call = [python, PEER, *commands]
        done = subprocess.run(call, cwd=folder, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    run("write", "theirs1", "1", "write", "theirs0", "0", "write", "many", "2")
    for videos in (0, 1):
        ours = folder / f"ours{videos}"
        write_lerobot(made_up(), ours, 10, version, bool(videos), keys={"state": "observation.state"})
        (ours / OURS).unlink()  # names are LeRobot's
    write_lerobot(read_lerobot(folder / "theirs0"), folder / "again", 10, version, videos=False)
    names = ("theirs1", "theirs0", "many", "ours1", "ours0", "again")
    run(*(word for name in names for word in ("read", name, f"{name}.npz")))
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["theirs1", "theirs0", "many", "ours1", "ours0", "again"])
def test_lerobot_and_dpag_read_the_same(live, name):
    found = read_lerobot(live / name)
    with np.load(live / f"{name}.npz") as read:
        for k, a in found.arrays.items():
            same_values(a, read[k], k)
        np.testing.assert_array_equal(found.episode_ends[read["episode_index"]] > read["index"], True)
        assert read["task"].tolist() == [
            task
            for (task,), n in zip(found.meta["episode_tasks"], np.diff(found.episode_ends, prepend=0))
            for _ in range(n)
        ]


def test_statistics_are_those_of_lerobot(live, version):
    with np.load(live / "theirs0.npz") as theirs, np.load(live / "again.npz") as ours:
        names = [n for n in theirs.files if n.startswith("stats/") and "/q" not in n]
        assert len(names) == 5 * 11
        for n in names:
            if version == "v3.0" and n == f"stats/{CAMERA}/std":
                continue  # lerobot 0.4.4 squares bytes, which overflow
            np.testing.assert_allclose(ours[n], theirs[n], rtol=1e-5, atol=1e-6, err_msg=n)
