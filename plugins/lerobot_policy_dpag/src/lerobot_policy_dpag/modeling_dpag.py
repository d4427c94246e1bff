"""The policy: dpag's, with LeRobot's names around it."""

import copy
from collections import deque

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.utils import populate_queues
from lerobot.utils.constants import ACTION
from torch import Tensor

from dpag.data import Shapes, WindowDataset
from dpag.lerobot import lerobot_name, read_lerobot
from dpag.policy import ChunkPolicy, build_policy, load_policy
from dpag.train import ema_decay

from .configuration_dpag import STEPS, DPAGConfig


def numbers_of(folder, config: DPAGConfig) -> WindowDataset:
    "The windows of a LeRobot dataset without its images, to which a new policy's scales are fitted."
    numbers = [k for k, f in config.input_features.items() if f.type is not FeatureType.VISUAL]
    names = {**{k: config.keys.get(k, k) for k in numbers}, ACTION: ACTION}
    demos = read_lerobot(folder, names.values(), names=names)
    shapes, steps = config.shapes(), {k: getattr(config, k) for k in STEPS}
    arrays = {k: a.reshape(-1, *shapes.steps[k]) for k, a in demos.arrays.items()}
    action = arrays.pop(ACTION)
    return WindowDataset(arrays, action, demos.episode_ends, action_ref=config.action_ref, **steps)


class DPAGPolicy(PreTrainedPolicy):
    """`policy` is trained, and `averaged`, the average of its weights, acts. Both are dpag's.

    With `dataset_meta`, as lerobot-train gives it, a new policy's scales are fitted to that dataset. Without,
    they are placeholders for weights that are loaded next."""

    config_class = DPAGConfig
    name = "dp_ag"

    def __init__(self, config: DPAGConfig, dataset_stats=None, dataset_meta=None):
        super().__init__(config)
        config.validate_features()
        new = dataset_meta is not None and config.pretrained_path is None
        dataset = numbers_of(dataset_meta.root, config) if new else None
        built = build_policy(config.method_config(), config.policy_config(), config.shapes(), dataset)
        # LeRobot saves the optimizer's state in no other order.
        self.policy = built.to(memory_format=torch.contiguous_format)
        self.policy.diagnosing = False  # the costly part of the log
        self.averaged = copy.deepcopy(self.policy).requires_grad_(False)
        self.register_buffer("n_updates", torch.tensor(0))
        self.reset()

    @classmethod
    def from_dpag(cls, checkpoint, names: dict[str, str] | None = None, device: str = "cpu") -> "DPAGPolicy":
        """The policy of a dpag checkpoint folder. `names` are LeRobot's of its observations, by its own; by
        default those with which dpag writes datasets. Raises ValueError for another method, and as
        dpag.load_policy does."""
        source, _ = load_policy(checkpoint)
        policy = cls(config_of(source, names or {}, device))
        policy.policy.load_state_dict(source.state_dict())
        policy.averaged.load_state_dict(source.state_dict())
        return policy.to(device).eval()

    @classmethod
    def _load_as_safetensor(cls, model, model_file, map_location, strict):
        return super()._load_as_safetensor(model, model_file, map_location, True)  # no weight may be missing

    def get_optim_params(self):
        return self.policy.parameters()

    def reset(self):
        "Forget the episode that was."
        self._seen = {k: deque(maxlen=self.config.n_obs_steps) for k in self.config.input_features}
        self._action_queue: deque[Tensor] = deque()

    def _observations(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        "dpag's observations `(B, n_obs_steps, …)`: images are bytes, colours last."
        found = {}
        for key, feature in self.config.input_features.items():
            x, name = batch[key], self.config.keys.get(key, key)
            if feature.type is FeatureType.VISUAL:
                x = x if x.dtype == torch.uint8 else (x * 255).round().clamp(0, 255).to(torch.uint8)
                x = x.movedim(-3, -1)
            # LeRobot drops the axis of a single number.
            found[name] = x.reshape(len(x), self.config.n_obs_steps, *self.averaged.shapes.obs[name])
        return found

    def _noise(self, device) -> torch.Generator:
        "Seeded by torch's own generator, which LeRobot's `--seed` sets and its checkpoints keep."
        return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        "The loss of the method, and its terms."
        obs, action = self._observations(batch), batch[ACTION]
        if len(action) == 1:  # what an epoch leaves over; the contrastive loss compares two windows at least
            obs, action = (
                {k: v.repeat_interleave(2, 0) for k, v in obs.items()},
                action.repeat_interleave(2, 0),
            )
        terms = self.policy.loss({"obs": obs, "action": action}, self._noise(action.device))
        loss = terms.pop("loss")
        return loss, {k: v.item() for k, v in terms.items()}

    @torch.no_grad()
    def update(self):
        "Average the weights, as dpag.train does; lerobot-train calls this after each step."
        decay = ema_decay(int(self.n_updates), self.config.train_config().ema)
        self.n_updates += 1
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.policy.parameters()), 1 - decay)

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> Tensor:
        """The next actions `(B, n_action_steps, D)`, after the observation `(B, …)` and those before it in
        the episode. Noise is drawn from `generator`; without one LeRobot's seed counts."""
        self._seen = populate_queues(self._seen, batch)
        obs = self._observations({k: torch.stack(list(q), 1) for k, q in self._seen.items()})
        device = next(self.averaged.parameters()).device
        return self.averaged.act(obs, generator or self._noise(device))

    def select_action(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        "The action `(B, D)` for an observation `(B, …)`. Every `n_action_steps` steps the policy acts anew."
        if self._action_queue:
            self._seen = populate_queues(self._seen, batch)
        else:
            self._action_queue.extend(self.predict_action_chunk(batch, generator).unbind(1))
        return self._action_queue.popleft()


def lerobot_names(shapes: Shapes, given: dict[str, str]) -> dict[str, str]:
    """LeRobot's names of the observations by their own: as `given`, or as dpag writes them into datasets.
    Raises ValueError for one that is not there, that LeRobot would not pass on, and where two are equal."""
    if unknown := sorted(set(given) - set(shapes.obs)):
        raise ValueError(f"names: there is no observation {unknown[0]!r}; there are {', '.join(shapes.obs)}")
    names = {k: given.get(k, lerobot_name(k, len(s) == 3)) for k, s in shapes.obs.items()}
    for key, name in names.items():
        # LeRobot turns what has `image` in its name into floats, colours first.
        if not name.startswith("observation.") or ("image" in name) != (len(shapes.obs[key]) == 3):
            raise ValueError(
                f"names: {key} = {name!r}: allowed is observation.…, with `image` in it for images"
            )
    if len(set(names.values())) < len(names):
        raise ValueError(f"names = {names}: two observations have one name")
    return names


def config_of(source: ChunkPolicy, names: dict[str, str], device: str) -> DPAGConfig:
    "The configuration of a policy of dpag's. Raises ValueError unless it is a DP-AG, and as `lerobot_names`."
    if source.method.kind != DPAGPolicy.name:
        raise ValueError(f"method = {source.method.kind!r}: this package has dp_ag only")
    there, features = lerobot_names(source.shapes, names), {}
    for key, shape in source.shapes.obs.items():
        image = len(shape) == 3
        kind, kept = (FeatureType.VISUAL, (shape[2], *shape[:2])) if image else (FeatureType.STATE, shape)
        features[there[key]] = PolicyFeature(type=kind, shape=kept)
    return DPAGConfig(
        **{k: getattr(source.settings, k) for k in STEPS},
        input_features=features,
        output_features={ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(source.shapes.action_dim,))},
        settings=source.settings.model_dump(mode="json", exclude=set(STEPS)),
        method=source.method.model_dump(mode="json"),
        keys={name: key for key, name in there.items() if name != key},
        action_ref=source.shapes.action_ref,
        device=device,
        push_to_hub=False,
    )
