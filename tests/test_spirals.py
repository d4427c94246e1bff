"""The irregular spirals: settings, data, the guided flow against its equation, training."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dpag.config import SettingsError, changed, generator, layered
from dpag.guidance import contrastive_loss
from dpag.report import SPIRALS
from dpag.tasks.spirals import (
    FLOWS,
    SCALE,
    AnchoredFlow,
    GuidedFlow,
    LearnedFlow,
    MeanFlow,
    PlainFlow,
    ResidualFlow,
    SpiralDataset,
    SpiralsConfig,
    make_spirals,
    measure,
    roughness,
    spiral,
    train_flow,
)

CONFIG = SpiralsConfig()


def made(flow, **guidance):
    torch.manual_seed(0)
    return flow(changed(CONFIG, {"guidance": guidance}))


def latents(flow, data):
    "A flow's μ, σ and latents."
    mu, logvar = flow.encode(data)
    spread = (0.5 * logvar).exp()
    return mu, spread, flow.latents(mu, spread, data, generator("n"))


# Settings.


@pytest.mark.parametrize("make", [lambda c: SpiralsConfig(**c), lambda c: layered(SpiralsConfig, c)])
def test_a_section_that_is_given_in_part_keeps_the_spirals_own_defaults(make):
    c = make(
        {"train": {"steps": 60, "ema": {"power": 0.5}}, "guidance": {"gamma": 3.0}, "lr": {"base_flow": 0.1}}
    )
    assert c.train.steps == 60 and c.train.warmup_steps == 50 and c.train.weight_decay == 0
    assert c.train.ema.power == 0.5 and c.train.ema.max_decay == 0.99
    assert c.guidance.gamma == 3 and c.guidance.vjp == "raw" and not c.guidance.vjp_detach
    assert c.lr == {**CONFIG.lr, "base_flow": 0.1} and set(c.lr) == set(FLOWS)


def test_a_wrong_setting_is_named():
    with pytest.raises(SettingsError, match=r"lr\.base_flow.* = -1"):
        layered(SpiralsConfig, {"lr": {"base_flow": -1}})
    with pytest.raises(SettingsError, match="seeds"):
        layered(SpiralsConfig, {"seeds": [1]})


def test_every_field_has_a_meaning():
    assert all(field.description for field in SpiralsConfig.model_fields.values())


def test_settings_do_not_load_the_integrator():
    code = "import sys, dpag.tasks.spirals; print('torchdiffeq' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"


# Data.


def test_spirals_are_drawn_from_their_seed():
    a, b, other = (make_spirals(20, CONFIG, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.observed, b.observed) and not torch.equal(a.observed, other.observed)
    assert a.observed.shape == (20, 30, 2) and a.future.shape == (20, 10, 2) and len(a[:7]) == 7


def test_the_future_is_on_a_curve_and_after_the_observations():
    data = make_spirals(50, changed(CONFIG, {"noise": 0.0}), seed=3)
    grid = np.linspace(0, 6 * math.pi, CONFIG.n_grid)
    curves = np.concatenate([spiral(grid, clockwise) for clockwise in (False, True)])
    for points in (data.future, data.observed):
        distance = np.linalg.norm(SCALE * points[:, :, None].numpy() - curves, axis=-1).min(-1)
        assert distance.max() < 1e-5
    assert (data.future_t > 0).all() and (data.future_t.diff(dim=1) > 0).all()
    assert (data.observed_t.diff(dim=1) > 0).all() and data.observed_t.max() < 0.7


def test_the_truths_roughness_is_the_one_below_the_table():
    test = make_spirals(CONFIG.n_test, CONFIG, seed=10**6 + 1)
    assert f"the truth has {roughness(test.future, test.future_t):.0f}." in SPIRALS.footnote


# The paper's two flows and their control.


def test_the_guided_latent_is_the_equations():
    model, data = made(GuidedFlow, gamma=2.0), make_spirals(5, CONFIG, seed=0)
    mu, spread, path = latents(model, data)
    for i in range(len(data)):
        for j in range(CONFIG.n_future):
            z = mu[i].detach().requires_grad_()
            out = model.decode(z[None], data.future_t[i, j : j + 1])[0]
            (vjp,) = torch.autograd.grad(out, z, grad_outputs=out.detach())
            assert torch.allclose(path[i, j], mu[i] + 2 * spread[i] * vjp, atol=1e-5), (i, j)


def test_gradients_flow_through_the_guidance():
    model, data = made(GuidedFlow), make_spirals(5, CONFIG, seed=0)
    mu, _, path = latents(model, data)
    (path - mu[:, None]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder[0].parameters())


def test_the_base_draws_each_latent_anew():
    model, data = made(FLOWS["base_flow"]), make_spirals(400, CONFIG, seed=0)
    mu, spread, path = latents(model, data)
    noise = ((path - mu[:, None]) / spread[:, None]).flatten(0, 1)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert torch.equal(model.predict(data, generator("a"))[0], model.predict(data, generator("a"))[0])
    assert not torch.equal(model.predict(data, generator("a"))[0], model.predict(data, generator("b"))[0])


@pytest.mark.parametrize("name", ("vjp_flow", "drift_flow", "residual_flow"))
def test_without_guidance_a_flow_is_its_control(name):
    data, control = make_spirals(6, CONFIG, seed=0), made(PlainFlow).predict
    wanted = control(make_spirals(6, CONFIG, seed=0), generator("n"))[0]
    assert torch.allclose(made(FLOWS[name], gamma=0.0).predict(data, generator("n"))[0], wanted, atol=1e-6)
    assert not torch.allclose(made(FLOWS[name]).predict(data, generator("n"))[0], wanted)


@pytest.mark.parametrize("name", ("base_flow", "vjp_flow", "mean_flow"))
def test_the_compared_have_the_same_loss_and_as_many_parameters(name):
    data = make_spirals(8, CONFIG, seed=0)
    model = made(FLOWS[name])
    terms = model.loss({"spirals": data}, generator("n"))
    mu, logvar = model.encode(data)
    kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(1).mean()
    assert torch.allclose(terms["loss"], terms["mse"] + 0.01 * kl)
    n = [sum(p.numel() for p in m.parameters()) for m in (model, made(MeanFlow))]
    assert n[0] == n[1]


# Residuals.


def test_a_correction_is_the_vjp_of_the_residuals():
    model, data = made(ResidualFlow), make_spirals(3, CONFIG, seed=0)
    z = torch.randn(3, CONFIG.latent_dim, requires_grad=True)
    found, t = model.correction(z, data), data.observed_t - data.observed_t[:, -1:]
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, i=i: model.decode(x.expand(30, -1), t[i]), z[i]
        )
        missing = data.observed[i] - model.decode(z[i].expand(30, -1), t[i])
        wanted = 4 / 30 * torch.einsum("jkz,jk->z", jacobian, missing)
        assert torch.allclose(found[i], wanted, atol=1e-5)


@pytest.mark.parametrize("flow", (ResidualFlow, LearnedFlow))
def test_residuals_never_see_the_future(flow):
    data = make_spirals(4, CONFIG, seed=0)
    model, moved = made(flow), make_spirals(4, CONFIG, seed=0)
    moved.future.add_(100.0)
    assert torch.equal(latents(model, data)[2], latents(model, moved)[2])


# The stochastic differential equation.


def test_drift_is_gamma_sigma_vjp():
    model, z, t = made(AnchoredFlow, gamma=2.0), torch.randn(5, CONFIG.latent_dim), torch.rand(5)
    spread = torch.rand(5, CONFIG.latent_dim)
    x = z.clone().requires_grad_()
    out = model.decode(x, t)
    (vjp,) = torch.autograd.grad(out, x, grad_outputs=out.detach())
    assert torch.allclose(model.drift(z, spread, t), 2 * spread * vjp, atol=1e-6)


def test_evolving_is_eulers_method_over_the_gaps():
    model, data = made(AnchoredFlow), make_spirals(4, CONFIG, seed=0)
    mu, logvar = model.encode(data)
    spread, t, z = (0.5 * logvar).exp(), data.future_t, mu
    path = model.evolve(mu, spread, t)
    for i in range(t.shape[1]):
        gap = 10 * (t[:, i] - (t[:, i - 1] if i else 0))
        z = z + gap[:, None] * model.drift(z, spread, t[:, i])
        assert torch.allclose(path[:, i], z, atol=1e-5), i


def test_the_loss_is_the_sum_of_its_terms():
    data = {"spirals": make_spirals(8, CONFIG, seed=0)}
    for on in ("evolved", "static", "both"):
        model = made(AnchoredFlow, denoise_on=on, kl_weight=0.0)
        terms = model.loss(data, generator("n"))
        b = data["spirals"]
        mu, logvar = model.encode(b)
        path = model.evolve(mu, (0.5 * logvar).exp(), b.future_t, generator("n"))
        evolved, static = (
            model.decode(path, b.future_t),
            model.decode(mu[:, None].expand_as(path), b.future_t),
        )
        error = {"evolved": F.mse_loss(evolved, b.future), "static": F.mse_loss(static, b.future)}
        error["both"] = (error["evolved"] + error["static"]) / 2
        contrast = contrastive_loss(static, evolved, temperature=0.8, positive_in_denominator=False)
        assert torch.allclose(terms["loss"], error[on] + 0.01 * contrast, atol=1e-6)
        assert torch.allclose(terms["mse"], error["evolved"])


def test_a_prediction_carries_no_gradient_when_none_is_asked_for():
    data = make_spirals(3, CONFIG, seed=0)
    for flow in FLOWS.values():
        with torch.no_grad():
            prediction, path = made(flow).predict(data, generator("n"))
        assert not prediction.requires_grad and not path.requires_grad


# Training.


@pytest.mark.parametrize("name", FLOWS)
def test_one_seed_one_model(name, tmp_path):
    config = changed(CONFIG, {"n_spirals": 40, "train": {"steps": 6, "checkpoint_every": 3}})
    test = make_spirals(10, config, seed=9)
    model, log = train_flow(name, config, seed=5, folder=tmp_path)
    again, _ = train_flow(name, config, seed=5)
    other, _ = train_flow(name, config, seed=6)
    assert (
        log.step.iloc[-1] == (18 if name == "plain_flow_long" else 6)
        and (tmp_path / "resume.safetensors").exists()
    )
    assert measure(model, test) == measure(again, test) != measure(other, test)
    assert (measure(model, test)["latent_path"] > 0) == (name in ("base_flow", "vjp_flow", "drift_flow"))


def test_a_batch_names_its_spirals():
    data = make_spirals(30, CONFIG, seed=0)
    batch = SpiralDataset(data).batch(7, generator("b"))
    assert torch.equal(batch["spirals"].observed, data.observed[batch["episode"]])
