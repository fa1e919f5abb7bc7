"""Published numbers beside one's own, and in which parts the two protocols differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sag_dit.evaluation.suite import METRICS


@dataclass(frozen=True)
class Expected:
    """Numbers that somebody has published.

    ``source`` names the publication and the table. ``metrics`` are the numbers by metric.
    ``protocol`` says how they were measured, under the keys of the facts that stand beside every
    number of ours, such as ``count`` or ``reference``; None is what was not published.
    ``experiment`` names a configuration whose settings are the published ones, None if there is
    none.

    Raises:
        ValueError: no source, no numbers, an unknown metric, or something that is no number.

    Example::

        for metric, published in expected.metrics.items():
            print(metric, published)
    """

    source: str
    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]
    experiment: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("expected.source is empty: name the publication and its table")
        if not self.metrics:
            raise ValueError(f"expected.metrics is empty: name some of {', '.join(METRICS)}")
        for name, value in self.metrics.items():
            if name not in METRICS:
                raise ValueError(
                    f"expected.metrics.{name}: no such metric, expected {', '.join(METRICS)}"
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"expected.metrics.{name}={value!r}: expected a number")

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Expected:
        """Read published numbers from plain values.

        Raises:
            ValueError: keys other than source, metrics, protocol and experiment, or values that do
                not fit.
        """
        unknown = node.keys() - {"source", "metrics", "protocol", "experiment"}
        if unknown:
            raise ValueError(
                f"expected.{', '.join(sorted(unknown))}: expected source, metrics, protocol and "
                f"experiment"
            )
        return cls(
            str(node.get("source") or ""),
            dict(node.get("metrics") or {}),
            dict(node.get("protocol") or {}),
            node.get("experiment"),
        )

    def differences(self, measured: Mapping[str, float]) -> dict[str, tuple[float, float, float]]:
        """Return (published, measured, measured - published) of the metrics that both have."""
        return {
            name: (self.metrics[name], measured[name], measured[name] - self.metrics[name])
            for name in METRICS
            if name in self.metrics and name in measured
        }

    def deviations(self, facts: Mapping[str, Any]) -> list[str]:
        """Name the parts of the protocol that differ from the published one, or are not known."""
        told = []
        for key, published in self.protocol.items():
            if published is None:
                told.append(f"{key}: not published, here {_fact_text(facts.get(key))}")
            elif key not in facts or facts[key] is None:
                told.append(f"{key}: published {_fact_text(published)}, here not known")
            elif not _same(published, facts[key]):
                told.append(
                    f"{key}: published {_fact_text(published)}, here {_fact_text(facts[key])}"
                )
        return told


def differing(stated: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Name the settings in which a run differs from the experiment that states the published ones.

    Both are flat. A setting that one of them lacks is null there.
    """
    return [
        f"{key}: {_fact_text(stated.get(key))} in the experiment, here {_fact_text(ours.get(key))}"
        for key in dict.fromkeys([*stated, *ours])
        if not _same(stated.get(key), ours.get(key))
    ]


def _same(published: Any, ours: Any) -> bool:
    if isinstance(published, (int, float)) and isinstance(ours, (int, float)):
        return float(published) == float(ours)
    return _fact_text(published) == _fact_text(ours)


def _fact_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{key} {_fact_text(each)}" for key, each in sorted(value.items())) or "none"
        )
    return "none" if value is None else str(value)
