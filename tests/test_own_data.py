"""Demonstrations of one's own: what is odd in them, what is said of them, what is trained from them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dpag.data import READERS, Demonstrations, Reader, load_demonstrations, main, save_demonstrations
from dpag.files import DamagedError, root
from dpag.oddities import action_reading, oddities, summary
from dpag.policy import load_policy

ENDS = np.array([60, 120, 200])


def clean(seed=0):
    "Three episodes of a point that wanders, and of what its camera sees."
    rng = np.random.default_rng(seed)
    position = np.cumsum(rng.normal(size=(200, 3)), 0).astype(np.float32)
    action = np.concatenate([position[1:], position[-1:]])
    camera = rng.integers(0, 255, (200, 4, 5, 3), np.uint8)
    return {"position": position, "camera": camera, "action": action}


def nothing(a):
    pass


def nan(a):
    a["position"][70, 1] = np.nan


def stuck(a):
    a["position"][:, 2] = 0.25


def jump(a):
    a["position"][90:120] += 500


def clip(a):
    np.clip(a["action"], -2, 1, out=a["action"])


def blank(a):
    a["camera"][33] = 7


def frozen(a):
    a["camera"][130:150] = a["camera"][130]


def pause(a):
    for x in a.values():
        x[10:50] = x[10]


FAULTS = {
    nan: ("position", "not finite", "episode 1, step 10"),
    stuck: ("position", "entries 2 never change", ""),
    jump: ("position", "jumps", "episode 1, step 30"),
    clip: ("action", "is its", "episode"),
    blank: ("camera", "have one colour", "episode 0, step 33"),
    frozen: ("camera", "one frame stands for 20 steps", "episode 2, step 10"),
    pause: ("episodes", "nothing changes for 39 steps", "episode 0, step 10"),
}


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_odd_where_nothing_is(seed):
    assert oddities(clean(seed), ENDS) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_named_with_its_place(fault):
    arrays = clean()
    fault(arrays)
    key, what, where = FAULTS[fault]
    found = [odd for odd in oddities(arrays, ENDS) if odd.key == key]
    assert any(what in odd.what and where in odd.where for odd in found), found


def test_what_is_between_episodes_is_not_odd():
    arrays = clean()
    arrays["position"][60:] += 500
    arrays["camera"][56:64] = arrays["camera"][56]  # four steps in each of two episodes
    assert oddities(arrays, ENDS) == []


def test_an_episode_that_is_far_too_short_is_named():
    assert "1 are shorter than a fifth" in str(oddities(clean(), np.array([60, 63, 120, 200]))[0])


@pytest.mark.parametrize("kind", ["positions of position", "changes of position in a step", ""])
def test_what_the_actions_seem_to_be(kind):
    arrays = clean()
    if "changes" in kind:
        arrays["action"] = np.diff(arrays["position"], axis=0, append=arrays["position"][-1:])
    elif not kind:
        arrays["action"] = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    assert action_reading(arrays, ENDS) == kind
    assert ("The actions look like" in summary(arrays, ENDS)) == bool(kind)


def test_the_command_says_what_is_in_a_file_and_draws_it(tmp_path, capsys):
    arrays = clean()
    jump(arrays)
    save_demonstrations(Demonstrations(arrays, ENDS, {"fps": 20}), tmp_path / "own.zarr")
    main(["info", str(tmp_path / "own.zarr"), "--figure", str(tmp_path / "page.png")])
    said = capsys.readouterr().out
    assert "3 episodes, 200 steps" in said and "20 steps a second" in said and "jumps" in said
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
    done = subprocess.run(
        [sys.executable, "-m", "dpag.data", "info", str(tmp_path / "no.zarr")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "no demonstrations at" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_is_asked_for_what_is_no_replay_buffer(tmp_path):
    demos = Demonstrations(clean(), ENDS)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(DamagedError, match="not a replay buffer"):
        load_demonstrations(folder)
    READERS.names()
    READERS.add("mine", Reader("mine", lambda p: (p / "mine.txt").exists(), lambda p, keys: demos, __name__))
    try:
        assert load_demonstrations(folder) is demos
    finally:
        del READERS.entries["mine"]


def papermill(tmp_path, **parameters):
    "Run the experiment on a file; what it printed as an error."
    given = ["-y", yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in parameters.items()})]
    notebook = str(root() / "nbs/experiments/e07_own_data.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, *given], capture_output=True, text=True, cwd=tmp_path)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    arrays = {k: np.concatenate([a, a]) for k, a in clean().items()}
    arrays["camera"] = np.random.default_rng(0).integers(0, 255, (400, 96, 96, 3), np.uint8)
    save_demonstrations(Demonstrations(arrays, np.concatenate([ENDS, ENDS + 200]), {}), folder / "own.zarr")
    return folder / "own.zarr"


@pytest.mark.parametrize("method", ["dp_ag", "lstm_gmm"])
def test_a_policy_is_trained_from_a_file_alone(tmp_path, own, method):
    keys = ["position"] if method == "lstm_gmm" else ["position", "camera"]
    out = tmp_path / "out"
    code, error = papermill(tmp_path, path=own, out=out, method=method, steps=20, observations=keys)
    assert code == 0, error[-2000:]
    policy, about = load_policy(out / "checkpoint")
    assert set(policy.shapes.obs) == set(keys) and len(about["info"]["validation"]["set_aside"]) == 1
    errors = pd.read_csv(out / "errors.csv")
    assert list(errors.step) == list(range(2, 21, 2)) and errors.notna().all(axis=None)
    assert (out / "attention_camera.png").exists() == ("camera" in keys) and (out / "errors.png").exists()


def test_a_key_that_is_not_there_is_named(tmp_path, own):
    code, error = papermill(tmp_path, path=own, out=tmp_path / "out", reference="place", frame="relative")
    assert code != 0 and "has no place: it has action, camera, position" in error
