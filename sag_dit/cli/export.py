"""``export.py``: write a model in the layout of another program, or our own, with its card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sag_dit.cli.app import launch
from sag_dit.cli.keys import Export


def training_data(ckpt: str) -> str | None:
    """Return what a checkpoint was trained on, as Markdown; None where nothing tells.

    A run's config.yaml tells, also from which other run it went on, and the names of published
    models do.
    """
    from sag_dit import catalogue
    from sag_dit.checkpoints import zoo
    from sag_dit.output.claim import recorded

    found = zoo.locate(ckpt)
    bundled, published = catalogue.entries("bundled"), catalogue.entries("model")
    known = bundled.get(ckpt) or published.get(found.name)
    if known is not None:
        return known.data
    path = found.path.resolve()
    inside = path.is_file() and path.parent.name == "checkpoints"
    run = path.parent.parent if inside else path if path.is_dir() else path.parent
    try:
        record = recorded(run)
        data = record["config"]["data"]
    except (ValueError, LookupError):
        return None
    if not isinstance(data, dict):
        return None
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()
    # A longer fence than any that stands in the text, which may be anybody's.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    said = f"As the run's config.yaml says:\n\n{fence}yaml\n{text}\n{fence}"
    return "\n\n".join([said, *_lineage(record.get("parent"))])


def _lineage(parent: Any) -> Iterator[str]:
    """Yield a sentence for each run that a run went on from, the latest first."""
    while isinstance(parent, Mapping):
        folder = str(parent.get("folder")).replace("`", "'")
        identity = str(parent.get("identity"))[:8]
        yield f"The run went on from step {parent.get('step')} of `{folder}` (identity {identity})."
        parent = parent.get("parent")


def run_export(config: Export) -> None:
    """Check what can be checked without the weights, load the model, and write it.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    from sag_dit.checkpoints import load
    from sag_dit.checkpoints.export import check_layout, check_out, export

    layout = config.format
    check_layout(layout)
    if config.out is not None:
        check_out(config.out)
    model = load(str(config.ckpt), ema=config.ema, vae=config.vae, num_heads=config.num_heads)
    # Each further average of a run is an export of its own.
    further = "" if isinstance(config.ema, bool) else f"-{config.ema}"
    out = Path(config.out or f"outputs/export/{model.name}{further}-{layout}")
    data = training_data(str(config.ckpt))
    done = export(model, out, layout, data=data, ema=config.ema)
    for note in done.notes:
        print(f"note: {note}")
    folder = done.path if done.path.is_dir() else done.path.parent
    print(f"card: {folder / 'README.md'}")
    print(f"export: {done.path}{'' if done.fresh else ' (already there)'}")


main = partial(launch, "export", run_export)
"""Run ``export.py``, with the arguments of the command line unless others are given."""
