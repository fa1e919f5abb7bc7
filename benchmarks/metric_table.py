"""Write the table of metrics in docs/evaluation.md: ``python -m benchmarks.metric_table``.

What stands in it is what each metric says of itself; a test sees that the page is as written here.
"""

from __future__ import annotations

from benchmarks.methods import ROOT, page
from sag_dit.evaluation.suite import METRICS, MetricKind

PAGE = ROOT / "docs" / "evaluation.md"
BEGIN = "<!-- python -m benchmarks.metric_table -->"


def called(kind: MetricKind) -> str:
    """Return what tables call a metric, with some networks' features in brackets."""
    others = ", ".join(f"{label} by {network}" for network, label in kind.labels.items())
    return f"{kind.label} ({others})" if others else kind.label


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| key | label | | what it tells | what it costs | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind in METRICS.items():
        better = {True: "↑", False: "↓", None: ""}[kind.higher_is_better]
        mark = "**" if kind.usual else ""
        lines.append(
            f"| {mark}`{name}`{mark} | {called(kind)} | {better} | {kind.tells} | {kind.cost} "
            f"| {kind.source} |"
        )
    return "\n".join(lines)


def written() -> str:
    """Return the page as it should be."""
    return page(PAGE.read_text(encoding="utf-8"), table(), BEGIN)


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
