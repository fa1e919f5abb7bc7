"""What determines the weights of a training run, and the folder that is named after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sag_dit.cli.schema import determining, later_keys
from sag_dit.identity import Name, digest, name_of, plain, without_later
from sag_dit.output.claim import recorded

ANY = object()
"""Stands for whatever value a key has."""


def identity(config: DictConfig) -> dict[str, Any]:
    """Return what determines the weights, as plain values."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    for key in determining("train", "nothing"):
        _drop(values, key)
    for key, value in later_keys("train").items():
        _drop(values, key, value)
    named: dict[str, Any] = _named(plain(values))
    return named


def _drop(values: dict[str, Any], key: str, value: Any = ANY) -> None:
    """Take a key, its groups set apart by dots, out of values, if it has this value there."""
    *groups, name = key.split(".")
    for group in groups:
        values = values.get(group) or {}
    if name in values and (value is ANY or values[name] == value):
        del values[name]


def _named(value: Any) -> Any:
    """Return values with every ``_target_`` by its key, and without what it takes since later."""
    if isinstance(value, list):
        return [_named(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    values = {name: _named(each) for name, each in value.items()}
    target = values.get("_target_")
    if not isinstance(target, str):
        return values
    try:
        thing = resolve_name(target)
    except Exception:  # What cannot be imported is refused, with the reason, when it is made.
        return values
    name = name_of(thing, otherwise=target)
    # A class has several paths, of which the hash of this run may have had any.
    former = sorted(name.former, key=lambda path: path != target)
    return {**without_later(values, thing), "_target_": Name(name, former)}


def run_folder(config: DictConfig) -> Path:
    """Return the run's folder: ``out``, or one named after what determines the weights.

    Runs had names before the average could warm up, so the name tells whether it does only where
    the first one is taken by a run that differs in this.
    """
    if config.out:
        return Path(config.out)
    values = identity(config)
    ema = {key: value for key, value in values["ema"].items() if key != "warmup"}
    first = _named_folder(config, {**values, "ema": ema})
    warmup = config.ema.get("warmup")
    there = recorded(first).get("config", {}).get("ema", {})
    if there.get("warmup", warmup) == warmup:
        return first
    return _named_folder(config, {**values, "ema": {**ema, "warmup": warmup}})


def _named_folder(config: DictConfig, values: dict[str, Any]) -> Path:
    return Path("outputs/train") / f"{config.name}-{digest(values)[:8]}"


def begun_without_warmup(out: Path) -> bool:
    """Whether a folder holds a run of a version that did not know ``ema.warmup``."""
    config = recorded(out).get("config", {})
    return "ema" in config and "warmup" not in config["ema"]


def go_on_as_begun(config: DictConfig, out: Path) -> None:
    """Leave the average of weights as it was where a run goes on."""
    if begun_without_warmup(out):
        with open_dict(config.ema):
            config.ema.pop("warmup", None)
