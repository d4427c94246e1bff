"""A policy as an ONNX file: the same actions as `act`, by a runner that needs no torch."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="needs the extra [onnx]")

from dpag import export, runner
from dpag.config import changed, generator, layered, seed_everything
from dpag.data import WindowDataset
from dpag.export import act_with, drawn_noise, export_policy, largest_difference, noise_shape
from dpag.files import DamagedError, root
from dpag.policy import METHODS, Actor, PolicyConfig, build_policy, load_policy, save_policy
from dpag.runner import ExportedPolicy

FEW = {"n_sample_steps": 2}
UNET = {"kind": "unet", "channels": [16, 32], "step_dim": 16, "n_groups": 4, "kernel_size": 3}
ABSOLUTE = {"action_frame": "absolute", "encoder": {"features": "raw"}}


def guided(**guidance) -> dict:
    return {"guidance": guidance}


# Name: method, its settings, the policy's settings over those of `small`.
CASES = {
    "dp-ddim": ("dp", {}, {"diffusion": {"sampler": "ddim", "n_sample_steps": 3}}),
    "dp-solver-absolute": (
        "dp",
        {},
        {**ABSOLUTE, "diffusion": {"sampler": "dpm_solver", "n_sample_steps": 3}},
    ),
    "dp-ddpm": ("dp", {}, {"diffusion": {"sampler": "ddpm", "n_sample_steps": 3, "prediction": "epsilon"}}),
    "dp-unet": ("dp", {}, {"net": UNET, "diffusion": {"n_sample_steps": 1}}),
    "dp_ag-every": ("dp_ag", guided(evolve="every"), {"diffusion": FEW}),
    "dp_ag-every-second": ("dp_ag", guided(evolve_every=2), {"diffusion": {"n_sample_steps": 3}}),
    "dp_ag-lagged": ("dp_ag", guided(evolve="lagged"), {"diffusion": {**FEW, "sampler": "dpm_solver"}}),
    "dp_ag-carried": ("dp_ag", guided(evolve="carried"), {"diffusion": FEW}),
    "dp_ag-never": ("dp_ag", guided(evolve="never"), {"diffusion": FEW}),
    "dp_ag-ddpm-raw": ("dp_ag", guided(vjp="raw"), {"diffusion": {**FEW, "sampler": "ddpm"}}),
    "dp_ag-silu": ("dp_ag", {}, {"net": {"activation": "silu"}, "diffusion": FEW}),
    "dp_ag-sample": ("dp_ag", {}, {**ABSOLUTE, "diffusion": {**FEW, "prediction": "sample"}}),
    "dp_ag-unet": ("dp_ag", {}, {"net": UNET, "diffusion": {"n_sample_steps": 1}}),
    "flow_policy": ("flow_policy", {"n_steps": 2}, {}),
    "ada_flow": ("ada_flow", {"max_steps": 4, "head": [16]}, {}),
}


def with_images(dataset: WindowDataset) -> WindowDataset:
    "The same episodes with an image of noise at each step in the place of the corners."
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (len(dataset.action), 48, 40, 3), generator=g, dtype=torch.uint8)
    obs = {"image": images, "agent_pos": dataset.obs["agent_pos"]}
    ends = np.arange(30, len(images) + 1, 30)  # as in conftest's episodes
    return WindowDataset(obs, dataset.action.numpy(), ends, **dataset.steps)


def make(small, dataset, method: str, own: dict, changes: dict):
    "An untrained policy with fitted scales, ready to act."
    settings = layered(PolicyConfig, small.model_dump(), changes)
    seed_everything(3)
    config = changed(METHODS[method].config(), own)
    shapes = replace(dataset.shapes, action_ref="agent_pos")
    return build_policy(config, settings, shapes, dataset).eval().requires_grad_(False)


def exported(policy, folder, **kw) -> ExportedPolicy:
    save_policy(folder / "checkpoint", policy)
    export_policy(folder / "checkpoint", folder / "policy.onnx", **kw)
    return ExportedPolicy(folder / "policy.onnx")


def windows(dataset: WindowDataset, n: int = 100) -> dict:
    "Observations `(n, T_o, …)`, spread over the episodes."
    return dataset.gather(torch.linspace(0, len(dataset) - 1, n).long())["obs"]


@pytest.mark.parametrize("name", CASES)
def test_the_file_acts_as_the_policy_does(name, small, dataset, tmp_path):
    policy = make(small, dataset, *CASES[name])
    runs = exported(policy, tmp_path)
    assert runs.noise_shape == noise_shape(policy)
    assert largest_difference(policy, runs, windows(dataset)) < 1e-4


@pytest.mark.parametrize("backbone", ["strided", "small", "resnet18"])
def test_the_file_sees_as_the_policy_does(backbone, small, dataset, tmp_path):
    seen = with_images(dataset)
    camera = {"backbone": backbone, "n_keypoints": 4, "crop": 36}
    encoder = {"features": "raw", "camera": camera}
    policy = make(small, seen, "dp_ag", {}, {**ABSOLUTE, "encoder": encoder, "diffusion": FEW})
    runs = exported(policy, tmp_path)
    assert largest_difference(policy, runs, windows(seen, 30)) < 1e-4
    obs = {k: v[0].numpy() for k, v in windows(seen, 1).items()}
    noise = drawn_noise(policy, 0).numpy()
    mirrored = obs["image"][:, :, ::-1]  # a view that runs backwards, as of a camera's BGR image
    other = runs.act({**obs, "image": mirrored}, noise)
    assert not np.allclose(runs.act(obs, noise), other, atol=1e-3)
    np.testing.assert_array_equal(other, runs.act({**obs, "image": mirrored.copy()}, noise))


@pytest.fixture(scope="module")
def dp_ag(small, dataset, tmp_path_factory):
    "A DP-AG that evolves at every step, its file's runner, and their folder."
    folder = tmp_path_factory.mktemp("dp_ag")
    policy = make(small, dataset, *CASES["dp_ag-every"])
    return policy, exported(policy, folder), folder


def test_a_convolution_is_one_again_only_in_the_graph(small, dataset):
    policy = make(small, dataset, *CASES["dp-unet"])
    names = [str(n.target) for n in export.traced(policy).graph.nodes]
    assert any("convolution" in n for n in names) and not any("unfold" in n for n in names)
    assert all(m.few_rows for m in policy.modules() if hasattr(m, "few_rows"))


class SameNoise:
    "Draws what a policy draws from a torch generator."

    def __init__(self, noise: torch.Generator):
        self.noise = noise

    def standard_normal(self, shape, dtype):
        return torch.stack([torch.randn((1, *shape[1:]), generator=self.noise)[0] for _ in range(shape[0])])


def test_the_runner_keeps_the_queues_that_an_actor_keeps(dp_ag, dataset):
    policy, _, folder = dp_ag
    runs, actor = ExportedPolicy(folder / "policy.onnx"), Actor(policy, generator("queue"))
    runs.random = SameNoise(generator("queue"))
    steps = [{k: v[t].numpy() for k, v in dataset.obs.items()} for t in range(25)]
    for start in (0, 3):  # two episodes
        ours, theirs = ([a(o) for o in steps[start:]] for a in (actor, runs))
        np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.ptp(ours))
        runs.reset()
        actor.reset()


def test_noise_is_what_the_actions_depend_on(dp_ag, dataset):
    policy, runs, _ = dp_ag
    obs = {k: v[0].numpy() for k, v in windows(dataset, 1).items()}
    one, other = (drawn_noise(policy, i).numpy() for i in range(2))
    np.testing.assert_array_equal(runs.act(obs, one), runs.act(obs, one))
    assert not np.allclose(runs.act(obs, one), runs.act(obs, other), atol=1e-2)
    assert not np.allclose(runs.act(obs), runs.act(obs), atol=1e-2)  # drawn anew


def test_acting_differently(dp_ag, dataset, tmp_path):
    policy, runs, folder = dp_ag
    never = {"guidance": {"evolve": "never"}}
    note = export_policy(folder / "checkpoint", tmp_path / "never.onnx", acting=never)
    assert note["method"]["guidance"]["evolve"] == "never"
    plain, obs = ExportedPolicy(tmp_path / "never.onnx"), windows(dataset, 20)
    assert largest_difference(policy, plain, obs) > 1e-3
    unguided = load_policy(folder / "checkpoint")[0].act_as(never)
    assert largest_difference(unguided, plain, obs) < 1e-4


PROGRAM = """
import sys
import numpy as np
from runner import ExportedPolicy

policy = ExportedPolicy("policy.onnx")
actions = [policy({"keypoints": np.arange(16.0), "agent_pos": np.ones(2)}) for _ in range(9)]
assert np.isfinite(actions).all() and actions[0].shape == (2,)
print(sorted(n for n in sys.modules if n.split(".")[0] in ("torch", "dpag", "onnx", "pydantic")))
"""


def test_the_runner_is_one_file_that_needs_no_torch(dp_ag, tmp_path):
    shutil.copy(dp_ag[2] / "policy.onnx", tmp_path)
    shutil.copy(runner.__file__, tmp_path / "runner.py")
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_push_t_is_played_without_torch(dp_ag, tmp_path):
    pytest.importorskip("gym_pusht")
    for file in (dp_ag[2] / "policy.onnx", runner.__file__, root() / "tools/pusht_onnx.py"):
        shutil.copy(file, tmp_path)
    run = [sys.executable, "pusht_onnx.py", "policy.onnx", "--episodes", "2", "--max-steps", "20"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout.splitlines()[-1])
    assert played["without_torch"] and len(played["scores"]) == 2
    assert all(0 <= score <= 1 for score in played["scores"])


def test_within_the_package_the_runner_needs_no_torch_either():
    program = "import sys, dpag.runner; print('torch' in sys.modules)"
    run = [sys.executable, "-c", program]
    assert subprocess.run(run, cwd=root(), capture_output=True, text=True).stdout == "False\n"


GOOD = {"keypoints": np.zeros(16), "agent_pos": np.zeros(2)}
BAD = {
    "missing": ({"agent_pos": np.zeros(2)}, "has no keypoints"),
    "shape": ({**GOOD, "agent_pos": np.zeros(3)}, r"agent_pos has the shape \(3,\); \(2,\) is needed"),
    "not finite": ({**GOOD, "agent_pos": [np.nan, 0]}, "agent_pos = .*: finite numbers are needed"),
    "words": ({**GOOD, "agent_pos": ["a", "b"]}, "agent_pos = .*: finite numbers are needed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_the_runner_refuses_what_the_policy_does_not_know(kind, dp_ag, tried):
    observation, words = BAD[kind]
    dp_ag[1].reset()
    with tried.refused("exported policies", match=words):
        dp_ag[1](observation)
    assert not dp_ag[1].recent


def test_the_runner_refuses_other_noise_and_images_of_floats(dp_ag, tried):
    window = {k: np.stack([v, v]) for k, v in GOOD.items()}
    with tried.refused("exported policies", match="noise has the shape"):
        dp_ag[1].act(window, np.zeros((2, 16, 2)))
    with tried.refused("exported policies", match="image is float64; an image of bytes"):
        runner.checked("image", np.zeros((4, 4, 3)), (4, 4, 3), "uint8")


def test_the_runner_refuses_files_of_something_else(dp_ag, tmp_path, tried):
    import onnx

    model = onnx.load(dp_ag[2] / "policy.onnx")
    for value, words in (('{"format": 99}', "format 99"), (None, "not a policy of dpag")):
        del model.metadata_props[:]
        if value:
            model.metadata_props.add(key="dpag", value=value)
        onnx.save(model, tmp_path / "other.onnx")
        with tried.refused("exported policies", match=words):
            ExportedPolicy(tmp_path / "other.onnx")


@pytest.mark.parametrize("method", ["ibc", "bet", "lstm_gmm"])
def test_methods_that_draw_otherwise_are_refused_by_name(method, small, dataset, tried):
    whole = {"n_obs_steps": 10, "horizon": 10, "n_action_steps": 1}
    sequence = whole if METHODS[method].policy.per_step else {}
    settings = layered(PolicyConfig, small.model_dump(), {**ABSOLUTE, **sequence})
    policy = build_policy(METHODS[method].config(), settings, dataset.shapes)
    with tried.refused(
        "exported policies", match=f"method = {method} cannot be exported: allowed are ada_flow"
    ):
        export.check_exportable(policy)


@pytest.mark.parametrize("evolve", ["sde", "drawn"])
def test_latents_that_draw_noise_are_refused_by_name(evolve, dp_ag, tmp_path, tried):
    acting = {"guidance": {"evolve": evolve}}
    with tried.refused(
        "exported policies", match=f"guidance.evolve = '{evolve}' cannot be exported: allowed are"
    ):
        export_policy(dp_ag[2] / "checkpoint", tmp_path / "policy.onnx", acting)
    assert not list(tmp_path.iterdir())


def test_noise_of_another_shape_is_refused(dp_ag, dataset, tried):
    policy, obs = dp_ag[0], windows(dataset, 1)
    for noise in (torch.zeros(0, 16, 2), torch.zeros(1, 8, 2)):
        with tried.refused("exported policies", match="is drawn, given are"):
            act_with(policy, obs, noise)


def test_nothing_is_written_for_a_checkpoint_that_is_damaged(dp_ag, tmp_path, tried):
    shutil.copytree(dp_ag[2] / "checkpoint", tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with tried.refused("exported policies", DamagedError):
        export_policy(tmp_path / "checkpoint", tmp_path / "policy.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_what_is_missing_is_named(dp_ag, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx, onnxruntime, onnxscript: .*pip install 'dpag\[onnx\]'"):
        export_policy(dp_ag[2] / "checkpoint", tmp_path / "policy.onnx")
