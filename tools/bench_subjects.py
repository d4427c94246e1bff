"""What tools/bench.py times: dpag's policies and its peers', each as one call and facts about its net."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
HORIZON, OBS_STEPS, ACTION_STEPS, ACTION = 16, 2, 8, 2
OBS = {"keypoints": 16, "agent_pos": 2}  # Push-T's, by key
COND = OBS_STEPS * sum(
    OBS.values()
)  # what the peers' nets see; dpag's latent is as wide, so the nets are the same
STEP_DIMS = {(64, 128, 256): 128}  # of the step's embedding; other U-Nets have the paper's 256


@dataclass(frozen=True)
class Case:
    "Subjects of one case do the same work, and take turns."

    part: str
    "act, train or laptop."
    channels: tuple[int, ...] = ()
    "The U-Net's; without any, the net of params.yaml."
    sampler: str = "ddim"
    steps: int = 16
    "0: as the settings have it, the sampler too."
    batch: int = 1

    @property
    def net(self) -> str:
        return "-".join(map(str, self.channels)) or "laptop"

    @property
    def column(self) -> str:
        return f"B {self.batch}" if self.part == "train" else f"{self.sampler.upper()} {self.steps}"


@dataclass
class Subject:
    "One thing that is timed. `passes`: forward and backward passes of its net in a call, for the floor."

    call: Callable[[], object]
    parameters: int = 0
    flops: float = float("nan")
    passes: float = 0.0

    def info(self) -> dict:
        return {"parameters": self.parameters, "flops": self.flops, "passes": self.passes}


def count(net: nn.Module) -> int:
    "How many weights a net has."
    return sum(p.numel() for p in net.parameters())


def count_flops(forward: Callable[[], object]) -> float:
    """Floating-point operations of a call; a multiplication and an addition are two. Gradients stay on: the
    counter may not know the operators of a path that is made for acting."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())


def observations(batch: int, steps: int = OBS_STEPS) -> dict[str, torch.Tensor]:
    "Made-up observations of Push-T, px: `(batch, steps, …)` by key."
    g = torch.Generator().manual_seed(0)
    return {k: 512 * torch.rand(batch, steps, n, generator=g) for k, n in OBS.items()}


# ---- dpag


def laptop_layers(root: Path) -> tuple[dict, dict]:
    "The laptop's settings of a policy and of the methods on Push-T with keypoints, in the checkout `root`."
    import yaml

    common, params = (
        yaml.safe_load((root / f).read_text(encoding="utf-8")) for f in ("conf/common.yaml", "params.yaml")
    )
    layers = {**common["policy"], **params["policy"]}
    layers["encoder"] = {**layers["encoder"], "features": "planar"}
    return layers, params["methods"]


def policy_settings(case: Case, root: Path):
    "dpag's PolicyConfig and the methods' settings of a case."
    from dpag.config import layered
    from dpag.policy import PolicyConfig

    steps = {"sampler": case.sampler, "n_sample_steps": case.steps} if case.steps else {}
    if not case.channels:
        layers, methods = laptop_layers(root)
        return layered(PolicyConfig, layers, {"diffusion": steps}), methods
    unet = {"kind": "unet", "channels": list(case.channels), "kernel_size": 5, "n_groups": 8}
    unet["step_dim"] = STEP_DIMS.get(case.channels, 256)
    return layered(
        PolicyConfig,
        {"horizon": HORIZON, "n_obs_steps": OBS_STEPS, "n_action_steps": ACTION_STEPS, "net": unet},
        {"encoder": {"latent_dim": COND}, "diffusion": {"prediction": "epsilon", "clip": 1.0, **steps}},
    ), {}


def episodes(settings):
    "A data set of ten made-up episodes, in windows as `settings` want them."
    from dpag.data import WindowDataset

    g = torch.Generator().manual_seed(0)
    obs = {k: 512 * torch.rand(300, n, generator=g) for k, n in OBS.items()}
    action = 512 * torch.rand(300, ACTION, generator=g)
    ends = torch.arange(30, 301, 30).numpy()
    steps = {k: getattr(settings, k) for k in ("horizon", "n_obs_steps", "n_action_steps")}
    return WindowDataset(obs, action.numpy(), ends, action_ref="agent_pos", **steps)


def passes(kind: str, method, case: Case, steps: int) -> float:
    """Passes of the net in one call, a backward one to its inputs or to its weights counted like a forward
    one; nan where the policy counts them itself."""
    if case.part == "train":
        if kind == "dp":
            return 3.0
        # Two predictions, the VJP between them, and a backward pass of twice the price for each that teaches.
        return 4.0 if method.guidance.denoise_on == "split" else 7.0
    if kind == "dp_ag":
        guidance = method.guidance
        more = {"every": 2 / guidance.evolve_every, "lagged": 1 / guidance.evolve_every, "never": 0.0}
        return steps * (1 + more[guidance.evolve])
    return {"dp": float(steps), "flow_policy": float(getattr(method, "n_steps", 1))}.get(kind, float("nan"))


def dpag_subject(case: Case, kind: str, changes: dict, root: Path) -> Subject:
    "Acting or training with a method of dpag, through its public interface."
    from dpag.config import layered
    from dpag.policy import METHODS, build_policy

    settings, methods = policy_settings(case, root)
    method = layered(METHODS[kind].config, methods.get(kind, {}), changes)
    torch.manual_seed(0)
    policy = build_policy(method, settings, dataset=episodes(settings))
    z = torch.zeros(1, policy.encoder.latent_dim)
    x, k = torch.zeros(1, settings.horizon, ACTION), torch.zeros(1, dtype=torch.long)
    flops = count_flops(lambda: policy.net(x, k, z))
    call = train_call(policy, case) if case.part == "train" else act_call(policy, case)
    n = passes(kind, method, case, settings.diffusion.n_sample_steps)
    if n != n:
        policy.reset_counts()
        call()
        n = policy.mean_steps()
    return Subject(call, count(policy.net), flops, n)


def act_call(policy, case: Case) -> Callable[[], object]:
    "One call of `act`."
    obs, noise = observations(case.batch, policy.n_obs_steps), torch.Generator().manual_seed(0)
    policy.eval()
    return lambda: policy.act(obs, noise)


def train_call(policy, case: Case) -> Callable[[], object]:
    "One training step: drawing the batch, loss, gradient, clipping, AdamW, average of the weights."
    from dpag import train

    settings = train.TrainConfig(batch_size=case.batch, lr=1e-4, device="cpu", **policy.method.train)
    dataset, done = episodes(policy.settings), [0]
    # Version 0.2 and older have `start_run`.
    run = train.start_run(policy, settings) if hasattr(train, "start_run") else train.Run(policy)

    def call():
        done[0] += 1
        return train.train_step(run, dataset, settings, seed=0, step=done[0])

    return call


# ---- its peers


def with_torchvision():
    "lerobot needs torchvision, which dpag knows how to import beside a CPU build of torch."
    from dpag.libraries import mend_torchvision

    mend_torchvision()


def lerobot_policy(case: Case):
    "lerobot's DiffusionPolicy with the same U-Net."
    with_torchvision()
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    inputs = {
        "observation.state": PolicyFeature(FeatureType.STATE, (OBS["agent_pos"],)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (OBS["keypoints"],)),
    }
    torch.manual_seed(0)
    return DiffusionPolicy(
        DiffusionConfig(
            n_obs_steps=OBS_STEPS,
            horizon=HORIZON,
            n_action_steps=ACTION_STEPS,
            input_features=inputs,
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
            down_dims=case.channels,
            diffusion_step_embed_dim=STEP_DIMS.get(case.channels, 256),
            noise_scheduler_type=case.sampler.upper(),
            num_inference_steps=case.steps,
            device="cpu",
        )
    )


def lerobot_subject(case: Case, *, fused: bool = False) -> Subject:
    """lerobot's policy acting (without its queues' and processors' work) or training: with the optimiser of
    its preset, or with torch's fused AdamW. It averages no weights."""
    policy = lerobot_policy(case)
    unet, obs = policy.diffusion.unet, observations(case.batch)
    batch = {
        "observation.state": obs["agent_pos"] / 512,
        "observation.environment_state": obs["keypoints"] / 512,
    }
    x, k, cond = torch.zeros(1, HORIZON, ACTION), torch.zeros(1, dtype=torch.long), torch.zeros(1, COND)
    flops = count_flops(lambda: unet(x, k, global_cond=cond))
    if case.part != "train":
        policy.eval()
        act = torch.no_grad()(policy.diffusion.generate_actions)
        return Subject(lambda: act(batch), count(unet), flops, case.steps)
    policy.train()
    batch["action"] = torch.rand(case.batch, HORIZON, ACTION) * 2 - 1
    batch["action_is_pad"] = torch.zeros(case.batch, HORIZON, dtype=torch.bool)
    preset, weights = policy.config.get_optimizer_preset(), list(policy.get_optim_params())
    opt = (
        torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-6, fused=True) if fused else preset.build(weights)
    )

    def step():
        loss, _ = policy.forward(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, preset.grad_clip_norm)
        opt.step()
        opt.zero_grad()
        return loss.item()

    return Subject(step, count(unet), flops, 3.0)


def stanford_policy(case: Case, path: str):
    "real-stanford/diffusion_policy's low-dimensional policy with the same U-Net, from a checkout at `path`."
    if path not in sys.path:
        sys.path.append(path)
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusion_policy.model.common.normalizer import LinearNormalizer, SingleFieldLinearNormalizer
    from diffusion_policy.model.diffusion.conditional_unet1d import ConditionalUnet1D
    from diffusion_policy.policy.diffusion_unet_lowdim_policy import DiffusionUnetLowdimPolicy

    torch.manual_seed(0)
    width = COND // OBS_STEPS
    unet = ConditionalUnet1D(
        input_dim=ACTION,
        global_cond_dim=COND,
        diffusion_step_embed_dim=STEP_DIMS.get(case.channels, 256),
        down_dims=list(case.channels),
        kernel_size=5,
        n_groups=8,
        cond_predict_scale=True,
    )
    scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[case.sampler](
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        prediction_type="epsilon",
    )
    sizes = {"horizon": HORIZON, "obs_dim": width, "action_dim": ACTION, "n_action_steps": ACTION_STEPS}
    policy = DiffusionUnetLowdimPolicy(
        unet,
        scheduler,
        n_obs_steps=OBS_STEPS,
        num_inference_steps=case.steps,
        obs_as_global_cond=True,
        **sizes,
    )
    normalizer = LinearNormalizer()
    for key, n in {"obs": width, "action": ACTION}.items():
        normalizer[key] = SingleFieldLinearNormalizer.create_fit(torch.rand(100, n))
    policy.set_normalizer(normalizer)
    return policy


def stanford_subject(case: Case, path: str) -> Subject:
    "That policy acting, or training: AdamW as in its settings, its average of the weights, no clipping."
    policy = stanford_policy(case, path)
    x, cond = torch.zeros(1, HORIZON, ACTION), torch.zeros(1, COND)
    flops = count_flops(lambda: policy.model(x, 0, global_cond=cond))
    obs = torch.cat([observations(case.batch)[k] for k in sorted(OBS)], -1) / 512
    if case.part != "train":
        policy.eval()
        act = torch.no_grad()(policy.predict_action)
        return Subject(lambda: act({"obs": obs}), count(policy.model), flops, case.steps)
    from diffusion_policy.model.diffusion.ema_model import EMAModel

    batch = {
        "obs": torch.rand(case.batch, HORIZON, obs.shape[-1]),
        "action": torch.rand(case.batch, HORIZON, ACTION),
    }
    mean = EMAModel(copy.deepcopy(policy), power=0.75)
    opt = torch.optim.AdamW(policy.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)

    def step():
        loss = policy.compute_loss(batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        mean.step(policy)
        return loss.item()

    return Subject(step, count(policy.model), flops, 3.0)


# ---- the machine


def gemm_subject() -> Subject:
    "One product of square matrices; `flops` is its own."
    n = 768
    a, b = torch.rand(n, n), torch.rand(n, n)
    out = torch.empty(n, n)
    return Subject(lambda: torch.mm(a, b, out=out), flops=2.0 * n**3)


def read_subject(parameters: int) -> Subject:
    "One product of a matrix, as large as a net's weights, and a vector: every weight is read once."
    columns = 1024
    rows = max(1, parameters // columns)
    matrix, vector, out = torch.rand(rows, columns), torch.rand(columns), torch.empty(rows)
    return Subject(lambda: torch.mv(matrix, vector, out=out), parameters=rows * columns)
