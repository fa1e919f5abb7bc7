"""Denoiser: what guidance and samplers see of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer, AttentionTap, Capture, Edit
from sag_dit.models.network import Fork, Outputs
from sag_dit.process import NoiseLevel, Prediction, Process
from sag_dit.process.base import OutputKind
from sag_dit.profiling import part
from sag_dit.tensors import Images

Condition: TypeAlias = Any
"""What an image is of. A denoiser of one kind knows its own: labels, text embeddings, ..."""


class Denoiser(nn.Module, ABC):
    """A network together with what one must know to ask it.

    Attributes:
        network: the module that is evaluated; names of layers are relative to it.
        process: the forward process it was trained on.
        kind: what the network puts out, ``eps``, ``v``, ``x_0`` or ``score``.
        latent_shape: (c, h, w) of x_t.
        x_0_range: values that a clean x_0 can have, None where unbounded (latents).
        layers: self-attention layers by name.
        aliases: further names of these layers, such as those of the published code.
        class_names: what its images are of: names of classes, or prompts.
        passes: what one evaluation costs, in passes of its network.

    Example:
        >>> import sag_dit
        >>> denoiser = sag_dit.load("digits").denoiser
        >>> level = denoiser.process.grid(50)[0]
        >>> x_t = torch.zeros(1, *denoiser.latent_shape)
        >>> denoiser(x_t, level, denoiser.conditions([3])).x_0.shape
        torch.Size([1, 1, 8, 8])
    """

    network: nn.Module
    process: Process
    kind: OutputKind
    latent_shape: tuple[int, int, int]
    x_0_range: tuple[float, float] | None
    layers: Mapping[str, AttentionLayer]
    aliases: Mapping[str, str] = MappingProxyType({})
    class_names: tuple[str, ...] = ()
    passes: float = 1.0

    @abstractmethod
    def evaluate(self, x_t: Images, t: Tensor, cond: Condition) -> Images:
        """Call the network once; its output may carry variance channels behind the first c."""

    @abstractmethod
    def null(self, count: int) -> Condition | None:
        """Return the condition 'nothing in particular', or None if the network knows none."""

    @abstractmethod
    def join(self, conditions: Sequence[Condition]) -> Condition:
        """Concatenate conditions along the batch."""

    def conditions(self, labels: Sequence[int]) -> Condition:
        """Return the condition of images by their labels: numbers of classes, or of prompts."""
        return torch.tensor(labels, device=self.device)

    def forward(
        self,
        x_t: Images,
        level: NoiseLevel,
        cond: Condition,
        captures: Sequence[Capture] = (),
        edits: Sequence[tuple[Edit, slice]] = (),
        forks: Sequence[Fork] = (),
        outputs: Outputs | None = None,
    ) -> Prediction:
        """Evaluate one batch and say what it predicts.

        ``forks``, where :attr:`chain_length` allows them, are further rows of the batch and of the
        answer; captures and edits find them from their block on. ``outputs``, where
        :attr:`keeps_outputs`, are those of the network's blocks, to be kept or to be used.

        Raises:
            ValueError: a captured or edited module does not exist or was not seen attending.
        """
        t, rows = level.times(x_t), x_t.shape[0]
        # Networks that cannot do it know no such argument.
        further: dict[str, Any] = {"forks": tuple(forks)} if forks else {}
        if outputs is not None:
            further["outputs"] = outputs
        ask = partial(self.evaluate, x_t, t, cond, **further)
        if captures or edits:
            with AttentionTap(self.network, captures, edits) as tap, part("network", rows):
                output = ask()
            attention = tap.captured
        else:
            with part("network", rows):
                output, attention = ask(), {}
        for fork in forks:
            x_t = fork.joined(x_t)
        channels = x_t.shape[1]
        fraction = None
        if output.shape[1] == 2 * channels:
            output, variance = output.split(channels, dim=1)
            fraction = (variance.float() + 1) / 2
        prediction = self.process.predict(x_t, level, output.to(x_t.dtype), self.kind)
        return replace(prediction, variance_fraction=fraction, attention=attention)

    def compile_blocks(self) -> None:
        """Compile the network block by block, in place: one graph for two rows and for more.

        Guidance asks for other numbers of rows at other steps. Compiled for the first number alone,
        a block would be compiled again in the middle of a run.
        """
        self._compile()
        for module in self.network.modules():
            if module._compiled_call_impl is not None:
                compiled = partial(_for_any_rows, module._compiled_call_impl)
                module._compiled_call_impl = compiled

    def _compile(self) -> None:
        """Have the network compile its blocks."""
        raise ValueError(f"{type(self.network).__name__} cannot be compiled block by block")

    @property
    def chain_length(self) -> int | None:
        """The number of ``network.blocks`` before which rows can join, None where they cannot."""
        return None

    @property
    def keeps_outputs(self) -> bool:
        """Whether outputs of the network's blocks can be kept, and used instead of running."""
        return False

    @property
    def size_multiple(self) -> int | None:
        """What the sides of an image of another size are multiples of; None: it takes none."""
        return None

    @staticmethod
    def kin(cond: Condition) -> Hashable:
        """Return what conditions must have in common to be asked in one batch."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next(self.network.parameters()).device

    def layer(self, name: str) -> AttentionLayer:
        """Return a self-attention layer by name; ``auto`` is the one in the middle of the depth.

        Raises:
            ValueError: no layer of that name; those that exist are listed.
        """
        name = self.aliases.get(name, name)
        names = list(self.layers)
        if not names:
            raise ValueError(f"layer {name!r}: this model has no self-attention layers to read")
        if name == "auto":
            return self.layers[names[(len(names) - 1) // 2]]
        found = self.layers.get(name) or self.layers.get(f"{name}.attn")
        if found is None:
            known = [*names, *(alias for alias in self.aliases if alias != "auto")]
            raise ValueError(
                f"layer {name!r} does not exist; this model's self-attention layers are "
                f"{', '.join(known)}"
            )
        return found


def _for_any_rows(compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled block; its code is to serve other numbers of rows as well.

    Raises:
        ValueError: the block cannot be compiled here.
    """
    # Imported late: this is the compiler, which takes seconds.
    from torch._dynamo import maybe_mark_dynamic
    from torch._dynamo.exc import TorchDynamoException
    from torch.utils._pytree import tree_leaves

    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.ndim]
    for each in given:
        if each.shape[0] == given[0].shape[0]:
            maybe_mark_dynamic(each, 0)
    try:
        return compiled(*args, **kwargs)
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"compile=true: a block of the network cannot be compiled here "
            f"({type(error).__name__}: {reason}); expected a C++ compiler on a CPU and Triton on a "
            f"GPU; compile=false draws without"
        ) from error
