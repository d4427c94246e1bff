"""Play Push-T with an exported policy, where neither torch nor dpag is installed.

Put this file, dpag/runner.py and the policy's file into one folder; then

    pip install numpy onnxruntime gym-pusht 'pymunk<7'
    python pusht_onnx.py policy.onnx --episodes 20

prints each episode's score and their mean as JSON. The initial states are those of the evaluations.
"""

import argparse
import json
import sys

import gym_pusht  # noqa: F401  (registers the environment)
import gymnasium
from runner import ExportedPolicy


def play(env, policy: ExportedPolicy, state_seed: int, max_steps: int) -> float:
    "One episode's score: the largest share of the goal that was covered, 1 at success."
    observation, _ = env.reset(seed=state_seed)
    policy.reset()
    best = 0.0
    for _ in range(max_steps):
        seen = {"keypoints": observation["environment_state"], "agent_pos": observation["agent_pos"]}
        observation, score, ended, _, _ = env.step(policy(seen))
        best = max(best, float(score))
        if ended:
            break
    return best


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a file of dpag.export.export_policy for pusht_kp")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=60_000, help="state seed of the first episode")
    parser.add_argument("--max-steps", type=int, default=300)
    chosen = parser.parse_args()
    policy = ExportedPolicy(chosen.model)
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type="environment_state_agent_pos").unwrapped
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.episodes)
    scores = [round(play(env, policy, seed, chosen.max_steps), 4) for seed in seeds]
    absent = not {"torch", "dpag"} & {*sys.modules}
    print(json.dumps({"scores": scores, "mean": sum(scores) / len(scores), "without_torch": absent}))


if __name__ == "__main__":
    main()
