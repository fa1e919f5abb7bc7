"""Folders of other trainers: which file in them holds the weights, or what command makes one.

accelerate and the hub keep ``model.safetensors`` or ``pytorch_model.bin``, perhaps in pieces with
an index; DeepSpeed keeps ``global_step5/mp_rank_00_model_states.pt``, torch.distributed a folder
with ``.metadata``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sag_dit.checkpoints import files
from sag_dit.checkpoints.sets import AVERAGE

STEMS = ("model", "pytorch_model", "pytorch_model_fsdp")
"""What accelerate and transformers call weights."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")
NO_WEIGHTS = re.compile(
    r"(?:optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states|dl_state_dict)"
    r".*|.*optim_states"
)
"""Stems of what trainers keep beside weights."""
PIECES = ".metadata"
"""The file that makes a folder a torch.distributed checkpoint."""


def weights_of(folder: Path) -> tuple[Path, ...]:
    """Return the files of the weights in a folder, none if it holds none.

    Raises:
        ValueError: they are in pieces that a command has to join, or there are several files.
    """
    # DeepSpeed's folder of a step is named in `latest`, or else it is the newest.
    for place in (*_steps(folder), folder):
        refuse_pieces(place)
        whole = sorted(place.glob("mp_rank_*_model_states.pt"))
        if len(whole) == 1:
            return tuple(whole)
        if whole or any(place.glob("*_model_states.pt")):
            raise ValueError(_in_pieces_of_deepspeed(place))
    for inner in sorted(folder.glob("pytorch_model*")):
        if inner.is_dir():
            refuse_pieces(inner)
            return weights_of(inner)
    known = files.weights_files(folder, STEMS)
    if known:
        beside = [file for file in _all_weights(folder) if file not in known and _is_set(file.stem)]
        if beside:
            raise ValueError(_several(folder, [known[0], *beside]))
        return known
    index = files.weights_name((path.name for path in folder.iterdir()), STEMS)
    if index is not None:
        raise ValueError(f"{folder}: not all files that {index} names are there; fetch the others")
    found = _all_weights(folder)
    if len(found) > 1:
        raise ValueError(_several(folder, found))
    return tuple(found)


def _all_weights(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in SUFFIXES and file.is_file() and not NO_WEIGHTS.fullmatch(file.stem)
    ]


def _is_set(stem: str) -> bool:
    """Whether a file is called as an average, or as the second model that accelerate keeps."""
    return bool(AVERAGE.search(stem) or re.fullmatch(rf"({'|'.join(STEMS)})_\d+", stem))


def _several(folder: Path, found: Sequence[Path]) -> str:
    names = ", ".join(file.name for file in found[:5]) + ", ..." * (len(found) > 5)
    return f"{folder}: a folder of {len(found)} weight files ({names}); pass the path of one"


def _steps(folder: Path) -> list[Path]:
    """Return the folder of DeepSpeed's newest step, if there is one."""
    latest = folder / "latest"
    if latest.is_file() and latest.stat().st_size < 256:
        named = latest.read_text(encoding="utf-8", errors="replace").strip()
        found = [each for each in folder.iterdir() if each.name == named and each.is_dir()]
        if found:
            return found
    numbered = {
        int(match[1]): each
        for each in folder.glob("global_step*")
        if each.is_dir() and (match := re.fullmatch(r"global_step(\d{1,18})", each.name))
    }
    return [numbered[max(numbered)]] if numbered else []


def refuse_pieces(folder: Path) -> None:
    """Refuse a torch.distributed checkpoint, whose ``.metadata`` only unpickling reads.

    Raises:
        ValueError: it is one; the command that makes a file of it is named.
    """
    if not (folder / PIECES).is_file():
        return
    # Lightning's has our config in a file of its own, which its own command keeps.
    if (folder / "meta.pt").is_file():
        command = f"python -m lightning.fabric.utilities.consolidate_checkpoint {folder}"
        made = f"{folder}.consolidated"
    else:
        made = f"{folder}.pt"
        command = (
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {made}"
        )
    raise ValueError(
        f"{folder}: a torch.distributed checkpoint, in pieces that only unpickling reads; if you "
        f"trust where it comes from, run `{command}` and pass {made}"
    )


def keeps_state(folder: Path) -> bool:
    """Whether a folder is one to go on training from, whose weights are therefore raw."""
    return any(NO_WEIGHTS.fullmatch(path.stem) for path in folder.iterdir())


def is_deepspeed(value: Mapping[str, Any]) -> bool:
    """Whether a file's content is DeepSpeed's, which has the network under ``module``."""
    return isinstance(value.get("module"), Mapping) and bool(
        {"ds_version", "ds_config", "buffer_names", "dp_world_size"} & value.keys()
    )


def whole_module(value: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the network that DeepSpeed keeps whole, as it does without ZeRO and with ZeRO 1 or 2.

    Raises:
        ValueError: ZeRO 3 left it in pieces; the command that joins them is named.
    """
    module: Mapping[str, Any] = value["module"]
    tensors = [item for item in module.values() if isinstance(item, Tensor)]
    if tensors and any(tensor.numel() == 0 for tensor in tensors):
        raise ValueError(_in_pieces_of_deepspeed(path.parent))
    return module


def _in_pieces_of_deepspeed(place: Path) -> str:
    root = place.parent
    return (
        f"{place}: DeepSpeed left the weights in pieces (ZeRO 3 or several model ranks); run "
        f"`python {root / 'zero_to_fp32.py'} {root} {root / 'whole'}`, which DeepSpeed put there, "
        f"and pass {root / 'whole'}"
    )
