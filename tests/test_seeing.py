"""Pictures: what the encoder makes of them, that they stay bytes, and that they are the humans' pictures."""
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from dpag import config
from dpag.data import Demonstrations, Standardizer, WindowDataset, load_demonstrations, save_demonstrations
from dpag.encoder import Camera, ObservationEncoder, build_backbone, spatial_softmax
from dpag.policy import Shapes, build_policy, load_policy, save_policy
from dpag.rollout import rollout, stack_observations
from dpag.tasks.pusht.env import PushT, draw_states, human_demonstrations

needs_human = pytest.mark.skipif(not os.environ.get("DPAG_MIRROR"), reason="DPAG_MIRROR names no folder with pusht.zip")
IMAGE_SHAPES = Shapes(obs={"image": (96, 96, 3), "agent_pos": (2,)}, action_dim=2, action_ref="agent_pos")


@pytest.fixture(scope="module")
def image_settings(settings):
    p = settings.for_cell("pusht_img").policy
    return p.model_copy(update={"encoder": p.encoder.model_copy(update=dict(hidden=[32], latent_dim=8)), "net": config.MLPNet(kind="mlp", width=48, depth=3, step_dim=16)})


@pytest.fixture(scope="module")
def image_dataset():
    rng = np.random.default_rng(0)
    agent = rng.uniform(100, 400, (60, 2)).astype(np.float32)
    return WindowDataset({"image": rng.integers(0, 256, (60, 96, 96, 3), dtype=np.uint8), "agent_pos": agent}, agent + 5, np.array([30, 60]), horizon=16, n_obs_steps=2, n_action_steps=8)


def test_spatial_softmax_against_a_loop():
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 4, 6, generator=g)
    for b in range(2):
        for c in range(3):
            p = torch.softmax(maps[b, c].flatten(), 0).view(4, 6)
            x = sum(p[i, j] * (j + .5) / 6 for i in range(4) for j in range(6)); y = sum(p[i, j] * (i + .5) / 4 for i in range(4) for j in range(6))
            assert torch.allclose(spatial_softmax(maps)[b, c], torch.stack([x, y]), atol=1e-6)


def test_crops_are_what_slicing_gives():
    camera = Camera(backbone="small", n_keypoints=4, crop=10, size=(16, 20))
    pictures, seen = torch.randint(256, (3, 2, 16, 20, 3), dtype=torch.uint8), []
    camera.backbone = torch.nn.Identity().requires_grad_(False)
    camera.backbone.forward = lambda x: (seen.append(x), x)[1]
    camera(pictures, torch.Generator().manual_seed(3))
    offsets = camera.offsets(3, torch.Generator().manual_seed(3), "cpu")
    assert len({tuple(o.tolist()) for o in offsets}) > 1 and (offsets[:, 0] <= 6).all() and (offsets[:, 1] <= 10).all()
    for b, (r, c) in enumerate(offsets.tolist()):
        for t in range(2):
            want = pictures[b, t, r:r + 10, c:c + 10].permute(2, 0, 1).float() / 127.5 - 1
            assert torch.equal(seen[0].view(3, 2, 3, 10, 10)[b, t], want)


def test_the_centre_is_looked_at_when_acting():
    camera = Camera(backbone="small", n_keypoints=4, crop=84, size=(96, 96))
    picture = torch.randint(256, (1, 2, 96, 96, 3), dtype=torch.uint8)
    border = picture.clone(); border[:, :, :6] = 0; border[:, :, -6:] = 0; border[:, :, :, :6] = 0; border[:, :, :, -6:] = 0
    assert torch.equal(camera(picture), camera(border))


def test_places_do_not_move_with_the_crop():
    "A map that answers to dark things finds a dark square at its centre, whatever the crop."
    camera = Camera(backbone="small", n_keypoints=1, crop=80, size=(96, 96))
    camera.backbone = torch.nn.Conv2d(3, 1, 4, stride=4, bias=False)
    torch.nn.init.constant_(camera.backbone.weight, -1.0)
    picture = torch.full((1, 1, 96, 96, 3), 255, dtype=torch.uint8); picture[0, 0, 40:56, 36:60] = 0
    def place(o):
        camera.offsets = lambda n, g, d: torch.tensor([o])
        with torch.no_grad(): return camera(picture).flatten() * 48 + 48
    for o in ([0, 0], [4, 4], [8, 12], [16, 16]): assert torch.allclose(place(o), torch.tensor([48.0, 48.0]), atol=1e-3)      # px: x from 36 to 60, y from 40 to 56
    assert torch.allclose(place([5, 6]), torch.tensor([48.0, 48.0]), atol=1.0)


def test_order_of_cameras_does_not_matter(image_settings):
    shapes = {"wrist": (32, 32, 3), "scene": (48, 40, 3), "agent_pos": (2,)}
    c = image_settings.encoder.model_copy(update={"camera": config.Camera(backbone="small", n_keypoints=4, crop=32)})
    obs = {k: torch.randint(256, (3, 2, *s), dtype=torch.uint8) if len(s) == 3 else torch.rand(3, 2, *s) for k, s in shapes.items()}
    outs = []
    for keys in (list(shapes), list(shapes)[::-1]):
        torch.manual_seed(0)
        enc = ObservationEncoder(shapes={k: shapes[k] for k in keys}, n_obs_steps=2, settings=c, scale=Standardizer(torch.zeros(4), torch.ones(4)))
        outs.append(enc({k: obs[k] for k in keys})[0])
    assert torch.equal(*outs)
    assert outs[0].shape == (3, 2 * 2 * 4 * 2 + 8)


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match="crop = 100 must be at most 96"): Camera(backbone="small", n_keypoints=4, crop=100, size=(96, 96))


@pytest.mark.parametrize("backbone", ["small", "resnet18"])
def test_backbones_share_an_interface_and_have_no_batch_norm(backbone):
    net = build_backbone(backbone, 8)
    assert net(torch.zeros(2, 3, 84, 84)).shape[:2] == (2, 8)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())
    net.eval(); x = torch.rand(4, 3, 84, 84)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-4)             # no sample depends on its neighbours


def test_bytes_reach_the_device_as_bytes(image_settings, image_dataset):
    assert image_dataset.obs["image"].dtype == torch.uint8 and image_dataset.batch(4, config.generator("b"))["obs"]["image"].dtype == torch.uint8
    env = PushT("image"); obs, _ = env.reset(seed=0)
    batch = stack_observations([[obs, obs]])
    assert batch["image"].dtype == torch.uint8 and batch["agent_pos"].dtype == torch.float32
    policy = build_policy(config.DP(kind="dp"), image_settings, IMAGE_SHAPES, image_dataset)
    seen = []
    policy.encoder.cameras["image"].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    policy.loss(image_dataset.batch(4, config.generator("b")), config.generator("n")); policy.act(batch, config.generator("a"))
    assert seen == [torch.uint8] * 2


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_image_policies_learn_save_and_repeat(settings, image_settings, image_dataset, method, tmp_path):
    torch.manual_seed(0)
    m = settings.methods[method]
    policy = build_policy(m, image_settings, IMAGE_SHAPES, image_dataset)
    batch = image_dataset.batch(8, config.generator("b"))
    one, two = (policy.loss(batch, config.generator("n", 1))["loss"] for _ in range(2))
    assert one.item() == two.item() and one.item() != policy.loss(batch, config.generator("n", 2))["loss"].item()
    one.backward()
    assert policy.encoder.cameras["image"].backbone[0].weight.grad.abs().sum() > 0
    save_policy(tmp_path / "c", policy, method=m, settings=image_settings, info={})
    again, _ = load_policy(tmp_path / "c")
    assert torch.equal(again.act(batch["obs"], config.generator("a")), policy.act(batch["obs"], config.generator("a")))


def test_the_vjp_reaches_the_latent_and_never_the_pixels(settings, image_settings, image_dataset):
    torch.manual_seed(0)
    policy = build_policy(settings.methods["dp_ag"], image_settings, IMAGE_SHAPES, image_dataset)
    calls, record = [], []
    policy.encoder.register_forward_hook(lambda *a: calls.append(1))
    policy.act(image_dataset.batch(3, config.generator("b"))["obs"], config.generator("a"), record)
    assert len(calls) == 1 and len(record) == image_settings.diffusion.n_sample_steps
    assert record[0].shape == (3, policy.encoder.latent_dim) and not torch.equal(record[0], record[-1])


def test_skipping_pictures_nobody_sees_changes_nothing():
    class Push:
        def act(self, obs, generator):
            assert obs["image"].shape[1:] == (2, 96, 96, 3)
            shade = obs["image"].float().mean((1, 2, 3, 4))[:, None, None] - 230
            return (obs["agent_pos"][:, -1:] + 40 * torch.tanh(shade)).expand(-1, 8, -1)
    class Always(PushT):
        observing = property(lambda self: True, lambda self, value: None)
    kw = dict(seeds=range(3), max_steps=30, n_obs_steps=2)
    a, b = (rollout(Push(), partial(E, "image"), **kw)[0] for E in (PushT, Always))
    assert a.equals(b) and a.attrs["steps"] == 90


def test_drawing_in_parallel_gives_the_environments_own_pictures():
    env = PushT("image"); env.reset(seed=0)
    states = np.random.default_rng(0).uniform([50, 50, 150, 150, -3], [450, 450, 350, 350, 3], (12, 5))
    drawn = draw_states(partial(PushT, "image"), states, np.array([5, 12]), workers=2)
    for s, p in zip(states, drawn):
        env.set_state(s)
        assert np.array_equal(env.sim._render(visualize=False), p)


@needs_human
def test_pictures_are_the_humans():
    demos, env = human_demonstrations(pictures=True), PushT("image")
    env.reset(seed=0)
    which = np.random.default_rng(1).choice(len(demos.arrays["state"]), 100, replace=False)
    error = [np.abs(env.set_state(demos.arrays["state"][i])["image"].astype(int) - demos.arrays["image"][i].astype(int)).mean() for i in which]
    assert demos.arrays["image"].dtype == np.uint8 and np.mean(error) < 0.65 and max(error) < 1.5


def test_image_demonstrations_survive_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    d = Demonstrations({"image": rng.integers(0, 256, (700, 96, 96, 3), dtype=np.uint8), "action": rng.normal(size=(700, 2)).astype(np.float32)}, np.array([300, 700]), {"source": "test"})
    save_demonstrations(d, tmp_path / "d.zarr")
    back = load_demonstrations(tmp_path / "d.zarr")
    assert back.arrays["image"].dtype == np.uint8 and np.array_equal(back.arrays["image"], d.arrays["image"]) and back.meta["hash"] == d.data_hash()
    assert len(list((tmp_path / "d.zarr/data/image").glob("*.0.0.0"))) > 1        # pieces, not one 20 MB file


MEMORY = """
import resource, sys, torch
from dpag import config, policy, train
from dpag.tasks.base import get_task
libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
s = config.validate(config.compose("laptop", "human")).for_cell("pusht_img")
task = get_task("pusht_img", s)
p = s.policy
ds = task.dataset(sys.argv[1], horizon=p.horizon, n_obs_steps=p.n_obs_steps, n_action_steps=p.n_action_steps)
model = policy.build_policy(s.methods["dp_ag"], p, task.shapes, ds)
train.fit(model, ds, settings=s.train.model_copy(update=dict(steps=3)), seed=0, folder=sys.argv[2], fingerprint="f")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - libraries) / 1e6)
"""


@needs_human
@pytest.mark.timeout(900)
def test_the_human_pictures_train_within_two_gigabytes(tmp_path):
    save_demonstrations(human_demonstrations(pictures=True), tmp_path / "h.zarr")
    out = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "h.zarr"), str(tmp_path / "run")], capture_output=True, text=True, cwd=config.root())
    assert out.returncode == 0, out.stderr[-2000:]
    assert float(out.stdout.split()[-1]) < 2.0
