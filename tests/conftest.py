import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import pytest
import torch

from dpag import config
from dpag.data import WindowDataset
from dpag.policy import Shapes

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def settings():
    return config.validate(config.compose("laptop", "scripted"))


@pytest.fixture(scope="session")
def shapes():
    return Shapes(obs={"keypoints": (16,), "agent_pos": (2,)}, action_dim=2, action_ref="agent_pos")


@pytest.fixture(scope="session")
def small(settings):
    "A policy section small enough for tests, otherwise the laptop's."
    return settings.policy.model_copy(update={"encoder": settings.policy.encoder.model_copy(update=dict(features="planar", hidden=[32], latent_dim=8)), "net": config.MLPNet(kind="mlp", width=48, depth=3, step_dim=16)})


@pytest.fixture(scope="session")
def patient():
    "An arm's settings for half a minute on a machine that is shared and pauses: nothing stops because it was late. The documented limits have short tests of their own."
    late = dict(stamp_age=2.0, frame_age=3.0, hold_after=1.0, stop_after=3.0, tracking=0.3, joint_speed=6.0, looser=True)
    def patient(robot): return config.Robot.model_validate({**robot.model_dump(), "watchdog": 0.5, "limits": {**robot.limits.model_dump(), **late}})
    return patient


@pytest.fixture(scope="session")
def dataset():
    "Ten made-up episodes of a block that drifts and an agent that circles."
    g = torch.Generator().manual_seed(0)
    steps, n = 30, 10
    t = torch.arange(steps).float()
    corners = torch.tensor([-60, 0, 60, 0, 60, 30, -60, 30, -15, 30, -15, 120, 15, 120, 15, 30.])
    centre = 200 + 100 * torch.rand(n, 1, 2, generator=g) + t[None, :, None]
    kp = centre.repeat(1, 1, 8) + corners
    phase = torch.rand(n, 1, generator=g) * 6.28
    agent = 256 + 120 * torch.stack([torch.cos(t / 5 + phase), torch.sin(t / 5 + phase)], -1)
    action = agent + 10 * torch.stack([-torch.sin(t / 5 + phase), torch.cos(t / 5 + phase)], -1)
    flat = lambda x: x.flatten(0, 1).float()
    return WindowDataset({"keypoints": flat(kp), "agent_pos": flat(agent)}, flat(action).numpy(), torch.arange(steps, n * steps + 1, steps).numpy(), horizon=16, n_obs_steps=2, n_action_steps=8)
