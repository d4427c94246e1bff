"""Push-T: exact states, the human data, the expert."""
import hashlib
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from dpag import config
from dpag.tasks.pusht import env as pusht
from dpag.tasks.base import fetch
from dpag.tasks.pusht.env import PushT, human_demonstrations, keypoints_of, replay
from dpag.tasks.pusht.expert import run_expert, scripted_demonstrations

needs_human = pytest.mark.skipif(not os.environ.get("DPAG_MIRROR"), reason="DPAG_MIRROR names no folder with pusht.zip")


def test_set_state_is_exact_and_at_rest():
    env, rng = PushT(), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(20):
        state = rng.uniform([50, 50, 100, 100, -3], [450, 450, 400, 400, 3])
        obs = env.set_state(state)
        np.testing.assert_allclose(env.state, state, atol=1e-9)
        np.testing.assert_allclose(obs["keypoints"], keypoints_of(state[None])[0], atol=1e-9)
        assert tuple(env.sim.block.velocity) == (0, 0)


@needs_human
def test_human_episodes_replay_exactly():
    demos, env, scores = human_demonstrations(), PushT(), []
    assert len(demos) == 206
    for i in range(60):
        e = demos.episode(i)
        seen, score = replay(env, e["state"].astype(np.float64), e["action"].astype(np.float64))
        turned = np.abs(seen[:, 4] - e["state"][:, 4]); turned = np.minimum(turned % (2 * np.pi), -turned % (2 * np.pi))
        if i < 20: assert np.abs(seen[:, :4] - e["state"][:, :4]).max() < 0.005 and turned.max() < 1e-3
        scores.append(score)
    assert np.mean(scores) == pytest.approx(0.949, abs=0.002)


@needs_human
def test_human_keypoints_are_the_environments():
    e, env = human_demonstrations().episode(3), PushT()
    env.reset(seed=0)
    for t in (0, 50): np.testing.assert_allclose(env.set_state(e["state"][t].astype(float))["keypoints"], e["keypoints"][t], atol=1e-2)


def test_no_network_and_no_mirror_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    with pytest.raises(ConnectionError, match="(?s)connect to a network.*DPAG_MIRROR"): fetch("pusht.zip", "http://127.0.0.1:9/pusht.zip", tmp_path, retries=0)
    assert not list(tmp_path.iterdir())


def test_mirror_without_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no pusht.zip in it"): human_demonstrations()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half an archive"])
def test_damaged_archive_is_refused(tmp_path, monkeypatch, content):
    (tmp_path / "pusht.zip").write_bytes(content)
    monkeypatch.setenv("DPAG_MIRROR", str(tmp_path))
    with pytest.raises(ValueError, match="damaged"): human_demonstrations()
    assert (tmp_path / "pusht.zip").exists()        # a user's own file is not ours to remove


def test_wrong_data_and_hostile_names_are_refused(tmp_path, monkeypatch):
    from dpag.data import Demonstrations, save_demonstrations
    save_demonstrations(Demonstrations({"action": np.zeros((9, 2), np.float32), "state": np.zeros((9, 5), np.float32)}, np.array([9]), {}), tmp_path / "p.zarr")
    with zipfile.ZipFile(tmp_path / "pusht.zip", "w") as z:
        for f in (tmp_path / "p.zarr").rglob("*"):
            if f.is_file(): z.write(f, f"pusht/x.zarr/{f.relative_to(tmp_path / 'p.zarr')}")
        z.writestr("../../escaped", "boo")
    # Downloaded once, it fails the check and is removed; nothing was unpacked anywhere.
    monkeypatch.delenv("DPAG_MIRROR", raising=False)
    folder = tmp_path / "raw"; folder.mkdir(); (tmp_path / "pusht.zip").rename(folder / "pusht.zip")
    monkeypatch.setattr(pusht, "fetch", lambda name, url, folder: folder / name)
    with pytest.raises(ValueError, match="sha256"): human_demonstrations(folder)
    assert not list(folder.iterdir()) and not (tmp_path.parent / "escaped").exists() and not (tmp_path / "escaped").exists()


def test_expert_succeeds_and_is_reproducible(settings):
    kw = dict(n_demos=8, first_seed=7000, expert=settings.pusht.expert, max_steps=300)
    states, actions, ends, meta = scripted_demonstrations(PushT, **kw, workers=2)
    again = scripted_demonstrations(PushT, **kw, workers=1)
    np.testing.assert_array_equal(states, again[0]); np.testing.assert_array_equal(actions, again[1])
    assert meta["success_rate"] >= 0.8 and len(ends) == 8


ATTEMPTS = """import sys
from pathlib import Path
from dpag import config
from dpag.tasks.pusht.env import PushT
from dpag.tasks.pusht.expert import scripted_demonstrations
expert = type(config.load().pusht.expert).model_validate_json(sys.argv[1])
scripted_demonstrations(PushT, n_demos=2, first_seed=7000, expert=expert, max_steps=300, workers=1, parts=Path(sys.argv[2]))"""

def test_a_later_process_goes_on_from_the_attempts_of_an_earlier_one(settings, tmp_path):
    expert = settings.pusht.expert
    subprocess.run([sys.executable, "-c", ATTEMPTS, expert.model_dump_json(), str(tmp_path)], cwd=config.root(), check=True)
    left = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.npz")}
    kw = dict(n_demos=4, first_seed=7000, expert=expert, max_steps=300, workers=1)
    states, actions, ends, meta = scripted_demonstrations(PushT, **kw, parts=tmp_path)
    fresh = scripted_demonstrations(PushT, **kw)
    np.testing.assert_array_equal(states, fresh[0]); np.testing.assert_array_equal(actions, fresh[1])
    assert meta == fresh[3] and len(left) >= 2 and len(list(tmp_path.iterdir())) == 1        # one folder: the same kind of attempts
    assert all(f.stat().st_mtime_ns == t for f, t in left.items())


def test_expert_plans_differ_by_plan_seed(settings):
    env = PushT()
    runs = [run_expert(env, seed=11, plan_seed=i, expert=settings.pusht.expert, max_steps=300)[1] for i in range(4)]
    assert len({hashlib.sha256(a.tobytes()).hexdigest() for a in runs}) > 1


def test_evaluation_never_sees_training_states(settings):
    e, t = settings.evaluate, settings.pusht
    assert set(range(e.first_seed, e.first_seed + e.n_episodes)).isdisjoint(range(t.demo_seed, t.demo_seed + 10 * t.n_demos))
