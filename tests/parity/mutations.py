"""Wrong turns that are easily taken, as replacements for parts of our code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pytest import MonkeyPatch
from torch import Tensor, nn

from sag_dit.denoiser import Denoiser
from sag_dit.guidance import SAG, Question
from sag_dit.models import DiT
from sag_dit.models.dit.layers import SelfAttention
from sag_dit.models.dit.network import TimestepEmbedder
from sag_dit.process import Prediction
from sag_dit.process.ddpm import BETAS, Posterior
from sag_dit.sampler import Ancestral
from tests.parity import ours

Apply = Callable[[MonkeyPatch], None]


@dataclass(frozen=True)
class Mutation:
    """One wrong turn: its name, how it is taken, and patterns of the goldens that must fail."""

    name: str
    apply: Apply
    notices: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def network_edit(edit: Callable[[nn.Module], None]) -> Apply:
    """Change every module of every network after it is built and filled."""

    def apply(patch: MonkeyPatch) -> None:
        build = ours.network

        def edited(name: str) -> DiT:
            network = build(name)
            for module in network.modules():
                edit(module)
            return network

        patch.setattr(ours, "network", edited)

    return apply


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Apply:
    """Replace an attribute by what `make` makes of it."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


# --- the network ---------------------------------------------------------------------------------
def sinusoids(divisor: int, sines_first: bool) -> Callable[[Any], Any]:
    def make(_: object) -> Callable[[TimestepEmbedder, Tensor], Tensor]:
        def features(self: TimestepEmbedder, t: Tensor) -> Tensor:
            exponent = torch.arange(128, dtype=torch.float32) / divisor
            angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
            parts = [angle.sin(), angle.cos()] if sines_first else [angle.cos(), angle.sin()]
            return torch.cat(parts, dim=-1)

        return features

    return make


def wide_epsilon(module: nn.Module) -> None:
    if isinstance(module, nn.LayerNorm):
        module.eps = 1e-5


def exact_gelu(module: nn.Module) -> None:
    if isinstance(module, nn.GELU):
        module.approximate = "none"


def half_the_heads(module: nn.Module) -> None:
    if isinstance(module, SelfAttention):
        module.num_heads //= 2


def whole_times(embed: Any) -> Any:
    return lambda self, t: embed(self, t.floor() if t.is_floating_point() else t)


def rows_first(positions: Any) -> Any:
    return lambda width, grid: positions(width, grid).roll(width // 2, dims=1)


def transposed_patches(unpatchify: Any) -> Any:
    def wrong(self: DiT, x: Tensor, grid: tuple[int, int]) -> Any:
        size = self.patch_size
        patches = x.unflatten(-1, (size, size, self.out_channels))
        return unpatchify(self, patches.transpose(2, 3).flatten(2), grid)

    return wrong


# --- process and samplers ------------------------------------------------------------------------
def later_times(grid: Any) -> Any:
    return lambda self, steps: tuple(replace(level, t=level.t + 1) for level in grid(self, steps))


def own_last_variance(of: Any) -> Any:
    def wrong(grid: Any) -> Any:
        right = of(grid)
        last = right.log_upper[-1:]
        lower, large = right.log_lower[:-1] + last, right.log_large[:-1] + last
        return replace(right, log_lower=lower, log_large=large)

    return wrong


def unhalved_fraction(log_variance: Any) -> Any:
    def wrong(self: Ancestral, posterior: Posterior, index: int, p: Prediction) -> Any:
        fraction = p.variance_fraction
        p = replace(p, variance_fraction=None if fraction is None else 2 * fraction - 1)
        return log_variance(self, posterior, index, p)

    return wrong


def variance_of_the_neighbour(log_variance: Any) -> Any:
    def wrong(self: Ancestral, posterior: Posterior, index: int, p: Prediction) -> Any:
        return log_variance(self, posterior, index - 1 if index else 1, p)

    return wrong


def small_for_large(_: object) -> Any:
    other = {"fixed_small": "fixed_large", "fixed_large": "fixed_small", "learned": "learned"}
    return lambda variance: Ancestral(variance=other[variance])  # type: ignore[arg-type]


def only_x_0_clamped(_: object) -> Any:
    def wrong(self: Prediction, x_0_range: tuple[float, float] | None) -> Any:
        x_0 = self.x_0 if x_0_range is None else self.x_0.clamp(*x_0_range)
        return SimpleNamespace(x_0=x_0, eps=self.eps, x_t=self.x_t)

    return wrong


# --- guidance ------------------------------------------------------------------------------------
class CombinedInV(SAG):
    """SAG that forgets that its two branches stand at different x_t."""

    def contribution(self, ask: Question) -> Any:
        right = super().contribution(ask)
        (base,) = yield next(right)
        (worse,) = yield right.send((base,))
        return self.scale * (base.v - worse.v)


def clamped_network(forward: Any) -> Any:
    def wrong(self: Denoiser, *args: Any) -> Prediction:
        prediction: Prediction = forward(self, *args).clamped(self.x_0_range)
        return prediction

    return wrong


class NarrowBlur(SAG):
    """SAG that blurs a third as widely as asked."""

    def blurred(self, x_0: Tensor) -> Tensor:
        return SAG(1.0, blur_sigma=self.blur_sigma / 3, kernel_size=self.kernel_size).blurred(x_0)


def edge_padding(blur: Any) -> Any:
    def wrong(x: Tensor, kernel: int, sigma: float) -> Any:
        border = kernel // 2
        wide = F.pad(x, (border,) * 4, mode="replicate")
        return blur(wide, kernel, sigma)[..., border:-border, border:-border]

    return wrong


def first_head(saliency: Any) -> Any:
    return lambda query, key, **options: saliency(
        query[:, :1], key[:, :1] if key.ndim == 4 else key, **options
    )


def on_both(owners: tuple[Any, ...], name: str, make: Callable[[Any], Any]) -> Apply:
    def apply(patch: MonkeyPatch) -> None:
        for owner in owners:
            replaced(owner, name, make)(patch)

    return apply


def other_betas(schedule: str, edit: Callable[[Any], Any]) -> Apply:
    """Change the betas of a schedule."""

    def apply(patch: MonkeyPatch) -> None:
        betas = BETAS[schedule]
        patch.setitem(BETAS, schedule, lambda count: edit(betas(count)))  # type: ignore[arg-type]

    return apply
