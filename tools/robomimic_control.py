"""Trains robomimic's own BC-RNN-GMM by robomimic's own trainer, and LSTM-GMM, on the same demonstrations.

Both are scored by dpag's protocol, from the same initial states, which serve for choosing and for nothing
else. Each call adds a row to results/robomimic_control.csv, or replaces the row of the same settings:

python tools/robomimic_control.py robomimic can_mh --demos 90 --steps 3000
python tools/robomimic_control.py dpag can_mh --demos 90 --steps 3000 --set min_std=0.1 --acting context=drawn
python tools/robomimic_control.py demonstrations can_mh --demos 90

`--set` changes settings that are trained with, `--acting` those that matter when acting only: of robomimic
they are keys of its configuration (algo.gmm.min_std), of dpag fields of the method, train.* and policy.*.
What was made and trained is kept in .dvc/tmp/robomimic_control."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import contextlib
import io
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dpag.config import changed, fingerprint, merge, seed_everything
from dpag.data import Demonstrations, WindowDataset, load_demonstrations, save_demonstrations
from dpag.files import atomic, root
from dpag.libraries import robomimic_factories
from dpag.policy import Policy, build_policy, load_policy, save_policy
from dpag.provenance import provenance
from dpag.rollouts import Protocol, rollout
from dpag.settings import CellSettings, load
from dpag.stats import clopper_pearson
from dpag.tasks.base import TASKS, get_task
from dpag.tasks.robomimic.env import SCENES, RobomimicEnv, matrix_from_6d, to_absolute
from dpag.tasks.robomimic.files import wrist_poses, write_hdf5
from dpag.tasks.robomimic.task import scripted_demonstrations
from dpag.train import fit

SCRATCH = root() / ".dvc/tmp/robomimic_control"
OUT = root() / "results/robomimic_control.csv"
KEY = ["task", "trainer", "settings", "acting", "demos", "seed", "steps", "episodes"]
MEASURED = ["success", "low", "high", "idle", "closings"]
COLUMNS = [*KEY, *MEASURED, "train_seconds", "data_hash", "commit", "device"]
STILL = 0.001  # m per step: a hand that moves less is idle
EPOCH = 100  # steps; robomimic's own

ONE_ARM = [name for name, spec in SCENES.items() if spec.n_arms == 1]


def scene_of(task: str) -> str:
    "The scene of a task `<scene>_<ph|mh>`."
    return task.rpartition("_")[0]


# ---- what an episode looks like


def closings(grips: np.ndarray) -> int:
    "How often commands `(T,)` turn from opening (−1) to closing (1)."
    closed = np.asarray(grips) > 0
    return int((closed[1:] & ~closed[:-1]).sum())


def idle(places: np.ndarray) -> float:
    "The share of steps in which a hand at `(T, 3)`, in m, moves less than STILL."
    return float((np.linalg.norm(np.diff(places, axis=0), axis=1) < STILL).mean())


class WatchedEnv(RobomimicEnv):
    "A scene with one arm that says how often its gripper closed, and how long its hand stood still."

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.places, self.grips = [info["agent_pos"]], [-1.0]
        return obs, info

    def step(self, action):
        out = super().step(action)
        self.places.append(out[-1]["agent_pos"])
        self.grips.append(float(action[9]))
        return out

    def measures(self) -> dict[str, float]:
        "For the episode's row."
        return {"closings": closings(np.array(self.grips)), "idle": idle(np.array(self.places))}


# ---- robomimic


def robomimic_observation(obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    "Our observations of a scene with one arm, `(B, …)` by key, by robomimic's names."
    ((pos, quat),) = wrist_poses(obs["hold"])
    arm = {"eef_pos": pos, "eef_quat": quat, "gripper_qpos": obs["gripper_qpos"]}
    return {"object": obs["object"], **{f"robot0_{k}": v for k, v in arm.items()}}


class RobomimicPolicy(Policy):
    """robomimic's algorithm behind `act`, in one episode at a time: it carries a recurrent state, and starts
    anew when an evaluation does."""

    def __init__(self, algo):
        super().__init__()
        self.algo = algo

    def reset_counts(self):
        self.algo.set_eval()
        self.algo.reset()

    @torch.no_grad()
    def act(self, obs, generator):
        "Absolute actions `(B, 1, 10)` for the last of the observations `(B, T, …)`."
        last = {k: v[:, -1].double().numpy() for k, v in obs.items()}
        seen = {k: torch.as_tensor(v).float() for k, v in robomimic_observation(last).items()}
        with torch.random.fork_rng(devices=[]):  # robomimic draws from torch's global generator
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            delta = self.algo.get_action(obs_dict=seen).double().numpy()
        R = matrix_from_6d(last["hold"][:, 3:9])
        rows = zip(delta, last["hold"][:, :3], R)
        actions = [to_absolute(d[None], pos[None], R[None], R) for d, pos, R in rows]
        return torch.as_tensor(np.stack(actions))


def robomimic_config(cell: CellSettings, data: Path, *, steps: int, seed: int, changes: dict):
    """robomimic's configuration of its study's BC-RNN from low-dimensional observations, with the width, the
    batch and the learning rate of `cell`, which falls to a hundredth within the training."""
    config_factory, *_ = robomimic_factories()
    from robomimic.scripts.generate_paper_configs import (
        modify_bc_rnn_config_for_dataset,
        modify_config_for_default_low_dim_exp,
    )

    scene, who = cell.task_name.rsplit("_", 1)
    config = modify_config_for_default_low_dim_exp(config_factory("bc"))
    config = modify_bc_rnn_config_for_dataset(config, scene, who, "low_dim")
    rate = {"initial": cell.train.lr, "decay_factor": 0.01, "epoch_schedule": [steps // EPOCH]}
    own = {
        "experiment": {"epoch_every_n_steps": EPOCH},
        "train": {
            "data": str(data),
            "cuda": False,
            "seed": seed,
            "num_epochs": steps // EPOCH,
            "batch_size": cell.train.batch_size,
        },
        "algo": {
            "optim_params": {"policy": {"learning_rate": {**rate, "scheduler_type": "linear"}}},
            "rnn": {"hidden_dim": cell.method.hidden},
        },
    }
    with config.values_unlocked():
        config.update(merge(own, changes))
    return config


def robomimic_algo(config):
    "robomimic's algorithm for a configuration, untrained, and the observations that it asks for."
    _, algo_factory, initialize = robomimic_factories()
    from robomimic.utils.file_utils import get_shape_metadata_from_dataset

    initialize(config)
    shapes = get_shape_metadata_from_dataset(config.train.data, all_obs_keys=config.all_obs_keys)
    torch.manual_seed(config.train.seed)
    algo = algo_factory(
        config.algo_name,
        config,
        obs_key_shapes=shapes["all_shapes"],
        ac_dim=shapes["ac_dim"],
        device=torch.device("cpu"),
    )
    return algo, shapes["all_obs_keys"]


def train_robomimic(algo, obs_keys: list[str], config) -> float:
    "The loop of robomimic's `scripts/train.py`, without its rollouts and records; the last epoch's loss."
    from robomimic.utils.train_utils import load_data_for_training, run_epoch
    from torch.utils.data import DataLoader

    np.random.seed(config.train.seed)  # noqa: NPY002 (robomimic's)
    torch.manual_seed(config.train.seed)
    dataset, _ = load_data_for_training(config, obs_keys=obs_keys)
    loader = DataLoader(dataset, batch_size=config.train.batch_size, shuffle=True, drop_last=True)
    log = {"Loss": float("nan")}
    for epoch in range(1, config.train.num_epochs + 1):
        log = run_epoch(algo, loader, epoch, num_steps=config.experiment.epoch_every_n_steps)
        algo.on_epoch_end(epoch)
    return log["Loss"]


# ---- one row


@dataclass(frozen=True)
class Asked:
    "What a row is asked of: who trains what, on how much, for how long, and what is changed."

    trainer: str
    task: str
    demos: int
    steps: int
    seed: int
    episodes: int
    settings: str
    acting: str

    @property
    def cell(self) -> CellSettings:
        "The task's settings for LSTM-GMM in the profile `laptop`, with these demonstrations and steps."
        cell = load("laptop-scripted").cell(self.task, "lstm_gmm")
        task, train = changed(cell.task, {"n_demos": self.demos}), changed(cell.train, {"steps": self.steps})
        return cell.model_copy(update={"task": task, "train": train})

    def trained(self, *about) -> Path:
        "Where what is trained with these settings is kept."
        return SCRATCH / f"{self.trainer}-{self.task}-{fingerprint(self.demos, self.seed, *about)}"


def changes_of(words: str) -> dict:
    "`algo.gmm.min_std=0.1 seed=2` as a tree; a value is JSON, or else a word."
    tree: dict = {}
    for change in words.split():
        key, _, value = change.partition("=")
        leaf: object = value
        with contextlib.suppress(ValueError):
            leaf = json.loads(value)
        for name in reversed(key.split(".")):
            leaf = {name: leaf}
        tree = merge(tree, leaf)
    return tree


def demonstrations(cell: CellSettings) -> Demonstrations:
    "The task's scripted demonstrations, made once, by one process."
    path = SCRATCH / f"{cell.task_name}-{cell.task.n_demos}.zarr"
    if not path.exists():
        scene, shapes = scene_of(cell.task_name), get_task(cell.task_name, cell.task).shapes
        made = scripted_demonstrations(scene, cell.task, workers=1, parts=path.with_suffix(".parts"))
        about = {"task": cell.task_name, "shapes": asdict(shapes)}
        save_demonstrations(Demonstrations(made.arrays, made.episode_ends, {**made.meta, **about}), path)
    return load_demonstrations(path)


def robomimics(asked: Asked, demos: Demonstrations) -> tuple[Policy, float]:
    "robomimic's policy, and the seconds that its training took."
    data = SCRATCH / f"{asked.task}-{asked.demos}.hdf5"
    if not data.exists():
        write_hdf5(data, demos, scene_of(asked.task))
    options = dict(steps=asked.steps, seed=asked.seed)
    training, acting = changes_of(asked.settings), changes_of(asked.acting)
    config = robomimic_config(asked.cell, data, **options, changes=training)
    path = asked.trained(config.dump()).with_suffix(".pt")
    with contextlib.redirect_stdout(io.StringIO()):
        if not path.exists():
            algo, obs_keys = robomimic_algo(config)
            start = time.perf_counter()
            loss = train_robomimic(algo, obs_keys, config)
            kept = {"model": algo.serialize(), "seconds": time.perf_counter() - start, "loss": loss}
            torch.save(kept, path)
        config = robomimic_config(asked.cell, data, **options, changes=merge(training, acting))
        algo, _ = robomimic_algo(config)
    kept = torch.load(path, weights_only=True)
    algo.deserialize(kept["model"])
    print(f"the last epoch's loss is {kept['loss']:.2f}")
    return RobomimicPolicy(algo), kept["seconds"]


def dpags(asked: Asked, demos: Demonstrations) -> tuple[Policy, float]:
    "LSTM-GMM, and the seconds that its training took."
    cell, changes = asked.cell, changes_of(asked.settings)
    train = changed(cell.train, changes.pop("train", {}))
    policy_settings = changed(cell.policy, changes.pop("policy", {}))
    method = changed(cell.method, changes)
    steps = ("horizon", "n_obs_steps", "n_action_steps")
    dataset = WindowDataset.of(demos, **{k: getattr(policy_settings, k) for k in steps})
    path = asked.trained(method, policy_settings, train)
    if not (path / "checkpoint").exists():
        seed_everything(asked.seed)
        policy = build_policy(method, policy_settings, dataset=dataset)
        log = fit(policy, dataset, train, seed=asked.seed, folder=path)
        save_policy(path / "checkpoint", policy, info={"train_seconds": float(log.seconds.iloc[-1])})
    policy, meta = load_policy(path / "checkpoint")
    return policy.act_as(changes_of(asked.acting)), meta["info"]["train_seconds"]


def scored(asked: Asked, demos: Demonstrations) -> dict:
    "What a policy does from states that serve for choosing."
    makers = {"robomimic": robomimics, "dpag": dpags}
    policy, seconds = makers[asked.trainer](asked, demos)
    own, cell = asked.trainer == "dpag", asked.cell
    protocol = Protocol(cell.task.max_steps, cell.policy.n_obs_steps if own else 1, asked.seed)
    first = load("laptop-scripted").sampling.first_seed
    make_env = partial(WatchedEnv, scene_of(asked.task))
    states, at_once = range(first, first + asked.episodes), cell.evaluate.at_once if own else 1
    rows, _ = rollout(policy, make_env, states, protocol, at_once=at_once)
    low, high = clopper_pearson(int(rows.success.sum()), len(rows))
    found = {"success": rows.success.mean(), "low": low, "high": high}
    return {**found, **rows[["idle", "closings"]].mean(), "train_seconds": seconds}


def demonstrated(demos: Demonstrations) -> dict:
    "The same measures of the demonstrations themselves."
    each = [demos.episode(i) for i in range(len(demos))]
    return {
        "idle": np.mean([idle(e["hold"][:, :3]) for e in each]),
        "closings": np.mean([closings(e["action"][:, 9]) for e in each]),
    }


def add_row(row: dict, path: Path = OUT):
    "Write a row to the table, in the place of one that was asked for the same."
    frame = pd.DataFrame([row], columns=COLUMNS)
    if path.exists():
        old = pd.read_csv(path, keep_default_na=False, dtype=str)
        same = (old[KEY] == frame[KEY].astype(str).iloc[0]).all(axis=1)
        frame = pd.concat([old[~same], frame])
    with atomic(path) as tmp:
        frame.sort_values(KEY, key=lambda c: c.astype(str)).to_csv(tmp, index=False, columns=COLUMNS)


def parse(argv=None) -> Asked:
    "The arguments."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainer", choices=("robomimic", "dpag", "demonstrations"))
    parser.add_argument("task", choices=[t for t in TASKS.names() if scene_of(t) in ONE_ARM])
    parser.add_argument("--demos", type=int, default=90)
    parser.add_argument("--steps", type=int, default=3000, help=f"of training, a multiple of {EPOCH}")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--set", dest="settings", default="", help="changes to train with: 'a.b=1 c=2'")
    parser.add_argument("--acting", default="", help="changes to act with")
    args = parser.parse_args(argv)
    if args.steps % EPOCH:
        parser.error(f"--steps {args.steps}: a multiple of {EPOCH} is needed, robomimic's epoch")
    return Asked(**vars(args))


def main(argv=None):
    torch.set_num_threads(1)
    asked = parse(argv)
    demos = demonstrations(asked.cell)
    if asked.trainer == "demonstrations":
        asked = Asked("demonstrations", asked.task, len(demos), 0, 0, len(demos), "", "")
        found = demonstrated(demos)
    else:
        found = scored(asked, demos)
    about = provenance(root())
    where = {"data_hash": demos.data_hash(), "commit": about["commit"], "device": about["device"]}
    rounded = {k: float(f"{v:.4g}") for k, v in found.items()}
    add_row({**{k: asdict(asked)[k] for k in KEY}, **rounded, **where})
    print(asked, rounded, sep="\n")


if __name__ == "__main__":
    main()
