"""Policies: acting, checkpoints, golden numbers."""
import pytest
import torch

from dpag import config
from dpag.policy import build_policy, load_policy, save_policy

UNET = config.UNet(kind="unet", channels=[16, 32], kernel_size=3, n_groups=8, step_dim=16)


def make(settings, small, shapes, dataset, method="dp_ag", net=None, **guidance):
    m = settings.methods[method]
    if guidance: m = config.DPAG(kind="dp_ag", guidance=m.guidance.model_copy(update=guidance))
    if net is not None: small = small.model_copy(update={"net": net})
    torch.manual_seed(0)
    return build_policy(m, small, shapes, dataset), m, small


def observations(dataset, n=6): return dataset.gather(torch.arange(0, 10 * n, 10))["obs"]


@pytest.mark.parametrize("net", [None, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize("frame", ["relative", "absolute"])
def test_gamma_zero_acts_exactly_like_no_guidance(settings, small, shapes, dataset, net, frame):
    policy, *_ = make(settings, small.model_copy(update={"action_frame": frame}), shapes, dataset, net=net)
    obs, trained = observations(dataset), policy.method.guidance
    def act(**kw):
        policy.act_as({"guidance": {**trained.model_dump(), **kw}})
        return policy.act(obs, config.generator("a"))
    assert torch.equal(act(gamma=0.0), act(evolve="off"))
    assert not torch.equal(act(gamma=5.0), act(evolve="off"))


@pytest.mark.parametrize("evolve,calls_per_step", [("every", 2), ("lagged", 1), ("off", 1)])
def test_evolution_costs_what_it_says(settings, small, shapes, dataset, evolve, calls_per_step):
    policy, *_ = make(settings, small, shapes, dataset, evolve=evolve)
    calls = []
    policy.net.register_forward_hook(lambda *a: calls.append(1))
    policy.act(observations(dataset), config.generator("a"))
    assert len(calls) == calls_per_step * small.diffusion.n_sample_steps


def test_evolving_at_every_fourth_step_reuses_the_latent(settings, small, shapes, dataset):
    policy, *_ = make(settings, small, shapes, dataset, evolve_every=4)
    seen = []
    policy.net.register_forward_pre_hook(lambda m, args: seen.append(args[2].detach().clone()))
    policy.act(observations(dataset), config.generator("a"))
    n = small.diffusion.n_sample_steps
    assert len(seen) == n + n // 4
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[1], seen[6])


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_order_of_the_batch_does_not_matter_to_what_is_done(settings, small, shapes, dataset, method):
    "Under the same noise, row i of the output depends on row i of the input alone."
    policy, *_ = make(settings, small, shapes, dataset, method=method)
    obs, p = observations(dataset), torch.tensor([3, 1, 5, 0, 2, 4])
    noised, k = torch.randn(6, 16, 2, generator=torch.Generator().manual_seed(0)), torch.full((6,), 40)
    out = policy.predictor(obs)(noised, k)
    permuted = policy.predictor({key: v[p] for key, v in obs.items()})(noised[p], k)
    assert torch.allclose(permuted, out[p], atol=1e-6)


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_saved_and_loaded_acts_bit_identically(settings, small, shapes, dataset, method, tmp_path):
    policy, m, p = make(settings, small, shapes, dataset, method=method)
    save_policy(tmp_path / "c", policy, method=m, settings=p, info={})
    again, _ = load_policy(tmp_path / "c")
    obs = observations(dataset)
    assert torch.equal(again.act(obs, config.generator("a")), policy.act(obs, config.generator("a")))
    assert not any(f.suffix in (".pt", ".pkl", ".ckpt") for f in (tmp_path / "c").iterdir())


@pytest.mark.parametrize("method", ["dp", "dp_ag", "flow_policy", "ada_flow"])
def test_three_noises_for_one_look_are_three_looks(settings, small, shapes, dataset, method):
    policy, *_ = make(settings, small, shapes, dataset, method=method)
    once = dataset.batch(4, config.generator("b"))
    thrice = {k: {n: v.repeat_interleave(3, 0) for n, v in x.items()} if k == "obs" else x.repeat_interleave(3, 0) for k, x in once.items()}
    expected = policy.loss(thrice, config.generator("n"))
    policy.n_noise_samples = 3
    found = policy.loss(once, config.generator("n"))
    for k in expected: torch.testing.assert_close(found[k], expected[k])


def test_acting_leaves_no_gradients_and_needs_no_grad_mode(settings, small, shapes, dataset):
    policy, *_ = make(settings, small, shapes, dataset)
    with torch.no_grad(): a = policy.act(observations(dataset), config.generator("a"))
    assert not a.requires_grad and all(q.grad is None for q in policy.parameters())


def test_relative_actions_move_with_the_agent(settings, small, shapes, dataset):
    "The frame alone: shifting actions and agent together leaves the training target unchanged."
    policy, *_ = make(settings, small, shapes, dataset, method="dp")
    batch = dataset.batch(4, config.generator("b"))
    moved = {**batch, "action": batch["action"] + 7, "obs": {**batch["obs"], "agent_pos": batch["obs"]["agent_pos"] + 7}}
    assert torch.allclose(policy.noised(batch, config.generator("n"))[0], policy.noised(moved, config.generator("n"))[0], atol=1e-4)


# Two training steps from fixed weights, settings and noise: a change here is a change of the method and must be meant.
GUIDANCE = config.Guidance(gamma=2.0, vjp="unit", vjp_detach=False, evolve="every", evolve_every=1, denoise_on="both", contrastive_weight=0.1, temperature=0.5,
                           positive_in_denominator=False, contrastive_detach=False, contrastive_noise="own", kl_weight=0.01, kl_prior="latent")
GOLDEN = {"dp": [1.012811, 1.064154], "dp_ag": [1.156951, 1.225688]}


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_golden_training_step(small, shapes, dataset, method):
    torch.manual_seed(0)
    policy = build_policy(config.DPAG(kind="dp_ag", guidance=GUIDANCE) if method == "dp_ag" else config.DP(kind="dp"), small, shapes, dataset)
    opt, losses = torch.optim.AdamW(policy.parameters(), 1e-3), []
    for step in range(2):
        loss = policy.loss(dataset.batch(16, config.generator("b", step)), config.generator("n", step))["loss"]
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[method], rel=1e-4)
