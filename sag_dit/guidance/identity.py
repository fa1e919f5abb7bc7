"""A term as plain values, for the name of a run's folder and its configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

LATER: Mapping[str, Any] = MappingProxyType({"later": True})
"""Metadata of a field that runs were made without: at its default it is left out of the identity.

So that folders keep their names, and runs go on, when a method gains an option.
"""


def plain(term: Any) -> dict[str, Any]:
    """Return a dataclass as values that JSON can hold."""
    values: dict[str, Any] = {"term": _name(type(term))}
    for each in fields(term):
        value = getattr(term, each.name)
        if not (each.metadata.get("later") and value == each.default):
            values[each.name] = _plain(value)
    return values


def weights(module: nn.Module) -> dict[str, str]:
    """Return a module as its class and the sha256 of its weights by name."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return {"module": _name(type(module)), "weights_sha256": sha.hexdigest()}


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _plain(value: Any) -> Any:
    """Return a value as JSON would read it back."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, nn.Module):
        return weights(value)
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name(value)
    return repr(value)
