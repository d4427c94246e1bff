"""The processors: those of LeRobot's Diffusion Policy, which with IDENTITY normalise nothing."""

from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors

from .configuration_dpag import DPAGConfig


def make_dp_ag_pre_post_processors(config: DPAGConfig, dataset_stats: dict | None = None):
    "What stands before and after the policy; the policy itself takes and gives the environment's units."
    return make_diffusion_pre_post_processors(config, dataset_stats)
