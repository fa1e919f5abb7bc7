"""Names of checkpoints: the bundled model, published ones, paths, and the hub's repositories."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from sag_dit.checkpoints import hub, published

BUNDLED = ("digits", "patches")
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")
WEIGHTS_FOLDER = "SAG_DIT_WEIGHTS"
"""The environment variable that names a folder of downloaded weights."""


@dataclass(frozen=True)
class Published:
    """A published model: its official file, its address, and its hub repository if it has one."""

    file: str
    url: str
    repository: str = ""


def _dit(side: int) -> Published:
    file = f"DiT-XL-2-{side}x{side}.pt"
    official = f"https://dl.fbaipublicfiles.com/DiT/models/{file}"
    return Published(file, official, f"facebook/DiT-XL-2-{side}")


def _openai(file: str) -> Published:
    variant = published.by_file(file)
    if variant is None:
        raise KeyError(file)
    return Published(file, variant.url + file)


ZOO = {
    "DiT-XL-2": _dit(256),
    "DiT-XL-2-512": _dit(512),
    "SiT-XL-2": Published(
        "SiT-XL-2-256x256.pt",
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
        "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
    ),
    "ADM-64": _openai("64x64_diffusion.pt"),
    "ADM-128": _openai("128x128_diffusion.pt"),
    "ADM-256": _openai("256x256_diffusion.pt"),
    "ADM-256-uncond": _openai("256x256_diffusion_uncond.pt"),
    "ADM-512": _openai("512x512_diffusion.pt"),
    "ADM-LSUN-bedroom": _openai("lsun_bedroom.pt"),
    "ADM-LSUN-cat": _openai("lsun_cat.pt"),
    "ADM-LSUN-horse": _openai("lsun_horse.pt"),
    "ADM-LSUN-horse-nodropout": _openai("lsun_horse_nodropout.pt"),
    "IDDPM-ImageNet-64": _openai("imagenet64_cond_270M_250K.pt"),
    "IDDPM-ImageNet-64-uncond": _openai("imagenet64_uncond_100M_1500K.pt"),
    "IDDPM-ImageNet-64-uncond-vlb": _openai("imagenet64_uncond_vlb_100M_1500K.pt"),
    "IDDPM-CIFAR-10": _openai("cifar10_uncond_50M_500K.pt"),
    "IDDPM-CIFAR-10-vlb": _openai("cifar10_uncond_vlb_50M_500K.pt"),
    "IDDPM-LSUN-bedroom": _openai("lsun_uncond_100M_2400K_bs64.pt"),
    "IDDPM-LSUN-bedroom-1200K": _openai("lsun_uncond_100M_1200K_bs128.pt"),
}
ALIASES = {"DiT-XL-2-256": "DiT-XL-2", "SiT-XL-2-256": "SiT-XL-2"}
CLASSIFIERS = {
    f"ADM-classifier-{side}": _openai(f"{side}x{side}_classifier.pt")
    for side in (64, 128, 256, 512)
}
"""Classifiers of noisy images, which guide and do not draw."""

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
VAES = {
    name: f"stabilityai/sd-vae-ft-{kind}"
    for kind in ("ema", "mse")
    for name in (kind, f"sd-vae-ft-{kind}")
}


@dataclass(frozen=True)
class Found:
    """Where a checkpoint lies on disk, and the short name it goes by."""

    path: Path
    name: str


def names() -> tuple[str, ...]:
    """Return the names that ``load`` knows beside paths."""
    return (*BUNDLED, *ZOO, *ALIASES)


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
        name = ALIASES.get(ckpt, ckpt)
        if name in BUNDLED:
            return Found(_bundled(name), name)
        if name in ZOO:
            return Found(_published(name, ZOO[name]), name)
        if name in CLASSIFIERS:
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
            return Found(hub.snapshot(text, ("transformer", "vae")), path.name)
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


def _bundled(name: str) -> Path:
    folder = Path(__file__).with_name(name)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(
            f"ckpt={name}: the bundled model is missing from {folder}; install the package "
            f"again, or train the model with `python train.py experiment={name}`"
        )
    return folder


def _published(name: str, model: Published) -> Path:
    for folder in local_folders():
        if (folder / model.file).is_file():
            return folder / model.file
        diffusers = folder / model.repository.split("/")[-1]
        if model.repository and (diffusers / "model_index.json").is_file():
            return diffusers
    folders = ", ".join(str(folder.absolute()) for folder in local_folders())
    if not model.repository:
        raise ValueError(
            f"{name}: the weights are not here, and no hub has them\n"
            f"looked for {model.file} in {folders} (${WEIGHTS_FOLDER} names a further folder)\n"
            f"download {model.url} as {model.file} into one of them, or pass its path instead of "
            f"the name"
        )
    try:
        return hub.snapshot(model.repository, ("transformer", "vae"))
    except hub.NotDownloadedError as error:
        raise ValueError(
            f"ckpt={name}: the weights are not here and could not be downloaded\n"
            f"looked for {model.file} and the folder {model.repository.split('/')[1]} in {folders} "
            f"(${WEIGHTS_FOLDER} names a further folder); for {model.repository} in the hub's "
            f"cache; and at the hub: {error}\n"
            f"with a network elsewhere, download {model.url} or {model.repository}, "
            f"and pass its path: ckpt=PATH"
        ) from None


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
    if name in CLASSIFIERS:
        return Found(_published(name, CLASSIFIERS[name]), name)
    path = Path(classifier).expanduser()
    if path.is_file():
        return Found(path, _short_name(path))
    raise ValueError(
        f"classifier={name!r}: no such classifier; expected {', '.join(CLASSIFIERS)}, or the path "
        f"of such a file; looked for {path.absolute()}"
    )


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
    repository = VAES.get(str(vae), str(vae))
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
