"""What is to be known of a metric beside its computation, stated once, where its class stands.

``measured`` above a class says it. The names at the command line, the choice of metrics, their
labels in tables, the help and the table in docs/evaluation.md follow from that.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torchmetrics import Metric

    from sag_dit.evaluation.features import Features
    from sag_dit.evaluation.reference import Reference

Kind = TypeVar("Kind", bound="type[Metric]")


@dataclass(frozen=True)
class MetricKind:
    """What is to be known of a metric beside its computation.

    ``label`` is what tables call it, with some networks' features by another of ``labels``.
    ``features`` names what of an image's :class:`Features` it looks at; with ``images`` it gets the
    images themselves and what they were drawn from. ``reference`` is what of a reference it is
    compared with, None for nothing. ``metric`` takes that first, then those of a suite's parameters
    that are named in ``options``, ``groups`` and ``period``. Where several metrics share a class
    and what it is compared with, its ``value`` is all of theirs. ``usual`` ones are measured where
    none are named. ``needs`` is what an error asks for where the reference lacks something.
    ``tells``, ``cost`` and ``source`` stand in the table of docs/evaluation.md.

    Example::

        MetricKind(FrechetDistance, "FD", "pool", "pool", {"inception": "FID"})
    """

    metric: type[Metric]
    label: str
    features: str
    reference: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    options: Sequence[str] = ()
    usual: bool = False
    needs: str = ""
    tells: str = ""
    cost: str = ""
    source: str = ""

    @property
    def higher_is_better(self) -> bool | None:
        """Whether more of it is better; None where neither is."""
        return self.metric.higher_is_better

    def label_with(self, network: str) -> str:
        """Return what it is called with the features of a network."""
        return self.labels.get(network, self.label)

    def possible(self, seen: Features, reference: Reference) -> bool:
        """Whether the features and the reference hold what it needs."""
        needed = self.reference is None or getattr(reference, self.reference) is not None
        return needed and (self.features == "images" or getattr(seen, self.features) is not None)


METRICS: dict[str, MetricKind] = {}
"""All metrics, in the order of tables; complete once ``sag_dit.evaluation.suite`` is imported."""


def measured(name: str, label: str, features: str, **known: Any) -> Callable[[Kind], Kind]:
    """Make a class of metrics known by a name; ``known`` are the fields of :class:`MetricKind`.

    Example::

        @measured("brightness", "brightness", "pool", tells="how bright the images are")
        class Brightness(Metric): ...
    """

    def add(metric: Kind) -> Kind:
        # Of several above one class the last is called first; tables have them as written.
        later = {other: kind for other, kind in METRICS.items() if kind.metric is metric}
        for other in later:
            del METRICS[other]
        METRICS[name] = MetricKind(metric, label, features, **known)
        METRICS.update(later)
        return metric

    return add


def usual_metrics() -> tuple[str, ...]:
    """Return the metrics that are measured where none are named, in the order of tables."""
    return tuple(name for name, kind in METRICS.items() if kind.usual)


@cache
def metric_names() -> tuple[str, ...]:
    """Return the names of all metrics, read from their files without importing them."""
    decorators = (
        decorator
        for file in sorted(Path(__file__).parent.glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
    )
    found = []
    for each in decorators:
        match each:
            case ast.Call(func=ast.Name("measured"), args=[ast.Constant(str(name)), *_]):
                found.append(name)
    return tuple(found)


def metric_kind(name: str) -> MetricKind:
    """Return what is known of a metric: one of ``METRICS``, or one's own by ``module.NAME``.

    Raises:
        ValueError: there is no such metric, or the name is not that of a :class:`MetricKind`.

    Example:
        >>> from sag_dit.evaluation.suite import metric_kind
        >>> metric_kind("fid").label
        'FD'
    """
    if name in METRICS:
        return METRICS[name]
    expected = f"expected {', '.join(METRICS)}, or module.NAME of a MetricKind of your own"
    if "." not in name:
        raise ValueError(f"metrics={name}: {expected}")
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"metrics={name}: {error}; {expected}") from error
    if not isinstance(found, MetricKind):
        raise ValueError(f"metrics={name} is a {type(found).__name__}; {expected}")
    return found
