"""Denoisers of diffusers' networks, whose condition is what the network is given beside x_t and t.

One subclass per token layout stands in ``text_layouts.py``.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionEdit, AttentionLayer, Capture, Edit
from sag_dit.denoiser.base import Denoiser
from sag_dit.denoiser.conditioning import Inputs
from sag_dit.process import NoiseLevel, Prediction, Process
from sag_dit.process.base import OutputKind
from sag_dit.tensors import Images

KEPT = 16
"""How many prompts' encodings are kept; images of one prompt mostly follow one another."""


@dataclass(frozen=True)
class TokenGrid:
    """What a call tells of its sequence: the size of x_t and the number of text tokens.

    Example:
        >>> TokenGrid((128, 128), text_tokens=77).size
        (128, 128)
    """

    size: tuple[int, int]
    text_tokens: int = 0


Encoder = Callable[[str | None, torch.device], Inputs]
"""(prompt, device) -> one row of what the network is given; without prompt, for the null one."""


class TextConditional(Denoiser):
    """A diffusers network at one size of x_t, asked with :class:`Inputs`.

    It is used in two ways. Within a pipeline the calls bring the conditions; ``empty`` is that of
    the null prompt, or None where it is not known. On its own the denoiser has ``prompts``, which
    are its classes, and ``encoder`` makes their conditions when they are asked for. The network is
    asked in the precision ``dtype``, by default that of its parameters, and predictions are
    float32.

    Attributes:
        network_class: diffusers' name of the network.
        x_name: its argument for x_t.
        time_unit: its unit of time in the scheduler's, whose whole is 1000.
        shared: its arguments that are never one row per image.

    Example::

        denoiser = sag_dit.load_text("FOLDER", ["a corgi"], size=(512, 512)).denoiser
        prediction = denoiser(x_t, level, denoiser.conditions([0]))
    """

    network_class: ClassVar[str]
    x_name: ClassVar[str] = "hidden_states"
    time_unit: ClassVar[float] = 1.0
    shared: ClassVar[tuple[str, ...]] = ("cross_attention_kwargs",)

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        kind: OutputKind,
        grid: TokenGrid,
        dtype: torch.dtype | None = None,
        empty: Inputs | None = None,
        prompts: Sequence[str] = (),
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.kind = kind
        self.grid = grid
        self.x_0_range = None
        self.empty = empty
        self.class_names = tuple(prompts)
        self._encoder = None if encoder is None else lru_cache(maxsize=KEPT)(encoder)
        self._dtype = dtype
        self.latent_shape = (self.own_channels(network), *grid.size)
        self.layers = {layer.name: layer for layer in self.find_layers(network, grid)}
        middle = self.middle_layer()
        self.aliases = {} if middle is None else {"auto": middle}

    def of(self, network: nn.Module) -> Self:
        """Return the denoiser of another network, to be asked with the conditions of this one.

        Raises:
            ValueError: the network is of another layout.
        """
        if self.network_class not in [each.__name__ for each in type(network).__mro__]:
            raise ValueError(
                f"{type(network).__name__}: expected a network of the same kind, "
                f"{self.network_class}"
            )
        return type(self)(network, self.process, self.kind, self.grid, empty=self.empty)

    @classmethod
    def own_channels(cls, network: nn.Module) -> int:
        """Return the channels of x_t: those that the network takes in and puts out."""
        config: Any = network.config
        return int(min(config.in_channels, config.out_channels or config.in_channels))

    @classmethod
    def split(cls, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split what the network is given into x_t, in its form, and channels behind it."""
        config: Any = network.config
        own = min(config.in_channels, config.out_channels or config.in_channels)
        axis = 1 if x.ndim == 4 else 2
        behind = x.narrow(axis, own, x.shape[axis] - own)
        return x.narrow(axis, 0, own), behind if behind.shape[axis] else None

    @classmethod
    def grid_of(cls, x: Tensor, arguments: Mapping[str, Any]) -> TokenGrid:
        """Read from a call of the network the size of its x_t and the length of its text."""
        return TokenGrid((x.shape[-2], x.shape[-1]))

    @classmethod
    def corrected(
        cls, network: nn.Module, arguments: Mapping[str, Any], cfg: bool
    ) -> Mapping[str, Any]:
        """Return a call's arguments as this network needs them, which a pipeline may not know.

        ``cfg`` says whether the second half of the rows is the null condition's, or the first.
        """
        return arguments

    @classmethod
    @abstractmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield the network's self-attention layers in the order of depth."""

    def middle_layer(self) -> str | None:
        """Return the layer that ``auto`` means; None is the middle of the depth."""
        return None

    @staticmethod
    def unpacked(x: Tensor, grid: TokenGrid) -> Images:
        """Turn the network's form of x_t into (b, c, h, w)."""
        return x

    @staticmethod
    def packed(x_t: Images) -> Tensor:
        """Turn (b, c, h, w) into the network's form of x_t."""
        return x_t

    def time(self, t: Tensor) -> Tensor:
        """Turn the scheduler's time into the network's, in its precision as its pipeline does."""
        return t if self.time_unit == 1 else t.to(self.dtype) / self.time_unit

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the network is asked."""
        return self._dtype or next(self.network.parameters()).dtype

    def evaluate(self, x_t: Images, t: Tensor, cond: Inputs) -> Images:
        """Call the network once, with the arguments that its pipeline would give it."""
        x = self.packed(x_t.to(self.dtype))
        if cond.channels is not None:
            x = torch.cat([x, cond.channels.rows], dim=1 if x.ndim == 4 else -1)
        inputs = {self.x_name: x, "timestep": self.time(t.to(x.device)), "return_dict": False}
        output: Tensor = self.network(**cond.plain(), **inputs)[0]
        size = (x_t.shape[-2], x_t.shape[-1])
        return self.unpacked(output, TokenGrid(size))

    def forward(
        self,
        x_t: Images,
        level: NoiseLevel,
        cond: Inputs,
        captures: Sequence[Capture] = (),
        edits: Sequence[tuple[Edit, slice]] = (),
    ) -> Prediction:
        """Evaluate one batch in float32; see :meth:`Denoiser.forward`."""
        tapped = {capture.layer.name for capture in captures}
        tapped |= {edit.module for edit, _ in edits if isinstance(edit, AttentionEdit)}
        with native_attention(self.network, tapped):
            return super().forward(x_t.float(), level, cond, captures, edits)

    def _encoded(self, prompt: str | None) -> Inputs:
        if self._encoder is None:
            raise ValueError("this denoiser has no encoder of prompts; its pipeline asks it")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._encoder(prompt, self.device).to(self.device, self.dtype)

    def conditions(self, labels: Sequence[int]) -> Inputs:
        """Return the condition of images by the numbers of their prompts."""
        return self.join([self._encoded(self.class_names[label]) for label in labels])

    def null(self, count: int) -> Inputs | None:
        """Return the null prompt's condition for ``count`` images, or None if it is not known."""
        empty = self.empty if self._encoder is None else self._encoded(None)
        if empty is None or empty.count == count:
            return empty
        return empty.take(torch.arange(count, device=self.device) % empty.count)

    def join(self, conditions: Sequence[Inputs]) -> Inputs:
        """Concatenate conditions."""
        return conditions[0].join(conditions[1:])

    def layer(self, name: str) -> AttentionLayer:
        """Return a layer by its name or that of its block; see :meth:`Denoiser.layer`."""
        return self.layers.get(f"{name}.attn1") or super().layer(name)


SPLIT = ("SlicedAttnProcessor", "XFormersAttnProcessor", "XLAFlashAttnProcessor2_0")
"""Processors of diffusers that compute the same as AttnProcessor2_0 in another way."""

FUSED = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Backends of diffusers that call PyTorch's fused attention."""


@contextmanager
def native_attention(network: nn.Module, names: set[str]) -> Iterator[None]:
    """Have the named layers call PyTorch's fused attention, whatever was chosen for the network.

    An :class:`AttentionTap` does not see attention slicing or other backends. All other layers keep
    their processors, and these get theirs back when the context ends.
    """
    with ExitStack() as undo:
        for name in names:
            layer = network.get_submodule(name)
            processor = getattr(layer, "processor", None)
            native = None if processor is None else _native(processor)
            if native is not None:
                undo.callback(setattr, layer, "processor", processor)
                layer.processor = native
        yield


def _native(processor: Any) -> Any:
    """Return the same processor on PyTorch's fused attention; None if it already calls that."""
    from diffusers.models import attention_processor

    name = type(processor).__name__
    if name in (*SPLIT, "AttnProcessor"):
        return attention_processor.AttnProcessor2_0()
    if name == "XFormersJointAttnProcessor":
        return attention_processor.JointAttnProcessor2_0()
    if hasattr(processor, "_attention_backend"):
        from diffusers.models.attention_dispatch import AttentionBackendName

        if processor._attention_backend in [AttentionBackendName(name) for name in FUSED]:
            return None
        native = copy.copy(processor)
        native._attention_backend = AttentionBackendName.NATIVE
        return native
    return None
