"""Opening what commands have left: the folder of a run, or the results of an evaluation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sag_dit.output.claim import CONFIG, recorded
from sag_dit.output.folder import read_png
from sag_dit.output.gallery import data_uri
from sag_dit.sampler import own_samplers, sampler_names
from sag_dit.untrusted import read_json

RESULTS = "results.json"
SHOWN = 12
"""Pairs of images that are shown of a run."""


@dataclass(frozen=True)
class Opened:
    """What a folder says of how images were drawn; what it does not say is None.

    ``page`` shows it. ``guidance`` holds each method's settings by its key, ``options`` those of
    the sampler.

    Example::

        opened = open_folder(Path("outputs/sample/digits-91f78b6e"))
        opened.ckpt, opened.steps
    """

    page: str
    ckpt: str | None = None
    label: str | None = None
    prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    sampler: str | None = None
    options: Mapping[str, Any] | None = None
    guidance: Mapping[str, Mapping[str, Any]] | None = None


def folders_of(roots: Sequence[Path]) -> list[str]:
    """Return the folders under ``roots`` that can be opened, the newest first."""
    files = [
        file
        for root in roots
        for name in (CONFIG, RESULTS)
        for depth in ("", "*/", "*/*/")
        for file in root.glob(f"{depth}{name}")
    ]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(str(file.parent) for file in files))


def open_folder(folder: Path, row: int = 0) -> Opened:
    """Read a folder; ``row`` numbers the setting of an evaluation.

    Raises:
        ValueError: there is nothing in it that a command has left.
    """
    if (folder / RESULTS).is_file():
        return _evaluation(folder, row)
    config = recorded(folder).get("config")
    if not config:
        raise ValueError(f"{folder}: neither a run's folder ({CONFIG}) nor results ({RESULTS})")
    if "ckpt" not in config or (folder / "checkpoints").is_dir():
        return Opened(_headed(folder, "a training run, chosen as the model"), ckpt=str(folder))
    classes = config.get("classes")
    first = classes[0] if isinstance(classes, list) and classes else classes
    sampler, options = stated_sampler(config.get("sampler") or {})
    return Opened(
        _pictures_in(folder),
        ckpt=str(config["ckpt"]),
        label=None if first in (None, "random") else str(first),
        prompt=config.get("prompt"),
        seed=config.get("seed"),
        steps=config.get("steps"),
        sampler=sampler,
        options=options,
        guidance={
            key: {name: each for name, each in node.items() if name != "_target_"}
            for key, node in (config.get("guidance") or {}).items()
            if isinstance(node, Mapping)
        },
    )


def table_rows(folder: Path) -> list[str]:
    """Return the names of an evaluation's settings; none of another folder."""
    file = folder / RESULTS
    return [str(row.get("name")) for row in _rows(file)] if file.is_file() else []


def _rows(file: Path) -> list[dict[str, Any]]:
    found: Any = read_json(file)
    rows = found.get("results") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: expected the results of an evaluation")
    return rows


def _evaluation(folder: Path, row: int) -> Opened:
    rows = _rows(folder / RESULTS)
    facts = rows[row].get("facts") or {}
    metrics = list(dict.fromkeys(name for each in rows for name in each.get("metrics", {})))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *metrics))
    body = ""
    for place, each in enumerate(rows):
        numbers = (each.get("metrics", {}).get(name) for name in metrics)
        cells = "".join(f"<td>{_as_number(number)}</td>" for number in numbers)
        chosen = " class=chosen" if place == row else ""
        body += f"<tr{chosen}><th>{html.escape(str(each.get('name')))}</th>{cells}</tr>"
    terms, seeds = facts.get("terms") or {}, facts.get("seed")
    seed: Any = seeds[0] if isinstance(seeds, list) and seeds else seeds
    # Results of earlier versions do not tell the sampler's options.
    options = facts.get("sampler_options")
    stated = options if isinstance(options, Mapping) else {}
    sampler, options = stated_sampler({**stated, "_target_": str(facts.get("sampler"))})
    return Opened(
        f'<table class="results"><tr>{head}</tr>{body}</table>',
        ckpt=facts.get("model"),
        seed=seed,
        steps=facts.get("steps"),
        sampler=sampler,
        options=options,
        guidance={key: dict(term) for key, term in terms.items() if isinstance(term, Mapping)},
    )


def _as_number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _headed(folder: Path, told: str) -> str:
    return f"<p>{html.escape(f'{folder}: {told}')}</p>"


def _pictures_in(folder: Path) -> str:
    """Return the first images of a run beside their twins; links that lead elsewhere are left."""
    home, cells = folder.resolve(), []
    for image in sorted((folder / "images").rglob("*.png"))[:SHOWN]:
        twin = folder / "unguided" / image.relative_to(folder / "images")
        both = [each for each in (twin, image) if each.is_file()]
        shown = [
            f'<img src="{data_uri(read_png(each))}" alt="{html.escape(each.parent.name)}">'
            for each in both
            if each.resolve().is_relative_to(home)
        ]
        cells.append(f'<div class="pair">{"".join(shown)}</div>')
    told = _headed(folder, "unguided beside guided" if (folder / "unguided").is_dir() else "images")
    return f'{told}<div class="opened small">{"".join(cells)}</div>'


def stated_sampler(stated: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of a sampler that a configuration states, else ``auto``, and its options.

    Example:
        >>> stated_sampler({"_target_": "sag_dit.sampler.DDIM", "eta": 0.5})
        ('ddim', {'eta': 0.5})
    """
    own = {
        said: name
        for name, kind in own_samplers().items()
        for said in (kind.__name__, *vars(kind).get("former", ()))  # A subclass inherits none.
    }
    kind = str(stated.get("_target_", "")).rpartition(".")[2]
    named = str(stated.get("name", own.get(kind, kind)))
    options = {key: each for key, each in stated.items() if key not in ("_target_", "name")}
    return (named, options) if named in sampler_names() else ("auto", options)
