"""The settings, in LeRobot's form: what it asks for by name, and dpag's own sections as dictionaries."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dpag.config import SettingsError, layered
from dpag.data import Shapes
from dpag.methods.dp_ag import DPAGConfig as Method
from dpag.policy import PolicyConfig
from dpag.train import TrainConfig, learning_rate

STEPS = ("n_obs_steps", "horizon", "n_action_steps")
TRAIN = ("lr", "weight_decay", "betas", "warmup_steps", "grad_clip", "ema")  # the rest is LeRobot's to say


def only(section: str, given: dict, allowed: tuple[str, ...], instead: str):
    "Raise SettingsError for a key of `given` that is not `allowed`; `instead` says what is."
    if wrong := sorted(set(given) - set(allowed)):
        raise SettingsError(f"{section}.{wrong[0]} = {given[wrong[0]]!r}: {instead}")


def identity() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), NormalizationMode.IDENTITY)


@LRSchedulerConfig.register_subclass("dp_ag")
@dataclass
class DPAGSchedulerConfig(LRSchedulerConfig):
    "dpag's learning rate: it rises for `num_warmup_steps`, and falls as a cosine to the last step."

    num_warmup_steps: int

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        share = TrainConfig(lr=1.0, warmup_steps=self.num_warmup_steps, steps=num_training_steps)
        return LambdaLR(optimizer, lambda step: learning_rate(step, share))


@PreTrainedConfig.register_subclass("dp_ag")
@dataclass
class DPAGConfig(PreTrainedConfig):
    """`--policy.type=dp_ag`. Raises dpag's SettingsError, which names field, value and what is allowed.

    Args:
        n_obs_steps: last observations that the policy is given.
        horizon: steps that are predicted at once.
        n_action_steps: predicted steps that are executed before the next prediction.
        settings: laid over dpag.PolicyConfig: encoder, net, diffusion, action_frame, n_noise_samples.
        method: laid over dpag.DPAGConfig: guidance.
        train: laid over dpag.TrainConfig: lr, weight_decay, betas, warmup_steps, grad_clip and ema.
        keys: the policy's name of an observation by LeRobot's, where they differ.
        action_ref: the observation, by the policy's name, that relative actions start from.
        normalization_mapping: nothing is normalised outside of the policy, which owns its scales.
    """

    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    settings: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    action_ref: str | None = None
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=identity)

    def __post_init__(self):
        super().__post_init__()
        own = tuple(k for k in PolicyConfig.model_fields if k not in STEPS)
        only("settings", self.settings, own, f"allowed are {', '.join(own)}; {', '.join(STEPS)} are fields")
        only(
            "train", self.train, TRAIN, f"allowed are {', '.join(TRAIN)}; the rest are settings of LeRobot's"
        )
        if set(self.normalization_mapping.values()) != {NormalizationMode.IDENTITY}:
            raise SettingsError("normalization_mapping: allowed is IDENTITY; the policy has its own scales")
        self.policy_config(), self.train_config()

    def method_config(self) -> Method:
        "dpag's settings of the method."
        return layered(Method, self.method, where="method")

    def policy_config(self) -> PolicyConfig:
        "dpag's settings of the policy."
        return self.method_config().policy_config(self.settings, {k: getattr(self, k) for k in STEPS})

    def train_config(self) -> TrainConfig:
        "dpag's settings of the training, of which `TRAIN` are used."
        return layered(TrainConfig, self.method_config().train, self.train, where="train")

    def shapes(self) -> Shapes:
        "The features as dpag sees them. Images are `(H, W, 3)`; LeRobot's are `(3, H, W)`."
        obs = {
            self.keys.get(k, k): (*f.shape[1:], f.shape[0])
            if f.type is FeatureType.VISUAL
            else tuple(f.shape)
            for k, f in self.input_features.items()
        }
        return Shapes(obs, self.action_feature.shape[0], self.action_ref)

    def validate_features(self):
        "Raise SettingsError unless there are observations and one action, whose names are known."
        if not self.input_features or self.action_feature is None:
            raise SettingsError("input_features and the output feature `action` are needed")
        if unknown := sorted(set(self.keys) - set(self.input_features)):
            there = ", ".join(sorted(self.input_features))
            raise SettingsError(f"keys has {unknown[0]!r}: the observations are {there}")
        names = self.shapes().obs
        if len(names) < len(self.input_features):
            raise SettingsError(f"keys = {self.keys}: two observations have one name")
        if self.action_ref is not None and self.action_ref not in names:
            raise SettingsError(f"action_ref = {self.action_ref!r}: allowed are {', '.join(sorted(names))}")

    def get_optimizer_preset(self) -> AdamWConfig:
        t = self.train_config()
        return AdamWConfig(t.lr, t.weight_decay, t.grad_clip, betas=t.betas)

    def get_scheduler_preset(self) -> DPAGSchedulerConfig:
        return DPAGSchedulerConfig(self.train_config().warmup_steps)

    @property
    def observation_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon))

    @property
    def reward_delta_indices(self) -> None:
        return None

    @property
    def drop_n_last_frames(self) -> int:
        "Frames at an episode's end that no window is of, as in dpag.data.window_indices."
        return self.horizon - self.n_action_steps - self.n_obs_steps + 1
