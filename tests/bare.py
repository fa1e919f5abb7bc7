"""An environment of a few distributions, made by hiding all others from this process.

What is hidden can neither be imported nor found, as if it were not installed, and what looks for
it from within the package is noted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What a machine with torch on it has, and what comes to it as wheels; issued, not chosen here.
PRESENT = (
    *("torch", "lightning", "timm", "torchvision", "safetensors", "numpy", "pillow"),
    *("scikit-learn", "transformers"),
)
CARRIED = (
    *("hydra-core", "omegaconf", "antlr4-python3-runtime", "diffusers", "jaxtyping", "rich"),
    "importlib-metadata",
)
OURS = "sag_dit"


def closure(listed: Iterable[str]) -> set[str]:
    """The installed distributions that the listed ones need, by their own metadata, and they."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(name), "") for name in listed]
    found = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needs = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:  # for another system, or Python
            continue
        found.add(name)
        for need in needs:
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                other = canonicalize_name(need.name)
                waiting += [(other, each) for each in ("", *need.extras)]
    return found


def modules_outside(kept: set[str]) -> set[str]:
    """The top-level modules that come with none of the kept distributions."""
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if module != OURS and kept.isdisjoint(canonicalize_name(owner) for owner in owners)
    }


class Hidden(PathFinder):
    """Finds modules and distributions on the path, as Python does, but for the hidden ones."""

    def __init__(self, kept: set[str]) -> None:
        self.kept = kept | {canonicalize_name(OURS)}
        # Noted even where it is not installed.
        self.modules = modules_outside(kept) | {"wandb"}
        self.missed: list[str] = []

    def find_spec(  # type: ignore[override]
        self, name: str, path: Any = None, target: Any = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.modules:
            return PathFinder.find_spec(name, path, target)
        importer = _importer()
        if importer.partition(".")[0] == OURS:
            self.missed.append(f"{importer} looks for {name}")
        return None

    def find_distributions(  # type: ignore[override]
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterator[metadata.Distribution]:
        for each in metadata.MetadataPathFinder.find_distributions(
            context or metadata.DistributionFinder.Context()
        ):
            if canonicalize_name(each.metadata["Name"]) in self.kept:
                yield each


def _importer() -> str:
    """The module that asked for the import which is under way."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals["__name__"].startswith(("importlib", "_frozen")):
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


def hide_others(*listed: str) -> Hidden:
    """Hide, for the rest of the process, all but the listed distributions and what they need."""
    hidden = Hidden(closure(listed or (*PRESENT, *CARRIED)))
    place = sys.meta_path.index(PathFinder)
    sys.meta_path[place] = hidden
    loaded = hidden.modules & {name.partition(".")[0] for name in sys.modules}
    if loaded:
        raise RuntimeError(f"too late: {sorted(loaded)} have been imported already")
    return hidden
