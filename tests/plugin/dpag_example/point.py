"""A point in the plane that moves to a goal."""

from functools import partial

import gymnasium as gym
import numpy as np
from pydantic import PositiveFloat

from dpag.data import Shapes
from dpag.tasks.base import Metric, Task, TaskConfig, collect_successes, joined, register_task


class PointConfig(TaskConfig):
    "A point that moves to a goal."

    reach: PositiveFloat = 0.1
    "Units that the point moves in a step at most."


class PointEnv(gym.Env):
    "Observations `{position: (2,), goal: (2,)}`; an action `(2,)` is the position to go to."

    def __init__(self, reach: float):
        self.reach = reach
        box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.observation_space, self.action_space = gym.spaces.Dict({"position": box, "goal": box}), box

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self.observe(), self.info()

    def observe(self):
        return {"position": self.position.copy(), "goal": self.goal.copy()}

    def info(self):
        left = float(np.linalg.norm(self.goal - self.position))
        return {"score": max(0.0, 1 - left), "is_success": left < 0.05, "agent_pos": self.position.copy()}

    def step(self, action):
        way = np.asarray(action) - self.position
        self.position = self.position + way * min(1, self.reach / max(np.linalg.norm(way), 1e-9))
        info = self.info()
        return self.observe(), info["score"], info["is_success"], False, info

    def measures(self):
        "What the rows of episodes have beside the score."
        return {"left": float(np.linalg.norm(self.goal - self.position))}

    def render(self):
        frame = np.full((96, 96, 3), 255, np.uint8)
        for place, color in ((self.goal, (0, 160, 0)), (self.position, (200, 0, 0))):
            x, y = np.clip(48 + 40 * place, 2, 93).astype(int)
            frame[y - 2 : y + 3, x - 2 : x + 3] = color
        return frame


def attempt(reach: float, seed: int):
    "One scripted episode: half of the way at each step."
    env = PointEnv(reach)
    obs, info = env.reset(seed=seed)
    rows = []
    while not info["is_success"]:
        action = obs["position"] + 0.5 * (obs["goal"] - obs["position"])
        rows.append({**obs, "action": action})
        obs, _, _, _, info = env.step(action)
    return {k: np.stack([r[k] for r in rows]).astype(np.float32) for k in rows[0]}, True


@register_task(
    "point",
    title="Point",
    config=PointConfig,
    sources=("scripted",),
    metrics=(Metric("left", "distance left", "units"),),
    length_unit="units",
    max_steps=60,
    n_demos=30,
)
def make_point(name, config):
    "The task of the registry."

    def scripted(parts, folder):
        found = collect_successes(
            partial(attempt, config.reach), n_demos=config.n_demos, first_seed=config.demo_seed, parts=parts
        )
        return joined(*found)

    shapes = Shapes(obs={"position": (2,), "goal": (2,)}, action_dim=2, action_ref="position")
    make_env = partial(PointEnv, config.reach)
    return Task(name, "Point", shapes, config.max_steps, 0.1, make_env, {"scripted": scripted})
