"""What goes into a module and comes out of it, for the rows that a capture or an edit is about."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

Rows = slice


IMAGE = "hidden_states"
"""What diffusers' blocks call their first input where they are called by keywords alone."""

TEXT_FIRST = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
"""Blocks of diffusers that return the text before the image."""


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any], module: str) -> Tensor:
    """Return the tensor a module was called with."""
    found = args[0] if args else kwargs.get(IMAGE)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"module {module!r} was not called with a tensor as its first argument, so its input "
            f"cannot be edited; choose a module within it"
        )
    return found


def paired(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, module: str
) -> list[tuple[Tensor, Tensor | None]]:
    """Return pairs (input, output) of a module that returns several tensors.

    A block of two streams, text and image, returns both, in an order of its own. Where that order
    is not known, an output belongs to the input that has its shape.

    Raises:
        ValueError: no input has its shape, or more than one has.
    """
    # Known blocks return the text first.
    if type(block).__name__ in TEXT_FIRST and isinstance(output, tuple):
        given = signature(block.forward).bind(*args, **kwargs).arguments
        text, image = output
        return [(given["encoder_hidden_states"], text), (given[IMAGE], image)]
    # Of others, look for the input of the same shape. None stands for a stream that ends here.
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for out in output if isinstance(output, tuple) else (output,):
        if out is None and inputs:
            pairs.append((inputs[0], None))
            continue
        fitting = [x for x in inputs if isinstance(out, Tensor) and x.shape == out.shape]
        if len(fitting) != 1:
            raise ValueError(
                f"module {module!r} returns {type(output).__name__}: only modules that return a "
                f"tensor can be edited, or a tensor for each of their inputs, of its shape"
            )
        pairs.append((fitting[0], out))
    return pairs


def with_rows(x: Tensor, rows: Rows, changed: Tensor, module: str) -> Tensor:
    """Return a copy of ``x`` whose ``rows`` are ``changed``, in its own type; gradients flow."""
    start, stop, _ = rows.indices(x.shape[0])
    if changed.shape != x[rows].shape:
        raise ValueError(
            f"an edit of {module!r} returned {tuple(changed.shape)}: expected the shape of the "
            f"rows it was given, {tuple(x[rows].shape)}"
        )
    return torch.cat([x[:start], changed.to(x.dtype), x[stop:]])


def rows_of(mask: Tensor | None, rows: Rows, batch: int) -> Tensor | None:
    """Return the mask of the chosen rows; a mask shared by all rows stays as it is."""
    return mask if mask is None or mask.ndim < 4 or mask.shape[0] != batch else mask[rows]
