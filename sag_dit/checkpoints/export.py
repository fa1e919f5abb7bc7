"""Writing checkpoints: our own folder, and a model in any layout with its card."""

from __future__ import annotations

import filecmp
import html
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sag_dit.checkpoints.config import describe
from sag_dit.checkpoints.files import METADATA_KEY
from sag_dit.checkpoints.model import Model
from sag_dit.codec import VAECodec
from sag_dit.denoiser import ClassConditional
from sag_dit.files import atomic
from sag_dit.models.family import Family, Layout, Source, families, family_for
from sag_dit.untrusted import TARGET

SHOWN_CLASSES = 20


def model_card(
    model: Model,
    layout: str,
    has_autoencoder: bool,
    usage: Sequence[str],
    notes: Sequence[str],
    data: str | None,
    weights: str,
) -> str:
    """Return the text of README.md.

    ``has_autoencoder`` tells whether the export holds it; ``usage`` are the lines on how to use
    the export, ``notes`` what to mind; ``weights`` tells averaged ("ema") from raw ("raw") ones.
    """
    # What the table and the config show.
    description = model.description
    config: dict[str, Any] = {key: description[key] for key in ("model", "process", "kind")}
    config["x_0_range"] = description["x_0_range"]
    names = list(model.class_names)
    shown = ", ".join(names[:SHOWN_CLASSES])
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN_CLASSES else ""
    network = model.class_conditional.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    # The card, from the source of the weights to their use.
    lines = [
        f"# Model card: {model.name}",
        "",
        f"A class-conditional {family_for(network).title}, exported by sag_dit.",
        "",
        "| | |",
        "|---|---|",
        f"| source | {model.name} |",
        f"| sha256 of the source's weights | `{model.sha256 or 'unknown: weights in memory'}` |",
        f"| weights | {'averaged (EMA)' if weights == 'ema' else 'raw, not averaged'}, float32 |",
        f"| layout | {layout} |",
        f"| parameters | {parameters:,} |",
        f"| input | {' x '.join(str(size) for size in model.denoiser.latent_shape)} |",
        f"| autoencoder | {_autoencoder(model, has_autoencoder)} |",
        f"| classes | {_cell(shown)}{more} |",
        "",
        "## Data",
        "",
        data or "Not known: the checkpoint does not say what it was trained on.",
        "",
        "The licence of the source's weights and data holds for this export too.",
        "",
        "## Config",
        "",
        "```json",
        json.dumps(config, indent=2),
        "```",
        "",
        "## Use",
        "",
        *usage,
    ]
    if notes:
        lines += ["", "## Mind", "", *(f"- {note}." for note in notes)]
    return "\n".join(lines) + "\n"


def _cell(text: str | None) -> str:
    """Return a text that is no markup: neither HTML nor Markdown, nor the end of a table's cell."""
    plain = html.escape(" ".join((text or "").split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", plain)


def _autoencoder(model: Model, there: bool) -> str:
    if not isinstance(model.codec, VAECodec):
        return "none: a pixel model"
    # What the folder holds, need not be looked for elsewhere.
    if there:
        return "in vae/"
    named = model.vae.get(TARGET) if isinstance(model.vae, Mapping) else model.vae
    return _cell(named) or "not named by the source"


CARD = "README.md"


class Exported(NamedTuple):
    """What was written.

    Attributes:
        path: what ``load`` reads: the weights' file or the folder.
        notes: what a user has to know; they stand in the card too.
        fresh: False if the folder held this very export already.

    Example::

        exported = export(model, "my_model", "safetensors")
        print(exported.path, *exported.notes)
    """

    path: Path
    notes: tuple[str, ...]
    fresh: bool


class Own(Layout):
    """Our own folder, which holds any model: weights, and a config that builds it anew.

    Example::

        Own().write(Path("my_model"), source)
    """

    program = "sag_dit"
    weights = "model.safetensors"

    def write(self, folder: Path, source: Source) -> None:
        """Write weights and config, each atomically.

        The config is also in the safetensors' metadata, so that the file alone can be loaded.
        """
        text = folder / "config.json"
        # The weights appear last: with them the folder is complete.
        with atomic(folder / self.weights) as part:
            save_file(source.state, part, metadata={METADATA_KEY: json.dumps(source.config)})
            with atomic(text) as temporary:
                temporary.write_text(json.dumps(source.config, indent=2) + "\n", encoding="utf-8")

    def usage(self, source: Source) -> list[str]:
        """Return how this package reads the folder."""
        return ["`sag_dit.load('this folder')`, or `python sample.py ckpt='this folder'`."]


EARLIER = "choose an earlier checkpoint, from before the training diverged"
OWN = "safetensors"
"""What ``export.py format=...`` calls :class:`Own`."""


def write_safetensors(
    folder: str | Path, denoiser: ClassConditional, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a denoiser's weights and config in our own layout, and return the weights' path.

    ``extra`` joins the config; ``vae`` and ``defaults`` are what a denoiser does not know.

    Raises:
        ValueError: weights are NaN or infinite.

    Example::

        write_safetensors("my_model", model.class_conditional, {"defaults": {"batch_size": 16}})
    """
    folder = Path(folder)
    check_finite(denoiser.network.state_dict(), str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    config = {**describe(denoiser), **(extra or {})}
    Own().write(folder, Source(denoiser.network, denoiser.process, config, {}))
    return folder / Own.weights


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters that hold NaN or infinite values."""
    return [name for name, tensor in state.items() if not tensor.isfinite().all()]


def check_finite(state: Mapping[str, Tensor], where: str, remedy: str = EARLIER) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: some are; the first parameter is named, and ``remedy`` is told.
    """
    broken = not_finite(state)
    if broken:
        others = f" and {len(broken) - 1} other parameters" if broken[1:] else ""
        raise ValueError(
            f"{where}: weights that are NaN or infinite, which nothing can be drawn with, in "
            f"{broken[0]}{others}; {remedy}"
        )


def check_layout(layout: str) -> None:
    """Refuse a layout that is not written.

    Raises:
        ValueError: it is neither our own nor one that a family is exported in.
    """
    known = list(dict.fromkeys(name for each in families().values() for name in each.layouts))
    if layout not in (*known, OWN):
        raise ValueError(f"format={layout}: expected {', '.join([*known, OWN])}")


def check_out(out: str | Path) -> Path:
    """Return the absolute folder to export to.

    Raises:
        ValueError: it is a file, is named as one, or holds what is no export.
    """
    folder = Path(out).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out}: a file; expected a folder that is new or empty")
    if folder.suffix in (".pt", ".pth", ".ckpt", ".safetensors", ".bin"):
        raise ValueError(
            f"out={out}: expected a folder; the weights, their config and the model card are "
            f"written into it: out={Path(out).with_suffix('')}"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CARD).is_file():
        raise _occupied(folder, "it holds other files")
    return folder


def export(
    model: Model, out: str | Path, layout: str, data: str | None = None, ema: bool = True
) -> Exported:
    """Write a model in a layout, with its card, as a folder that appears whole or not at all.

    ``data`` says in a sentence what the model was trained on; ``ema`` tells the card whether its
    weights are averaged ones.

    Raises:
        ValueError: the layout is unknown or cannot express the model; weights are NaN or infinite;
            ``out`` is a file or holds something else; there is no room on the disk.
    """
    # What can be refused is refused before anything is written.
    check_layout(layout)
    folder = check_out(out)
    denoiser, codec = model.class_conditional, model.codec
    check_finite(denoiser.network.state_dict(), model.name)
    settings: dict[str, Any] = {}
    if isinstance(codec, VAECodec):
        settings = {"_class_name": codec.kind, **codec.settings}
    source = Source(denoiser.network, denoiser.process, model.description, settings)
    chosen = fitting(family_for(denoiser.network), layout, source)
    notes = chosen.notes(source)
    # Written beside its place and renamed, so that it is there as a whole or not at all.
    with _staged(folder, chosen.size(source)) as part:
        chosen.write(part, source)
        if chosen.has_autoencoder and isinstance(codec, VAECodec):
            codec.vae.save_pretrained(part / "vae")
            _forget_path(part / "vae" / "config.json")
        usage, weights = chosen.usage(source), "ema" if ema else "raw"
        card = model_card(model, layout, chosen.has_autoencoder, usage, notes, data, weights)
        (part / CARD).write_text(card, encoding="utf-8")
        fresh = _publish(part, folder)
    return Exported(folder / chosen.weights, tuple(notes), fresh)


def fitting(family: Family, layout: str, source: Source) -> Layout:
    """Return a layout that can hold a model of this family.

    Raises:
        ValueError: it cannot; the reasons are named.
    """
    found = Own() if layout == OWN else family.layouts.get(layout)
    if found is None:
        owner = next(each for each in families().values() if layout in each.layouts)
        program = owner.layouts[layout].program
        obstacles = [f"{family.noun}, where it has {owner.noun}"]
    else:
        program, obstacles = found.program, found.obstacles(source)
    if found is None or obstacles:
        raise ValueError(
            f"format={layout}: {program} cannot express this model: {'; '.join(obstacles)}. Use "
            f"format={OWN}, which sag_dit reads"
        )
    return found


def _forget_path(config: Path) -> None:
    """Take out where diffusers had read a part from: a place on this machine."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _staged(folder: Path, need: int) -> Iterator[Path]:
    """Give an empty folder beside the final one, and take it away in the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise ValueError(
            f"out={folder}: {free / 1e6:,.1f} MB are free and {need / 1e6:,.1f} MB are needed; "
            f"make room, or choose a folder on another disk"
        )
    # The process's number, so that two processes never write one folder.
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
    except (SafetensorError, RuntimeError) as error:  # what the writers make of a full disk
        raise OSError(f"out={folder}: could not be written ({error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, folder: Path) -> bool:
    """Rename a finished folder; return False if the same content is there already.

    Raises:
        ValueError: something else is there.
    """
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(part, folder)
        return True
    ours, theirs = (
        {path.relative_to(root) for path in root.rglob("*") if not path.is_dir()}
        for root in (part, folder)
    )
    foreign = sorted(theirs - ours)
    if foreign:
        raise _occupied(folder, f"it holds {foreign[0]}")
    differing = [
        name
        for name in sorted(ours)
        if name not in theirs or not filecmp.cmp(part / name, folder / name, shallow=False)
    ]
    if differing:
        raise _occupied(folder, f"its {differing[0]} is missing or differs")
    return False


def _occupied(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"out={folder}: not empty and not this export ({what}); expected a new or empty folder: "
        f"choose another, or delete this one"
    )
