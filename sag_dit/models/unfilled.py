"""Networks without memory, to be filled with the weights of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def unfilled() -> Iterator[None]:
    """Build networks on the device ``meta``, and draw no initial values.

    Even without memory, initial values cost time: PyTorch computes their shapes in Python, and
    imports its compiler for it.

    Example:
        >>> with unfilled():
        ...     layer = torch.nn.Linear(10**6, 10**6)
        >>> layer.weight.device.type
        'meta'
    """
    with torch.device("meta"), _NoInitialValues():
        yield


class _NoInitialValues(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)
