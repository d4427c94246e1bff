"""The method against its formulas, computed another way."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dpag.config import generator
from dpag.diffusion import Diffusion, DiffusionConfig
from dpag.guidance import (
    Guidance,
    GuidanceConfig,
    contrastive_loss,
    drift_bound,
    kl_loss,
    latent_vjp,
    leverage,
)
from dpag.methods import dp_ag
from dpag.methods.dp_ag import ActionGuidedPolicy, DPAGConfig
from dpag.policy import build_policy
from dpag.train import TrainConfig, fit


@pytest.mark.parametrize("shape", [(5,), (4, 2)])
def test_vjp_is_the_explicit_jacobian_transposed_times_the_prediction(shape):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, math.prod(shape))
    ).double()
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    f = lambda z: net(z).unflatten(1, shape)
    got = latent_vjp(f(z), z, scale="raw", detach=True)
    for i in range(6):
        jac = torch.autograd.functional.jacobian(lambda v: f(v[None])[0].flatten(), z[i].detach())
        assert torch.allclose(got[i], jac.T @ f(z)[i].flatten().detach(), atol=1e-12)
    unit = latent_vjp(f(z), z, scale="unit", detach=True)
    assert torch.allclose(unit.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(unit, got / got.norm(dim=1, keepdim=True))


def test_undetached_vjp_differentiates_both_its_factors():
    "d/dW of sum(VJP) for eps = z W^T is known: VJP = z W^T W."
    W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    latent_vjp(z @ W.T, z, scale="raw", detach=False).sum().backward()
    got = W.grad.clone()
    W2 = W.detach().clone().requires_grad_()
    (z.detach() @ W2.T @ W2).sum().backward()
    assert torch.allclose(got, W2.grad)


@pytest.mark.parametrize("inside", [True, False])
def test_contrastive_loss_is_the_loop_from_the_formula(inside):
    g = torch.Generator().manual_seed(1)
    a, b, tau = (
        torch.randn(5, 4, 2, generator=g, dtype=torch.float64),
        torch.randn(5, 4, 2, generator=g, dtype=torch.float64),
        0.7,
    )
    total = 0.0
    for i in range(5):
        sims = [torch.dot(a[i].flatten(), b[j].flatten()) / a[i].norm() / b[j].norm() for j in range(5)]
        denominator = sum(math.exp(sims[j] / tau) for j in range(5) if inside or j != i)
        total -= math.log(math.exp(sims[i] / tau) / denominator) / 5
    assert contrastive_loss(a, b, temperature=tau, positive_in_denominator=inside).item() == pytest.approx(
        total, abs=1e-12
    )


def test_contrastive_loss_does_not_depend_on_the_order_of_the_batch():
    a, b = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    kw = dict(temperature=0.5, positive_in_denominator=False)
    assert contrastive_loss(a[p], b[p], **kw).item() == pytest.approx(
        contrastive_loss(a, b, **kw).item(), abs=1e-12
    )


@pytest.mark.parametrize("prior", ["latent", "standard"])
def test_kl_is_torchs(prior):
    mu, logvar, z = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    centre = z if prior == "latent" else torch.zeros_like(z)
    want = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(centre, torch.ones_like(z))).sum(1).mean()
    assert kl_loss(mu, logvar, z, prior=prior).item() == pytest.approx(want.item(), abs=1e-12)


def test_drift_bound_is_the_theorems():
    assert drift_bound(lipschitz=2.0, temperature=0.5, batch_size=11, alpha=-1.0) == pytest.approx(
        2 * 4 * (2 - 0.5 * math.log(10) - 0.5)
    )


def _grads(small, shapes, dataset, **changes):
    method = DPAGConfig(guidance=GuidanceConfig(**changes))
    torch.manual_seed(0)
    policy = build_policy(method, small, shapes, dataset)
    policy.loss(dataset.batch(16, generator("b")), generator("n"))["loss"].backward()
    return policy.encoder.heads.mu.weight.grad, policy.encoder.heads.logvar.weight.grad


def test_gradients_reach_the_encoder_through_sigma_and_through_the_evolved_branch(small, shapes, dataset):
    alone = {"contrastive_weight": 0.0, "kl_weight": 0.0, "denoise_on": "evolved"}
    mu, logvar = _grads(small, shapes, dataset, **alone, vjp_detach=True)
    # σ scales the step, so it is taught by the evolved prediction alone.
    assert mu.abs().sum() > 0 and logvar.abs().sum() > 0
    mu2, _ = _grads(small, shapes, dataset, **alone, vjp_detach=False)
    assert not torch.allclose(mu, mu2)  # and the VJP itself carries gradient when not detached
    _, none = _grads(small, shapes, dataset, **alone, vjp_detach=True, gamma=0.0)
    assert none is None or none.abs().sum() == 0  # γ = 0 cuts σ off


def test_static_denoising_never_teaches_the_evolved_branch(small, shapes, dataset):
    alone = {"contrastive_weight": 0.0, "kl_weight": 0.0, "denoise_on": "static"}
    one, two = (_grads(small, shapes, dataset, **alone, gamma=gamma) for gamma in (1.0, 9.0))
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("sampler,steps", [("ddim", 50), ("ddpm", 100), ("dpm_solver", 20)])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_samplers_recover_a_known_gaussian(sampler, steps, prediction):
    m, s = -0.4, 0.25
    d = Diffusion(DiffusionConfig(prediction=prediction, sampler=sampler, n_sample_steps=steps))

    def best(x, i):
        a, b = d.scales(torch.tensor([d.steps[i].level]))
        eps = b * (x - a * m) / (a**2 * s**2 + b**2)
        clean = (x - b * eps) / a
        return {"epsilon": eps, "sample": clean, "v_prediction": a * eps - b * clean}[prediction]

    x = d.sample(best, (6000, 1, 1), torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(m, abs=0.02) and x.std().item() == pytest.approx(s, abs=0.02)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver"])
def test_samplers_are_diffusers(sampler, prediction, schedule):
    "With a smooth function for a net, at numbers of steps that divide the levels and that do not."
    import diffusers

    names = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm_solver": "DPMSolverMultistepScheduler"}
    clip = 1e9 if sampler == "dpm_solver" else 1.0  # the library's solver does not clip
    own = {} if sampler == "dpm_solver" else {"clip_sample_range": clip}
    # Under the linear schedule 1 − ᾱ is tiny at the end, and the library's DDPM keeps four digits of it.
    atol = 1e-4 if (sampler, schedule) == ("ddpm", "linear") else 1e-5
    for n_steps in (2, 5, 8, 16, 100):
        scheduler = getattr(diffusers, names[sampler])(
            num_train_timesteps=100,
            beta_schedule=schedule,
            prediction_type=prediction,
            timestep_spacing="trailing",
            beta_start=1e-4,
            beta_end=0.02,
            **own,
        )
        scheduler.set_timesteps(n_steps)
        d = Diffusion(
            DiffusionConfig(
                sampler=sampler, prediction=prediction, schedule=schedule, n_sample_steps=n_steps, clip=clip
            )
        )
        assert [int(k) for k in scheduler.timesteps] == [step.level for step in d.steps]
        g, h = (torch.Generator().manual_seed(3) for _ in range(2))
        found = d.sample(lambda x, i: torch.cos(x + d.steps[i].level / 20), (4, 16, 2), g)  # noqa: B023
        x = torch.randn(4, 16, 2, generator=h)
        for k in scheduler.timesteps:
            x = scheduler.step(torch.cos(x + k / 20), k, x, generator=h).prev_sample
        size = x.abs().max().clamp_min(1)
        torch.testing.assert_close(found / size, x / size, atol=atol, rtol=0)


def test_low_temperature_target_scales_noise():
    config = DiffusionConfig(
        n_train_steps=10, prediction="epsilon", sampler="ddpm", n_sample_steps=10, target_temperature=0.4
    )
    noise, k = torch.randn(2, 3, 1), torch.tensor([1, 2])
    assert torch.equal(Diffusion(config).target(noise, noise, k), noise / 0.4)


# The component.


@pytest.mark.parametrize("vjp", ["raw", "unit"])
def test_the_evolved_latent_is_the_formula(vjp):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
    z, mu, sigma = torch.randn(3, 2, 4)
    guidance = Guidance(GuidanceConfig(gamma=2.5, vjp=vjp))
    output, z_evolved = guidance.evolve(net, z, mu, sigma)
    leaf = z.clone().requires_grad_()
    expected = latent_vjp(net(leaf), leaf, scale=vjp, detach=True)
    assert torch.equal(output, net(z)) and torch.equal(z_evolved, mu + 2.5 * sigma * expected)
    assert torch.equal(guidance.pull(net(leaf), leaf, sigma), 2.5 * sigma * expected)


def test_of_a_tuple_the_last_entry_counts_and_gradients_need_not_be_on():
    torch.manual_seed(0)
    net, z, one = torch.nn.Linear(4, 6), torch.randn(2, 4), torch.ones(2, 4)
    guidance = Guidance(GuidanceConfig())
    with torch.no_grad():
        (first, last), z_evolved = guidance.evolve(lambda z: (z.sum(), net(z)), z, z, one, detach=True)
    assert torch.equal(last, net(z)) and torch.equal(first, z.sum())
    assert torch.equal(z_evolved, guidance.evolve(net, z, z, one, detach=True)[1])
    assert not z.requires_grad  # the caller's latent stays as it was


@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
def test_detach_is_the_settings_unless_asked_otherwise(setting, asked):
    torch.manual_seed(0)
    net, z, one = (
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh()),
        torch.randn(2, 4),
        torch.ones(2, 4),
    )
    guidance = Guidance(GuidanceConfig(vjp_detach=setting))
    _, z_evolved = guidance.evolve(net, z, z, one, detach=asked)
    assert z_evolved.requires_grad == (not (setting if asked is None else asked))


def test_the_losses_follow_the_settings():
    torch.manual_seed(0)
    a, mu, logvar, z = torch.randn(4, 5, 3)
    b = torch.randn(5, 3, requires_grad=True)
    for detach in (True, False):
        config = GuidanceConfig(temperature=0.3, positive_in_denominator=True, contrastive_detach=detach)
        loss = Guidance(config).contrast(a, b)
        assert loss.item() == contrastive_loss(a, b, temperature=0.3, positive_in_denominator=True).item()
        assert loss.requires_grad != detach
    for prior in ("latent", "standard"):
        found = Guidance(GuidanceConfig(kl_prior=prior)).kl(mu, logvar, z)
        assert torch.equal(found, kl_loss(mu, logvar, z, prior=prior))


def test_with_shared_noise_only_the_observations_tell_samples_apart(small, shapes, dataset):
    """Eight times one sample: with noise of its own each is recognised by it; with one noise for all
    nothing is left, and the loss is that of a guess among seven."""
    got = {}
    for noise in ("own", "shared"):
        method = DPAGConfig(guidance=GuidanceConfig(contrastive_noise=noise, temperature=0.1))
        torch.manual_seed(0)
        policy = build_policy(method, small, shapes, dataset)
        policy.encoder.heads.logvar.weight.data.zero_()
        policy.encoder.heads.logvar.bias.data.fill_(-10)  # no noise of the latent either
        one = dataset.batch(1, generator("b"))
        batch = {
            "obs": {k: v.expand(8, *v.shape[1:]) for k, v in one["obs"].items()},
            "action": one["action"].expand(8, -1, -1),
        }
        got[noise] = policy.loss(batch, generator("n"))["contrastive"].item()
    assert got["shared"] == pytest.approx(math.log(7), abs=0.02) and got["own"] < got["shared"] - 1


def test_leverage_is_the_share_of_what_another_latent_moves():
    out, there, other = torch.randn(3, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    length = lambda x: sum(row.norm() for row in x) / len(x)
    assert leverage(out, there, other).item() == pytest.approx(length(there - out) / length(other - out))
    assert leverage(out, out, other) == 0 and leverage(out, other, out).isnan()


@pytest.mark.parametrize("denoise_on", ["split", "both"])
def test_logging_the_leverage_changes_no_bit_of_training(small, shapes, dataset, denoise_on, monkeypatch):
    def grads():
        torch.manual_seed(0)
        method = DPAGConfig(guidance=GuidanceConfig(denoise_on=denoise_on))
        policy = build_policy(method, small, shapes, dataset)
        noise = generator("n")
        terms = policy.loss(dataset.batch(16, generator("b")), noise)
        terms["loss"].backward()
        return terms, [p.grad for p in policy.parameters() if p.grad is not None], noise.get_state()

    with_it, logged, state = grads()
    assert 0 < with_it["leverage"] < 10 and not with_it["leverage"].requires_grad
    monkeypatch.setattr(ActionGuidedPolicy, "diagnosing", False)
    without, plain, state_without = grads()
    assert "leverage" not in without
    assert torch.equal(with_it["loss"], without["loss"]) and torch.equal(state, state_without)
    assert len(logged) == len(plain) and all(map(torch.equal, logged, plain))


def test_a_policy_that_evolves_nothing_has_no_leverage(small, shapes, dataset):
    "With γ = 0 the evolved latent is μ; without the latent's noise that is the static one too."
    torch.manual_seed(0)
    policy = build_policy(DPAGConfig(guidance=GuidanceConfig(gamma=0.0)), small, shapes, dataset)
    policy.encoder.heads.logvar.weight.data.zero_()
    policy.encoder.heads.logvar.bias.data.fill_(-40)
    terms = policy.loss(dataset.batch(16, generator("b")), generator("n"))
    assert terms["leverage"].item() < 0.05  # the latent keeps a little noise: its logvar has a floor


def test_the_leverage_is_in_every_row_of_the_log_and_computed_for_no_other_step(
    small, shapes, dataset, monkeypatch
):
    calls, original = [], dp_ag.measured_leverage
    monkeypatch.setattr(dp_ag, "measured_leverage", lambda *a: calls.append(1) or original(*a))
    policy = build_policy(DPAGConfig(), small, shapes, dataset)
    log = fit(policy, dataset, TrainConfig(steps=6, log_every=2, batch_size=8, threads=1))
    assert len(log) == 3 and (log.leverage > 0).all() and len(calls) == 3
    assert policy.diagnosing
