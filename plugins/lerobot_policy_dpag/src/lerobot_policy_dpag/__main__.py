"""A DP-AG that dpag has trained, as a folder that LeRobot loads with `--policy.path`.

usage: python -m lerobot_policy_dpag CHECKPOINT FOLDER [OBSERVATION=LEROBOT'S NAME …]
"""

import sys

from dpag.files import atomic_folder

from .modeling_dpag import DPAGPolicy
from .processor_dpag import make_dp_ag_pre_post_processors


def convert(checkpoint, folder, names: dict[str, str] | None = None):
    "Write the folder; one that is there is replaced. Raises ValueError as `DPAGPolicy.from_dpag` does."
    policy = DPAGPolicy.from_dpag(checkpoint, names)
    with atomic_folder(folder) as new:
        for part in (policy, *make_dp_ag_pre_post_processors(policy.config)):
            part.save_pretrained(new)


if __name__ == "__main__":
    if len(sys.argv) < 3 or any("=" not in word for word in sys.argv[3:]):
        sys.exit(__doc__)
    convert(sys.argv[1], sys.argv[2], dict(word.split("=", 1) for word in sys.argv[3:]))
