"""Reading weight files: what a file is, is read from its first bytes; nothing is unpickled."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sag_dit.bounds import Bounds
from sag_dit.files import file_sha256
from sag_dit.untrusted import parse_json, read_json_as
from sag_dit.untrusted import read_json as read_json

EXPECTED = (
    "expected weights of a DiT: an official .pt (a state dict, or model, ema and args), a "
    "Lightning .ckpt of this package, a .safetensors file, or a diffusers folder"
)
METADATA_KEY = "sag_dit"
MAKES_BYTES = b"\nbytearray\n"
"""How a pickle of torch.save names the class that makes any number of bytes."""
_NUMPY = ("scalar", "_reconstruct")
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")


class Unused:
    """Stands for a value of numpy or pathlib beside the weights, of which nothing is built.

    Example:
        >>> vars(Unused("float64"))
        {}
    """

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


UNUSED = (
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _NUMPY),
    *(f"pathlib.{kind}" for kind in _PATHS),
    *(f"pathlib._local.{kind}" for kind in _PATHS),
)
"""The classes and functions by which numpy's numbers, arrays and random states, and paths, are
pickled. numpy's own would trust what a file says of types and sizes."""
WRAPPERS = ("module.", "denoiser.network.")
"""Prefixes of modules around a network: data parallel, and our LightningModule."""
INNER_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module"
    r"|_forward_module)\."
)
"""What torch and its companions put into names, at any place, for a module wrapped around one."""
NETWORK = ("diffusion_pytorch_model",)
"""What diffusers calls weights."""
ENDINGS = (
    r"(?:(?P<variant>\.\w+)?\.(?P<single>safetensors|bin)"
    r"|\.(?P<sharded>safetensors|bin)\.index(?P<sharded_variant>\.\w+)?\.json)"
)


@dataclass(frozen=True)
class WeightsIndex:
    """What the index of sharded weights says: which file each tensor lies in.

    Example:
        >>> WeightsIndex({"pos_embed": "model-00001-of-00002.safetensors"}).weight_map["pos_embed"]
        'model-00001-of-00002.safetensors'
    """

    weight_map: Annotated[
        Mapping[str, str], Bounds(pattern=r"[\w.-]+", expected="names of files beside it")
    ]


def container(path: Path) -> Literal["zip", "pickle", "safetensors"]:
    """Tell from a file's first bytes how it holds its tensors.

    Raises:
        ValueError: it cannot be read, or holds no tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    if head[:4] == b"PK\x03\x04":
        return "zip"
    # A length of at most 100 MB and a JSON object; tested first, for the length may begin with 80.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    if head[:1] == b"\x80":
        return "pickle"
    if not head:
        found = "the file is empty"
    elif head.startswith(b"version https://git-lfs"):
        found = "the file is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    elif head.lstrip()[:1] == b"<":
        found = "the file is a web page, so perhaps its download was refused"
    else:
        found = f"the file begins with {head[:12]!r}"
    raise ValueError(f"{path}: {found}; {EXPECTED}")


def read_torch(path: Path) -> Any:
    """Read what torch.save wrote: tensors, plain values and argparse.Namespace, nothing else.

    Numbers and arrays of numpy, and paths, become :class:`Unused`.

    Raises:
        ValueError: the file is damaged, foreign, or holds objects that would have to be unpickled.
    """
    # Mapped, the optimizer's state in a training checkpoint is never read from disk. Only zipped
    # files can be; and by a path, torch would go by the extension.
    held = container(path)
    mapped = held == "zip" and path.suffix != ".safetensors"
    _refuse_bombs(path, held == "zip")
    try:
        allowed: list[Any] = [Namespace, *((Unused, name) for name in UNUSED)]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            if mapped:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise ValueError(f"{path}: damaged or no file of torch.save; {EXPECTED}") from None
        raise ValueError(
            f"{path}: refused, because it holds Python objects ({refused[1]}) and reading those "
            f"can run code; expected tensors, plain values, numbers of numpy, paths and an "
            f"argparse.Namespace. If you "
            f"trust where it comes from, save its state dict alone with torch.save and load that"
        ) from None
    except Exception as error:  # torch raises almost any type on a damaged file
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{path}: damaged, cut short, or no file of torch.save ({reason}); {EXPECTED}"
        ) from None


def _refuse_bombs(path: Path, zipped: bool) -> None:
    """Refuse an archive that is packed, and a pickle that makes bytes by their number.

    torch.save does neither; torch's reader allows both, and so would fill any memory.

    Raises:
        ValueError: it is such a file, or no archive.
    """
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                unpacked, size = sum(each.file_size for each in entries), path.stat().st_size
                if unpacked > size or any(each.compress_type for each in entries):
                    raise ValueError(f"{size:,} bytes that unpack to {unpacked:,}")
                pickles = [archive.read(e) for e in entries if e.filename.endswith(".pkl")]
                makes_bytes = any(MAKES_BYTES in each for each in pickles)
        else:
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                makes_bytes = content.find(MAKES_BYTES) >= 0
        if makes_bytes:
            raise ValueError("a bytearray, made by its length alone")
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: damaged, cut short, or no file of torch.save ({error}); {EXPECTED}"
        ) from None


def refuse_spread(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are larger than what is stored of them, or not stored at all.

    Strides may repeat one number a billion times, and many tensors be views of the same numbers.

    Raises:
        ValueError: there is one; it is named.
    """
    stored: dict[int, int] = {}
    total = 0
    for name, tensor in state.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        there = tensor.untyped_storage().nbytes() if plain else 0
        # Not nbytes, which sparse tensors have not.
        size = tensor.numel() * tensor.element_size()
        if size > there:
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, of which {there:,} bytes are stored: "
                f"expected all of it, as torch.save stores tensors"
            )
        if plain:
            stored[tensor.untyped_storage().data_ptr()] = there
        total += size
    if total > 2 * sum(stored.values()):
        raise ValueError(
            f"{path}: tensors of {total:,} bytes share {sum(stored.values()):,} stored ones: "
            f"expected weights of their own"
        )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, and the config that this package left in the metadata (empty if none).

    Raises:
        ValueError: the file is damaged or cut short.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            told = (file.metadata() or {}).get(METADATA_KEY, "{}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged, cut short, or no safetensors file ({error}); {EXPECTED}"
        ) from None
    config = parse_json(told, f"{path}: its metadata's {METADATA_KEY}")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: its metadata's {METADATA_KEY} is no JSON object but {config!r}")
    return state, config


def weights_name(names: Iterable[str], stems: Sequence[str] = NETWORK) -> str | None:
    """Choose a folder's weights: full precision, then safetensors, then one file.

    ``stems`` are what they may be called, diffusers' way by default. A sharded file is named by its
    index. None if there are no weights.
    """
    pattern = re.compile(f"(?:{'|'.join(stems)}){ENDINGS}")
    found = [match for name in names if (match := pattern.fullmatch(name))]
    found.sort(
        key=lambda match: (
            match["variant"] or match["sharded_variant"] or "",
            (match["single"] or match["sharded"]) != "safetensors",
            match["single"] is None,
        )
    )
    return found[0].string if found else None


def weights_files(folder: Path, stems: Sequence[str] = NETWORK) -> tuple[Path, ...]:
    """Return the weight files of a folder, none if there are none or some are missing."""
    name = weights_name((path.name for path in folder.glob("*")), stems)
    if name is None:
        return ()
    files = [folder / name]
    if name.endswith(".json"):
        shards = read_json_as(folder / name, WeightsIndex, open=True).weight_map.values()
        files = [folder / shard for shard in sorted(set(shards))]
    return tuple(files) if all(file.is_file() for file in files) else ()


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Read and join the weight files of a folder."""
    state: dict[str, Tensor] = {}
    for file in files:
        part = read_safetensors(file)[0] if container(file) == "safetensors" else read_torch(file)
        state.update(tensors(part, file))
    return state


def tensors(value: Any, path: Path) -> Mapping[str, Tensor]:
    """Return a mapping of names to tensors as such.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, Mapping) and value:
        strange = [name for name, item in value.items() if not isinstance(item, Tensor)]
        if not strange:
            refuse_spread(value, path)
            return value
        found = f"found {', '.join(str(name) for name in strange[:5])}"
    else:
        found = f"found an empty or foreign {type(value).__name__}"
    raise ValueError(f"{path}: {found} where tensors should be; {EXPECTED}")


def without_wrappers(name: str) -> str:
    """Return a parameter's name without what was wrapped around the modules in it.

    Example:
        >>> without_wrappers("blocks.0._orig_mod.attn._checkpoint_wrapped_module.qkv.weight")
        'blocks.0.attn.qkv.weight'
    """
    return INNER_WRAPPERS.sub("", name)


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a network's own entries, without the names of what was wrapped around it."""
    entries = {without_wrappers(name): tensor for name, tensor in state.items()}
    for _ in WRAPPERS:
        for prefix in WRAPPERS:
            inner = {
                name.removeprefix(prefix): tensor
                for name, tensor in entries.items()
                if name.startswith(prefix)
            }
            entries = inner or entries
    return entries


def sha256(files: Sequence[Path]) -> str:
    """Return the sha256 of one file, or of the list of several files' sha256.

    A file in a model hub's cache is compared with the sha256 that the hub published for it.

    Raises:
        ValueError: a downloaded file is not what was published.
    """
    digests = []
    for path in files:
        digests.append(file_sha256(path))
        # The hub's cache links to large files that it names by their published sha256.
        published = path.readlink().name if path.is_symlink() else ""
        if re.fullmatch(r"[0-9a-f]{64}", published) and published != digests[-1]:
            raise ValueError(
                f"{path}: sha256 is {digests[-1]}, expected {published}; the download is damaged: "
                f"delete {path.resolve()} and repeat the command"
            )
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
