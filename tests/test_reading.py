"""Nothing is read wrongly in silence: chunks that are lost, images of another scale, numbers that cannot be,
columns for rows, other controllers, and actions that no sampler could put out."""

import inspect
import io
import json
import re
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pytest
import torch
import zarr
from scipy.spatial.transform import Rotation

from dpag import policy as policies
from dpag.arrays import chunk_files, file_sizes, first_bad, place, to_bytes
from dpag.config import changed, generator
from dpag.data import (
    Demonstrations,
    Shapes,
    WindowDataset,
    fit_standardizer,
    load_demonstrations,
    save_demonstrations,
)
from dpag.diffusion import SAMPLERS, Diffusion, DiffusionConfig
from dpag.encoder import ImageEncoder, ImageEncoderConfig
from dpag.files import DamagedError
from dpag.methods.dp import DPConfig, far_actions
from dpag.methods.dp_ag import DPAGConfig
from dpag.policy import PolicyConfig, build_policy, load_policy, save_policy
from dpag.tasks.base import Task
from dpag.tasks.kitchen import task as kitchen
from dpag.tasks.robomimic.env import CONTROLLER, SCENES, matrix_from_6d
from dpag.tasks.robomimic.files import WRIST_TO_GRIP, read_hdf5, write_hdf5

CHECKPOINTS = Path(__file__).parent / "data/checkpoints"
WINDOW = {"horizon": 16, "n_obs_steps": 2, "n_action_steps": 8}


# Chunks.


def zipped(folder, path, inside="a/replay.zarr"):
    with zipfile.ZipFile(path, "w") as z:
        for name in sorted(file_sizes(folder)):
            z.write(folder / name, f"{inside}/{name}" if inside else name)
    return path


LAYOUTS = {
    "zarr 2": {"zarr_format": 2},
    "zarr 2, nested": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "zarr 3": {"zarr_format": 3},
    "zarr 3, flat": {"zarr_format": 3, "chunk_key_encoding": {"name": "v2", "separator": "."}},
    "zarr 3, shards": {"zarr_format": 3},
    "zarr 3, blosc": {"zarr_format": 3, "compressors": zarr.codecs.BloscCodec()},
    "zarr 2, zstd": {"zarr_format": 2, "compressors": numcodecs.Zstd()},
    "zarr 2, bare": {"zarr_format": 2, "compressors": None},
}


@pytest.fixture(params=LAYOUTS)
def store(request, tmp_path):
    "A store of another program: 23 steps in chunks of 5, the last one not full; its arrays."
    rng, n = np.random.default_rng(0), 23
    arrays = {
        "action": rng.uniform(50, 450, (n, 2)).astype("f4"),
        "state": rng.uniform(50, 450, (n, 5)),
        "image": rng.integers(1, 255, (n, 8, 8, 3)).astype("u1"),
    }
    how = dict(LAYOUTS[request.param])
    group = zarr.open_group(tmp_path / "z", mode="w", zarr_format=how.pop("zarr_format"))
    for k, a in arrays.items():
        shards = (10, *a.shape[1:]) if "shards" in request.param else None
        sides = (10, 4, 8, 3) if k == "image" else (5, *a.shape[1:])
        group.create_array(f"data/{k}", data=a, chunks=sides, shards=shards, **how)
    group.create_array("meta/episode_ends", data=np.array([9, n], "u2"))
    return tmp_path / "z", arrays


def test_a_whole_store_is_read_from_a_folder_and_from_a_zip(store, tmp_path):
    folder, arrays = store
    for inside in ("", "a", "a/b.zarr"):
        zipped(folder, tmp_path / "z.zip", inside)
        for path in (folder, tmp_path / "z.zip"):
            found = load_demonstrations(path)
            assert found.arrays.keys() == arrays.keys() and found.episode_ends.tolist() == [9, 23]
            assert all(np.array_equal(found.arrays[k], a) for k, a in arrays.items())


def test_any_file_that_is_lost_empty_or_cut_is_missed(store, tmp_path):
    folder, arrays = store
    for name in file_sizes(folder):
        if not name.startswith(("data/", "meta/")) or name.count("/") < 2:
            continue
        file = folder / name
        content, about = file.read_bytes(), file.name in (".zarray", "zarr.json", ".zattrs")
        if file.name == ".zattrs":  # has nothing
            continue
        for broken in (None, b"", content[: len(content) // 2]):
            file.unlink() if broken is None else file.write_bytes(broken)
            for path in (folder, zipped(folder, tmp_path / "z.zip")):
                with pytest.raises(DamagedError) as e:
                    load_demonstrations(path)
                assert about or broken or name.split("/")[1] in str(e.value)
        file.write_bytes(content)
    assert load_demonstrations(folder).arrays.keys() == arrays.keys()


def test_a_chunk_beyond_the_shape_says_that_the_shape_is_not_the_datas(store, tmp_path):
    folder, _ = store
    names = chunk_files(zarr.open_group(folder, mode="r")["data/action"])
    first = names[0]
    beyond = folder / re.sub(r"0(.)0$", r"9\g<1>0", first)
    beyond.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / first, beyond)
    for path in (folder, zipped(folder, tmp_path / "z.zip")):
        with pytest.raises(DamagedError, match="is a chunk beyond the shape"):
            load_demonstrations(path)
    assert load_demonstrations(folder, keys=["state"]).arrays.keys() == {"state"}


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_of_the_fill_value_alone_is_refused_unless_somebody_vouches(tmp_path, version):
    group = zarr.open_group(tmp_path / "z", mode="w", zarr_format=version)
    reward = np.zeros(20, "f4")
    reward[17] = 1
    group.create_array("data/reward", data=reward, chunks=(5,))
    group.create_array("data/action", data=np.ones((20, 2), "f4"), chunks=(5, 2))
    group.create_array("meta/episode_ends", data=np.array([20]))
    with pytest.raises(DamagedError, match="3 of the 4 chunks of /data/reward.* zarr 3 leaves out"):
        load_demonstrations(tmp_path / "z")
    assert np.array_equal(load_demonstrations(tmp_path / "z", fill_missing=True).arrays["reward"], reward)
    assert load_demonstrations(tmp_path / "z", keys=["action"]).arrays.keys() == {"action"}


def test_a_zip_with_two_stores_or_none_is_refused(store, tmp_path):
    folder, _ = store
    path = zipped(folder, tmp_path / "z.zip", "a")
    with zipfile.ZipFile(path, "a") as z:
        for name in file_sizes(folder):
            z.write(folder / name, f"b/{name}")
    with pytest.raises(DamagedError, match="2 arrays named meta/episode_ends"):
        load_demonstrations(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/notmeta/episode_ends/zarr.json", "{}")
    with pytest.raises(DamagedError, match="0 arrays named meta/episode_ends"):
        load_demonstrations(path)


# Images.


def film(n=30, h=6, w=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


DARK = np.zeros((7, 6, 9, 3), np.uint8)
STORED = {
    "bytes": lambda x: x,
    "whole numbers": lambda x: x.astype("i8"),
    "16 bits": lambda x: x.astype("u2"),
    "whole floats": lambda x: x.astype("f4"),
    "whole doubles": lambda x: x.astype(">f8"),
    "up to 1": lambda x: (x / 255).astype("f4"),
    "up to 1, doubles": lambda x: x / 255,
    "up to 1, halves": lambda x: (x / 255).astype("f2"),
    "nearly whole": lambda x: (x / 255).astype("f4") * np.float32(255),
}


@pytest.mark.parametrize("first", ["rows", "colours"])
@pytest.mark.parametrize("kind", STORED)
def test_images_of_any_sure_scale_are_the_same_bytes(tmp_path, monkeypatch, kind, first):
    monkeypatch.setattr(
        "dpag.arrays.pieces", lambda a: ((i, np.asarray(a[i : i + 4])) for i in range(0, a.shape[0], 4))
    )
    for images in (film(), np.concatenate([DARK, film()]), np.concatenate([film(), DARK]), DARK):
        stored = STORED[kind](images)
        stored = np.moveaxis(stored, -1, 1) if first == "colours" else stored
        group = zarr.open_group(tmp_path / "z", mode="w")
        every = {"write_empty_chunks": True}
        group.create_array("data/image", data=stored, chunks=(4, *stored.shape[1:]), config=every)
        group.create_array("data/pos", data=np.ones((len(images), 2), "f4"), chunks=(50, 2))
        group.create_array("data/action", data=np.ones((len(images), 2), "f4"), chunks=(50, 2))
        group.create_array("meta/episode_ends", data=np.array([len(images)]))
        for keys in (None, {"image": np.uint8}):
            found = load_demonstrations(tmp_path / "z", keys).arrays["image"]
            assert found.dtype == np.uint8 and np.array_equal(found, images)


REFUSED = {
    "from -1 to 1": lambda x: x / np.float32(127.5) - 1,
    "standardised": lambda x: (x - np.float32(120)) / 60,
    "not whole": lambda x: x + np.float32(0.4),
    "above 255": lambda x: x.astype("i4") * 257,
    "negative": lambda x: x.astype("i2") - 1,
    "0 and 1": lambda x: (x > 99).astype("f4"),
    "yes and no": lambda x: x > 99,
    "two scales": lambda x: np.concatenate([x[:9], x[9:] / 255]),
    "two scales, the other way": lambda x: np.concatenate([x[:9] / 255, x[9:]]),
    "not a number": lambda x: np.where(np.arange(len(x)).reshape(-1, 1, 1, 1) == 20, np.nan, x),
    "grey": lambda x: x[..., :1],
    "with alpha": lambda x: np.concatenate([x, x[..., :1]], -1),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_images_of_a_scale_that_is_not_sure_are_refused(kind):
    images = REFUSED[kind](film())
    with pytest.raises(ValueError, match="image"):
        to_bytes(images)
    demos = Demonstrations(
        {"image": images, "pos": np.ones((30, 2)), "action": np.ones((30, 2))}, np.array([12, 30])
    )
    with pytest.raises(ValueError, match="data/image"):
        WindowDataset.of(
            replace(
                demos,
                meta={
                    "shapes": {"obs": {"image": [6, 9, 3], "pos": [2]}, "action_dim": 2, "action_ref": None}
                },
            ),
            **WINDOW,
        )


def test_the_first_image_of_another_scale_is_named_by_episode_and_step():
    images = film().astype("f4")
    images[17] /= 255
    demos = Demonstrations(
        {"image": images, "pos": np.ones((30, 2)), "action": np.ones((30, 2))}, np.array([12, 30])
    )
    with pytest.raises(ValueError, match="step 5 of episode 1 are from .*, those of earlier ones up to 255"):
        WindowDataset.of(demos, **WINDOW)


def test_a_window_holds_bytes_whatever_the_images_were():
    arrays = {"image": np.moveaxis(film() / 255, -1, 1), "pos": np.ones((30, 2)), "action": np.ones((30, 2))}
    shapes = {"obs": {"image": [6, 9, 3], "pos": [2]}, "action_dim": 2, "action_ref": "pos"}
    for meta in ({"shapes": shapes}, {}):
        data = WindowDataset.of(Demonstrations(arrays, np.array([12, 30]), meta), **WINDOW)
        assert data.obs["image"].dtype == torch.uint8 and np.array_equal(data.obs["image"].numpy(), film())


def test_images_that_are_no_bytes_reach_no_policy():
    images = torch.from_numpy(film() / 255)
    obs = {"image": images.numpy(), "pos": np.ones((30, 2), "f4")}
    for wrong in (obs["image"], np.moveaxis(film(), -1, 1), film()[..., :1]):
        with pytest.raises(ValueError, match=r"obs\['image'\] has images .*; allowed are bytes"):
            WindowDataset({**obs, "image": wrong}, np.ones((30, 2)), [30], **WINDOW)
    encoder = ImageEncoder(ImageEncoderConfig(crop=6), (6, 9))
    forward = inspect.unwrap(ImageEncoder.forward)  # without the check of annotations, which only tests have
    with pytest.raises(ValueError, match=r"type torch.float64; allowed are bytes"):
        forward(encoder, images[None, :2])


# Numbers.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("key", ["action", "state"])
def test_the_first_number_that_is_none_is_named(tmp_path, key, bad):
    rng = np.random.default_rng(0)
    for _ in range(4):
        ends = np.cumsum(rng.integers(2, 9, 5))
        t = int(rng.integers(ends[-1]))
        arrays = {"action": np.ones((ends[-1], 2)), "state": np.ones((ends[-1], 3, 2))}
        arrays[key][t, ..., 1], arrays[key][t:, ..., 0] = bad, bad if t % 2 else 1
        episode = next(i for i, end in enumerate(ends) if t < end)
        where = f"data/{key} has .* at step {t - (ends[episode - 1] if episode else 0)} of episode {episode}"
        save_demonstrations(Demonstrations(arrays, ends), tmp_path / "d.zarr")
        with pytest.raises(DamagedError, match=where):
            load_demonstrations(tmp_path / "d.zarr")
        with pytest.raises(ValueError, match=where):
            WindowDataset.of(Demonstrations(arrays, ends), **WINDOW)


def test_a_place_is_an_episode_and_a_step_of_it():
    ends = np.array([3, 4, 9])
    steps = [(e, s) for e, n in enumerate(np.diff(ends, prepend=0)) for s in range(n)]
    assert [place(ends, t) for t in range(9)] == [f"step {s} of episode {e}" for e, s in steps]


def test_the_first_bad_number_is_found_in_any_piece(monkeypatch):
    monkeypatch.setattr("dpag.arrays.pieces", lambda a: ((i, a[i : i + 3]) for i in range(0, a.shape[0], 3)))
    for t in range(10):
        a = np.arange(20.0).reshape(10, 2)
        a[t, 1] = np.nan
        assert first_bad(a)[0] == t and first_bad(a[:t]) is None
        assert first_bad(np.arange(10), 0, t) == (None if t == 9 else (t + 1, t + 1))


@pytest.fixture
def a_task():
    "A made-up task with images, and arrays that fit it."
    shapes = Shapes(obs={"image": (6, 9, 3), "pos": (2,)}, action_dim=2, action_ref="pos")
    arrays = {"image": film(), "pos": np.full((30, 2), 9.0), "action": np.full((30, 2), 8.0)}

    def source(parts, folder):
        return Demonstrations(arrays, np.array([12, 30]))

    ranges = {"pos": (0, 512), "action": (0, 512)}
    return Task("made_up", "Made up", shapes, 9, 0.1, lambda: None, {"file": source}, ranges), arrays


def test_what_a_task_does_not_observe_is_not_learned_from(a_task):
    task, arrays = a_task
    arrays["state"] = np.zeros((30, 5))
    demos = task.demonstrations("file")
    assert demos.shapes == task.shapes and "state" in demos.arrays
    windows = WindowDataset.of(demos, horizon=4, n_obs_steps=2, n_action_steps=2)
    assert windows.shapes == task.shapes


def test_what_a_task_says_of_its_arrays_is_checked(a_task):
    task, arrays = a_task
    assert np.array_equal(task.demonstrations("file").arrays["image"], film())
    arrays["image"] = np.moveaxis(film(), -1, 1) / np.float32(255)
    assert np.array_equal(task.demonstrations("file").arrays["image"], film())
    for key, wrong, said in (
        ("image", film(h=7), "(7, 9, 3), expected (6, 9, 3)"),
        ("pos", np.ones((30, 3)), "(3,), expected (2,)"),
        ("action", np.ones((30, 2, 1)), "(2, 1), expected (2,)"),
        ("action", np.ones(30), "(), expected (2,)"),
        ("pos", np.full((30, 2), "9"), "has the type <U1"),
        ("pos", np.full((30, 2), 1j), "has the type complex128"),
        (
            "pos",
            np.where(np.arange(60).reshape(30, 2) == 47, -0.1, 9),
            "-0.1 at step 11 of episode 1; allowed",
        ),
        (
            "action",
            np.where(np.arange(60).reshape(30, 2) == 3, 513, 9),
            "513 at step 1 of episode 0; allowed",
        ),
    ):
        before, arrays[key] = arrays[key], wrong
        with pytest.raises(ValueError, match="made_up, demos = file: .*") as e:
            task.demonstrations("file")
        assert said in str(e.value) and f"data/{key}" in str(e.value)
        arrays[key] = before
    del arrays["pos"]
    with pytest.raises(ValueError, match="data/pos is missing; there are action, image"):
        task.demonstrations("file")


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "i8", "u2", "u8"])
def test_episode_ends_say_which_entry_is_wrong(dtype):
    arrays = {"action": np.ones((9, 2))}
    assert Demonstrations(arrays, np.array([4, 9], dtype)).episode_ends.dtype == np.int64
    for ends, said in (
        ([4, 4, 9], "entry 1 is 4 after 4"),
        ([0, 9], "entry 0 is 0"),
        ([5, 4, 9], "entry 1 is 4 after 5"),
    ):
        with pytest.raises(ValueError, match=said):
            Demonstrations(arrays, np.array(ends, dtype))
    obs, action = {"pos": np.ones((9, 2), "f4")}, np.ones((9, 2), "f4")
    assert len(WindowDataset(obs, action, np.array([4, 9], dtype), **WINDOW)) == 2
    for ends in ([9, 4], [4, 8], [4, 10]):
        with pytest.raises(ValueError, match="episode_ends"):
            WindowDataset(obs, action, np.array(ends, dtype), **WINDOW)
    if np.dtype(dtype).kind == "i":
        with pytest.raises(ValueError, match="entry 0 is -4"):
            Demonstrations(arrays, np.array([-4, 9], dtype))


# The reach of a sampler.


def windows(actions, pos=None):
    "A data set of `actions` `(N, T, D)`, which start from nothing unless `pos` is given."
    n, steps, d = actions.shape
    pos = np.zeros_like(actions) if pos is None else pos
    arrays = {"pos": pos.reshape(-1, d), "action": actions.reshape(-1, d)}
    shapes = {"obs": {"pos": [d]}, "action_dim": d, "action_ref": "pos"}
    ends = np.arange(steps, n * steps + 1, steps)
    return WindowDataset.of(Demonstrations(arrays, ends, {"shapes": shapes}), **WINDOW)


def rare_events(seed=0, share=0.005):
    "An ordinary entry, a gripper that hardly ever closes, a constant, and one that varies by 0.1 mm."
    rng = np.random.default_rng(seed)
    actions = np.zeros((40, 60, 4), np.float32)
    actions[..., 0] = rng.normal(size=(40, 60))
    actions[..., 1] = np.where(rng.random((40, 60)) < share, 1, -1)
    actions[..., 2] = 300.1
    actions[..., 3] = 0.3 + 5e-5 * np.sign(rng.normal(size=(40, 60)))
    return actions


RELATIVE = PolicyConfig(action_frame="relative")


@pytest.mark.filterwarnings("ignore:.*windows have actions beyond")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", [DPConfig(), DPAGConfig()], ids=["dp", "dp_ag"])
def test_every_demonstrated_chunk_can_be_put_out(method, sampler):
    data = windows(rare_events())
    settings = changed(RELATIVE, {"diffusion": {"prediction": "sample", "sampler": sampler}})
    policy = build_policy(method, settings, dataset=data)
    policy.act_as({"policy": {"diffusion": {"n_sample_steps": 3}}})
    every = data.gather(torch.arange(len(data)))
    clean = policy.normalised(every)
    assert clean.abs().max() > 10
    found = policy.diffusion.sample(lambda x, i: clean, clean.shape, generator("s"))
    back = policy.action_scale.inverse(found)
    assert torch.allclose(back, every["action"], atol=1e-4, rtol=0)
    assert (back[..., 2] == np.float32(300.1)).all()
    closed = every["action"][..., 1] == 1
    assert closed.any() and (back[..., 1][closed] > 0.999).all()
    small = clean[..., 3]
    assert small.abs().min() > 0.5  # not flattened


def test_what_was_beyond_is_named():
    data = windows(rare_events())
    with pytest.warns(
        UserWarning, match=r"of 2120 windows have actions beyond .*clip = 5.*\(entry 1 by up to"
    ) as w:
        build_policy(DPConfig(), RELATIVE, dataset=data)
    assert "entry 0" not in str(w[0].message) and "entry 3" not in str(w[0].message)


def test_where_nothing_is_beyond_nothing_changes_and_nothing_is_said(small, shapes, dataset):
    settings = changed(small, {"diffusion": {"n_sample_steps": 8}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = build_policy(DPConfig(), settings, shapes, dataset)
        absolute = changed(settings, {"action_frame": "absolute", "diffusion": {"clip": 1.0}})
        build_policy(DPConfig(), absolute, shapes, dataset)
    assert policy.diffusion.reach.abs().max() > 1
    low, high = policy.diffusion.limits()
    assert (low == -5).all() and (high == 5).all()
    obs = {k: v[:6] for k, v in dataset.gather(torch.arange(6))["obs"].items()}
    actions = policy.act(obs, generator("a"))
    policy.diffusion.reach.zero_()
    assert torch.equal(policy.act(obs, generator("a")), actions)


def test_limits_are_each_entrys_own_and_each_sides():
    d = Diffusion(DiffusionConfig(), (3, 2))
    clean = torch.zeros(9, 3, 2)
    clean[4, 1, 0], clean[5, 2, 1] = 12.0, -7.0
    d.follow(clean)
    low, high = d.limits()
    expected = torch.full((3, 2), 5.0)
    assert torch.equal(high, expected.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(12.0)))
    assert torch.equal(low, -expected.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(7.0)))
    out = d.sample(lambda x, i: torch.full_like(x, 50.0), (1, 3, 2), generator("x"))
    assert out.abs().max() <= 12 and far_actions(clean, 5.0).startswith("2 of 9 windows")


@pytest.mark.filterwarnings("ignore:.*windows have actions beyond")
def test_a_checkpoint_keeps_its_reach_and_an_older_one_has_none(tmp_path):
    policy = build_policy(DPConfig(), RELATIVE, dataset=windows(rare_events()))
    save_policy(tmp_path / "c", policy)
    again, meta = load_policy(tmp_path / "c")
    assert torch.equal(again.diffusion.reach, policy.diffusion.reach) and meta["schema"] == policies.SCHEMA
    assert again.diffusion.limits()[1].max() > 10
    for name in ("dp_ag", "unet"):
        old, _ = load_policy(CHECKPOINTS / name)
        assert old.diffusion.reach.shape == (2, old.horizon, old.shapes.action_dim)
        assert (old.diffusion.limits()[1] == old.settings.diffusion.clip).all()


def test_a_tensor_that_is_missing_is_damage_whatever_the_schema(tmp_path):
    from safetensors.torch import load_file, save_file

    from dpag.files import seal

    for name, gone in (("new", "diffusion.reach"), ("unet", "action_scale.scale")):
        path = tmp_path / name
        if name == "new":
            save_policy(path, build_policy(DPConfig(), RELATIVE, Shapes({"pos": (2,)}, 2, "pos")))
        else:
            shutil.copytree(CHECKPOINTS / name, path)
        weights = load_file(path / "model.safetensors")
        del weights[gone]
        save_file(weights, path / "model.safetensors")
        seal(path)
        with pytest.raises(DamagedError, match=f"missing or not known: {gone}"):
            load_policy(path)


def test_a_standardizer_keeps_small_entries_and_returns_constants():
    rng = np.random.default_rng(0)
    for size in (1e-3, 1.0, 512.0, 1e5):
        for mode in ("std", "range"):
            still = torch.full((5000, 1), size * 1.1)
            small = torch.tensor(size * (1 + 1e-4 * rng.choice([-1, 1], (5000, 1))), dtype=torch.float32)
            f = fit_standardizer(torch.cat([still, small], 1), mode=mode)
            x = torch.cat([still, small], 1)
            z = f(x)
            assert (z[:, 0] == 0).all() and torch.equal(f.inverse(z)[:, 0], still[:, 0])
            if size * 1e-4 > 1e-6:
                assert 0.5 < z[:, 1].abs().mean() < 2
                assert torch.allclose(f.inverse(z)[:, 1], small[:, 0], atol=1e-6 * size)


# Kitchen: a demonstration is a column.


def kitchen_zip(path, lengths, time_first=True, nan=None):
    "A kitchen.zip as the public one; joint 0 counts from 1 on in each episode, the padding is zero."
    steps = np.arange(max(lengths))[:, None] < np.array(lengths)
    obs = np.zeros((*steps.shape, 60))
    obs[..., 0] = (1 + np.arange(len(steps))[:, None]) * steps * 0.01
    obs[..., 1] = np.arange(len(lengths)) * steps
    if nan is not None:
        obs[nan] = np.nan
    arrays = {
        "observations_seq": obs,
        "actions_seq": np.zeros((*steps.shape, 9)),
        "existence_mask": steps * 1.0,
    }
    with zipfile.ZipFile(path, "w") as z:
        for k, a in arrays.items():
            b = io.BytesIO()
            np.save(b, a if time_first else a.swapaxes(0, 1))
            z.writestr(f"kitchen/{k}.npy", b.getvalue())
    return path


@pytest.mark.parametrize("time_first", [True, False])
def test_the_kitchens_episodes_are_what_the_mask_says(tmp_path, time_first):
    rng = np.random.default_rng(0)
    for n in (2, 3, 7, 30):
        lengths = rng.integers(3, 20, n)
        lengths[[0, 1]] = 5, 9  # not sorted: the axes differ
        demos = kitchen.read_archive(kitchen_zip(tmp_path / "kitchen.zip", lengths, time_first))
        assert np.diff(demos.episode_ends, prepend=0).tolist() == lengths.tolist()
        for i in range(n):
            joints = demos.episode(i)["joints"]
            assert np.allclose(joints[:, 0], 0.01 * (1 + np.arange(lengths[i]))) and (joints[:, 1] == i).all()


@pytest.mark.parametrize("lengths", [[4, 4, 4], [9, 7, 5], [6, 6, 1], [3], [1, 1]], ids=str)
@pytest.mark.parametrize("time_first", [True, False])
def test_a_kitchen_that_can_be_read_two_ways_is_refused(tmp_path, lengths, time_first):
    with pytest.raises(ValueError, match="kitchen.zip: .*along both axes: .* episodes; the humans' are 566"):
        kitchen.read_archive(kitchen_zip(tmp_path / "kitchen.zip", lengths, time_first))


@pytest.mark.parametrize("time_first", [True, False])
def test_the_number_of_the_humans_decides(tmp_path, time_first):
    lengths = np.sort(np.random.default_rng(0).integers(3, 9, 566))[::-1]
    assert len(kitchen.read_archive(kitchen_zip(tmp_path / "kitchen.zip", lengths, time_first))) == 566


def test_the_kitchens_first_bad_number_is_named(tmp_path):
    with pytest.raises(ValueError, match="kitchen.zip: damaged: data/joints has nan at step 3 of episode 1"):
        kitchen.read_archive(kitchen_zip(tmp_path / "kitchen.zip", [5, 9, 7], nan=(3, 1, 0)))
    # In the padding, where no episode is, nothing is read.
    assert len(kitchen.read_archive(kitchen_zip(tmp_path / "kitchen.zip", [5, 9, 7], nan=(6, 0, 0)))) == 3


# robomimic's files: what an action does is what the file's controller says.

ARGS = {
    "env_version": "1.4.1",
    "type": 1,
    "env_kwargs": {
        "robots": ["Panda"],
        "control_freq": 20,
        "camera_names": ["agentview"],
        "camera_heights": 84,
        "controller_configs": CONTROLLER,
    },
}


def poses(n, seed=0):
    "A hand's way: positions, rotations of the grip, and robosuite's quaternions of the wrist."
    rng = np.random.default_rng(seed)
    pos = np.array([0.0, 0.1, 0.95]) + np.cumsum(rng.normal(0, 0.01, (n, 3)), 0)
    R = Rotation.from_rotvec(
        [np.pi - 0.02, 0.01, 0.1] + np.cumsum(rng.normal(0, 0.02, (n, 3)), 0)
    ).as_matrix()
    return pos, R, Rotation.from_matrix(R @ WRIST_TO_GRIP.T).as_quat()


def hdf5(path, actions, args=ARGS, controller=None, scene="lift", **changes):
    "A file of robomimic's with `actions` [(T, 7 · arms), …], one per episode."
    spec, n = SCENES[scene], sum(map(len, actions))
    kwargs = {**args["env_kwargs"], **({} if controller is None else {"controller_configs": controller})}
    kwargs["robots"] = ["Panda"] * spec.n_arms
    said = {"env_name": spec.sim, **args, "env_kwargs": kwargs}
    with h5py.File(path, "w") as f:
        f.create_group("data").attrs.update(total=n, env_args=json.dumps({**said, **changes}))
        for i, a in enumerate(actions):
            e = f.create_group(f"data/demo_{i}")
            e.attrs["num_samples"] = len(a)
            e["actions"], e["states"], e["obs/object"] = (
                a,
                np.zeros((len(a), 32)),
                np.zeros((len(a), spec.object_dim)),
            )
            for arm in range(spec.n_arms):
                pos, _, quat = poses(len(a), 10 * i + arm)
                e[f"obs/robot{arm}_eef_pos"], e[f"obs/robot{arm}_eef_quat"] = pos, quat
                e[f"obs/robot{arm}_gripper_qpos"] = np.zeros((len(a), 2))
    return path


def deltas(n, seed=0, arms=1, size=1.0):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-size, size, (n, arms, 7))
    a[..., 6] = np.sign(a[..., 6])
    a[rng.random((n, arms)) < 0.3, 3:6] = 0  # no rotation: the goal stays
    return a.reshape(n, 7 * arms)


SCALES = {
    "as here": {},
    "half as far": {"output_max": [0.025] * 3 + [0.25] * 3, "output_min": [-0.025] * 3 + [-0.25] * 3},
    "one number": {"output_max": 0.1, "output_min": -0.1},
    "not symmetric": {
        "output_max": [0.08, 0.02, 0.05, 0.5, 0.1, 0.5],
        "output_min": [-0.02] * 3 + [-0.5] * 3,
    },
    "wider input": {"input_max": 2, "input_min": [-2, -1, -2, -1, -1, -1]},
}


def goals(actions, controller, seed):
    "robosuite's own controller's goals after each action, from where the hand is."
    from robosuite.controllers.base_controller import Controller
    from robosuite.utils.control_utils import set_goal_orientation

    c = object.__new__(type("C", (Controller,), {"run_controller": None}))
    c.action_scale = c.action_input_transform = c.action_output_transform = None
    for end in ("input_max", "input_min", "output_max", "output_min"):
        setattr(c, end, c.nums2array(controller[end], 6))
    pos, R, _ = poses(len(actions), seed)
    found, goal = [], R[0]
    for t, a in enumerate(actions):
        moved = c.scale_action(a[:6])
        if moved[3:].any():
            goal = set_goal_orientation(moved[3:], R[t])
        found.append((pos[t] + moved[:3], goal))
    return found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("scene", ["lift", "transport"])
def test_the_controllers_own_scale_is_used(tmp_path, scene, scale):
    controller, arms = {**CONTROLLER, **SCALES[scale]}, SCENES[scene].n_arms
    actions = [deltas(n, n, arms) for n in (20, 9)]
    for said in (controller, [controller] * arms):
        demos = read_hdf5(hdf5(tmp_path / "f.hdf5", actions, controller=said, scene=scene), scene)
        for i, given in enumerate(actions):
            for arm in range(arms):
                found = demos.episode(i)["action"][:, 10 * arm : 10 * arm + 10]
                for t, (pos, R) in enumerate(
                    goals(given[:, 7 * arm : 7 * arm + 7], controller, 10 * i + arm)
                ):
                    assert np.allclose(found[t, :3], pos, atol=1e-6)
                    assert np.allclose(matrix_from_6d(found[t, 3:9]), R, atol=1e-5)
                assert np.array_equal(found[:, 9], given[:, 7 * arm + 6].astype("f4"))
        assert ("action_delta" in demos.arrays) == (scale == "as here")
        assert demos.meta["env_args"]["env_kwargs"]["controller_configs"] == said


def test_each_arm_has_its_own_controller(tmp_path):
    each = [CONTROLLER, {**CONTROLLER, **SCALES["half as far"]}]
    path = hdf5(tmp_path / "f.hdf5", [deltas(9, 0, 2)], controller=each, scene="transport")
    found, actions = read_hdf5(path, "transport").arrays["action"], deltas(9, 0, 2)
    for arm, full in enumerate((0.05, 0.025)):
        moved = found[:, 10 * arm : 10 * arm + 3] - poses(9, arm)[0]
        assert np.allclose(moved, full * actions[:, 7 * arm : 7 * arm + 3], atol=1e-6)


def absolute(n, seed=0):
    pos, R, _ = poses(n, seed)
    goal = np.roll(pos, -1, 0)
    goal[-1] = pos[-1]
    return np.concatenate([goal, Rotation.from_matrix(R).as_rotvec(), -np.ones((n, 1))], 1)


def test_poses_are_read_where_the_file_says_so(tmp_path):
    path = hdf5(tmp_path / "f.hdf5", [absolute(20)], controller={**CONTROLLER, "control_delta": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demos, wanted = read_hdf5(path, "lift"), absolute(20)
    assert np.allclose(demos.arrays["action"][:, :3], wanted[:, :3], atol=1e-6)
    turns = matrix_from_6d(demos.arrays["action"][:, 3:9])
    assert np.allclose(turns, poses(20)[1], atol=1e-5) and "action_delta" not in demos.arrays


def test_rotations_of_the_wrist_are_warned_of(tmp_path):
    wrist = absolute(20)
    wrist[:, 3:6] = Rotation.from_quat(poses(20)[2]).as_rotvec()
    path = hdf5(tmp_path / "f.hdf5", [wrist], controller={**CONTROLLER, "control_delta": False})
    with pytest.warns(UserWarning, match="1.5[0-9] rad from the hand's in the median"):
        read_hdf5(path, "lift")


def test_poses_under_a_delta_controller_are_refused(tmp_path):
    small = absolute(20)
    small[:, :3] = np.clip(small[:, :3], -0.99, 0.99)
    small[:, 3:6] = 0  # in the range of delta actions
    late = deltas(20)
    late[13, 4] = 3.1
    for actions, said in (
        ([absolute(20)], r"demo_0/actions has -?[23]\.\d\d at step 0, out of the range"),
        ([deltas(8), small], "demo_1/actions lie within 0.* m of the hand at every step"),
        ([late], r"demo_0/actions has 3.10 at step 13"),
    ):
        with pytest.raises(ValueError, match=f"(?s)f.hdf5: .*{said}.*absolute poses.*low_dim_v141"):
            read_hdf5(hdf5(tmp_path / "f.hdf5", actions), "lift")


def test_delta_actions_under_an_absolute_controller_are_refused(tmp_path):
    path = hdf5(tmp_path / "f.hdf5", [deltas(20)], controller={**CONTROLLER, "control_delta": False})
    with pytest.raises(
        ValueError, match="m from the hand at step 0; with control_delta = false they are poses"
    ):
        read_hdf5(path, "lift")


OTHERS = [
    ({"env_version": "1.2.0"}, "env_version = 1.2.0"),
    ({"env_version": "1.5.1"}, "env_version = 1.5.1"),
    ({"env_version": None}, "env_version = None"),
    ({"type": 2}, "type = 2"),
    ({"env_name": "Stack"}, "the file is of Stack, expected Lift"),
    ({"env_kwargs": None}, "no env_kwargs"),
    ({"env_kwargs": {}}, "controller_configs must describe"),
    ({"env_kwargs": {"controller_configs": [CONTROLLER] * 2}}, "the controllers of 1 arms"),
]


@pytest.mark.parametrize("changes, said", OTHERS, ids=[s for _, s in OTHERS])
def test_another_environment_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=f"f.hdf5: not robomimic's .*{said}"):
        read_hdf5(hdf5(tmp_path / "f.hdf5", [deltas(9)], **changes), "lift")


@pytest.mark.parametrize(
    "name, value", [("control_freq", 10), ("robots", ["Sawyer"]), ("gripper_types", "WipingGripper")]
)
def test_another_robot_or_rate_is_refused(tmp_path, name, value):
    kwargs = {**ARGS["env_kwargs"], name: value}
    with pytest.raises(ValueError, match=f"{name} = "):
        read_hdf5(hdf5(tmp_path / "f.hdf5", [deltas(9)], env_kwargs=kwargs), "lift")


@pytest.mark.parametrize(
    "name, value",
    [
        ("type", "OSC_POSITION"),
        ("type", "JOINT_POSITION"),
        ("type", "IK_POSE"),
        ("type", "BASIC"),
        ("type", None),
        ("kp", 300),
        ("kp", [150] * 5 + [50]),
        ("damping_ratio", 2),
        ("impedance_mode", "variable_kp"),
        ("interpolation", "linear"),
        ("position_limits", [[0, 0, 0], [1, 1, 1]]),
        ("control_delta", "no"),
        ("output_max", [0.05] * 5),
        ("output_max", -0.05),
        ("input_max", float("nan")),
    ],
)
def test_another_controller_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=r"f.hdf5: not robomimic's"):
        read_hdf5(hdf5(tmp_path / "f.hdf5", [deltas(9)], controller={**CONTROLLER, name: value}), "lift")


def test_what_does_not_matter_is_not_asked(tmp_path):
    for controller in (
        {k: CONTROLLER[k] for k in ("type", "output_max", "output_min")},
        {**CONTROLLER, "kp": [150] * 6, "damping": 3, "ramp_ratio": 0.5},
    ):
        path = hdf5(tmp_path / "f.hdf5", [deltas(9)], controller=controller, env_version="1.4.0")
        assert "action_delta" in read_hdf5(path, "lift").arrays


@pytest.mark.parametrize("key, width", [("eef_pos", 2), ("eef_quat", 3), ("gripper_qpos", 1)])
def test_an_observation_of_another_width_is_refused(tmp_path, key, width):
    path = hdf5(tmp_path / "f.hdf5", [deltas(9)])
    with h5py.File(path, "a") as f:
        old = f[f"data/demo_0/obs/robot0_{key}"][:]
        del f[f"data/demo_0/obs/robot0_{key}"]
        f[f"data/demo_0/obs/robot0_{key}"] = old[:, :width]
    with pytest.raises(ValueError, match=rf"robot0_{key} is \(9, {width}\), expected \(9, {width + 1}\)"):
        read_hdf5(path, "lift")


def test_a_bad_number_is_named_by_demonstration_and_step(tmp_path):
    path = hdf5(tmp_path / "f.hdf5", [deltas(9), deltas(12, 1)])
    with h5py.File(path, "a") as f:
        f["data/demo_1/obs/object"][7, 3] = np.nan
    with pytest.raises(ValueError, match="/data/demo_1/object has nan at step 7"):
        read_hdf5(path, "lift")


def test_the_environment_survives_our_own_format(tmp_path):
    demos = read_hdf5(hdf5(tmp_path / "f.hdf5", [deltas(9), deltas(12, 1)]), "lift")
    save_demonstrations(demos, tmp_path / "d.zarr")
    back = load_demonstrations(tmp_path / "d.zarr")
    assert (
        back.meta["env_args"] == demos.meta["env_args"]
        and back.meta["env_args"]["env_kwargs"]["camera_heights"] == 84
    )
    write_hdf5(tmp_path / "g.hdf5", back, "lift")
    again = read_hdf5(tmp_path / "g.hdf5", "lift")
    assert all(np.allclose(again.arrays[k], a, atol=1e-6) for k, a in demos.arrays.items())
