"""The image encoder against loops and slices, and image policies from bytes to actions."""

import numpy as np
import pytest
import torch

from dpag.config import generator, layered
from dpag.data import Shapes, Standardizer, WindowDataset
from dpag.encoder import (
    BACKBONES,
    EncoderConfig,
    ImageEncoder,
    ImageEncoderConfig,
    ObservationEncoder,
    PeakedMaps,
    build_backbone,
    spatial_softmax,
)
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.policy import METHODS, PolicyConfig, build_policy, load_policy, save_policy

SHAPES = Shapes(obs={"image": (96, 96, 3), "agent_pos": (2,)}, action_dim=2, action_ref="agent_pos")


@pytest.fixture(scope="module")
def settings():
    return layered(
        PolicyConfig,
        {
            "action_frame": "relative",
            "encoder": {"hidden": [32], "latent_dim": 8},
            "net": {"width": 48, "depth": 3, "step_dim": 16},
        },
    )


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    agent = rng.uniform(100, 400, (60, 2)).astype(np.float32)
    return WindowDataset(
        {"image": rng.integers(0, 256, (60, 96, 96, 3), dtype=np.uint8), "agent_pos": agent},
        agent + 5,
        np.array([30, 60]),
        horizon=16,
        n_obs_steps=2,
        n_action_steps=8,
    )


def test_spatial_softmax_against_a_loop():
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 4, 6, generator=g)
    for b in range(2):
        for c in range(3):
            p = torch.softmax(maps[b, c].flatten(), 0).view(4, 6)
            x = sum(p[i, j] * (j + 0.5) / 6 for i in range(4) for j in range(6))
            y = sum(p[i, j] * (i + 0.5) / 4 for i in range(4) for j in range(6))
            assert torch.allclose(spatial_softmax(maps)[b, c], torch.stack([x, y]), atol=1e-6)


def test_crops_are_what_slicing_gives():
    camera = ImageEncoder(ImageEncoderConfig(n_keypoints=4, crop=10), (16, 20))
    images, inputs = torch.randint(256, (3, 2, 16, 20, 3), dtype=torch.uint8), []
    camera.backbone.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    camera(images, torch.Generator().manual_seed(3))
    corners = camera.corners(3, torch.Generator().manual_seed(3), "cpu")
    assert len({tuple(o.tolist()) for o in corners}) > 1
    assert (corners[:, 0] <= 6).all() and (corners[:, 1] <= 10).all()
    for b, (r, c) in enumerate(corners.tolist()):
        for t in range(2):
            want = images[b, t, r : r + 10, c : c + 10].permute(2, 0, 1).float() / 127.5 - 1
            assert torch.equal(inputs[0].unflatten(0, (3, 2))[b, t], want)


def test_the_centre_is_used_when_acting():
    camera = ImageEncoder(ImageEncoderConfig(n_keypoints=4, crop=84), (96, 96))
    image = torch.randint(256, (1, 2, 96, 96, 3), dtype=torch.uint8)
    border = torch.zeros_like(image)
    border[:, :, 6:-6, 6:-6] = image[:, :, 6:-6, 6:-6]
    assert torch.equal(camera(image), camera(border))


def test_positions_do_not_move_with_the_crop():
    "A map that answers to dark things finds a dark square at its centre, whatever the crop."
    camera = ImageEncoder(ImageEncoderConfig(n_keypoints=1, crop=80), (96, 96))
    camera.backbone = torch.nn.Conv2d(3, 1, 4, stride=4, bias=False)
    torch.nn.init.constant_(camera.backbone.weight, -1.0)
    image = torch.full((1, 1, 96, 96, 3), 255, dtype=torch.uint8)
    image[0, 0, 40:56, 36:60] = 0  # px: x from 36 to 60, y from 40 to 56

    def position(corner):
        camera.corners = lambda n, g, d: torch.tensor([corner])
        with torch.no_grad():
            return camera(image).flatten() * 48 + 48

    for corner in ([0, 0], [4, 4], [8, 12], [16, 16]):
        assert torch.allclose(position(corner), torch.tensor([48.0, 48.0]), atol=1e-3)
    assert torch.allclose(position([5, 6]), torch.tensor([48.0, 48.0]), atol=1.0)


def test_order_of_images_does_not_matter():
    shapes = {"wrist": (32, 32, 3), "scene": (48, 40, 3), "agent_pos": (2,)}
    config = EncoderConfig(hidden=[32], latent_dim=8, camera=ImageEncoderConfig(n_keypoints=4, crop=32))
    obs = {
        k: torch.randint(256, (3, 2, *s), dtype=torch.uint8) if len(s) == 3 else torch.rand(3, 2, *s)
        for k, s in shapes.items()
    }
    outs = []
    for keys in (list(shapes), list(shapes)[::-1]):
        torch.manual_seed(0)
        scale = Standardizer(torch.zeros(4), torch.ones(4))
        some = {k: shapes[k] for k in keys}
        encoder = ObservationEncoder(shapes=some, n_obs_steps=2, config=config, scale=scale)
        outs.append(encoder({k: obs[k] for k in keys})[0])
    assert torch.equal(*outs)
    assert outs[0].shape == (3, 2 * 2 * 4 * 2 + 8)


def test_positions_can_be_read_off_the_latent(settings, images):
    policy = build_policy(DPConfig(), settings, SHAPES, images)
    obs = images.batch(3, generator("b"))["obs"]
    found = policy.encoder.positions(policy.encode(obs)[0])
    assert torch.equal(found["image"], policy.encoder.cameras["image"](obs["image"]))
    assert found["image"].shape == (3, 2, 32, 2) and policy.encoder.n_coordinates == 128


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="crop = 100 must be at most 96"):
        ImageEncoder(ImageEncoderConfig(n_keypoints=4, crop=100), (96, 96))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_share_an_interface_and_have_no_batch_norm(backbone):
    net = build_backbone(backbone, 8)
    assert net(torch.zeros(2, 3, 84, 84)).shape[:2] == (2, 8)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.modules())
    net.eval()
    x = torch.rand(4, 3, 84, 84)
    assert torch.allclose(net(x)[:1], net(x[:1]), atol=1e-4)  # no sample depends on its neighbours


def test_peaked_maps_against_a_loop():
    maps = 0.01 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) + 4
    norm = PeakedMaps(3)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0])
    for b in range(2):
        for k in range(3):
            m = maps[b, k]
            want = (k + 1) * (m - m.mean()) / (m.var(unbiased=False) + norm.eps).sqrt()
            assert torch.allclose(norm(maps)[b, k], want, atol=1e-3)


def test_a_new_strided_backbone_finds_what_moves_and_ignores_the_background():
    torch.manual_seed(0)
    net = build_backbone("strided", 16)
    images = torch.ones(2, 3, 88, 88)
    images[0, :, 16:32, 16:32] = -0.5  # a square, and the same one 40 px to the right and below
    images[1, :, 56:72, 56:72] = -0.5
    places = 88 * spatial_softmax(net(images))
    assert (places[1] - places[0]).mean(0).min() > 10
    other = torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)  # another light
    assert torch.allclose(88 * spatial_softmax(net(images + other)), places, atol=0.01)


def test_images_reach_the_encoder_as_bytes(settings, images):
    batch = images.batch(4, generator("b"))
    assert images.obs["image"].dtype == batch["obs"]["image"].dtype == torch.uint8
    policy = build_policy(DPConfig(), settings, SHAPES, images)
    dtypes = []
    policy.encoder.cameras["image"].register_forward_pre_hook(lambda m, args: dtypes.append(args[0].dtype))
    policy.loss(batch, generator("n"))
    policy.act(batch["obs"], generator("a"))
    assert dtypes == [torch.uint8] * 2


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_image_policies_learn_save_and_repeat(settings, images, method, tmp_path):
    torch.manual_seed(0)
    policy = build_policy(METHODS[method].config(), settings, SHAPES, images)
    batch = images.batch(8, generator("b"))
    one, two, other = (policy.loss(batch, generator("n", i))["loss"] for i in (1, 1, 2))
    assert one.item() == two.item() != other.item()
    one.backward()
    camera = policy.encoder.cameras["image"]
    assert all(m.weight.grad.abs().sum() > 0 for m in camera.modules() if hasattr(m, "weight"))
    save_policy(tmp_path / "c", policy)
    again, _ = load_policy(tmp_path / "c")
    assert torch.equal(again.act(batch["obs"], generator("a")), policy.act(batch["obs"], generator("a")))


def test_the_vjp_reaches_the_latent_and_never_the_pixels(settings, images):
    torch.manual_seed(0)
    policy = build_policy(DPAGConfig(), settings, SHAPES, images)
    calls, record = [], []
    policy.encoder.register_forward_hook(lambda *a: calls.append(1))
    policy.act(images.batch(3, generator("b"))["obs"], generator("a"), record)
    assert len(calls) == 1 and len(record) == settings.diffusion.n_sample_steps
    assert record[0].shape == (3, policy.encoder.latent_dim) and not torch.equal(record[0], record[-1])


def test_a_policy_with_images_alone_is_refused_in_a_sentence():
    shapes = Shapes(obs={"image": (96, 96, 3)}, action_dim=2)
    with pytest.raises(ValueError, match="obs has images only"):
        build_policy(DPConfig(), PolicyConfig(), shapes)
