"""Images that stay on the disk: the same windows, the same training, the same distrust of what is read."""

import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

from dpag.config import generator, seed_everything
from dpag.data import Demonstrations, WindowDataset, batches_ahead, load_demonstrations, save_demonstrations
from dpag.files import DamagedError
from dpag.methods.dp import DPConfig
from dpag.policy import build_policy
from dpag.streaming import Ahead, ArrayOnDisk, ChunkCache, stays_on_disk
from dpag.train import TrainConfig, fit

WINDOW = {"horizon": 8, "n_obs_steps": 2, "n_action_steps": 4}


def seen(n_episodes=4, steps=30, size=16) -> Demonstrations:
    rng = np.random.default_rng(0)
    t = n_episodes * steps
    position = rng.normal(size=(t, 2)).cumsum(0).astype("f4")
    image = rng.integers(0, 256, (t, size, size, 3), dtype=np.uint8)
    arrays = {"position": position, "image": image, "action": position + 1}
    return Demonstrations(arrays, np.arange(1, n_episodes + 1) * steps)


def write_foreign(path, demos: Demonstrations, rows=7, zarr_format=2, **kw):
    "As somebody else would: small chunks, no seal."
    store = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for k, a in demos.arrays.items():
        more = kw if k == "image" else {}
        store.create_array(f"data/{k}", data=a, chunks=(rows, *a.shape[1:]), **more)
    store.create_array("meta/episode_ends", data=demos.episode_ends)


def small_store(path, demos, kind):
    if kind == "ours":
        save_demonstrations(demos, path)
    elif kind == "shards":
        write_foreign(path, demos, zarr_format=3, shards=(28, 16, 16, 3))
    elif kind == "tiles":
        store = zarr.open_group(path, mode="w", zarr_format=2)
        for k, a in demos.arrays.items():
            chunks = (7, 5, 16, 2) if k == "image" else (50, *a.shape[1:])
            store.create_array(f"data/{k}", data=a, chunks=chunks)
        store.create_array("meta/episode_ends", data=demos.episode_ends)
    else:
        write_foreign(path, demos)


@pytest.mark.parametrize("kind", ["ours", "small chunks", "shards", "tiles"])
def test_windows_are_the_same_from_the_disk(tmp_path, kind):
    demos = seen()
    small_store(tmp_path / "z", demos, kind)
    memory = load_demonstrations(tmp_path / "z")
    disk = load_demonstrations(tmp_path / "z", memory=40_000)
    assert isinstance(disk.arrays["image"], ArrayOnDisk)
    assert isinstance(disk.arrays["position"], np.ndarray)
    a, b = WindowDataset.of(memory, **WINDOW), WindowDataset.of(disk, **WINDOW)
    assert a.data_hash == b.data_hash == demos.data_hash() and a.shapes == b.shapes
    for step in range(20):
        one, other = (d.batch(9, generator("b", step)) for d in (a, b))
        assert torch.equal(one["action"], other["action"])
        assert all(torch.equal(one["obs"][k], other["obs"][k]) for k in one["obs"])
    assert np.array_equal(disk.episode(2)["image"], memory.episode(2)["image"])


def test_a_training_from_the_disk_is_the_same_to_the_bit(tmp_path):
    write_foreign(tmp_path / "z", seen(n_episodes=2, size=96))
    settings = TrainConfig(steps=6, batch_size=8, log_every=2, checkpoint_every=3)
    states = []
    for memory in (None, 500_000):
        dataset = WindowDataset.of(load_demonstrations(tmp_path / "z", memory=memory), **WINDOW)
        assert bool(batches_ahead(dataset)) == (memory is not None)
        seed_everything(0)
        policy = build_policy(DPConfig(), dataset=dataset)
        log = fit(policy, dataset, settings, folder=tmp_path / str(memory))
        states.append((policy.state_dict(), log["loss"].tolist()))
    (a, losses), (b, others) = states
    assert losses == others and all(torch.equal(a[k], b[k]) for k in a)


def test_a_sealed_chunk_is_looked_at_when_it_is_read(tmp_path):
    demos = seen(n_episodes=3, steps=200, size=96)
    save_demonstrations(demos, tmp_path / "z")
    chunks = sorted((tmp_path / "z/data/image").glob("[0-9]*"))
    assert len(chunks) > 1
    last = bytearray(chunks[-1].read_bytes())
    last[40] ^= 1
    chunks[-1].write_bytes(last)
    disk = load_demonstrations(tmp_path / "z", memory=1000)
    assert np.array_equal(disk.arrays["image"][:3], demos.arrays["image"][:3])
    with pytest.raises(DamagedError, match=r"data/image/\d.*is damaged: its checksum"):
        disk.arrays["image"][-1:]
    dataset = WindowDataset.of(disk, **WINDOW)
    with pytest.raises(DamagedError, match="is damaged"):
        for step in range(50):
            dataset.batch(16, generator(step))


@pytest.mark.parametrize("kind", ["ours", "small chunks"])
def test_a_chunk_that_is_not_there_is_missed_before_the_training(tmp_path, kind):
    small_store(tmp_path / "z", seen(), kind)
    next((tmp_path / "z/data/image").glob("[0-9]*")).unlink()
    with pytest.raises(DamagedError, match="missing"):
        load_demonstrations(tmp_path / "z", memory=1000)


@pytest.mark.parametrize("part", ["data/position/0.0", "data/image/.zarray", "meta/episode_ends/0"])
def test_the_rest_of_a_sealed_store_is_looked_at_at_once(tmp_path, part):
    save_demonstrations(seen(), tmp_path / "z")
    file = tmp_path / "z" / part
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DamagedError, match="is damaged"):
        load_demonstrations(tmp_path / "z", memory=1000)


def test_only_large_images_of_bytes_stay_on_the_disk(tmp_path):
    demos = seen()
    floats = replace(demos, arrays={**demos.arrays, "image": demos.arrays["image"] / np.float32(255)})
    write_foreign(tmp_path / "f", floats)
    found = load_demonstrations(tmp_path / "f", memory=1000).arrays
    assert found["image"].dtype == np.uint8 and isinstance(found["image"], np.ndarray)
    stored = zarr.create_array({}, shape=(10, 3, 8, 8), dtype="u1")
    assert not stays_on_disk(stored, 0)


def test_the_cache_keeps_to_its_budget_with_several_threads():
    cache, asked = ChunkCache(5000), []

    def use(seed):
        for name in np.random.default_rng(seed).integers(0, 20, 300):
            chunk = cache.get(int(name), lambda n=int(name): asked.append(n) or np.full(1000, n, "u1"))
            assert chunk[0] == name

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.used == sum(c.nbytes for c in cache._kept.values()) <= 5000
    assert 20 <= len(asked) < 1200


def test_what_is_drawn_ahead_comes_in_order_and_its_errors_too():
    def draw(step):
        if step == 5:
            raise ValueError("step 5")
        return step

    ahead = Ahead(draw, 3, last=20)
    assert [ahead(s) for s in range(1, 5)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="step 5"):
        ahead(5)
    ahead.close()


TWO_HUNDRED_GB = r"""
import re, sys
import numpy as np, zarr
path, steps = sys.argv[1], 7_302_000
store = zarr.open_group(path, mode="w", zarr_format=2)
store.create_array("data/image", shape=(steps, 96, 96, 3), chunks=(256, 96, 96, 3), dtype="u1", fill_value=7)
for key in ("position", "action"):
    store.create_array(f"data/{key}", data=np.random.default_rng(0).normal(size=(steps, 2)).astype("f4"))
store.create_array("meta/episode_ends", data=np.arange(300, steps + 1, 300))
store.attrs["hash"] = "not asked for"
from dpag.config import generator
from dpag.data import WindowDataset, load_demonstrations
from dpag.methods.dp import DPConfig
from dpag.policy import build_policy
from dpag.train import TrainConfig, fit
demos = load_demonstrations(path, fill_missing=True, memory=2**29)
assert demos.arrays["image"].nbytes > 200e9
data = WindowDataset.of(demos, horizon=8, n_obs_steps=2, n_action_steps=4)
for step in range(3):
    batch = data.batch(16, generator(step))
    assert batch["obs"]["image"].shape == (16, 2, 96, 96, 3) and (batch["obs"]["image"] == 7).all()
fit(build_policy(DPConfig(), dataset=data), data, TrainConfig(steps=2, batch_size=8))
# Not getrusage: its largest size is also that of the process which started this one.
with open("/proc/self/status") as status:
    print(len(data), int(re.search(r"VmHWM:\s+(\d+) kB", status.read())[1]) / 2**20)
"""


def test_two_hundred_gigabytes_are_trained_from_in_four(tmp_path):
    run = [sys.executable, "-c", TWO_HUNDRED_GB, str(tmp_path / "z")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    windows, gib = done.stdout.split()
    assert int(windows) > 7_000_000 and float(gib) < 4
