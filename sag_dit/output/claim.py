"""A folder belongs to one set of settings, which stand in its ``config.yaml``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sag_dit.files import atomic
from sag_dit.identity import agree, written

CONFIG = "config.yaml"


def claim(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], what: str) -> None:
    """Make a folder belong to ``settings``, or find that it does.

    ``settings``, an identity, determines the results; ``config`` is the whole configuration; both
    are written, unless the folder is this one and cannot be written to. A folder whose settings
    have former names of what has a key now is recognised.

    Raises:
        ValueError: the folder holds results of other settings; the differences are named.
    """
    file = folder / CONFIG
    if file.exists():
        differences = _differences(recorded(folder).get("settings", {}), settings)
        if differences:
            raise ValueError(
                f"out={folder} holds {what} of other settings:\n  "
                + "\n  ".join(differences)
                + "\nChoose another out, leave out unset, or repeat the former settings"
            )
        if not os.access(folder, os.W_OK):
            return
    with atomic(file) as temporary:
        record = {"settings": written(settings), "config": dict(config)}
        temporary.write_text(
            yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def recorded(folder: Path) -> dict[str, Any]:
    """Return what a folder's ``config.yaml`` says; nothing if there is none."""
    file = folder / CONFIG
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.exists() else {}


def _by_path(values: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, Mapping):
        return {prefix.rstrip("."): values}
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _by_path(value, f"{prefix}{key}.")
    return flat


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = _by_path(before), _by_path(now)
    return [
        f"{key}: there {old.get(key, 'not set')}, now {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if not agree(old.get(key), new.get(key))
    ]
