"""Inputs: a condition that is whatever a network is given beside x_t and t."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PerImage:
    """A tensor whose first dimension is images; what is not wrapped so is shared by all images.

    Example:
        >>> PerImage(torch.zeros(2, 77, 768)).rows.shape
        torch.Size([2, 77, 768])
    """

    rows: Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """A condition: the network's further arguments by name, in any nesting.

    ``channels`` is concatenated behind x_t: the mask and the masked image of an inpainting model.

    Example:
        >>> text = Inputs.of({"encoder_hidden_states": torch.zeros(2, 77, 768)}, count=2)
        >>> text.take(slice(1)).join([text]).count
        3
    """

    arguments: Mapping[str, Any]
    channels: PerImage | None = None

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        count: int,
        shared: Sequence[str] = (),
        channels: Tensor | None = None,
    ) -> Inputs:
        """Take every tensor of ``count`` rows as one row per image, but those named ``shared``."""
        wrapped = {
            name: value if name in shared else _wrapped(value, count)
            for name, value in arguments.items()
        }
        return cls(wrapped, None if channels is None else PerImage(channels))

    @property
    def count(self) -> int:
        """The number of images."""
        return len(next(_per_image(self.arguments)).rows)

    def take(self, rows: slice | Tensor) -> Inputs:
        """Return the condition of some images."""
        return self._with(lambda value: value[rows], self)

    def join(self, others: Sequence[Inputs]) -> Inputs:
        """Return the condition of all images; what is shared is taken from the first condition."""
        return self._with(lambda *values: torch.cat(values), self, *others)

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Return the condition on a device, its floating-point tensors in a type."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return self._with(moved, self)

    def plain(self) -> dict[str, Any]:
        """Return the arguments in fresh containers, as some networks change what they are given."""
        return {name: _unwrapped(value) for name, value in self.arguments.items()}

    def _with(self, function: Callable[..., Tensor], *all_inputs: Inputs) -> Inputs:
        return Inputs(
            _mapped(function, *(inputs.arguments for inputs in all_inputs)),
            _mapped(function, *(inputs.channels for inputs in all_inputs)),
        )


def _mapped(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Apply a function to the rows at each place of trees of one shape."""
    first = trees[0]
    if isinstance(first, PerImage):
        return PerImage(function(*(tree.rows for tree in trees)))
    if isinstance(first, Mapping):
        return {key: _mapped(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (list, tuple)):
        return [_mapped(function, *values) for values in zip(*trees, strict=True)]
    return first


def _wrapped(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return PerImage(value) if value.ndim > 0 and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _wrapped(each, count) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_wrapped(each, count) for each in value]
    return value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, PerImage):
        return value.rows
    if isinstance(value, Mapping):
        return {key: _unwrapped(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unwrapped(each) for each in value]
    return value


def _per_image(tree: Any) -> Iterator[PerImage]:
    if isinstance(tree, PerImage):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _per_image(each)
