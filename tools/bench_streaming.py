"""Training from images on the disk beside training from memory, into results/streaming.csv.

python tools/bench_streaming.py [--frames N] [--steps N]

A store of random frames of 96 pixels is written with chunks of two sizes. From memory and from the disk, with
a cache of a tenth of the frames, the same batches are drawn and the same policy is trained, in turns."""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
from tqdm import tqdm

from dpag.config import generator, seed_everything
from dpag.data import WindowDataset, load_demonstrations
from dpag.files import atomic, root
from dpag.methods.dp import DPConfig
from dpag.policy import build_policy
from dpag.train import TrainConfig, fit

BATCH, WINDOW = 64, {"horizon": 16, "n_obs_steps": 2, "n_action_steps": 8}


def write_store(path: Path, frames: int, rows: int):
    "Smooth random images, which compress a little, in chunks of `rows` frames."
    rng, steps = np.random.default_rng(0), 300
    store = zarr.open_group(path, mode="w", zarr_format=2)
    shape = (frames, 96, 96, 3)
    image = store.create_array("data/image", shape=shape, chunks=(rows, *shape[1:]), dtype="u1")
    for start in range(0, frames, rows):
        coarse = rng.integers(0, 256, (min(rows, frames - start), 12, 12, 3), dtype=np.uint8)
        image[start : start + rows] = coarse.repeat(8, 1).repeat(8, 2)
    for key in ("position", "action"):
        store.create_array(f"data/{key}", data=rng.normal(size=(frames, 2)).astype("f4"))
    store.create_array("meta/episode_ends", data=np.arange(steps, frames + 1, steps))


def measure(dataset: WindowDataset, steps: int, name: str) -> dict:
    "Milliseconds of drawing a batch, and of a training step."
    dataset.batch(BATCH, generator("first"))
    start = time.perf_counter()
    for step in range(steps):
        dataset.batch(BATCH, generator("batch", step))
    drawing = (time.perf_counter() - start) / steps
    seed_everything(0)
    policy = build_policy(DPConfig(), dataset=dataset)
    start = time.perf_counter()
    fit(policy, dataset, TrainConfig(steps=steps, batch_size=BATCH), name=name)
    return {"batch_ms": 1e3 * drawing, "training_step_ms": 1e3 * (time.perf_counter() - start) / steps}


def main():
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, default=19_800)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as d:
        size = args.frames * 96 * 96 * 3
        kinds = {"memory": (16, None), "disk, 16 frames a chunk": (16, size // 10)}
        kinds["disk, 303 frames a chunk"] = (303, size // 10)
        for chunk in (16, 303):
            write_store(Path(d) / str(chunk), args.frames, chunk)
        for turn in tqdm(range(args.rounds), desc="rounds"):
            for name, (chunk, memory) in kinds.items():
                demos = load_demonstrations(Path(d) / str(chunk), memory=memory)
                found = measure(WindowDataset.of(demos, **WINDOW), args.steps, name)
                rows.append({"images": name, "turn": turn, **found})
    table = pd.DataFrame(rows).groupby("images", sort=False)[["batch_ms", "training_step_ms"]].median()
    table["ratio_to_memory"] = table["training_step_ms"] / table["training_step_ms"].iloc[0]
    print(table.round(3).to_markdown())
    with atomic(root() / "results/streaming.csv") as tmp:
        table.round(4).to_csv(tmp)


if __name__ == "__main__":
    main()
