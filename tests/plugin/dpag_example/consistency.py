"""A consistency policy: one net maps a chunk at any noise level to its clean end."""

from typing import Literal

import torch
from pydantic import PositiveInt

from dpag.policy import MethodConfig, NoiseNetPolicy, register_method


class ConsistencyConfig(MethodConfig):
    "Consistency training (Song et al. 2023), in its simplest form."

    kind: Literal["consistency"] = "consistency"
    n_levels: PositiveInt = 20
    "Noise levels; the last one is pure noise."


@register_method(title="Consistency", color="#c44e52")
class ConsistencyPolicy(NoiseNetPolicy):
    "Acts in one step."

    config_class = ConsistencyConfig

    def clean(self, noised, level, z):
        "The clean chunk `(B, T, D)` that a noised one leads to; at level 0 itself."
        share = (level / self.method.n_levels)[:, None, None]
        return (1 - share) * noised + share * self.net(noised, level, z)

    def loss(self, batch, generator):
        clean, z = self.normalised(batch), self.encode(batch["obs"], generator)[0]
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        level = (
            torch.randint(self.method.n_levels, (len(clean),), generator=generator, device=clean.device) + 1
        )

        def at(k):
            return clean + (k / self.method.n_levels)[:, None, None] * (noise - clean)

        with torch.no_grad():
            target = self.clean(at(level - 1), level - 1, z)
        return {"loss": (self.clean(at(level), level, z) - target).square().mean()}

    @torch.no_grad()
    def act(self, obs, generator):
        z = self.encode(obs)[0]
        noise = torch.randn(
            len(z), self.horizon, self.shapes.action_dim, generator=generator, device=z.device
        )
        level = torch.full((len(z),), self.method.n_levels, device=z.device)
        return self.executed(self.clean(noise, level, z), obs)
