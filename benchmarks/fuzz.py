"""Give every loader damaged and hostile files: ``python -m benchmarks.fuzz`` (``make fuzz``).

A small honest file of each kind is changed at random: bytes flipped, cut, repeated, joined with
another's; in JSON and YAML also values that mean nothing (NaN, 1e9, deep nests, other types). Each
loader may read the result or refuse it with a ValueError or an OSError. Counted as failures are

- code that ran: an import, a process, ``exec`` or a file opened for writing, seen by an audit hook;
- any other exception;
- more than :data:`SECONDS` for one file;
- more memory than twice the file's size and 256 MB.

``--cases 100000`` is the full measure, ``--seed`` another series; the same seed gives the same
files.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import sag_dit
from sag_dit.checkpoints.config import describe
from sag_dit.checkpoints.files import METADATA_KEY
from sag_dit.checkpoints.formats import read_scheduler
from sag_dit.codec import VAECodec
from sag_dit.data.crop import read_crop
from sag_dit.data.encoding import LatentFolder
from sag_dit.data.images import find_images
from sag_dit.data.latents import LatentData
from sag_dit.data.requests import read_requests
from sag_dit.data.shards import Index, pack, read_index
from sag_dit.denoiser import ClassConditional
from sag_dit.evaluation.images import open_images
from sag_dit.models import DiT
from sag_dit.output.claim import claim, recorded
from sag_dit.process import DDPM
from sag_dit.study.results import Record, read_record, write_record
from sag_dit.training.loggers import CSVLog

SECONDS = 10
MEMORY = 256 << 20
CODE = ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
"""Audit events that a file that is read must never cause; imports are told apart by their time."""

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**9, 1e9, 1e308, -0.5, float("nan"), float("inf")),
    *("", "ab", "../../etc/passwd", "/", "\u0000", "x" * 10_000, [], {}, [[]], {"a": 1}),
    *([1] * 1_000, {"_target_": "os.system", "command": "true"}),
)
"""What stands in the place of a value of JSON or YAML."""
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
VAE: dict[str, Any] = {"latent_channels": 4, "scaling_factor": 0.5, "latents_mean": [0.1] * 4}


@dataclass(frozen=True)
class Kind:
    """A kind of file: a folder that holds an honest one, which file is changed, who reads it.

    One that ``writes`` goes on with its file.
    """

    folder: Path
    file: str
    read: Callable[[Path], object]
    writes: bool = False

    @property
    def is_text(self) -> bool:
        """Whether its values can be changed one by one."""
        return self.file.endswith((".json", ".jsonl", ".yaml"))


def network() -> ClassConditional:
    """A small DiT of 8 x 8 grey images, with the weights that it begins with."""
    return ClassConditional(
        DiT(8, 2, 1, hidden_size=16, depth=1, num_heads=2, num_classes=4, learn_sigma=False),
        DDPM(),
    )


def _raw(folder: Path) -> object:
    return sag_dit.load(folder / "last.ckpt", ema=False)


def labels(path: Path) -> object:
    """Read a set of images: its classes, then all pixels."""
    images = open_images(path)
    return images.labels, list(images.read(4))


def kinds(root: Path) -> Iterator[tuple[str, Kind]]:
    """Write an honest file of every kind and tell how it is read."""
    denoiser = network()
    state = {name: part.contiguous() for name, part in denoiser.network.state_dict().items()}
    config = describe(denoiser)

    def new(name: str) -> Path:
        (root / name).mkdir()
        return root / name

    # Weights, as the programs of this field leave them.
    folder = new("official")
    torch.save({"model": state, "ema": state}, folder / "model.pt")
    (folder / "model.json").write_text(json.dumps({"model": {"num_heads": 2}}))
    yield "official .pt", Kind(folder, "model.pt", lambda f: sag_dit.load(f / "model.pt"))
    folder = new("legacy")
    (folder / "old.json").write_text(json.dumps({"model": {"num_heads": 2}}))
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    yield "legacy .pt", Kind(folder, "old.pt", lambda f: sag_dit.load(f / "old.pt"))
    folder = new("trainer")
    beside = {"args": {"model": "DiT-S/2"}, "best": np.float64(3.2), "rng": np.random.get_state()}
    raw = {f"model.{name}": part for name, part in state.items()}
    average = {f"model_ema.{name}": part for name, part in state.items()}
    torch.save({"state_dict": raw | average, **beside}, folder / "epoch.pt")
    yield "trainer's .pt", Kind(folder, "epoch.pt", sag_dit.load)
    folder = new("deepspeed")
    (folder / "global_step5").mkdir()
    module = {f"module.{name}": part for name, part in state.items()}
    name = "global_step5/mp_rank_00_model_states.pt"
    torch.save({"module": module, "ds_version": "0.14", "buffer_names": []}, folder / name)
    yield "DeepSpeed", Kind(folder, name, sag_dit.load)
    folder = new("accelerate")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "hidden_size": 16}))
    yield "accelerate", Kind(folder, "pytorch_model.bin", sag_dit.load)
    folder = new("lightning")
    parts = {f"denoiser.network.{name}": part for name, part in state.items()}
    torch.save({"state_dict": parts, "hyper_parameters": config}, folder / "last.ckpt")
    yield ".ckpt", Kind(folder, "last.ckpt", _raw)
    folder = new("ours")
    metadata = {METADATA_KEY: json.dumps(config)}
    save_file(state, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text(json.dumps(config))
    yield ".safetensors", Kind(folder, "model.safetensors", sag_dit.load)
    yield "config.json", Kind(folder, "config.json", sag_dit.load)

    # Images, alone and as sets.
    drawn = np.random.default_rng(0)
    pixels = drawn.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for ending in ("png", "jpg", "webp", "bmp", "tiff"):
        folder = new(ending)
        Image.fromarray(pixels).save(folder / f"image.{ending}")
        name = f"image.{ending}"
        yield f".{ending}", Kind(folder, name, lambda f, n=name: read_crop(f / n, 8))  # type: ignore[misc]
    folder = new("sampled")
    (folder / "images").mkdir()
    rows = []
    for index in range(3):
        Image.fromarray(pixels).save(folder / "images" / f"{index:06d}.png")
        rows.append(json.dumps({"index": index, "label": index}))
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    yield "manifest.jsonl", Kind(folder, "manifest.jsonl", labels)
    folder = new("npz")
    sets = drawn.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "set.npz", arr_0=sets, arr_1=np.arange(4))
    yield ".npz", Kind(folder, "set.npz", lambda f: labels(f / "set.npz"))

    folder = new("archives")
    images = {f"{number}.png": number for number in range(3)}
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in images:
            packed.write(root / "png" / "image.png", name)
        packed.writestr("dataset.json", json.dumps({"labels": [*images.items()]}))
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name in images:
            tar.add(root / "png" / "image.png", name)
    (folder / "labels.csv").write_text("file,label\n0.png,cat\n1.png,dog\n2.png,cat\n")
    (folder / "labels.json").write_text(json.dumps({"labels": [*images.items()]}))
    yield ".zip", Kind(folder, "set.zip", lambda f: labels(f / "set.zip"))
    # Its list is kept in the cache.
    yield ".tar", Kind(folder, "set.tar", lambda f: labels(f / "set.tar"), writes=True)
    for name in ("labels.csv", "labels.json"):
        stated = lambda f, n=name: find_images(f / "set.zip", str(f / n))  # noqa: E731
        yield name, Kind(folder, name, stated)  # type: ignore[misc]

    described = {"0.png": (root / "png" / "image.png").read_bytes(), "0.json": b'{"label": 1}'}
    with tarfile.open(folder / "described.tar", "w") as tar:
        for name, content in described.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    by_key = lambda f: find_images(f / "described.tar", "label")  # noqa: E731
    yield "described .tar", Kind(folder, "described.tar", by_key, writes=True)

    # What stands beside: requests, latents.
    folder = new("requests")
    (folder / "requests.csv").write_text("seed,class\n0,2\n1,cat\n7,3\n")
    names = ("cat", "dog", "2", "bird")
    read = lambda f: read_requests(f / "requests.csv", names)  # noqa: E731
    yield "requests", Kind(folder, "requests.csv", read)
    folder = new("latents")
    write_latents(folder)
    yield "index.json", Kind(folder, "index.json", latents)
    yield "latents", Kind(folder, "latents-00000.safetensors", latents)
    yield "latents' config.json", Kind(folder, "config.json", latents)

    folder = new("edm2")
    for number in range(2):
        np.save(folder / f"{number}.npy", drawn.random((8, 2, 2), dtype=np.float32))
    named = [[f"{number}.npy", number] for number in range(2)]
    (folder / "dataset.json").write_text(json.dumps({"labels": named}))
    raw = lambda f: LatentData(f, batch_size=2, workers=0).dataset[0]  # noqa: E731
    yield ".npy", Kind(folder, "0.npy", raw)
    yield "dataset.json", Kind(folder, "dataset.json", raw)

    # What runs leave, and what diffusers does.
    folder = new("run")
    claim(folder, {"steps": 20, "layers": ["a", "b"]}, {"data": {"root": "photos"}}, "images")
    log = CSVLog(folder)
    log.log_metrics({"loss": 0.5, "lr": 1e-4}, step=1)
    log.log_metrics({"loss": 0.25, "lr": 1e-4}, step=2)
    yield "config.yaml", Kind(folder, "config.yaml", recorded)
    read_log = lambda f: CSVLog(f, first_step=2).log_metrics({"loss": 1.0}, step=2)  # noqa: E731
    yield "metrics.csv", Kind(folder, "logs/metrics.csv", read_log, writes=True)
    folder = new("records")
    write_record(folder, "1f3a", Record({"fid": 3.5}, {"fid": 0.1}, {"seed": 0, "model": "m"}))
    yield "record", Kind(folder, "1f3a.json", lambda f: read_record(f, "1f3a"))
    folder = new("scheduler")
    steps = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "shift": 1.0}
    words = {"beta_schedule": "linear", "prediction_type": "epsilon", "_class_name": "DDIM"}
    (folder / "scheduler.json").write_text(json.dumps(steps | words))
    yield (
        "scheduler",
        Kind(folder, "scheduler.json", lambda f: read_scheduler(f / "scheduler.json")),
    )
    folder = new("vae")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [8, 16], **VAE})
    )
    yield "vae", Kind(folder, "config.json", VAECodec)


def write_latents(folder: Path) -> None:
    """Write what encoding leaves of four images of two classes."""
    latents = LatentFolder(folder)
    latents.claim({"size": 16})
    moments = torch.rand(4, 2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).half()
    labels = torch.arange(4) % 2
    latents.write(0, pack(moments, labels, torch.arange(4)), 4, ())
    index = Index({"size": 16}, "vae", ("a", "b"), (4, 2, 2), "float16", 2, (0, 0), ())
    latents.finish(1, index)


def latents(folder: Path) -> object:
    """Read a folder of latents, as encoding and training do."""
    LatentFolder(folder).claim({"size": 16})
    read_index(folder)
    data = LatentData(folder, batch_size=2, seed=0, workers=0)
    return data.dataset[0]


def changed(content: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Return a file's content with one to three random changes."""
    data = bytearray(content)
    for _ in range(drawn.randint(1, 3)):
        at = drawn.randrange(len(data) + 1)
        length = drawn.choice((1, 2, 8, 64, 1024))
        match drawn.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << drawn.randrange(8)
            case 1:
                data[at : at + length] = drawn.randbytes(length)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * drawn.choice((1, 2, 50))
            case _:
                data[at:] = other[min(at, len(other)) :]
    return bytes(data)


def changed_text(text: str, drawn: random.Random) -> str:
    """Return JSON, or lines of it, with one value in the place of another."""
    lines = text.split("\n")
    number = drawn.randrange(len(lines)) if text.startswith('{"') and "\n" in text else -1
    value = yaml.safe_load(lines[number] if number >= 0 else text)
    if drawn.random() < 0.02:
        return drawn.choice(("[" * 100_000 + "]" * 100_000, LAUGHS))
    places = list(_places(value))
    parent, key = drawn.choice(places) if places else (None, None)
    if parent is None:
        value = drawn.choice(VALUES)
    elif drawn.random() < 0.15:
        del parent[key]
    else:
        parent[key] = drawn.choice(VALUES)
    changed = json.dumps(value)
    if number < 0:
        return changed
    lines[number] = changed
    return "\n".join(lines)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in list(items):
        yield value, key
        if isinstance(each, (dict, list)):
            yield from _places(each)


class Watch:
    """Sees what a loader does: code that runs, time and memory."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGALRM, self._late)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(CODE) and not _is_library(event):
            self.events.append(f"{event} {arguments[:1]!r:.80}")
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.events.append(f"open {arguments[0]!r:.80} for writing")

    @staticmethod
    def _late(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is called within."""
        self.events.clear()
        self.on = True
        signal.alarm(SECONDS)
        try:
            yield
        finally:
            signal.alarm(0)
            self.on = False


def _is_library(event: str) -> bool:
    """Whether ``compile`` or ``exec`` comes of Python itself: an import, a named tuple."""
    if event not in ("exec", "compile"):
        return False
    frame = sys._getframe(2)
    name = frame.f_code.co_filename
    return name.startswith("<frozen") or "/lib/python3" in name


def memory(what: str) -> int:
    """Return what Linux tells of this process's memory, in bytes: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(what)), 0)


def failure(kind: Kind, folder: Path, size: int, watch: Watch) -> str | None:
    """Have a changed file read, and return what went wrong."""
    with suppress(OSError):  # a kernel that cannot forget the highest mark tells of the first only
        Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.monotonic()
    try:
        with watch.watching():
            kind.read(folder)
    except (ValueError, OSError):
        pass
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:120]}"
    # A loader may have taken the alarm for a damaged file, so time is measured too.
    if time.monotonic() - began > SECONDS:
        return f"more than {SECONDS} s"
    events = [each for each in watch.events if not (kind.writes and each.endswith("for writing"))]
    if events:
        return f"code ran: {events[0]}"
    grown = memory("VmHWM") - before
    return f"{grown >> 20} MB more" if grown > 2 * size + MEMORY else None


def fuzz(
    cases: int,
    seed: int = 0,
    only: str = "",
    keep: Path | None = None,
    seconds: float = math.inf,
) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Read so many changed files; return the failures, and how many of each kind were read.

    After so many ``seconds`` it ends with those that it has read.
    """
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    drawn = random.Random(seed)
    failures: Counter[tuple[str, str]] = Counter()
    read: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        found = {name: kind for name, kind in kinds(root) if only in name}
        contents = {name: (kind.folder / kind.file).read_bytes() for name, kind in found.items()}
        watch = Watch()
        # Once as they are: what is imported late is there then, and an honest file is read.
        for kind in found.values():
            kind.read(kind.folder)
        until = time.monotonic() + seconds
        for case in range(cases):
            if time.monotonic() > until:
                break
            name, kind = drawn.choice(list(found.items()))
            content = contents[name]
            folder = root / "changed"
            shutil.copytree(kind.folder, folder)
            if kind.is_text and drawn.random() < 0.7:
                new = changed_text(content.decode(), drawn).encode()
            else:
                new = changed(content, contents[drawn.choice(list(contents))], drawn)
            (folder / kind.file).write_bytes(new)
            wrong = failure(kind, folder, max(len(content), len(new)), watch)
            read[name] += 1
            if wrong is not None:
                failures[name, wrong] += 1
                if keep and failures[name, wrong] == 1:
                    shutil.copytree(folder, keep / f"{case}-{name.strip('.')}")
            shutil.rmtree(folder)
    logging.disable(logging.NOTSET)
    return failures, read


def main() -> None:
    """Read many changed files, and tell of every failure once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after these")
    chosen = parser.parse_args()
    began = time.monotonic()
    failures, read = fuzz(chosen.cases, chosen.seed, chosen.only, chosen.keep, chosen.seconds)
    for (name, wrong), count in failures.most_common():
        print(f"{name}: {wrong} ({count} times)")
    told = ", ".join(f"{name} {count}" for name, count in sorted(read.items()))
    print(f"{sum(read.values())} files in {time.monotonic() - began:.0f} s: {told}")
    print(f"{sum(failures.values())} failures")
    raise SystemExit(min(1, len(failures)))


if __name__ == "__main__":
    main()
