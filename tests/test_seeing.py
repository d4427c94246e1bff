"""Push-T's images: they stay bytes, and they are those that the humans saw."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from dpag.data import Demonstrations, load_demonstrations, save_demonstrations
from dpag.policy import Policy
from dpag.rollouts import Protocol, rollout, stack_observations
from dpag.tasks.pusht.env import PushTDictEnv, draw_states, human_demonstrations

needs_human = pytest.mark.skipif(
    not os.environ.get("DPAG_MIRROR"), reason="DPAG_MIRROR names no folder with pusht.zip"
)


def test_a_batch_of_images_is_bytes():
    obs, _ = PushTDictEnv("image").reset(seed=0)
    batch = stack_observations([[obs, obs]])
    assert batch["image"].dtype == torch.uint8 and batch["agent_pos"].dtype == torch.float32


class Push(Policy):
    "Goes where the shade of both images says."

    def act(self, obs, generator):
        assert obs["image"].shape[1:] == (2, 96, 96, 3)
        shade = obs["image"].float().mean((1, 2, 3, 4))[:, None, None] - 230
        return (obs["agent_pos"][:, -1:] + 40 * torch.tanh(shade)).expand(-1, 8, -1)


class Always(PushTDictEnv):
    "Draws at every step."

    observing = property(lambda self: True, lambda self, value: None)


def test_skipping_images_that_nobody_looks_at_changes_nothing():
    protocol = Protocol(max_steps=30, n_obs_steps=2)
    a, b = (rollout(Push(), partial(E, "image"), range(3), protocol)[0] for E in (PushTDictEnv, Always))
    assert a.equals(b) and a.attrs["steps"] == 90


def test_drawing_in_parallel_gives_the_environments_own_images():
    env = PushTDictEnv("image")
    env.reset(seed=0)
    states = np.random.default_rng(0).uniform([50, 50, 150, 150, -3], [450, 450, 350, 350, 3], (12, 5))
    drawn = draw_states(partial(PushTDictEnv, "image"), states, np.array([5, 12]), workers=2)
    for state, image in zip(states, drawn):
        env.set_state(state)
        assert np.array_equal(env.simulator.image(), image)


@needs_human
def test_images_are_the_humans():
    demos, env = human_demonstrations(images=True), PushTDictEnv("image")
    env.reset(seed=0)
    states, images = demos.arrays["state"], demos.arrays["image"]
    which = np.random.default_rng(1).choice(len(states), 100, replace=False)
    error = [
        np.abs(env.set_state(states[i])["image"].astype(int) - images[i].astype(int)).mean() for i in which
    ]
    assert images.dtype == np.uint8 and np.mean(error) < 0.65 and max(error) < 1.5


def test_image_demonstrations_survive_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (700, 96, 96, 3), dtype=np.uint8),
        "action": rng.normal(size=(700, 2)).astype(np.float32),
    }
    demos = Demonstrations(arrays, np.array([300, 700]), {"source": "test"})
    save_demonstrations(demos, tmp_path / "d.zarr")
    back = load_demonstrations(tmp_path / "d.zarr")
    assert back.arrays["image"].dtype == np.uint8
    assert np.array_equal(back.arrays["image"], demos.arrays["image"])
    assert back.meta["hash"] == demos.data_hash()
    assert len(list((tmp_path / "d.zarr/data/image").glob("*.0.0.0"))) > 1  # pieces, not one 20 MB file


MEMORY = """
import resource, sys, torch
from dpag.config import layered
from dpag.data import WindowDataset, load_demonstrations
from dpag.methods.dp_ag import DPAGConfig
from dpag.policy import PolicyConfig, build_policy
from dpag.tasks.base import TASKS, get_task
from dpag.train import TrainConfig, fit
libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
task, said = get_task("pusht_img"), TASKS["pusht_img"].configure()
settings = layered(PolicyConfig, {"action_frame": "relative"}, said.policy)
arrays = load_demonstrations(sys.argv[1], keys=[*task.shapes.obs, "action"])
dataset = WindowDataset.of(arrays, horizon=16, n_obs_steps=2, n_action_steps=8)
policy = build_policy(DPAGConfig(), settings, task.shapes, dataset)
fit(policy, dataset, layered(TrainConfig, said.train, {"steps": 3}), folder=sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - libraries) / 1e6)
"""


@needs_human
@pytest.mark.timeout(900)
def test_the_human_images_train_within_two_gigabytes(tmp_path):
    save_demonstrations(human_demonstrations(images=True), tmp_path / "h.zarr")
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "h.zarr", tmp_path / "run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert float(out.stdout.split()[-1]) < 2.0
