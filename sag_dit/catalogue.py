"""The catalogue of the zoo, ``catalogue.yaml``: what is known of every checkpoint with a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["bundled", "model", "classifier", "upsampler", "autoencoder"]


@dataclass(frozen=True)
class Entry:
    """One checkpoint; what is not known of it is None.

    Attributes:
        name: what ``load`` calls it.
        kind: what it is for, or that it lies in the package.
        aliases: further names.
        family: the key of its network's family.
        resolution: the side of its images, in pixels.
        file: its official file name; for a bundled one, where it lies in ``checkpoints/``.
        url: where that file can be downloaded.
        repository: the hub repository that holds the same as a diffusers folder.
        sha256: of the file.
        size: of the file, in bytes.
        licence: of the weights.
        data: what it was trained on, in a sentence.
        reference: the paper.
        preset: the row of its configs/compare with which sample.py draws by itself.
        weights: what its family has to know to recognise and read it.

    Example:
        >>> entries()["DiT-XL-2"].file
        'DiT-XL-2-256x256.pt'
    """

    name: str
    kind: Kind
    aliases: tuple[str, ...] = ()
    family: str | None = None
    resolution: int | None = None
    file: str | None = None
    url: str | None = None
    repository: str | None = None
    sha256: str | None = None
    size: int | None = None
    licence: str | None = None
    data: str | None = None
    reference: str | None = None
    preset: str = "sag"
    weights: Mapping[str, Any] = field(default_factory=dict)


@cache
def _all() -> Mapping[str, Entry]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    # In C where PyYAML has it: this file is long, and every command reads it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    listed: dict[str, dict[str, Any]] = yaml.load(text, Loader=loader)
    return {
        name: Entry(name, **{**each, "aliases": tuple(each.get("aliases", ()))})
        for name, each in listed.items()
    }


def entries(*kinds: Kind) -> Mapping[str, Entry]:
    """Return the entries of some kinds by their names, all if no kind is asked for."""
    return {name: each for name, each in _all().items() if not kinds or each.kind in kinds}


def aliases(*kinds: Kind) -> dict[str, str]:
    """Return the further names of entries of some kinds, and the names that they stand for."""
    return {alias: each.name for each in entries(*kinds).values() for alias in each.aliases}
