"""Normalized attention guidance (Chen et al., NeurIPS 2025, arXiv 2505.21179)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sag_dit.attention import AttentionEdit
from sag_dit.attention.edits import Attend
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.guidance.term import Question, Rewriting


def length(x: Tensor) -> Tensor:
    """Return the L1 norm of each token, over all heads, of (r, k, n, e)."""
    found: Tensor = torch.linalg.vector_norm(x, 1, dim=(1, 3), keepdim=True, dtype=torch.float32)
    return found


@dataclass(frozen=True)
class AwayFromText(AttentionEdit):
    """Attention to a text is led away from that to another one, which follows it in the sequence.

    The last ``others`` keys are those of the other text, and the ``own`` before them of the text.
    With ``joint`` they are queries too, and each text attends as if the other were not there.

    Example::

        AwayFromText("transformer_blocks.0.attn2", 77, 77, False, scale=4.0, tau=2.5, alpha=0.25)
    """

    own: int
    others: int
    joint: bool
    scale: float
    tau: float
    alpha: float

    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Return alpha Z_clipped + (1 - alpha) Z_own."""
        # What the image's tokens see of the one text and of the other.
        n = key.shape[2]
        place = torch.arange(n, device=key.device).expand(query.shape[2], n)
        first, second = n - self.own - self.others, n - self.others
        own = attend(query, key, value, place < second)
        other = attend(query, key, value, (place < first) | (place >= second))
        # Led away, no longer than tau times as long, and mixed with what it was.
        away = own + self.scale * (own - other)
        longest = self.tau * length(own) / length(away).clamp(min=1e-12)
        away = away * longest.clamp(max=1).to(away)
        mixed = self.alpha * away + (1 - self.alpha) * own
        if not self.joint:
            return mixed
        return torch.cat([mixed[:, :, :first], own[:, :, first:second], other[:, :, second:]], 2)


@dataclass(frozen=True)
class NAG(Rewriting):
    """Attention to the text led away from attention to the negative prompt; s = 0 is off.

    In every layer Z = Z_pos + s (Z_pos - Z_neg) is shortened to ``tau`` times the length of Z_pos
    (L1, for each token) and mixed: ``alpha`` Z + (1 - alpha) Z_pos. It serves models of few steps,
    where CFG fails. It needs no second pass: the text is twice as long, and the attention of these
    layers is computed three times, which is little in cross-attention and more in joint attention.

    It stands in the place of the pipeline's own guidance, as :class:`CFG` does, and beside CFG the
    given prompt's prediction is the one with NAG. In joint attention the negative prompt is read
    beside the prompt's own pooled embedding.

    Published: FLUX schnell s = 4, tau = 2.5, alpha = 0.25 (the code counts s + 1).

    Source: the paper, whose norm is L1; ChenDarYen/Normalized-Attention-Guidance, the authors' code
    for FLUX, takes L2.

    Raises:
        ValueError: ``tau`` or ``alpha`` is out of range, or the model does not attend to text.

    Example::

        with sag_dit.guide(pipe, NAG(4.0)):
            pipe("a researcher", negative_prompt="glasses", guidance_scale=2.0)
    """

    key = "nag"
    title = "NAG"
    does = "attention led away from that to the negative prompt"
    moves = "away from what is not wanted"
    look = "whether what was not wanted is gone"
    source = "Chen et al. 2025"
    needs = frozenset({"text"})

    from_null: ClassVar[bool] = True

    _: KW_ONLY
    tau: float = 2.5
    """The longest attention output, in lengths of that to the prompt alone."""
    alpha: float = 0.25
    """Share of the guided attention; 1 takes it alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise ValueError(f"tau={self.tau}: expected more than 0")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: expected more than 0, at most 1")

    def check(self, model: Denoiser) -> None:
        """Refuse a model whose attention does not see a text, or sees it in an unknown place."""
        if not isinstance(model, TextConditional) or not (model.cross_layers or model.joint_layers):
            raise ValueError(
                f"nag_scale={self.scale}: guides where attention sees a text, behind or beside the "
                f"image, and {type(model.network).__name__} has no such layers; set nag_scale=0"
            )
        super().check(model)

    def rewritten(self, ask: Question) -> Question:
        """Return the question with both texts in the base, and its attention edited."""
        model: Any = ask.base.model
        own, other = ask.base.cond, ask.required_null().cond
        if own is None:  # The cost is told before there are prompts.
            return ask
        sizes = (own.text_tokens, other.text_tokens)
        how = (self.scale * self.weight(ask.step), self.tau, self.alpha)
        edits = [AwayFromText(name, *sizes, False, *how) for name in model.cross_layers]
        edits += [AwayFromText(name, *sizes, True, *how) for name in model.joint_layers]
        base = replace(ask.base, cond=own.followed_by(other)).edited(*edits)
        return replace(ask, base=base)
