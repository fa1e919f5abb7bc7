"""Names of checkpoints: the bundled model, published ones, paths, and the hub's repositories."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from sag_dit import catalogue
from sag_dit.catalogue import Entry, aliases
from sag_dit.checkpoints import hub

FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")
WEIGHTS_FOLDER = "SAG_DIT_WEIGHTS"
"""The environment variable that names a folder of downloaded weights."""
PARTS = ("transformer", "vae")
"""What is needed of a pipeline's repository."""


DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"


@dataclass(frozen=True)
class Found:
    """Where a checkpoint lies on disk, and the short name it goes by.

    Example:
        >>> locate("digits").name
        'digits'
    """

    path: Path
    name: str


def names() -> tuple[str, ...]:
    """Return the names that ``load`` knows beside paths."""
    return (*catalogue.entries("bundled", "model"), *aliases("model"))


def local_folders() -> list[Path]:
    """Return the folders where downloaded weights are looked for."""
    stated = os.environ.get(WEIGHTS_FOLDER)
    return [Path(folder).expanduser() for folder in (stated, "pretrained_models") if folder]


def locate(ckpt: str | Path) -> Found:
    """Find a checkpoint by published name, path or hub repository, in this order.

    A published model is looked for in $SAG_DIT_WEIGHTS and ./pretrained_models, under its official
    file name or as a diffusers folder, then in the hub's cache, then at the hub.

    Raises:
        ValueError: it is nowhere; the nearest names and all places are listed.
    """
    if isinstance(ckpt, str):
        name = aliases("model").get(ckpt, ckpt)
        if name in catalogue.entries("bundled"):
            return Found(_bundled(catalogue.entries("bundled")[name]), name)
        if name in catalogue.entries("model"):
            return Found(_published(catalogue.entries("model")[name]), name)
        if name in catalogue.entries("classifier"):
            raise ValueError(
                f"ckpt={ckpt}: a classifier, which guides and does not draw; set "
                f"guidance.classifier.classifier={ckpt}, and ckpt to the model that it guides"
            )
    path = Path(ckpt).expanduser()
    if path.exists():
        return Found(path, _short_name(path))
    tried = [str(path.absolute())]
    text = str(ckpt)
    # `folder/name` is a path if there is such a folder, whatever the hub holds.
    named_as_file = path.suffix in FILE_SUFFIXES
    if hub.REPOSITORY.fullmatch(text) and not named_as_file and not path.parent.exists():
        try:
            return Found(hub.snapshot(text, PARTS), path.name)
        except hub.NotDownloadedError as error:
            tried.append(f"the hub's repository {text} ({error})")
    nearest = difflib.get_close_matches(text, names(), n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
    raise ValueError(
        f"ckpt={text!r}: no such checkpoint{hint}\n"
        f"expected a published name ({', '.join(names())}), a .pt, .ckpt or .safetensors file, a "
        f"run folder, a diffusers folder, or a hub repository\n"
        f"looked for {'; '.join(tried)}"
    )


def _bundled(model: Entry) -> Path:
    (file,) = _local_places(model)
    if not file.is_file():
        raise ValueError(
            f"ckpt={model.name}: the bundled model is missing from {file.parent}; install the "
            f"package again, or train the model with `python train.py experiment={model.name}`"
        )
    return file.parent


def _published(model: Entry) -> Path:
    # Downloaded by hand, as the official file or as a diffusers folder.
    here = _there(model)
    if here is not None:
        return here
    # Else at the hub, where not all are.
    folders = ", ".join(str(folder.absolute()) for folder in local_folders())
    if not model.repository:
        raise ValueError(
            f"{model.name}: the weights are not here, and no hub has them\n"
            f"looked for {model.file} in {folders} (${WEIGHTS_FOLDER} names a further folder)\n"
            f"download {model.url} as {model.file} into one of them, or pass its path instead of "
            f"the name"
        )
    try:
        return hub.snapshot(model.repository, PARTS)
    except hub.NotDownloadedError as error:
        raise ValueError(
            f"ckpt={model.name}: the weights are not here and could not be downloaded\n"
            f"looked for {model.file} and the folder {model.repository.split('/')[1]} in {folders} "
            f"(${WEIGHTS_FOLDER} names a further folder); for {model.repository} in the hub's "
            f"cache; and at the hub: {error}\n"
            f"with a network elsewhere, download {model.url} or {model.repository}, "
            f"and pass its path: ckpt=PATH"
        ) from None


def _local_places(entry: Entry) -> list[Path]:
    """Return where a checkpoint is looked for on this machine, in this order."""
    if entry.kind == "bundled":
        return [Path(__file__).parent / str(entry.file)]
    names = [entry.file, entry.repository and entry.repository.split("/")[-1]]
    return [folder / name for folder in local_folders() for name in names if name]


def _there(entry: Entry) -> Path | None:
    """Return the first of these places where the file, or the folder as a whole, is."""
    landmark = "config.json" if entry.kind == "autoencoder" else "model_index.json"
    places = (p for p in _local_places(entry) if p.is_file() or (p / landmark).is_file())
    return next(places, None)


def _parts(entry: Entry) -> tuple[str, ...]:
    """Return what is needed of a repository: its folders, or its root."""
    return ("",) if entry.kind == "autoencoder" else PARTS


@dataclass(frozen=True)
class Listed:
    """A checkpoint of the zoo, and whether it is here.

    Attributes:
        entry: what the catalogue says: name, licence, size, resolution and more.
        places: where it is looked for, in this order.
        found: where it is; None if it is not on this machine.

    Example::

        for each in listed():
            print(each.entry.name, each.found or each.places)
    """

    entry: Entry
    places: tuple[str, ...]
    found: Path | None


def listed() -> list[Listed]:
    """Return what can be loaded by name, and whether it is here; nothing is downloaded.

    Example:
        >>> first = listed()[0]
        >>> first.entry.name, first.entry.resolution, first.found is not None
        ('emoji', 64, True)
    """
    listed = []
    for each in catalogue.entries("bundled", "model", "classifier", "autoencoder").values():
        places, found = [str(place.absolute()) for place in _local_places(each)], _there(each)
        if each.repository:
            places.append(f"{each.repository} in the hub's cache")
            found = found or hub.cached(each.repository, _parts(each))
        listed.append(Listed(each, tuple(places), found))
    return listed


def _short_name(path: Path) -> str:
    """Return what a checkpoint is called: its file's stem, or its folder's name.

    A run's checkpoints/last.ckpt and a folder's model.safetensors say nothing: their run or folder
    does.
    """
    path = path.resolve()
    if path.is_file() and path.parent.name == "checkpoints":
        return path.parent.parent.name
    if path.is_file() and path.stem in ("model", "last"):
        return path.parent.name
    return path.stem if path.is_file() else path.name


def locate_classifier(classifier: str | Path) -> Found:
    """Find a classifier by published name or path.

    Raises:
        ValueError: it is nowhere; the places are listed.
    """
    name = str(classifier)
    known = catalogue.entries("classifier")
    if name in known:
        return Found(_published(known[name]), name)
    path = Path(classifier).expanduser()
    if path.is_file():
        return Found(path, _short_name(path))
    raise ValueError(
        f"classifier={name!r}: no such classifier; expected {', '.join(known)}, or the path "
        f"of such a file; looked for {path.absolute()}"
    )


def vae_repository(vae: str) -> str:
    """Return the hub repository of an autoencoder that is known by name, else what was given."""
    known = catalogue.entries("autoencoder").get(aliases("autoencoder").get(vae, vae))
    return vae if known is None else str(known.repository)


def locate_vae(vae: str | Path) -> Path:
    """Find an autoencoder: a folder, a diffusers pipeline's folder, or a hub repository.

    Raises:
        ValueError: it is nowhere; the places are listed.
    """
    path = Path(vae).expanduser()
    if (path / "model_index.json").is_file():
        path = path / "vae"
    if path.exists():
        return path
    repository = vae_repository(str(vae))
    folders = [folder / repository.split("/")[-1] for folder in local_folders()]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    try:
        if not hub.REPOSITORY.fullmatch(repository):
            raise hub.NotDownloadedError(f"{repository!r} is no repository's name")
        return hub.snapshot(repository, ("",))
    except hub.NotDownloadedError as error:
        raise ValueError(
            f"vae={vae}: the autoencoder of this latent model is not here and could not be "
            f"downloaded\n"
            f"looked for {', '.join(str(folder.absolute()) for folder in [path, *folders])}; for "
            f"{repository} in the hub's cache; and at the hub: {error}\n"
            f"pass a local folder with its config.json and weights: vae=PATH"
        ) from None
