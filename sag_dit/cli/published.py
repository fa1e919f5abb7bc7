"""Published numbers of a configuration, and in what a run differs from how they were made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sag_dit.cli.composing import compose
from sag_dit.cli.keys import Evaluate
from sag_dit.cli.keys.key import keys_of, to_dict
from sag_dit.cli.values import make_terms
from sag_dit.evaluation.expected import Expected, differing


def expected_of(config: Evaluate) -> Expected | None:
    """Return the published numbers of a configuration, None if it names none.

    Raises:
        ValueError: entries that are unknown or do not fit.
    """
    if config.expected is None:
        return None
    return Expected.of(to_dict(config.expected))


def experiment_of(expected: Expected) -> Evaluate | None:
    """Return the configuration with the published settings, None if none is named.

    Raises:
        HydraException: there is no such experiment.
    """
    if expected.experiment is None:
        return None
    found: Evaluate = compose("evaluate", [f"experiment={expected.experiment}"])
    return found


def otherwise(config: Evaluate, expected: Expected) -> list[str]:
    """Name the settings that the experiment of published numbers has otherwise."""
    told: list[str] = []
    experiment = experiment_of(expected)
    if experiment is None or config.samples is not None:
        return told
    stated, ours = _settings(experiment), _settings(config)
    for part in dict.fromkeys([*stated, *ours]):
        first, second = stated.get(part, {}), ours.get(part, {})
        # Which sampler and terms there are, and the scales, the protocol says in a word.
        named = part.partition(".")[0] in expected.protocol
        if named and _told_apart(part, first) != _told_apart(part, second):
            continue
        known = {*expected.protocol, *([f"{part}.scale"] if named else [])}
        told += differing(_flat(part, first, known), _flat(part, second, known))
    return told


def _settings(config: Evaluate) -> dict[str, dict[str, Any]]:
    """Return what determines the images: the drawing, the sampler, and each term that is on."""
    drawing = {
        key: to_dict(getattr(config, key))
        for key, (_, told) in keys_of(Evaluate).items()
        if told.published
    }
    drawing["trainer.precision"] = str(config.trainer.get("precision") or "32-true")
    terms = make_terms(config.guidance)
    active = sorted(name for name, term in terms.items() if not term.off)
    guidance = {f"guidance.{name}": config.guidance[name] or {} for name in active}
    return {"": drawing, "sampler": config.sampler} | guidance


def _told_apart(part: str, settings: Mapping[str, Any]) -> Any:
    """Return what the protocol's word tells apart: samplers by class, a term by being there."""
    return settings.get("_target_") if part == "sampler" else bool(settings)


def _flat(part: str, settings: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    flat = {f"{part}.{key}" if part else key: value for key, value in settings.items()}
    return {key: value for key, value in flat.items() if key not in known}
