"""A denoiser conditioned on class labels: any :class:`sag_dit.models.Network`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from sag_dit.denoiser.base import Denoiser
from sag_dit.models.network import Fork, Network, Outputs, check_members, lacking, takes
from sag_dit.process import Process
from sag_dit.process.base import OutputKind
from sag_dit.tensors import Images, Labels


class ClassConditional(Denoiser):
    """A network asked with labels from 0 to num_classes - 1; label num_classes is the null class.

    An unconditional model is one with a single class and no label dropout, or a UNet without
    classes, which counts as one.

    Raises:
        ValueError: the network lacks a member of :class:`sag_dit.models.Network` or has one that is
            not what it says, ``kind`` is none, or there are not as many class names as classes.

    Example:
        >>> from sag_dit.models import DiT
        >>> from sag_dit.process import DDPM
        >>> network = DiT(input_size=8, hidden_size=32, depth=2, num_heads=1, num_classes=10)
        >>> denoiser = ClassConditional(network, DDPM())
        >>> denoiser.join([denoiser.conditions([3]), denoiser.null(1)])
        tensor([ 3, 10])
    """

    key = "class_conditional"
    former = ("sag_dit.denoiser.class_conditional.ClassConditional",)

    network: Network

    def __init__(
        self,
        network: Network,
        process: Process,
        kind: OutputKind = "eps",
        x_0_range: tuple[float, float] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        # Both are refused here, where who made them is at hand.
        missing = lacking(network)
        if missing:
            raise ValueError(
                f"network={type(network).__name__}: lacks {', '.join(missing)}; expected all "
                f"members of sag_dit.models.Network, most of which sag_dit.models.Backbone brings"
            )
        check_members(network)
        if kind not in get_args(OutputKind):
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(get_args(OutputKind))}")
        num_classes = max(network.num_classes, 1)
        if class_names and len(class_names) != num_classes:
            raise ValueError(
                f"{len(class_names)} class names for a model of {num_classes} classes: "
                f"expected one name per class, or none"
            )
        self.network = network
        self.process = process
        self.kind = kind
        self.x_0_range = None if x_0_range is None else (x_0_range[0], x_0_range[1])
        self.num_classes = num_classes
        self.class_names = tuple(class_names) or tuple(str(i) for i in range(self.num_classes))
        self.latent_shape = (network.in_channels, *network.input_size)
        self.layers = network.layers
        self.aliases = network.aliases

    def evaluate(
        self,
        x_t: Images,
        t: Tensor,
        cond: Labels,
        forks: Sequence[Fork] = (),
        outputs: Outputs | None = None,
    ) -> Images:
        """Call the network once with one label per image."""
        dtype = next(self.network.parameters()).dtype
        further: dict[str, Any] = {"forks": forks} if forks else {}
        if outputs is not None:
            further["outputs"] = outputs
        out: Tensor = self.network(x_t.to(dtype), t, cond, **further)
        return out

    def _compile(self) -> None:
        self.network.compile_blocks()

    @property
    def chain_length(self) -> int | None:
        """The number of the network's blocks, None if its ``forward`` takes no forks."""
        return len(self.network.blocks) if self._takes("forks") else None

    @property
    def keeps_outputs(self) -> bool:
        """Whether the network's ``forward`` takes ``outputs``."""
        return self._takes("outputs")

    def _takes(self, argument: str) -> bool:
        return takes(self.network.forward, argument) and takes(self.evaluate, argument)

    @property
    def size_multiple(self) -> int | None:
        """The network's ``patch_size``, None unless it says ``any_size``."""
        return self.network.patch_size if getattr(self.network, "any_size", False) else None

    def null(self, count: int) -> Labels | None:
        """Return ``count`` null labels, or None if the model was trained without label dropout."""
        label = self.network.null_label
        return None if label is None else torch.full((count,), label, device=self.device)

    def join(self, conditions: Sequence[Labels]) -> Labels:
        """Concatenate labels."""
        return torch.cat(list(conditions))
