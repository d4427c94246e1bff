"""DP-AG in LeRobot, by the plug-in in `plugins/lerobot_policy_dpag`: lerobot-train trains it, and a policy
that dpag has trained acts there as it does here.

Tests beside a live LeRobot run where DPAG_LEROBOT_V30 names the Python of an environment with lerobot 0.4.4
(`make lerobot`)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from dpag.config import generator, layered
from dpag.data import WindowDataset
from dpag.files import read_text, root
from dpag.lerobot import read_lerobot
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.policy import Actor, PolicyConfig, build_policy, load_policy, save_policy
from dpag.train import TrainConfig, fit

PEER = Path(__file__).parent / "lerobot/policy_peer.py"
PLUGIN = root() / "plugins/lerobot_policy_dpag"
STEPS = {"horizon": 4, "n_obs_steps": 2, "n_action_steps": 2}
SETTINGS = {
    "encoder": {"hidden": [16], "latent_dim": 4, "camera": {"crop": 48, "n_keypoints": 4}},
    "net": {"kind": "mlp", "width": 16, "depth": 2, "step_dim": 8},
    "diffusion": {"n_sample_steps": 4},
}
RESUMED = ["--resume=true", "--output_dir=out", "--steps=7"]
DATASET = {"dataset.repo_id": "made/here", "dataset.root": "theirs", "dataset.video_backend": "pyav"}
LOOP = {"batch_size": 6, "num_workers": 0, "save_freq": 3, "log_freq": 1}
CAMERA = "observation.images.top"


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    "Runs commands of `policy_peer.py` in a folder, with the plug-in as pip installs it; gives the folder."
    python = os.environ.get("DPAG_LEROBOT_V30")
    if not python:
        pytest.skip("no environment with lerobot 0.4.4 is named")
    python = os.path.abspath(python)
    folder, site = tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("site")
    shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(site), str(folder / "source")], check=True, capture_output=True)
    clean = {**os.environ, "PYTHONPATH": f"{root()}{os.pathsep}{site}", "HF_HUB_OFFLINE": "1"}

    def run(*commands, check=True):
        call = [python, str(PEER), json.dumps(commands)]
        done = subprocess.run(call, cwd=folder, env=clean, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done

    run.folder, run.python, run.env = folder, python, clean
    return run


def words(given: dict) -> list[str]:
    return [f"--{k}={v}" for k, v in given.items()]


TRAINED = words(
    {
        **DATASET,
        **LOOP,
        "policy.type": "dp_ag",
        "policy.device": "cpu",
        "policy.push_to_hub": "false",
        "policy.settings": json.dumps(SETTINGS),
        "policy.train": json.dumps({"lr": 0.01, "warmup_steps": 2}),
        **{f"policy.{k}": v for k, v in STEPS.items()},
        "output_dir": "out",
        "steps": 6,
    }
)
START = "out/checkpoints/000003/pretrained_model"
FINE_TUNED = words({**DATASET, **LOOP, "policy.path": START, "output_dir": "fine", "steps": 2})


@pytest.fixture(scope="module")
def trained(peer):
    "A dataset that lerobot wrote, with a video, and what lerobot-train made of it in six steps."
    model = "out/checkpoints/last/pretrained_model"
    peer(
        ["write", "theirs", 1],
        ["train", *TRAINED],
        ["again", model, "again"],
        ["back", model, "back"],
        ["windows", "theirs", model, "windows.npz"],
        ["train", f"--config_path={START}/train_config.json", *RESUMED],
        ["train", *FINE_TUNED],
    )
    return peer.folder / model


def weights(trained, step: str) -> dict[str, torch.Tensor]:
    return load_file(trained.parents[1] / step / "pretrained_model/model.safetensors")


@pytest.mark.timeout(900)
def test_lerobot_train_trains_it_on_lerobots_dataset_with_video(trained):
    first, last = weights(trained, "000003"), weights(trained, "000006")
    assert (first["n_updates"], last["n_updates"]) == (3, 6)
    assert all(t.isfinite().all() for t in last.values())
    changed = {k for k in last if not torch.equal(first[k], last[k])}
    for part in ("policy", "averaged"):
        assert any(k.startswith(f"{part}.encoder.cameras") for k in changed)
        assert any(k.startswith(f"{part}.net") for k in changed)
    trained_ones = [k for k in changed if k.startswith("policy.")]
    assert all(not torch.equal(last[k], last[k.replace("policy", "averaged", 1)]) for k in trained_ones)


@pytest.mark.timeout(900)
def test_an_interrupted_training_goes_on(trained):
    assert weights(trained, "000007")["n_updates"] == 7


@pytest.mark.timeout(900)
def test_a_policy_is_trained_further_with_the_scales_that_it_has(trained, peer):
    first = weights(trained, "000003")
    tuned = load_file(peer.folder / "fine/checkpoints/last/pretrained_model/model.safetensors")
    assert tuned["n_updates"] == 5
    scales = {k for k in tuned if "scale" in k or "reach" in k}
    assert scales and all(torch.equal(first[k], tuned[k]) for k in scales)
    assert any(not torch.equal(first[k], tuned[k]) for k in tuned.keys() - scales)


@pytest.mark.timeout(900)
def test_a_policy_is_the_same_after_saving_and_loading(trained, peer):
    "`again` compares every weight in LeRobot's own process."
    assert (peer.folder / "again/config.json").exists()


@pytest.mark.timeout(900)
def test_the_scales_are_those_that_dpag_fits_and_the_windows_are_dpags(trained, peer):
    demos = read_lerobot(peer.folder / "theirs")
    dataset = WindowDataset.of(demos, **STEPS)
    settings = layered(PolicyConfig, SETTINGS, STEPS)
    fitted = build_policy(DPAGConfig(), settings, dataset=dataset).state_dict()
    learned = load_file(trained / "model.safetensors")
    for name in [k for k in fitted if "scale" in k or "reach" in k]:
        torch.testing.assert_close(learned[f"policy.{name}"], fitted[name], msg=name)
    ours = dataset.gather(torch.arange(len(dataset)))
    with np.load(peer.folder / "windows.npz") as theirs:
        np.testing.assert_array_equal(theirs["action"], ours["action"])
        assert set(theirs.files) == {"action", *ours["obs"]}
        for k, v in ours["obs"].items():
            np.testing.assert_array_equal(theirs[k], v, err_msg=k)


@pytest.mark.timeout(900)
def test_what_lerobot_has_trained_is_a_checkpoint_of_dpags(trained, peer):
    policy, meta = load_policy(peer.folder / "back")
    assert meta["info"] == {"updates": 6} and policy.shapes.obs[CAMERA] == (64, 64, 3)
    demos = read_lerobot(peer.folder / "theirs")
    obs = WindowDataset.of(demos, **STEPS).batch(3, generator("obs"))["obs"]
    assert policy.act(obs, generator("act")).shape == (3, 2, 2)


# Trained by dpag


NAMES = {
    "agent_pos": "observation.state",
    "goal": "observation.environment_state",
    "image": "observation.image",
}


@pytest.fixture(scope="module")
def ours(peer):
    "A checkpoint of dpag's, observations of an episode, and what LeRobot does with both."
    rng, n = np.random.default_rng(0), 40
    position = rng.normal(size=(n + 1, 2)).cumsum(0).astype(np.float32)
    obs = {
        "agent_pos": position[:-1],
        "goal": rng.normal(size=(n, 2, 3)).astype(np.float32),
        "image": rng.integers(0, 256, (n, 64, 80, 3), np.uint8),
    }
    dataset = WindowDataset(obs, position[1:], [15, n], **STEPS, action_ref="agent_pos")
    settings = layered(PolicyConfig, SETTINGS, STEPS, {"action_frame": "relative"})
    policy = build_policy(DPAGConfig(), settings, dataset=dataset)
    fit(policy, dataset, TrainConfig(steps=20, batch_size=8, lr=0.01, warmup_steps=2))
    save_policy(peer.folder / "ours", policy)
    save_policy(peer.folder / "dp", build_policy(DPConfig(), settings, dataset=dataset))
    episode = {k: v[:5] for k, v in obs.items()}
    np.savez(peer.folder / "episode.npz", **{NAMES[k]: v for k, v in episode.items()})
    given = ("there", "episode.npz")
    peer(
        ["convert", "ours", "there", *(f"{k}={v}" for k, v in NAMES.items())],
        ["act", *given, "act.npz"],
        ["batch", *given, "batch.npz"],
        ["again", "there", "there_again"],
        ["refusals", "said.json", "ours", "dp"],
    )
    return load_policy(peer.folder / "ours")[0], episode


@pytest.mark.timeout(900)
def test_a_policy_of_dpags_acts_in_lerobot_as_here(ours, peer):
    policy, episode = ours
    actor = Actor(policy, generator("act", 0))
    expected = []
    for _ in range(2):
        actor.reset()
        expected.extend(actor(dict(zip(episode, row))) for row in zip(*episode.values()))
    with np.load(peer.folder / "act.npz") as theirs:
        np.testing.assert_array_equal(theirs["actions"], np.array(expected))


@pytest.mark.timeout(900)
def test_it_acts_every_n_action_steps_and_after_a_reset(ours, peer):
    with np.load(peer.folder / "act.npz") as theirs:
        states = theirs["states"]
    drew = [True, *((a != b).any() for a, b in zip(states, states[1:]))]
    assert drew == 2 * [
        True,
        False,
        True,
        False,
        True,
    ]  # a reset drops the sixth action


@pytest.mark.timeout(900)
def test_several_robots_act_at_once(ours, peer):
    policy, episode = ours
    obs = {k: torch.from_numpy(v[:3])[:, None].repeat_interleave(2, 1) for k, v in episode.items()}
    expected = policy.act(obs, generator("act", 0))
    with np.load(peer.folder / "batch.npz") as theirs:
        np.testing.assert_array_equal(theirs["actions"], expected)
        np.testing.assert_array_equal(theirs["chunk"], expected)


SAID = {
    "horizon": ["policy: horizon = 4 must be at least n_action_steps + n_obs_steps - 1 = 9"],
    "settings": ["settings.horizon = 4: allowed are action_frame", "mpl"],
    "method": ["method.guidance.gamma = -1.0"],
    "train": ["train.steps = 9: allowed are lr, weight_decay", "train.lr = 'fast'"],
    "keys": ["keys has 'observation.image': the observations are observation.state"],
    "action_ref": ["action_ref = 'observation.position': allowed are observation.state"],
    "input_features": ["input_features and the output feature `action` are needed"],
    "normalization_mapping": ["normalization_mapping: allowed is IDENTITY"],
    "checkpoint": [
        "method = 'dp': this package has dp_ag only",
        "names: there is no observation 'agent'; there are agent_pos, goal, image",
        "names: goal = 'goal': allowed is observation.",
        "names: image = 'observation.top': allowed is observation.",
        "two observations have one name",
    ],
}


@pytest.mark.timeout(900)
def test_what_is_wrong_is_refused_by_name(ours, peer):
    said = json.loads(read_text(peer.folder / "said.json"))
    assert {k: len(v) for k, v in said.items()} == {k: len(v) for k, v in SAID.items()}
    for name, expected in SAID.items():
        for found, text in zip(said[name], expected):
            assert text in found
