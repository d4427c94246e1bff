"""Own data in robomimic's layout: there and back to the bit, and nothing read that is not there."""

import json
import shutil

import h5py
import numpy as np
import pytest

from dpag.data import Demonstrations, load_demonstrations, main, save_demonstrations
from dpag.files import DamagedError
from dpag.hdf5 import is_hdf5, read_hdf5, write_hdf5
from dpag.lerobot import read_lerobot, write_lerobot

LENGTHS = [7, 12, 1, 30]


def own(seed=0) -> Demonstrations:
    rng, ends = np.random.default_rng(seed), np.cumsum(LENGTHS)
    t = ends[-1]
    arrays = {
        "joint": rng.normal(size=(t, 6)),
        "gripper": rng.integers(0, 2, (t, 1)),
        "wrist": rng.integers(0, 256, (t, 24, 32, 3), dtype=np.uint8),
        "action": rng.uniform(-1, 1, (t, 7)).astype("f4"),
    }
    return Demonstrations(arrays, ends, {"robot": "an arm", "seed": seed})


def assert_same(a: Demonstrations, b: Demonstrations):
    assert a.arrays.keys() == b.arrays.keys() and np.array_equal(a.episode_ends, b.episode_ends)
    for key, values in a.arrays.items():
        assert values.dtype == b.arrays[key].dtype and np.array_equal(values, b.arrays[key]), key


@pytest.fixture
def written(tmp_path):
    write_hdf5(tmp_path / "own.hdf5", own())
    return tmp_path / "own.hdf5"


@pytest.mark.parametrize("seed", range(3))
def test_zarr_hdf5_lerobot_and_back_are_exact(tmp_path, seed):
    demos = own(seed)
    save_demonstrations(demos, tmp_path / "a")
    write_hdf5(tmp_path / "b.hdf5", load_demonstrations(tmp_path / "a"))
    write_lerobot(load_demonstrations(tmp_path / "b.hdf5"), tmp_path / "c", fps=10, videos=False)
    write_hdf5(tmp_path / "d.hdf5", read_lerobot(tmp_path / "c"))
    save_demonstrations(load_demonstrations(tmp_path / "d.hdf5"), tmp_path / "e")
    assert_same(load_demonstrations(tmp_path / "e"), demos)
    assert load_demonstrations(tmp_path / "b.hdf5").meta["robot"] == "an arm"


def test_robomimic_itself_reads_it(written):
    from robomimic.utils.dataset import SequenceDataset

    keys = {"obs_keys": ("joint", "gripper"), "dataset_keys": ("actions", "rewards", "dones")}
    dataset = SequenceDataset(str(written), **keys, frame_stack=1, load_next_obs=False)
    demos, n = own(), sum(LENGTHS)
    assert len(dataset) == n and dataset.n_demos == len(LENGTHS)
    assert np.allclose([dataset[i]["actions"][0] for i in range(n)], demos.arrays["action"])
    assert np.allclose([dataset[i]["obs"]["joint"][0] for i in range(n)], demos.arrays["joint"])


def test_what_others_record_is_read_in_the_order_of_its_numbers(tmp_path):
    with h5py.File(tmp_path / "r.h5", "w") as f:
        for i in (10, 2, 0):
            demo = f.create_group(f"data/demo_{i}")
            demo["actions"] = np.full((3, 2), i, "f8")
            demo["obs/rgb"] = np.full((3, 3, 16, 16), i / 10, "f4")  # floats up to one, colours first
            demo["obs/rgb"][0, 0, 0, 0] = 1.0
            demo["next_obs/rgb"] = np.zeros((3, 3, 16, 16), "f4")
    found = load_demonstrations(tmp_path / "r.h5")
    assert found.arrays["action"][::3, 0].tolist() == [0, 2, 10]
    assert found.arrays["rgb"].shape == (9, 16, 16, 3) and found.arrays["rgb"].dtype == np.uint8
    assert found.arrays["rgb"][3, 5, 5].tolist() == [51] * 3


def change(path, do):
    with h5py.File(path, "r+") as f:
        do(f)


def unwritten(f):
    del f["data/demo_1/obs/joint"]
    f.create_dataset("data/demo_1/obs/joint", (12, 6), "f8", chunks=(5, 6))[:5] = 1


def linked(f):
    del f["data/demo_1/obs/joint"]
    f["data/demo_1/obs/joint"] = h5py.ExternalLink("elsewhere.hdf5", "/x")


def soft(f):
    del f["data/demo_1/obs"]
    f["data/demo_1/obs"] = h5py.SoftLink("/data/demo_0/obs")


def virtual(f):
    del f["data/demo_1/obs/joint"]
    layout = h5py.VirtualLayout((12, 6), "f8")
    layout[:] = h5py.VirtualSource("elsewhere.hdf5", "x", (12, 6))
    f["data/demo_1/obs"].create_virtual_dataset("joint", layout)


def external(f):
    del f["data/demo_1/obs/joint"]
    f["data/demo_1/obs"].create_dataset("joint", (12, 6), "f8", external=[("elsewhere.bin", 0, 576)])


def replaced(name, value):
    def do(f):
        del f[name]
        f[name] = value

    return do


KINDS = {
    "part never written": (unwritten, r"2 of the 3 parts of /data/demo_1/obs/joint were never written"),
    "external link": (linked, "obs/joint is missing, or a link"),
    "soft link": (soft, "data/demo_1/obs is missing, or a link"),
    "virtual": (virtual, "lies in another file"),
    "external": (external, "lies in another file"),
    "a step less": (replaced("data/demo_1/obs/joint", np.zeros((11, 6))), r"shape \(11, 6\)"),
    "another width": (replaced("data/demo_1/obs/joint", np.zeros((12, 5))), r"shape \(12, 5\)"),
    "another type": (replaced("data/demo_1/obs/joint", np.zeros((12, 6), "f4")), "of float32"),
    "a number": (replaced("data/demo_1/obs/joint", 3.0), "is no array of steps"),
    "texts": (replaced("data/demo_1/actions", np.array([b"x"] * 12)), "expected"),
    "another number": (replaced("data/demo_1/obs/joint", np.zeros((12, 6))), "the arrays' hash is"),
    "no episodes": (lambda f: [f["data"].pop(n) for n in list(f["data"])], "no demo_0"),
    "no data": (lambda f: f.pop("data"), "data"),
    "a key less": (lambda f: f["data/demo_1/obs"].pop("joint"), "is missing"),
    "env_args": (lambda f: f["data"].attrs.update(env_args="{"), "JSON"),
    "an action among obs": (
        lambda f: f["data/demo_0/obs"].move("joint", "action"),
        "obs/action has the name",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_whole_is_refused(written, kind):
    do, says = KINDS[kind]
    change(written, do)
    with pytest.raises(DamagedError, match=says):
        load_demonstrations(written)


def test_numbers_that_are_none_are_named(written):
    values = own().arrays["joint"][7:19].copy()
    values[4, 2] = np.nan
    change(written, lambda f: [f.pop("dpag"), replaced("data/demo_1/obs/joint", values)(f)])
    with pytest.raises(DamagedError, match="data/joint has nan at step 4 of episode 1"):
        load_demonstrations(written)


def test_a_file_that_was_cut_anywhere_is_refused(written, tmp_path):
    raw = written.read_bytes()
    for size in np.linspace(9, len(raw) - 1, 40, dtype=int):
        (tmp_path / "cut.hdf5").write_bytes(raw[:size])
        with pytest.raises(DamagedError):
            load_demonstrations(tmp_path / "cut.hdf5")


def test_a_flipped_bit_is_noticed_or_changes_nothing(written, tmp_path):
    raw, rng, demos = written.read_bytes(), np.random.default_rng(0), own()
    for at in rng.integers(8, len(raw), 150):
        copy = bytearray(raw)
        copy[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "bit.hdf5").write_bytes(copy)
        try:
            found = load_demonstrations(tmp_path / "bit.hdf5")
        except DamagedError:
            continue
        assert_same(found, demos)


def test_keys_limit_what_is_read_and_say_as_what(written):
    found = load_demonstrations(written, keys={"joint": None, "gripper": np.uint8})
    assert {k: a.dtype for k, a in found.arrays.items()} == {"joint": np.float64, "gripper": np.uint8}
    with pytest.raises(DamagedError, match="do not fit into int32"):
        load_demonstrations(written, keys={"action": np.int32})
    with pytest.raises(DamagedError, match=r"has no arm; there are action, gripper, joint, wrist"):
        load_demonstrations(written, keys=["arm"])


def test_actions_that_env_args_do_not_explain_are_warned_of(tmp_path):
    demos = own()
    demos.arrays["action"] *= 3
    args = {"env_name": "Lift", "type": 1, "env_kwargs": {"controller_configs": {"control_delta": True}}}
    write_hdf5(tmp_path / "p.hdf5", demos, args)
    with pytest.warns(UserWarning, match="takes −1 to 1 by env_args: they may be poses"):
        found = load_demonstrations(tmp_path / "p.hdf5")
    assert found.meta["env_args"] == args
    write_hdf5(tmp_path / "again.hdf5", found)  # which keeps them
    with h5py.File(tmp_path / "again.hdf5") as f:
        assert json.loads(f["data"].attrs["env_args"]) == args


@pytest.mark.filterwarnings("error")
def test_the_command_tells_what_is_in_the_file(written, capsys):
    main(["info", str(written)])
    said = capsys.readouterr().out
    assert "4 episodes" in said and "wrist" in said


def test_a_file_of_another_kind_is_none(tmp_path, written):
    (tmp_path / "x.hdf5").write_bytes(b"\x89HDF")
    assert is_hdf5(written) and not is_hdf5(tmp_path / "x.hdf5") and not is_hdf5(tmp_path)
    with pytest.raises(DamagedError):
        read_hdf5(tmp_path / "x.hdf5")
    shutil.copy(written, tmp_path / "x.zip")  # by what it is, not by its name
    assert len(load_demonstrations(tmp_path / "x.zip")) == len(LENGTHS)


def test_what_cannot_be_written_is_refused_and_nothing_is_lost(written):
    before = written.read_bytes()
    demos = own()
    demos.arrays["a/b"] = demos.arrays["joint"]
    with pytest.raises(ValueError, match="'a/b' cannot be"):
        write_hdf5(written, demos)
    demos = own()
    demos.arrays["joint"][3] = np.inf
    with pytest.raises(ValueError, match="inf"):
        write_hdf5(written, demos)
    assert written.read_bytes() == before
