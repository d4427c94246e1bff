"""Policies: acting, the registry, checkpoints of this schema and the last, golden numbers."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from pydantic import create_model
from safetensors import safe_open

from dpag import policy as policies
from dpag.config import SettingsError, generator
from dpag.data import Shapes
from dpag.guidance import GuidanceConfig
from dpag.methods.dp import DPConfig
from dpag.methods.dp_ag import DPAGConfig
from dpag.noise_net import TimeConv, TimeDoubling, UNetConfig
from dpag.policy import METHODS, Actor, PolicyConfig, build_policy, load_policy, register_method, save_policy
from dpag.provenance import processor

UNET = UNetConfig(channels=[16, 32], kernel_size=3, n_groups=8, step_dim=16)
CHECKPOINTS = Path(__file__).parent / "data/checkpoints"


def make(small, shapes, dataset, method="dp_ag", net=None, **guidance):
    m = DPAGConfig(guidance=GuidanceConfig(**guidance)) if guidance else METHODS[method].config()
    torch.manual_seed(0)
    settings = small if net is None else small.model_copy(update={"net": net})
    return build_policy(m, settings, shapes, dataset)


def observations(dataset, n=6):
    return dataset.gather(torch.arange(0, 10 * n, 10))["obs"]


@pytest.mark.parametrize("net", [None, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize("frame", ["relative", "absolute"])
def test_gamma_zero_acts_exactly_like_no_guidance(small, shapes, dataset, net, frame):
    policy = make(small.model_copy(update={"action_frame": frame}), shapes, dataset, net=net)
    obs, trained = observations(dataset), policy.method.guidance

    def act(**kw):
        policy.act_as({"guidance": {**trained.model_dump(), **kw}})
        return policy.act(obs, generator("a"))

    assert torch.equal(act(gamma=0.0), act(evolve="never"))
    assert not torch.equal(act(gamma=5.0), act(evolve="never"))


@pytest.mark.parametrize("net", [None, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize("evolve,outputs,vjps", [("every", 2, 1), ("lagged", 1, 1), ("never", 1, 0)])
def test_evolution_costs_what_it_says(small, shapes, dataset, net, evolve, outputs, vjps):
    policy, n = make(small, shapes, dataset, net=net, evolve=evolve), small.diffusion.n_sample_steps
    with torch.no_grad():
        denoiser = policy.predictor(observations(dataset))
        policy.diffusion.sample(denoiser, (6, 16, 2), generator("a"))
    unused = 1 if evolve == "lagged" else 0  # the last step's VJP would move a latent that nobody asks for
    assert (denoiser.n_outputs, denoiser.n_vjps) == (outputs * n, vjps * n - unused)


def test_a_policy_samples_in_another_way_with_the_same_weights(small, shapes, dataset):
    policy, obs = make(small, shapes, dataset), observations(dataset)
    eight = policy.act(obs, generator("a"))
    policy.act_as({"policy": {"diffusion": {"n_sample_steps": 2, "sampler": "dpm_solver"}}})
    assert policy.mean_steps() == 2 and policy.settings.diffusion.sampler == "dpm_solver"
    assert not torch.equal(policy.act(obs, generator("a")), eight)
    policy.act_as({"policy": {"diffusion": {"n_sample_steps": 8, "sampler": "ddim"}}})
    assert torch.equal(policy.act(obs, generator("a")), eight)
    with pytest.raises(SettingsError, match="cannot change policy.horizon when acting"):
        policy.act_as({"policy": {"horizon": 8}})
    with pytest.raises(SettingsError, match="n_sample_steps = 200 must be at most"):
        policy.act_as({"policy": {"diffusion": {"n_sample_steps": 200}}})
    with pytest.raises(SettingsError, match="cannot change policy when acting"):
        make(small, shapes, dataset, method="flow_policy").act_as(
            {"policy": {"diffusion": {"n_sample_steps": 2}}}
        )


def test_lagged_evolution_at_every_fourth_step_costs_two_derivatives(small, shapes, dataset):
    policy = make(small, shapes, dataset, evolve="lagged", evolve_every=4)
    with torch.no_grad():
        denoiser = policy.predictor(observations(dataset))
        policy.diffusion.sample(denoiser, (6, 16, 2), generator("a"))
    assert (denoiser.n_outputs, denoiser.n_vjps) == (8, 2)


def test_evolving_at_every_fourth_step_reuses_the_latent(small, shapes, dataset):
    policy, latents = make(small, shapes, dataset, evolve_every=4), []
    policy.act(observations(dataset), generator("a"), latents)
    assert len(latents) == small.diffusion.n_sample_steps
    assert torch.equal(latents[1], latents[2]) and not torch.equal(latents[1], latents[6])


def test_a_drawn_latent_is_a_new_sample_in_each_step(small, shapes, dataset):
    "Mean and deviation over many steps are the encoder's, and no two steps share a latent."
    policy, obs = make(small, shapes, dataset, evolve="drawn"), observations(dataset)
    mu, logvar = policy.encode(obs)
    latents = []
    for seed in range(60):
        policy.act(obs, generator("a", seed), latents)
    z = (torch.stack(latents) - mu) / (0.5 * logvar).exp()
    assert len(latents) == 60 * small.diffusion.n_sample_steps
    torch.testing.assert_close(z.mean(), torch.tensor(0.0), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(), torch.tensor(1.0), atol=0.02, rtol=0)
    assert (torch.stack(latents).diff(dim=0).norm(dim=-1) > 0).all()


def test_drawn_noise_comes_from_the_generator_of_the_act(small, shapes, dataset):
    policy, obs = make(small, shapes, dataset, evolve="drawn"), observations(dataset)
    assert torch.equal(policy.act(obs, generator("a")), policy.act(obs, generator("a")))
    denoiser = policy.predictor(obs)
    with torch.no_grad(), pytest.raises(ValueError, match="a latent that is drawn needs a generator"):
        denoiser(torch.randn(6, 16, 2), 0)


@pytest.mark.parametrize("evolve", ["carried", "sde"])
def test_a_carried_latent_takes_eulers_steps(small, shapes, dataset, evolve):
    "From where it was, by γ σ ⊙ VJP under it and, with noise, by σ ξ, over one unit of time."
    policy, obs = make(small, shapes, dataset, evolve=evolve), observations(dataset)
    mu, logvar = policy.encode(obs)
    sigma, z, n = (0.5 * logvar).exp().detach(), mu.detach(), small.diffusion.n_sample_steps
    noise, own, noised = generator("n"), generator("n"), torch.randn(n, 6, 16, 2)
    with torch.no_grad():
        denoiser = policy.predictor(obs, None, noise)
    for i in range(n):
        k = policy.diffusion.levels()[i].expand(6)
        moved = policy.predictions(noised[i], k, z, z, sigma / n).z_evolved.detach()
        if evolve == "sde":
            moved = moved + sigma / n**0.5 * torch.randn(z.shape, generator=own)
        with torch.no_grad():
            out = denoiser(noised[i], i)
            torch.testing.assert_close(denoiser.z, moved, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(out, policy.net(noised[i], k, moved), atol=1e-4, rtol=1e-3)
        z = moved


def test_learning_from_the_mean_draws_no_latent(small, shapes, dataset):
    batch = dataset.batch(16, generator("b"))
    for learn_from, noisy in (("sample", True), ("mean", False)):
        policy = make(small, shapes, dataset, learn_from=learn_from)
        terms = policy.loss(batch, generator("n"))
        assert (terms["sampling_noise"] > 0) == noisy


@pytest.mark.parametrize("net", [None, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize("evolve", ["every", "lagged"])
def test_the_denoiser_evolves_the_latent_as_training_does(small, shapes, dataset, net, evolve):
    "What is computed once, and the derivative that goes through the conditioning alone, change no number."
    policy, obs = make(small, shapes, dataset, net=net, evolve=evolve), observations(dataset)
    mu, logvar = policy.encode(obs)
    sigma, z = (0.5 * logvar).exp().detach(), mu.detach()
    denoiser, noised = policy.predictor(obs), torch.randn(2, 6, 16, 2)
    k = policy.diffusion.levels()[:, None].expand(-1, 6)
    both = [policy.predictions(noised[i], k[i], z, z, sigma) for i in range(2)]
    expected = both[0].out_evolved if evolve == "every" else both[0].out
    torch.testing.assert_close(denoiser(noised[0], 0), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(denoiser.z, both[0].z_evolved, atol=1e-5, rtol=1e-4)
    if evolve == "lagged":
        again = policy.predictions(noised[1], k[1], both[0].z_evolved.detach(), z, sigma).out
        torch.testing.assert_close(denoiser(noised[1], 1), again, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("net", [None, UNET], ids=["mlp", "unet"])
def test_half_a_batch_learns_under_each_latent(small, shapes, dataset, net):
    "`split`: rows of the first half are the second predictions of `both`, with no gradient to the first."
    policy = make(small, shapes, dataset, net=net)
    batch = dataset.batch(8, generator("b"))
    noised, k, _ = policy.training_examples(batch, generator("n"))
    mu, logvar = policy.encode(batch["obs"])
    rows = (noised, k, mu, mu, (0.5 * logvar).exp())
    both, second = policy.predictions(*rows), policy.second_predictions(*rows)
    for expected, found in zip(both, second):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not second.out.requires_grad and not second.eps.requires_grad
    weight = policy.net.of_latent.weight
    one, two = (torch.autograd.grad(p.out_evolved.sum(), weight)[0] for p in (both, second))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)


def test_splitting_a_batch_trains_on_both_latents(small, shapes, dataset):
    policy = make(small, shapes, dataset, denoise_on="split")
    terms = policy.loss(dataset.batch(8, generator("b")), generator("n"))
    terms["loss"].backward()
    assert policy.encoder.heads.logvar.weight.grad.abs().sum() > 0
    assert terms["denoise"] != terms["denoise_evolved"]
    with pytest.raises(ValueError, match="it needs vjp_detach = true"):
        GuidanceConfig(denoise_on="split", vjp_detach=False)


def test_without_a_contrastive_weight_there_is_no_contrastive_loss(small, shapes, dataset):
    policy = make(small, shapes, dataset, contrastive_weight=0.0)
    terms = policy.loss(dataset.batch(8, generator("b")), generator("n"))
    assert "contrastive" not in terms and terms["loss"].requires_grad


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_convolutions_are_the_librarys_for_few_rows_and_many(batch):
    x = torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(0))
    for conv in (TimeConv(6, 4, 5), TimeConv(6, 4, 3, stride=2), TimeConv(6, 4, 1), TimeDoubling(6)):
        library = torch.nn.ConvTranspose1d if isinstance(conv, TimeDoubling) else torch.nn.Conv1d
        torch.testing.assert_close(conv(x), library.forward(conv, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_order_of_the_batch_does_not_matter_to_what_is_done(small, shapes, dataset, method):
    "Under the same noise, row i of the output depends on row i of the input alone."
    policy = make(small, shapes, dataset, method=method)
    obs, p = observations(dataset), torch.tensor([3, 1, 5, 0, 2, 4])
    noised = torch.randn(6, 16, 2, generator=torch.Generator().manual_seed(0))
    out = policy.predictor(obs)(noised, 4)
    permuted = policy.predictor({key: v[p] for key, v in obs.items()})(noised[p], 4)
    assert torch.allclose(permuted, out[p], atol=1e-6)


@pytest.mark.parametrize("method", ["dp", "dp_ag", "flow_policy", "ada_flow"])
def test_three_noises_for_one_encoding_are_three_encodings(small, shapes, dataset, method):
    policy = make(small, shapes, dataset, method=method)
    once = dataset.batch(4, generator("b"))
    thrice = {
        k: {n: v.repeat_interleave(3, 0) for n, v in x.items()} if k == "obs" else x.repeat_interleave(3, 0)
        for k, x in once.items()
    }
    expected = policy.loss(thrice, generator("n"))
    policy.n_noise_samples = 3
    found = policy.loss(once, generator("n"))
    for k in expected:
        torch.testing.assert_close(found[k], expected[k])


def test_acting_leaves_no_gradients_and_needs_no_grad_mode(small, shapes, dataset):
    policy = make(small, shapes, dataset)
    with torch.no_grad():
        a = policy.act(observations(dataset), generator("a"))
    assert not a.requires_grad and all(q.grad is None for q in policy.parameters())


def test_relative_actions_move_with_the_agent(small, shapes, dataset):
    "The frame alone: shifting actions and agent together leaves the training target unchanged."
    policy = make(small, shapes, dataset, method="dp")
    batch = dataset.batch(4, generator("b"))
    agent = {"agent_pos": batch["obs"]["agent_pos"] + 7}
    moved = {**batch, "action": batch["action"] + 7, "obs": {**batch["obs"], **agent}}
    a, b = (policy.training_examples(x, generator("n"))[0] for x in (batch, moved))
    assert torch.allclose(a, b, atol=1e-4)


def test_a_policy_of_ones_own_arrays_takes_a_handful_of_words(dataset):
    "Defaults do for everything else, and relative actions and cameras are not asked for."
    shapes = Shapes(obs={"agent_pos": (2,)}, action_dim=2)
    policy = build_policy(DPConfig(), PolicyConfig(), shapes, dataset)
    assert policy.act({"agent_pos": torch.zeros(1, 2, 2)}, generator("a")).shape == (1, 8, 2)


def test_wrong_shapes_are_found_under_pytest(small, shapes, dataset):
    "jaxtyping's annotations are checked here (conftest.py): this is what makes them true."
    policy = make(small, shapes, dataset, method="dp")
    with pytest.raises(TypeCheckError):
        policy.net(torch.zeros(3, 16, 2), torch.zeros(4, dtype=torch.long), torch.zeros(3, 8))
    with pytest.raises(TypeCheckError):
        policy.diffusion.add_noise(torch.zeros(3, 16, 2), torch.zeros(3, 15, 2), torch.zeros(3).long())


# One observation at a time.


def test_an_actor_executes_chunks_and_asks_again(small, shapes, dataset):
    policy = make(small, shapes, dataset)
    steps = [{k: v[i].numpy() for k, v in dataset.obs.items()} for i in range(20)]
    actor = Actor(policy)
    found = [actor(step) for step in steps]
    g = generator("act", 0)
    for at in (0, 8, 16):
        window = {k: torch.stack([v[max(0, at - 1)], v[at]])[None] for k, v in dataset.obs.items()}
        expected = policy.act(window, g)[0].numpy()
        assert np.array_equal(np.array(found[at : at + 8]), expected[: 20 - at])
    assert found[0].shape == (2,)


def test_an_actor_forgets_the_last_episode(small, shapes, dataset):
    policy = make(small, shapes, dataset)
    first, later = ({k: v[i].numpy() for k, v in dataset.obs.items()} for i in (0, 100))
    actor, fresh = Actor(policy, generator("x")), Actor(policy, generator("y"))
    actor(first)
    actor.reset()
    actor.noise, fresh.noise = generator("z"), generator("z")
    assert np.array_equal(actor(later), fresh(later))


# The registry.


def test_methods_are_found_where_they_are_defined():
    entry = METHODS["dp_ag"]
    assert (entry.title, entry.config, entry.module) == ("DP-AG", DPAGConfig, "dpag.methods.dp_ag")
    with pytest.raises(SettingsError, match="method = 'dpag': allowed are .*dp, dp_ag"):
        METHODS["dpag"]


def test_two_modules_cannot_have_one_name():
    policy = type("Other", (METHODS["dp"].policy,), {"__module__": "another_package"})
    with pytest.raises(ValueError, match="two methods are named 'dp'"):
        register_method(title="DP", color="k")(policy)


# Checkpoints.


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_saved_and_loaded_acts_bit_identically(small, shapes, dataset, method, tmp_path):
    policy = make(small, shapes, dataset, method=method)
    save_policy(tmp_path / "c", policy, {"step": 3})
    again, meta = load_policy(tmp_path / "c")
    obs = observations(dataset)
    assert torch.equal(again.act(obs, generator("a")), policy.act(obs, generator("a")))
    assert (meta["schema"], meta["info"]) == (policies.SCHEMA, {"step": 3})
    assert not any(f.suffix in (".pt", ".pkl", ".ckpt") for f in (tmp_path / "c").iterdir())
    assert [f.name for f in tmp_path.iterdir()] == ["c"]


def expected_of(folder):
    with safe_open(folder / "expected.safetensors", "pt") as f:
        tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    obs = {k.removeprefix("obs/"): v for k, v in tensors.items() if k.startswith("obs/")}
    same = (meta["processor"], meta["torch"]) == (processor(), torch.__version__)
    return obs, tensors, same


def check(actions, expected, same):
    "Bit-identical on the kind of machine that made them; elsewhere sums are taken in another order."
    assert torch.equal(actions, expected) if same else torch.allclose(actions, expected, atol=0.01)


def test_a_checkpoint_of_this_schema_acts_as_it_did():
    "A DP-AG's whose gripper closes in half a percent of the steps: one entry's limits are further out."
    obs, expected, same = expected_of(CHECKPOINTS / "reach")
    policy, meta = load_policy(CHECKPOINTS / "reach")
    assert meta["schema"] == policies.SCHEMA
    check(policy.act(obs, generator("act", 0)), expected["actions"], same)
    policy.diffusion.reach.zero_()
    assert not torch.allclose(policy.act(obs, generator("act", 0)), expected["actions"], atol=0.1)


def test_a_checkpoint_of_schema_4_acts_as_it_did():
    "A U-Net's, sampled with DDPM, whose limits are the same for all entries."
    obs, expected, same = expected_of(CHECKPOINTS / "unet")
    policy, meta = load_policy(CHECKPOINTS / "unet")
    assert meta["schema"] == 4
    check(policy.act(obs, generator("act", 0)), expected["actions"], same)


@pytest.mark.parametrize("name", ["dp_ag", "dp_ag_image"])
def test_checkpoints_of_schema_1_act_as_they_did(name):
    "Made by the code of commit 37043de; positions are in px. Today's net adds in another order."
    obs, expected, _ = expected_of(CHECKPOINTS / name)
    policy, meta = load_policy(CHECKPOINTS / name)
    assert "schema" not in meta
    check(policy.act(obs, generator("act", 0)), expected["actions"], False)


def test_a_u_net_that_was_not_the_published_one_is_refused_by_name():
    with pytest.raises(ValueError, match="a U-Net of dpag 0.2 or older") as e:
        load_policy(CHECKPOINTS / "dp")
    assert "damaged" not in str(e.value)


def test_schema_1_calls_never_off():
    obs, expected, _ = expected_of(CHECKPOINTS / "dp_ag_image")
    policy, meta = load_policy(CHECKPOINTS / "dp_ag_image")
    assert (meta["method"]["guidance"]["evolve"], policy.method.guidance.evolve) == ("off", "never")
    policy.act_as({"guidance": {"evolve": "every"}})
    check(policy.act(obs, generator("act", 0)), expected["actions_guided"], False)
    assert not torch.equal(expected["actions"], expected["actions_guided"])


@pytest.fixture
def edited(tmp_path):
    "An old checkpoint after a change of its JSON."
    shutil.copytree(CHECKPOINTS / "dp_ag", tmp_path / "c")

    def edited(change):
        path = CHECKPOINTS / "dp_ag/checkpoint.json"
        meta = json.loads(path.read_text(encoding="utf-8"))
        change(meta)
        (tmp_path / "c/checkpoint.json").write_text(json.dumps(meta), encoding="utf-8")
        return tmp_path / "c"

    return edited


def test_yaml_may_have_made_off_false(edited):
    path = edited(lambda meta: meta["method"]["guidance"].update(evolve=False))
    assert load_policy(path)[0].method.guidance.evolve == "never"


UNKNOWN = [
    (lambda m: m["method"].update(momentum=1), "method.momentum = 1: Extra inputs"),
    (lambda m: m["method"]["guidance"].update(alpha=1), "method.guidance.alpha = 1: Extra inputs"),
    (lambda m: m["policy"]["encoder"].update(dropout=0.1), "policy.encoder.dropout = 0.1: Extra inputs"),
    (lambda m: m["policy"]["net"].update(kind="transformer"), "policy.net: .*'mlp'"),
    (lambda m: m["method"].update(kind="dp_gpt"), "method = 'dp_gpt': allowed are"),
    (lambda m: m.update(schema=6), "schema 6 is of a later dpag; this one reads up to 5"),
]


@pytest.mark.parametrize("change,words", UNKNOWN)
def test_what_is_not_known_is_said_and_not_called_damage(edited, change, words):
    with pytest.raises(ValueError, match=words) as e:
        load_policy(edited(change))
    assert "damaged" not in str(e.value) and str(edited(change)) in str(e.value)


def leaves(section, at=()):
    for name in type(section).model_fields:
        value = getattr(section, name)
        yield (*at, name)
        if hasattr(type(value), "model_fields"):
            yield from leaves(value, (*at, name))


def without(tree, path):
    name, *rest = path
    return {k: without(v, rest) if rest and k == name else v for k, v in tree.items() if rest or k != name}


@pytest.mark.parametrize("section", [PolicyConfig(), UNetConfig(), DPConfig(), DPAGConfig()], ids=type)
def test_every_setting_has_a_default(section):
    "So a checkpoint that is older than a setting can be read."
    for path in leaves(section):
        if path[-1] != "kind":
            assert type(section).model_validate(without(section.model_dump(), path)) == section, path


def test_new_settings_do_not_break_old_checkpoints(monkeypatch):
    guidance = create_model("NewGuidance", __base__=GuidanceConfig, fresh=(int, 1))
    method = create_model("NewDPAG", __base__=DPAGConfig, guidance=(guidance, guidance()), also=(str, "x"))
    policy = create_model("NewPolicy", __base__=PolicyConfig, fresh=(float, 0.5))
    monkeypatch.setitem(METHODS.entries, "dp_ag", dataclasses.replace(METHODS["dp_ag"], config=method))
    monkeypatch.setattr(policies, "PolicyConfig", policy)
    loaded, _ = load_policy(CHECKPOINTS / "dp_ag")
    assert (loaded.method.guidance.fresh, loaded.method.also, loaded.settings.fresh) == (1, "x", 0.5)
    obs, expected, _ = expected_of(CHECKPOINTS / "dp_ag")
    check(loaded.act(obs, generator("act", 0)), expected["actions"], False)


def test_damage_is_called_damage(edited):
    path = edited(lambda meta: None)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        load_policy(path)
    for text in ("{", "[]", "{}", '{"method": 1, "policy": {}, "shapes": {}}'):
        (path / "checkpoint.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="damaged checkpoint"):
            load_policy(path)
    (path / "checkpoint.json").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_policy(path)


# Two training steps from fixed weights, settings and noise: a change here is a change of the method and must
# be meant.
GUIDANCE = GuidanceConfig(
    gamma=2.0,
    vjp="unit",
    vjp_detach=False,
    evolve="every",
    evolve_every=1,
    denoise_on="both",
    contrastive_weight=0.1,
    temperature=0.5,
    positive_in_denominator=False,
    contrastive_detach=False,
    contrastive_noise="own",
    kl_weight=0.01,
    kl_prior="latent",
)
GOLDEN = {"dp": [0.976436, 1.052245], "dp_ag": [1.117016, 1.203381]}


@pytest.mark.parametrize("method", ["dp", "dp_ag"])
def test_golden_training_step(small, shapes, dataset, method):
    torch.manual_seed(0)
    m = DPAGConfig(guidance=GUIDANCE) if method == "dp_ag" else DPConfig()
    policy = build_policy(m, small, shapes, dataset)
    opt, losses = torch.optim.AdamW(policy.parameters(), 1e-3), []
    for step in range(2):
        loss = policy.loss(dataset.batch(16, generator("b", step)), generator("n", step))["loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[method], rel=1e-4)
