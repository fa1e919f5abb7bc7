"""Downloading from the Hugging Face hub: only the needed files, cached and resumable."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from sag_dit.checkpoints.files import read_json, weights_files, weights_name

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")


class NotDownloadedError(Exception):
    """A repository is neither in the cache nor could it be downloaded; says why.

    Example::

        try:
            folder = snapshot("stabilityai/sd-vae-ft-ema", ("",))
        except NotDownloadedError as error:
            print(error)
    """


def snapshot(repository: str, folders: tuple[str, ...]) -> Path:
    """Return the folder of a repository's files, downloading what is not in the cache.

    ``folders`` are those whose weights are needed, "" being the repository's root.

    Raises:
        NotDownloadedError: the network, the hub or the repository's name is the matter.
    """
    from huggingface_hub import HfApi, snapshot_download

    there = cached(repository, folders)
    if there is not None:
        return there
    try:
        info = HfApi().model_info(repository, timeout=10)
        needed = needed_files((file.rfilename for file in info.siblings or ()), folders)
        return Path(snapshot_download(repository, allow_patterns=needed))
    except Exception as error:  # the hub's client changes its HTTP library, and so the types
        raise NotDownloadedError(_reason(error)) from error


def cached(repository: str, folders: tuple[str, ...]) -> Path | None:
    """Return the folder of a repository's files if all that is needed is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    # Not asked of snapshot_download, which misses every file of the repository that is not needed.
    landmark = "config.json" if "" in folders else "model_index.json"
    found = try_to_load_from_cache(repository, landmark)
    there = isinstance(found, str) and _is_complete(Path(found).parent, folders)
    return Path(str(found)).parent if there else None


def whole(repository: str) -> Path:
    """Return the folder of a diffusers pipeline with all its parts, downloading what is missing.

    Raises:
        ValueError: it could not be downloaded.
    """
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(repository))
    except Exception as error:  # the hub's client changes its HTTP library, and so the types
        raise ValueError(
            f"{repository}: not all of this pipeline is in the hub's cache, and it could not be "
            f"downloaded ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: " + str(error).strip().split("\n")[0][:200]


def needed_files(names: Iterable[str], folders: tuple[str, ...]) -> list[str]:
    """Choose from a repository's files the configs, and one set of weights for each folder."""
    contents: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        contents[folder].append(file)
    wanted = []
    for folder, files in contents.items():
        prefix = f"{folder}/" if folder else ""
        chosen = [file for file in files if file in CONFIGS]
        weights = weights_name(files) if folder in folders else None
        if weights:
            chosen.append(weights)
            if weights.endswith(".json"):
                # An index is named model.safetensors.index.json or ...index.fp16.json, its shards
                # model-00001-of-00002.safetensors or model.fp16-00001-of-00002.safetensors.
                stem, kind, *_, last, _ = weights.split(".")
                shard = stem if last == "index" else f"{stem}.{last}"
                chosen.append(f"{shard}-*.{kind}")
        wanted += [prefix + file for file in chosen]
    return wanted


def _is_complete(cached: Path, folders: tuple[str, ...]) -> bool:
    """Whether a download has all that is needed; one that was interrupted has some."""
    index = cached / "model_index.json"
    # A pipeline with a UNet has no transformer to wait for.
    absent = {"transformer"} - set(read_json(index)) if index.is_file() else set()
    return all(
        (cached / folder / "config.json").is_file() and weights_files(cached / folder)
        for folder in folders
        if folder not in absent
    )
