"""DP-AG in LeRobot: run by the Python of an environment with lerobot 0.4.4 and the plug-in, never by dpag's.

python policy_peer.py COMMANDS    # a list of lists in JSON: the name of a function below, its arguments
"""

import functools
import json
import logging
import runpy
import sys

import numpy as np
import torch
from safetensors.torch import save_file

from peer import write  # isort: skip (it mends torchvision)

from lerobot.configs.default import DatasetConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets.factory import make_dataset
from lerobot.datasets.sampler import EpisodeAwareSampler
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.scripts import lerobot_train
from lerobot.utils.control_utils import predict_action
from lerobot.utils.import_utils import register_third_party_plugins

from dpag.config import SettingsError, generator
from dpag.policy import save_policy


def train(*arguments: str):
    "lerobot-train."
    sys.argv = ["lerobot-train", *arguments]
    lerobot_train.main()


def convert(*arguments: str):
    "python -m lerobot_policy_dpag."
    sys.argv = ["lerobot_policy_dpag", *arguments]
    runpy.run_module("lerobot_policy_dpag", run_name="__main__")


def load(folder: str):
    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(folder)
    return get_policy_class(config.type).from_pretrained(folder, config=config)


def act(folder: str, observations: str, out: str):
    "Two episodes with the same observations, as LeRobot drives a robot: the actions, and the noise's states."
    policy, g = load(folder), generator("act", 0)
    before, after = make_pre_post_processors(policy.config, folder)
    policy.select_action = functools.partial(policy.select_action, generator=g)
    actions, states = [], []
    with np.load(observations) as arrays:
        steps = [dict(zip(arrays, row)) for row in zip(*arrays.values())]
    for _ in range(2):
        policy.reset()
        for step in steps:
            action = predict_action(step, policy, torch.device("cpu"), before, after, use_amp=False)
            actions.append(action.squeeze(0).numpy())
            states.append(g.get_state().numpy().copy())
    np.savez(out, actions=actions, states=states)


def batch(folder: str, observations: str, out: str):
    "The first action for three observations at once, as lerobot-eval asks for it."
    policy = load(folder)
    before, after = make_pre_post_processors(policy.config, folder)
    with np.load(observations) as arrays:
        obs = {k: torch.from_numpy(arrays[k][:3]) for k in arrays}
    images = {k: v.movedim(-1, 1).float() / 255 for k, v in obs.items() if "image" in k}
    with torch.inference_mode():
        actions = [
            after(policy.select_action(before({**obs, **images}), generator("act", 0))) for _ in range(2)
        ]
        policy.reset()
        chunk = policy.predict_action_chunk(before({**obs, **images}), generator("act", 0))
    np.savez(out, actions=torch.stack(actions, 1).numpy(), chunk=chunk.numpy())


def again(folder: str, out: str):
    "Load, save, load. A weight that is missing is noticed."
    first = load(folder)
    first.save_pretrained(out)
    second = load(out)
    assert first.config == second.config
    kept = second.state_dict()
    assert kept.keys() == first.state_dict().keys()
    for name, t in first.state_dict().items():
        assert torch.equal(t, kept[name]), name
    del kept["policy.net.out.weight"]
    save_file(kept, f"{out}/model.safetensors")
    try:
        load(out)
    except RuntimeError as e:
        assert "policy.net.out.weight" in str(e)
    else:
        raise AssertionError("a missing weight passed")


def back(folder: str, out: str):
    "A checkpoint of dpag's from what LeRobot has trained."
    policy = load(folder)
    save_policy(out, policy.averaged, {"updates": int(policy.n_updates)})


def refusals(out: str, checkpoint: str, other_method: str):
    "What is said about settings that are wrong, by what is wrong; and about checkpoints."
    register_third_party_plugins()
    features = {
        "input_features": {"observation.state": PolicyFeature(type=FeatureType.STATE, shape=(2,))},
        "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
    }
    config, said = PreTrainedConfig.get_choice_class("dp_ag"), {}
    policy = get_policy_class("dp_ag")
    for wrong in (
        {"horizon": 4},
        {"settings": {"horizon": 4}},
        {"settings": {"net": {"kind": "mpl"}}},
        {"method": {"guidance": {"gamma": -1.0}}},
        {"train": {"steps": 9}},
        {"train": {"lr": "fast"}},
        {"keys": {"observation.image": "image"}},
        {"action_ref": "observation.position"},
        {"input_features": {}},
        {"normalization_mapping": {"STATE": NormalizationMode.MEAN_STD}},
    ):
        try:
            policy(config(device="cpu", **{**features, **wrong}))
        except SettingsError as e:
            said[next(iter(wrong))] = said.get(next(iter(wrong)), []) + [str(e)]
    for folder, names in (
        (other_method, {}),
        (checkpoint, {"agent": "observation.state"}),
        (checkpoint, {"goal": "goal"}),
        (checkpoint, {"image": "observation.top"}),
        (checkpoint, {"goal": "observation.agent_pos"}),
    ):
        try:
            policy.from_dpag(folder, names)
        except ValueError as e:
            said["checkpoint"] = said.get("checkpoint", []) + [str(e)]
    with open(out, "w", encoding="utf-8") as f:
        json.dump(said, f)


def windows(root: str, folder: str, out: str):
    "Every window that lerobot-train draws for the policy in `folder`, as the policy sees it."
    policy = load(folder)
    data = DatasetConfig("made/here", root=root, video_backend="pyav")
    dataset = make_dataset(TrainPipelineConfig(data, policy=policy.config))
    ends = [dataset.meta.episodes[k] for k in ("dataset_from_index", "dataset_to_index")]
    drop = policy.config.drop_n_last_frames
    batch = torch.utils.data.default_collate(
        [dataset[i] for i in EpisodeAwareSampler(*ends, drop_n_last_frames=drop)]
    )
    obs = policy._observations(batch)
    seen = {k.replace("/", "."): v.numpy() for k, v in obs.items()}
    np.savez(out, action=batch["action"].numpy(), **seen)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    known = {f.__name__: f for f in (write, train, convert, act, batch, again, back, refusals, windows)}
    for name, *arguments in json.loads(sys.argv[1]):
        known[name](*arguments)
