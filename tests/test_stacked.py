"""Nets that are trained together come out as if each had been alone."""

import pandas as pd
import pytest
import torch
from conftest import SHAPES, drifting_blocks, small_policy
from safetensors.torch import load_file
from torch import nn

from dpag.config import changed, seed_everything
from dpag.guidance import Guidance, GuidanceConfig
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.noise_net import MLPConfig, UNetConfig
from dpag.policy import METHODS, build_policy
from dpag.train import TrainConfig, Trainee, fit, fit_together
from dpag.validation import split

DATA = drifting_blocks()
HUNDRED = TrainConfig(
    steps=100, batch_size=16, warmup_steps=10, log_every=20, checkpoint_every=20, device="cpu"
)
CASES = {
    "dp": DPConfig(),
    "split": DPAGConfig(guidance=GuidanceConfig(denoise_on="split")),
    "both": DPAGConfig(guidance=GuidanceConfig(denoise_on="both", contrastive_noise="shared")),
    "raw, static": DPAGConfig(guidance=GuidanceConfig(denoise_on="static", vjp="raw", gamma=1.0)),
    "through the VJP": DPAGConfig(guidance=GuidanceConfig(vjp_detach=False)),
}


def policies(method, n=3, **net):
    "Small policies of `n` seeds."
    made = []
    for seed in range(n):
        seed_everything(seed)
        settings = small_policy() if not net else changed(small_policy(), net)
        made.append(build_policy(method, settings, SHAPES, DATA))
    return made


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def alone(method, settings=HUNDRED, n=3, **net):
    made = policies(method, n, **net)
    logs = [fit(p, DATA, settings, seed=s) for s, p in enumerate(made)]
    return made, logs


def check_equal(together, single):
    for a, b in zip(together, single, strict=True):
        assert (weights(a) - weights(b)).abs().max() < 1e-5
    assert (weights(single[0]) - weights(single[1])).abs().max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_each_is_as_if_it_had_been_alone(case):
    single, logs = alone(CASES[case])
    together = policies(CASES[case])
    found = fit_together([Trainee(p, s) for s, p in enumerate(together)], DATA, HUNDRED)
    check_equal(together, single)
    for a, b in zip(found, logs, strict=True):
        pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), rtol=1e-3)
