"""A stand-in for Apple's GPUs on any machine: a device that calls itself mps and holds no float64.

Tensors on it compute on the CPU, so that results are the CPU's bit for bit, but they refuse what
torch refuses there: float64, numpy, and company from the CPU. To torch's C++ they are on the device
meta, which has autograd on every build and no values of its own that could be mistaken for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

DEVICE = torch.device("mps", 0)
_HIDDEN = torch.device("meta", 1)
_WIDE = (torch.float64, torch.complex128)
aten = torch.ops.aten
# What torch lets meet across devices: copies, and indices.
_ACROSS = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_}


class OnDevice(Tensor):
    """A tensor on the device, which keeps its values in one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        if held.dtype in _WIDE:
            raise TypeError(
                f"Cannot convert a MPS Tensor to {str(held.dtype)[6:]} dtype as the MPS framework "
                f"doesn't support it. Please use float32 instead."
            )
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_HIDDEN,
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    def __reduce_ex__(self, _: Any) -> Any:
        return OnDevice, (self.held,)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_flatten((args, kwargs))[0]
        if func.overloadpacket not in _ACROSS:
            for leaf in leaves:
                if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.ndim:
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but {func} found mps and "
                        f"cpu, {leaf.dtype} {tuple(leaf.shape)}"
                    )
        if func.overloadpacket is aten.copy_ and not isinstance(args[0], OnDevice):
            func(args[0], args[1].held, **kwargs)
            return args[0]
        stays = kwargs.get("device") in (None, _HIDDEN)
        if kwargs.get("device") == _HIDDEN:
            kwargs["device"] = torch.device("cpu")
        made = func(*_held(args), **_held(kwargs))
        return _placed(made, leaves) if stays else made


def _held(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, tree)


def _placed(made: Any, given: Sequence[Any]) -> Any:
    """Put results on the device; what was written in place is still the same tensor."""
    known = {id(leaf.held): leaf for leaf in given if isinstance(leaf, OnDevice)}
    return tree_map_only(
        Tensor, lambda each: known[id(each)] if id(each) in known else OnDevice(each), made
    )


class _Arrivals(TorchDispatchMode):
    """Puts what is made on the device, or sent there, on it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") != _HIDDEN or any(
            isinstance(leaf, OnDevice) for leaf in tree_flatten((args, kwargs))[0]
        ):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return tree_map_only(Tensor, OnDevice, made)


class _Names(TorchFunctionMode):
    """Lets code that calls the device mps reach it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = [*map(_named, args)], {k: _named(v) for k, v in (kwargs or {}).items()}
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            kwargs = {"device": _HIDDEN, "dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == _HIDDEN:
            # torch fills these where no mode sees it.
            return func(*args, **{**kwargs, "device": None}).to(_HIDDEN)
        made = func(*args, **kwargs)
        if type(made) is Tensor and made.device == _HIDDEN:
            raise NotImplementedError(f"{func} made a tensor on the device that holds no values")
        return made


def _named(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == DEVICE.type:
        return _HIDDEN
    return _HIDDEN if isinstance(value, str) and value.partition(":")[0] == DEVICE.type else value


@contextmanager
def without_float64() -> Iterator[torch.device]:
    """Give a device without float64 for the time being."""
    with _Names(), _Arrivals():
        yield DEVICE
