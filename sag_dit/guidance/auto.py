"""Autoguidance (Karras et al., NeurIPS 2024, arXiv 2406.02507)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.text_conditional import TextConditional
from sag_dit.guidance.term import Asking, BranchTerm, Question


@dataclass(frozen=True)
class Autoguidance(BranchTerm):
    """pred = worse + w (pred - worse), where a worse model of the same kind answers; w = 1 is off.

    ``worse`` is the denoiser of a smaller model, or of an earlier checkpoint of the same run. In a
    guided pipeline it is the network of another one, such as ``other.unet``, which is asked with
    the guided pipeline's prompts. The command line names a checkpoint instead, ``ckpt``, and with
    ``ema`` its averaged or raw weights, and loads ``worse`` from it before anything is drawn.

    Published: EDM2-S at 512 pixels w = 2.1 and EDM2-XXL w = 2.05, guided by EDM2-XS after a
    sixteenth of the training.

    Source: equation 3 of the paper.

    Raises:
        ValueError: not exactly one of ``worse`` and ``ckpt`` is given, or ``ckpt`` was not loaded;
            or the worse model is of another kind, lacks the null condition that it would be asked
            for, or is the guided model itself.

    Example::

        worse = sag_dit.load("EARLIER.ckpt").denoiser
        sag_dit.sample(model, [3, 7], guidance=[Autoguidance(2.0, worse=worse)])
    """

    key = "auto"
    former = ("sag_dit.guidance.auto.Autoguidance",)
    title = "autoguidance"
    does = "away from a worse checkpoint"
    moves = "away from what a worse model draws"
    look = "faults that a worse model makes"
    source = "Karras et al. 2024"
    needs = frozenset({"worse"})

    neutral: ClassVar[float] = 1.0

    _: KW_ONLY
    ckpt: str | None = None
    """A smaller model, or an earlier checkpoint of the same run."""
    ema: bool | float | None = True
    """Its averaged weights, or else its raw ones; or a further average of a run, by its number."""
    worse: nn.Module | None = None
    """The worse model itself, in Python."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.off and (self.ckpt is None) == (self.worse is None):
            raise ValueError(
                "autoguidance needs a worse model: set ckpt (guidance.auto.ckpt=PATH) to a smaller "
                "model or an earlier checkpoint, or give worse a denoiser; not both"
            )
        number = isinstance(self.ema, float) and 0 < self.ema < 1
        absent = self.ema is None and self.ckpt is None
        if not (isinstance(self.ema, bool) or number or absent):
            raise ValueError(f"ema={self.ema!r}: expected true, false or a number between 0 and 1")

    def worse_than(self, model: Denoiser) -> Denoiser:
        """Return the worse model, to be asked as the model is."""
        if isinstance(self.worse, Denoiser):
            return self.worse
        if self.worse is None:
            raise ValueError(
                f"ckpt={self.ckpt!r}: the command line loads it, and Python gives the denoiser "
                f"itself: worse=sag_dit.load({self.ckpt!r}).denoiser"
            )
        if not isinstance(model, TextConditional):
            raise ValueError(
                f"worse={type(self.worse).__name__}: expected a denoiser, as in "
                f"worse=sag_dit.load(PATH).denoiser; bare networks are for guided pipelines"
            )
        return model.of(self.worse)

    def check(self, model: Denoiser) -> None:
        """Refuse a worse model that answers other questions than the model, or the same as it."""
        super().check(model)
        worse = self.worse_than(model)
        # Both must answer the same question: x_t of one shape and process, the same classes.
        for name in ("latent_shape", "process", "num_classes", "dtype"):
            theirs, ours = getattr(worse, name, None), getattr(model, name, None)
            if theirs != ours:
                raise ValueError(
                    f"the worse model's {name} is {theirs}: expected that of the model, {ours}"
                )
        # Both text models are asked with the conditions of the guided one, so that only a model of
        # classes can lack a null condition of its own.
        own = not isinstance(model, TextConditional)
        if own and self.branch != "cond" and model.null(1) is not None and worse.null(1) is None:
            raise ValueError(
                f"branch={self.branch!r}: the worse model has no null condition (trained without "
                f"label dropout), and the model has; use branch='cond'"
            )
        # The same network, or equal weights in another one, would leave nothing to guide with.
        pairs = zip(worse.parameters(), model.parameters(), strict=False)
        if worse.network is model.network or (
            worse.device == model.device
            and type(worse.network) is type(model.network)
            and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
        ):
            raise ValueError("the worse model is the model itself, which guides nowhere")

    def contribution(self, ask: Question) -> Asking:
        """Return (w - 1) (v - v_worse)."""
        branch = ask.branch(self.branch)
        if "worse" not in ask.memory:
            ask.memory["worse"] = self.worse_than(branch.model)
        worse: Denoiser = ask.memory["worse"]
        if worse.device != branch.x_t.device:
            worse.to(branch.x_t.device)
        good, bad = yield branch, replace(branch, model=worse, edits=(), captures=())
        return (self.scale - 1) * (good.v - bad.v)
