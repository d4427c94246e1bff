"""DP-AG as a policy of LeRobot. Importing this registers `--policy.type=dp_ag`; LeRobot does so by itself."""

from .configuration_dpag import DPAGConfig
from .modeling_dpag import DPAGPolicy
from .processor_dpag import make_dp_ag_pre_post_processors

__all__ = ["DPAGConfig", "DPAGPolicy", "make_dp_ag_pre_post_processors"]
