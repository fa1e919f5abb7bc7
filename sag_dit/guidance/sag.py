"""Self-Attention Guidance (Hong et al., ICCV 2023, arXiv 2210.00939) and blur guidance."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, replace

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from sag_dit.denoiser import Denoiser
from sag_dit.guidance.term import Asking, Branch, BranchName, Question, Term
from sag_dit.process import Prediction
from sag_dit.tensors import Images, Mask, Saliency


def attention_mask(saliency: Saliency, grid: tuple[int, int], threshold: float) -> Mask:
    """Return where tokens receive more than ``threshold`` times the average attention, (b, h, w).

    Source: equation 15 of the paper, threshold psi = 1.0.
    """
    mask: Tensor = saliency.unflatten(1, grid) > threshold
    return mask


def fitting_kernel(kernel_size: int, size: tuple[int, int]) -> int:
    """Return the largest odd kernel up to ``kernel_size`` whose reflect padding fits an image.

    Reflect padding by k // 2 needs k // 2 < min(size).
    """
    largest = 2 * min(size) - 1
    return min(kernel_size, largest)


@dataclass(frozen=True)
class BlurGuidance(Term):
    """Guide away from a prediction whose input was blurred everywhere: SAG with mask = 1.

    pred + s (pred - degraded), combined in eps; s = 0 is off. With x_bar = alpha x_0_tilde + sigma
    eps and delta = x_0 - x_0_tilde, this is s (v - v_bar - d_alpha delta) in v, without a division.

    ``blur_sigma`` is in latent cells; ``kernel_size`` is reduced to the largest odd size that fits.
    ``branch``: ``auto`` degrades the null branch beside CFG and the given condition otherwise.

    Source: Hong et al. 2023, section 4.2.
    """

    scale: float = 1.0
    _: KW_ONLY
    blur_sigma: float = 1.0
    kernel_size: int = 9
    branch: BranchName = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blur_sigma <= 0:
            raise ValueError(f"blur_sigma={self.blur_sigma}: expected more than 0, in cells")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size}: expected an odd number above 0")
        if self.branch not in ("auto", "cond", "null"):
            raise ValueError(f"branch={self.branch!r}: expected 'auto', 'cond' or 'null'")

    @property
    def off(self) -> bool:
        """Scale 0 contributes nothing."""
        return self.scale == 0

    def check(self, model: Denoiser) -> None:
        """Refuse branch='null' for a model without a null condition; tell of a reduced kernel."""
        size = model.latent_shape[1:]
        fitting = fitting_kernel(self.kernel_size, size)
        if fitting < self.kernel_size:
            warnings.warn(
                f"kernel_size={self.kernel_size} does not fit a latent of {size[0]} x {size[1]} "
                f"and is reduced to {fitting}",
                stacklevel=2,
            )
        if self.branch == "null" and model.null(1) is None:
            raise ValueError(
                "branch='null': this model has no null condition (trained without label dropout); "
                "use branch='cond'"
            )

    def blurred(self, x_0: Images) -> Images:
        """Blur the clean image, reflecting at its borders."""
        kernel = fitting_kernel(self.kernel_size, (x_0.shape[-2], x_0.shape[-1]))
        sigma = self.blur_sigma
        blurred: Tensor = gaussian_blur(x_0, [kernel, kernel], [sigma, sigma])
        return blurred

    def question(self, ask: Question) -> Branch:
        """Return what is asked first."""
        return ask.branch(self.branch)

    def degraded(self, x_0: Images, base: Prediction, model: Denoiser) -> Images:
        """Return x_0_tilde, the clean image with less of what guidance should keep."""
        return self.blurred(x_0)

    def contribution(self, ask: Question) -> Asking:
        """Return s (v - v_bar - d_alpha delta)."""
        branch = self.question(ask)
        (base,) = yield (branch,)
        x_0 = base.clamped(branch.model.x_0_range).x_0
        x_0_tilde = self.degraded(x_0, base, branch.model)
        level = base.level
        x_bar = level.alpha * x_0_tilde + level.sigma * base.eps
        (worse,) = yield (replace(branch, x_t=x_bar, captures=()),)
        delta = base.x_0 - x_0_tilde
        return self.scale * (base.v - worse.v - level.d_alpha * delta)


@dataclass(frozen=True)
class SAG(BlurGuidance):
    """Self-Attention Guidance: blur only where self-attention looks.

    x_0_tilde = mask blur(x_0) + (1 - mask) x_0, where mask = saliency > ``threshold`` on the grid
    of ``layer`` (``auto`` is the middle of the depth), upsampled by nearest to the latent.

    Source: Hong et al. 2023, algorithm 1 and equations 15 to 19.
    """

    _: KW_ONLY
    layer: str = "auto"
    threshold: float = 1.0

    def check(self, model: Denoiser) -> None:
        """Refuse a layer that the model does not have."""
        super().check(model)
        model.layer(self.layer)

    def question(self, ask: Question) -> Branch:
        """Ask for the layer's saliency along with the prediction."""
        return ask.branch(self.branch).capturing(self.layer)

    def degraded(self, x_0: Images, base: Prediction, model: Denoiser) -> Images:
        """Blur where the mask is set."""
        layer = model.layer(self.layer)
        mask = attention_mask(base.attention[layer.name], layer.grid, self.threshold)
        area = F.interpolate(mask[:, None].to(x_0.dtype), x_0.shape[-2:], mode="nearest")
        return area * self.blurred(x_0) + (1 - area) * x_0
