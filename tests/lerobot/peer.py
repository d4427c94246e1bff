"""What LeRobot itself writes and reads: run by the Python of an environment with lerobot 0.3.3 (datasets of
version 2.1) or 0.4.4 (3.0), never by dpag's.

    python peer.py write FOLDER VIDEOS    # three episodes, with videos (1), in many files (2), or PNG (0)
    python peer.py read FOLDER OUT.npz    # every step of a dataset as LeRobot gives it, and its statistics

Several commands may follow each other. DPAG_LEROBOT_DECODER names LeRobot's decoder, pyav without it.
"""

import contextlib
import logging
import os
import sys

import numpy as np
import torch

# torchvision has no build for this torch on the CPU; these two operators are all that its import misses.
library = torch.library.Library("torchvision", "DEF")
for operator in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor x) -> Tensor",
):
    with contextlib.suppress(RuntimeError):  # it has them
        library.define(operator)

from lerobot.datasets.lerobot_dataset import LeRobotDataset

LENGTHS, SIZE, FPS = (5, 7, 4), 64, 10
TASKS = ("push", "push", "pull")
AXES = ["height", "width", "channels"]
NUMBERS = {
    "observation.state": ("float32", (3,)),
    "observation.touch": ("bool", (1,)),
    "observation.grid": ("float32", (2, 3)),
    "action": ("float32", (2,)),
    "next.reward": ("float64", (1,)),
}


def image(t: int) -> np.ndarray:
    "A disc before colours that change smoothly."
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = np.hypot(columns - 10 - 3 * t, rows - 30)[..., None] < 9
    shade = np.stack([rows * 3, columns * 3, np.full_like(rows, 40 + 10 * t)], -1)
    return np.where(inside, [230, 60, 40], shade).astype(np.uint8)


def step(t: int) -> dict:
    "The numbers of step `t` of all."
    rng = np.random.default_rng(t)
    made = {k: rng.normal(size=shape) for k, (_, shape) in NUMBERS.items()}
    return {k: (a > 0 if NUMBERS[k][0] == "bool" else a).astype(NUMBERS[k][0]) for k, a in made.items()}


def write(folder: str, videos: int):
    features = {k: {"dtype": d, "shape": s, "names": None} for k, (d, s) in NUMBERS.items()}
    kind = "video" if videos else "image"
    features["observation.images.top"] = {"dtype": kind, "shape": (SIZE, SIZE, 3), "names": AXES}
    features["observation.state"]["names"] = ["x", "y", "z"]
    dataset = LeRobotDataset.create(
        "made/here", FPS, features, root=folder, robot_type="disc", use_videos=videos > 0
    )
    if videos == 2 and hasattr(dataset, "finalize"):
        dataset.meta.update_chunk_settings(2, 0.001, 0.001)
    t = 0
    for length, task in zip(LENGTHS, TASKS):
        for _ in range(length):
            frame = {**step(t), "observation.images.top": image(t)}
            if hasattr(dataset, "finalize"):  # 0.4
                dataset.add_frame({**frame, "task": task})
            else:
                dataset.add_frame(frame, task)
            t += 1
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


def read(folder: str, out: str):
    dataset = LeRobotDataset(
        "made/here", root=folder, video_backend=os.environ.get("DPAG_LEROBOT_DECODER", "pyav")
    )
    items = [dataset[i] for i in range(len(dataset))]
    arrays = {k: np.stack([np.asarray(x[k]) for x in items]) for k in items[0]}
    for k in dataset.meta.camera_keys:  # floats up to 1, colours first
        arrays[k] = np.rint(np.moveaxis(arrays[k], 1, -1) * 255).astype(np.uint8)
    stats = {f"stats/{k}/{n}": a for k, s in dataset.meta.stats.items() for n, a in s.items()}
    np.savez_compressed(out, **arrays, **stats)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    words = sys.argv[1:]
    for command, folder, last in zip(words[::3], words[1::3], words[2::3]):
        if command == "write":
            write(folder, int(last))
        else:
            read(folder, last)
