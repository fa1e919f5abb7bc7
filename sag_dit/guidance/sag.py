"""Self-Attention Guidance (Hong et al., ICCV 2023, arXiv 2210.00939) and blur guidance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer, capture_key
from sag_dit.denoiser import Denoiser
from sag_dit.guidance.blur import gaussian_blur
from sag_dit.guidance.perturbed import Layer, check_attends, checked_layers, layers_of
from sag_dit.guidance.term import Asking, Branch, BranchName, BranchTerm, Question
from sag_dit.identity import LATER
from sag_dit.process import Prediction
from sag_dit.tensors import Images, Mask, Saliency, Scalar, home_of_doubles

MaskKind = Literal["attention", "global", "high_frequency", "random", "square"]
MASKS: tuple[str, ...] = get_args(MaskKind)

PURPOSE = 2


def attention_mask(saliency: Saliency, grid: tuple[int, int], threshold: Scalar) -> Mask:
    """Return where tokens receive more than ``threshold`` times the average attention, (b, h, w).

    The threshold may be of each image, (b, 1, 1).

    Source: equation 15 of the paper, threshold psi = 1.0.
    """
    mask: Tensor = saliency.unflatten(1, grid) > threshold
    return mask


def mean_saliency(
    attention: Mapping[str, Tensor], layers: Sequence[AttentionLayer], heads: int | None = None
) -> Float[Tensor, "b h w"]:
    """Return the saliency that was captured, averaged over layers on the finest of their grids."""
    finest = max((layer.grid for layer in layers), key=lambda grid: grid[0] * grid[1])
    maps = []
    for layer in layers:
        seen = attention[capture_key(layer.name, "saliency", heads)].unflatten(1, layer.grid)
        if layer.grid != finest:
            seen = F.interpolate(seen[:, None], finest, mode="nearest")[:, 0]
        maps.append(seen)
    return torch.stack(maps).mean(dim=0)


def of_same_area(scores: Float[Tensor, "b h w"], mask: Mask) -> Mask:
    """Return the highest scores of each image, as many as its mask has tokens."""
    order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)
    chosen: Tensor = ranks < mask.flatten(1).sum(dim=1, keepdim=True)
    return chosen.view_as(mask)


def detail(
    x_0: Float[Tensor, "b c h w"], blurred: Float[Tensor, "b c h w"], grid: tuple[int, int]
) -> Float[Tensor, "b gh gw"]:
    """Return the energy of what a blur takes away, averaged over the latent cells of each token."""
    energy = (x_0 - blurred).square().mean(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(energy, grid)[:, 0]


def centrality(mask: Mask) -> Float[Tensor, "b h w"]:
    """Return scores that fall with the distance to the middle; equal scores form squares."""
    rows, columns = (
        (torch.arange(size, device=mask.device) - (size - 1) / 2).abs() for size in mask.shape[1:]
    )
    return -torch.maximum(rows[:, None], columns[None]).expand(mask.shape)


def fitting_kernel(kernel_size: int, size: tuple[int, int]) -> int:
    """Return the largest odd kernel up to ``kernel_size`` whose reflect padding fits an image.

    Reflect padding by k // 2 needs k // 2 < min(size).
    """
    largest = 2 * min(size) - 1
    return min(kernel_size, largest)


def channels_of(attention: nn.Module) -> int | None:
    """Return the channels of an attention module's queries, None if its parts do not tell them."""
    for name, parts in (("to_q", 1), ("qkv", 3)):
        width: int | None = getattr(getattr(attention, name, None), "out_features", None)
        if width is not None:
            return width // parts
    return None


@dataclass(frozen=True)
class BlurGuidance(BranchTerm):
    """Guide away from a prediction whose input was blurred everywhere: SAG with mask = 1.

    pred + s (pred - degraded), combined in eps; s = 0 is off. With x_bar = alpha x_0_tilde + sigma
    eps and delta = x_0 - x_0_tilde, this is s (v - v_bar - d_alpha delta) in v, without a division.

    ``blur_sigma`` is in latent cells, or with ``blur_in="grid"`` a share of the latent's shorter
    side; ``kernel_size`` is in cells, None for three sigmas to either side, and is reduced to the
    largest odd size that fits. ``branch``: ``auto`` degrades the null branch beside CFG and the
    given condition otherwise.

    Source: Hong et al. 2023, section 4.2.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[BlurGuidance(0.5, blur_sigma=2.0)])
    """

    key = "blur"
    former = ("sag_dit.guidance.sag.BlurGuidance",)
    title = "blur guidance"
    does = "pred + s (pred - blurred): as SAG, blurred everywhere"
    moves = "away from a blurred copy"
    look = "outlines and details"
    source = "Hong et al. 2023, section 4.2"
    search = MappingProxyType({"blur_sigma": (0.3, 3.0)})

    _: KW_ONLY
    branch: BranchName = "auto"
    """Which prediction is degraded: cond, null, or auto: null beside CFG, else cond."""
    blur_sigma: float = 1.0
    """Of the Gaussian blur, in the unit blur_in."""
    kernel_size: int | None = 9
    """Odd, in latent cells; null: three sigmas to either side."""
    blur_in: Literal["cells", "grid"] = field(default="cells", metadata=LATER)
    """cells of the latent; grid: a share of its shorter side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blur_sigma <= 0:
            raise ValueError(f"blur_sigma={self.blur_sigma}: expected more than 0, in cells")
        size = self.kernel_size
        if size is not None and (size < 1 or size % 2 == 0):
            raise ValueError(f"kernel_size={size}: expected an odd number above 0, or null")
        if self.blur_in not in ("cells", "grid"):
            raise ValueError(f"blur_in={self.blur_in!r}: expected 'cells' or 'grid'")

    def check(self, model: Denoiser) -> None:
        """Refuse branch='null' for a model without a null condition; tell of a reduced kernel."""
        super().check(model)
        size = model.latent_shape[1:]
        fitting = fitting_kernel(self.kernel(size), size)
        if self.kernel_size is not None and fitting < self.kernel_size:
            warnings.warn(
                f"kernel_size={self.kernel_size} does not fit a latent of {size[0]} x {size[1]} "
                f"and is reduced to {fitting}",
                stacklevel=2,
            )

    def sigma(self, size: tuple[int, int]) -> float:
        """Return the blur's sigma in cells."""
        return self.blur_sigma * (min(size) if self.blur_in == "grid" else 1)

    def kernel(self, size: tuple[int, int]) -> int:
        """Return the kernel's size in cells, before it is made to fit."""
        wide = 2 * math.ceil(3 * self.sigma(size)) + 1
        return wide if self.kernel_size is None else self.kernel_size

    def blurred(self, x_0: Images) -> Images:
        """Blur the clean image, reflecting at its borders."""
        size = (x_0.shape[-2], x_0.shape[-1])
        kernel, sigma = fitting_kernel(self.kernel(size), size), self.sigma(size)
        return gaussian_blur(x_0, kernel, sigma)

    def question(self, ask: Question) -> Branch:
        """Return what is asked first."""
        return ask.branch(self.branch)

    def degraded(self, x_0: Images, base: Prediction, ask: Question) -> Images:
        """Return x_0_tilde, the clean image with less of what guidance should keep."""
        return self.blurred(x_0)

    def contribution(self, ask: Question) -> Asking:
        """Return s (v - v_bar - d_alpha delta)."""
        # Predict the clean image, and take away what guidance should keep.
        branch = self.question(ask)
        (base,) = yield (branch,)
        x_0 = base.clamped(branch.model.x_0_range).x_0
        x_0_tilde = self.degraded(x_0, base, ask)
        # Noise it again with the predicted noise, and ask what the network says of that.
        level = base.level
        x_bar = level.alpha * x_0_tilde + level.sigma * base.eps
        (worse,) = yield (branch.at(x_bar),)
        # The difference of the two eps, written in v. See "One parametrisation" in the
        # architecture.
        delta = base.x_0 - x_0_tilde
        return self.scale * (base.v - worse.v - level.d_alpha * delta)


@dataclass(frozen=True)
class SAG(BlurGuidance):
    """Self-Attention Guidance: blur only where self-attention looks.

    x_0_tilde = mask blur(x_0) + (1 - mask) x_0, upsampled by nearest to the latent, where mask is
    saliency > ``threshold`` psi on the grid of ``layer``, or > the ``quantile`` of the image's own
    saliency. ``layer`` may name several layers, whose saliency is averaged; ``auto`` is the one in
    the middle of the depth. The other masks are those that the paper compares with. Each has as
    many tokens as the attention's: ``random`` ones, those of most detail (``high_frequency``), or a
    ``square`` in the middle. ``global`` blurs everywhere and reads no attention, so that ``layer``,
    ``heads``, ``threshold`` and ``quantile`` do not matter. ``heads`` reads the layer as if it had
    another number of heads: the authors' commands for 256 pixels do so, with 4.

    Published: ADM 256 output block 2, kernel 31, sigma 9, s = 0.5 and 0.8 without classes, 0.2
    with, there heads = 4; ADM 128 output block 8, sigma 3, s = 0.1; Stable Diffusion middle block,
    kernel 9, sigma 1, s = 0.75.

    Source: Hong et al. 2023, algorithm 1 and equations 15 to 19.

    Raises:
        ValueError: the mask is unknown, ``quantile`` is not in [0, 1) or is beside a threshold, or
            a layer does not exist.

    Example::

        sag_dit.sample(model, [3, 7], guidance=[SAG(0.5, layer="blocks.5", interval=(0.0, 0.5))])
    """

    key = "sag"
    former = ("sag_dit.guidance.sag.SAG",)
    title = "SAG"
    does = "pred + s (pred - degraded): blurs where self-attention looks"
    moves = "away from a copy that is blurred where the model itself looks"
    look = "outlines and details"
    source = "Hong et al. 2023"
    variants = MappingProxyType({"SAG's other masks": "SAG(mask=...)"})
    search = MappingProxyType({"layer": "each layer", "threshold": (0.5, 2.0)})

    _: KW_ONLY
    layer: Layer | Sequence[Layer] = "auto"
    """Whose saliency is read, one or several; auto: in the middle of the depth."""
    threshold: float = 1.0
    """Times the mean saliency: what is above is blurred."""
    quantile: float | None = field(default=None, metadata=LATER)
    """Of the image's own saliency, in place of the threshold."""
    mask: MaskKind = field(default="attention", metadata=LATER)
    """attention, or one it is compared with: random, high_frequency, square, global."""
    heads: int | None = field(default=None, metadata=LATER)
    """Read the layer with so many heads, as the authors read ADM's 16 as 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layer", checked_layers("layer", self.layer))
        if self.mask not in MASKS:
            raise ValueError(f"mask={self.mask!r}: expected one of {', '.join(MASKS)}")
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise ValueError(f"quantile={self.quantile}: expected a number from 0 to below 1")
        if self.quantile is not None and self.threshold != SAG.threshold:
            raise ValueError(
                f"quantile={self.quantile} beside threshold={self.threshold}: the quantile takes "
                f"the threshold's place; leave one of them out"
            )
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads={self.heads}: expected 1 or more, or null for the layer's own")

    def check(self, model: Denoiser) -> None:
        """Refuse a layer that the model does not have, and heads that do not divide its channels.

        Where the layer's projections have names that are not known, the first evaluation refuses.
        """
        super().check(model)
        check_attends(self, model)
        layers = self.layers(model)
        if self.heads is None:
            return
        for layer in layers:
            channels = channels_of(model.network.get_submodule(layer.name))
            if channels is not None and channels % self.heads:
                raise ValueError(
                    f"sag.heads={self.heads}: the {channels} channels of layer {layer.name} do not "
                    f"divide into so many heads; expected a divisor, or null for the layer's own"
                )

    def identity(self, model: Denoiser) -> dict[str, Any]:
        """Return the term with its layers by name."""
        names = [layer.name for layer in self.layers(model)]
        return {**super().identity(model), "layer": names[0] if len(names) == 1 else names}

    def layers(self, model: Denoiser) -> tuple[AttentionLayer, ...]:
        """Return the layers whose saliency is read."""
        return layers_of(model, self.layer)

    def question(self, ask: Question) -> Branch:
        """Ask for the layers' saliency along with the prediction."""
        branch = ask.branch(self.branch)
        if self.mask != "global":
            for layer in self.layers(branch.model):
                branch = branch.capturing(layer.name, heads=self.heads)
        return branch

    def readings(self, model: Denoiser) -> tuple[str, ...]:
        """Return the keys under which a prediction's attention holds what this term read."""
        return tuple(
            capture_key(layer.name, "saliency", self.heads) for layer in self.layers(model)
        )

    def limit(self, saliency: Tensor) -> Scalar:
        """Return what saliency (b, h, w) must exceed: psi, or each image's quantile, (b, 1, 1)."""
        if self.quantile is None:
            return self.threshold
        # Newer torch interpolates in float64.
        values = saliency.flatten(1).to(home_of_doubles(saliency.device))
        return torch.quantile(values, self.quantile, dim=1)[:, None, None].to(saliency.device)

    def attended(
        self, attention: Mapping[str, Tensor], model: Denoiser
    ) -> tuple[Float[Tensor, "b h w"], Mask]:
        """Return the saliency that was captured, and where it exceeds the limit."""
        saliency = mean_saliency(attention, self.layers(model), self.heads)
        grid = (saliency.shape[1], saliency.shape[2])
        return saliency, attention_mask(saliency.flatten(1), grid, self.limit(saliency))

    def degraded(self, x_0: Images, base: Prediction, ask: Question) -> Images:
        """Blur where the mask is set."""
        blurred = self.blurred(x_0)
        if self.mask == "global":
            return blurred
        # The paper's mask, or one of equal area that it is compared with.
        _, mask = self.attended(base.attention, ask.base.model)
        grid = (mask.shape[1], mask.shape[2])
        if self.mask == "high_frequency":
            mask = of_same_area(detail(x_0, blurred, grid), mask)
        elif self.mask == "random":
            mask = of_same_area(ask.draw(grid, PURPOSE), mask)
        elif self.mask == "square":
            mask = of_same_area(centrality(mask), mask)
        # Blur there: each token's cells of the latent are taken from the blurred image.
        area = F.interpolate(mask[:, None].to(x_0.dtype), x_0.shape[-2:], mode="nearest")
        return area * blurred + (1 - area) * x_0
