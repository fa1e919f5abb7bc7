"""Train the bundled ``emoji`` from nothing, in a number of seconds: ``python -m benchmarks.emoji``.

    python -m benchmarks.emoji --out result --autoencoder-seconds 110 --seconds 200
    python -m benchmarks.emoji --out result --tiny

Autoencoder, latents by ``encode.py``, denoiser by ``train.py experiment=emoji``, export in half
precision, and a picture of samples. A few dozen steps of every entry of :data:`WAYS` tell how fast
the machine is; the faster way trains as many steps as fit into what is left of ``--seconds``, so
that the learning rate ends at zero in time. Every phase copies its result to ``--out`` at once:

- ``autoencoder.tar`` (a folder of diffusers), ``reconstructions.png``
- ``denoiser.tar`` (a folder that ``ckpt=`` takes, with ``vae=``), ``samples.png``
- ``denoiser-STEP.tar`` of an earlier step, if the held-out loss was lower there
- ``metrics.csv`` (losses by step), ``report.json`` (settings, times, speeds)
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.utils import make_grid

import sag_dit
from sag_dit.checkpoints import write_safetensors
from sag_dit.checkpoints.files import METADATA_KEY
from sag_dit.data.emoji import write_images
from sag_dit.guidance import CFG, PAG, SAG

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
BF16 = "trainer.precision=bf16-mixed"
WAYS = {"compiled": ["compile=true", BF16], "eager": []} if ON_GPU else {"eager": []}
"""Name -> arguments of ``train.py``, to be timed against each other; eager is float32 and TF32."""

PROBE_STEPS = 160
PROBE_LIMIT = 60.0
"""Seconds after which a way that does not get going is given up."""

MARGIN = 0.94
"""Of the steps that should fit, the share that is asked for."""

CLASSES = (
    *("happy face", "unhappy face", "monster", "animal face", "heart", "hand", "person", "worker"),
    *("athlete", "mammal", "bird", "plant", "food", "place", "vehicle", "flag"),
)
GUIDANCE = {
    "none": (),
    "CFG 2": (CFG(2.0),),
    "SAG 1": (SAG(1.0),),
    "CFG 2, SAG 1": (CFG(2.0), SAG(1.0)),
    "CFG 2, PAG 1": (CFG(2.0), PAG(1.0)),
}
"""Rows of the picture of samples, from the same noise."""

TINY = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "data.batch_size=16"]


class Run:
    """One training from nothing: where things lie, and what is told about them."""

    def __init__(self, out: Path, work: Path, tiny: bool) -> None:
        self.out, self.work, self.tiny = out, work, tiny
        self.report: dict[str, Any] = {"torch": torch.__version__}
        self.report["device"] = torch.cuda.get_device_name() if ON_GPU else "cpu"
        self._begun = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def note(self, name: str, value: object) -> None:
        """Tell, and write down at once."""
        self.report[name] = value
        print(f"[{time.monotonic() - self._begun:.0f} s] {name}: {value}", flush=True)
        text = json.dumps(self.report, indent=1)
        (self.out / "report.json").write_text(text, encoding="utf-8")

    def command(self, *arguments: str, limit: float | None = None) -> float:
        """Run a Python command in the repository's root and return its seconds.

        Raises:
            CalledProcessError: it failed.
            TimeoutExpired: it took longer than ``limit`` seconds.
        """
        print("python", *arguments, flush=True)
        begun = time.monotonic()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, timeout=limit)
        return time.monotonic() - begun

    def pack(self, folder: Path, *names: str) -> None:
        """Copy files of a folder to the output, as one archive with the folder's name."""
        with tarfile.open(self.out / f"{folder.name}.tar", "w") as archive:
            for name in names:
                archive.add(folder / name, f"{folder.name}/{name}")

    def autoencoder(self, seconds: float) -> None:
        """Train the autoencoder."""
        folder = self.work / "autoencoder"
        arguments = ["--out", str(folder), "--seconds", str(seconds)]
        arguments += ["--tiny"] * self.tiny
        took = self.command("-m", "benchmarks.emoji_autoencoder", *arguments)
        self.note("autoencoder_seconds", took)
        self.note("autoencoder", json.loads((folder / "measured.json").read_text()))
        self.pack(folder, "config.json", "diffusion_pytorch_model.safetensors", "measured.json")
        shutil.copy(folder / "reconstructions.png", self.out)

    def latents(self) -> None:
        """Write the images to train on and to tune with, and encode them."""
        begun = time.monotonic()
        for split in ("train", "tune"):
            images = self.work / "images" / split
            if not images.exists():
                write_images(images, split, 4 if self.tiny else None)  # type: ignore[arg-type]
            self.command(
                *("encode.py", f"data.root={images}", "data.size=64", "flip=false"),
                *(f"vae={self.work / 'autoencoder'}", f"out={self.work / 'latents' / split}"),
                *("slice_size=64", "trainer.devices=1"),
            )
        self.note("latents_seconds", time.monotonic() - begun)

    def train(self, out: Path, steps: int, *arguments: str, limit: float | None = None) -> float:
        """Run ``train.py`` for a number of steps, and return its seconds."""
        latents = self.work / "latents"
        return self.command(
            *("train.py", "experiment=emoji", f"out={out}", f"max_steps={steps}"),
            *(f"data.root={latents / 'train'}", f"data.validation={latents / 'tune'}"),
            *("trainer.devices=1", "trainer.enable_progress_bar=false"),
            *(["data.workers=4", "optimizer.fused=true"] if ON_GPU else []),
            *(TINY if self.tiny else []),
            *arguments,
            limit=limit,
        )

    def speed(self, way: str) -> tuple[float, float]:
        """Return steps a second of a way to train, and the seconds until they begin.

        Raises:
            CalledProcessError: this way does not work here.
            TimeoutExpired: it takes too long to begin.
        """
        steps, every = (12, 4) if self.tiny else (PROBE_STEPS, 20)
        out = self.work / f"probe-{way}"
        rest = [f"every_n_steps.{name}={2 * steps}" for name in ("checkpoint", "preview")]
        rest += [f"every_n_steps.validation={2 * steps}", f"every_n_steps.log={every}"]
        took = self.train(out, steps, *WAYS[way], *rest, limit=PROBE_LIMIT)
        rows = [row for row in read_metrics(out) if row.get("images/s")]
        rates = sorted(float(row["images/s"]) for row in rows[1:])
        rate = rates[len(rates) // 2] / (16 if self.tiny else 256)
        return rate, max(0.0, took - steps / rate)

    def denoiser(self, seconds: float, ways: list[str]) -> None:
        """Time the ways to train, and train by the one that gets furthest."""
        begun = time.monotonic()
        speeds = {}
        for way in ways:
            try:
                speeds[way] = self.speed(way)
            except subprocess.SubprocessError as error:
                self.note(f"failed_{way}", str(error)[-300:])
        self.note("steps_a_second_and_seconds_to_begin", speeds)
        left = seconds - (time.monotonic() - begun)
        counts = {way: int(MARGIN * rate * (left - start)) for way, (rate, start) in speeds.items()}
        way = max(counts, key=counts.__getitem__)
        steps = max(20, counts[way])
        self.note("steps", {"way": way, "steps": steps})
        out = self.work / "run"
        every = max(1, steps // 8)
        took = self.train(
            out,
            steps,
            *WAYS[way],
            *(f"every_n_steps.validation={every}", f"every_n_steps.checkpoint={4 * every}"),
            *(f"every_n_steps.preview={2 * steps}", f"schedule.num_warmup_steps={steps // 40}"),
            # Should the machine become slower: the weights are exported then too.
            f"trainer.max_time={clock(left)}",
        )
        self.note("training_seconds", took)
        self.note(
            "validation", [row["val/loss"] for row in read_metrics(out) if row.get("val/loss")]
        )
        shutil.copy(next(out.rglob("metrics.csv")), self.out / "metrics.csv")

    def export_best(self) -> None:
        """Write the checkpoint of the lowest loss on the emoji to tune with, unless it is late."""
        steps = {
            file: int(file.stem.rpartition("-")[2])
            for file in (self.work / "run" / "checkpoints").glob("best-*.ckpt")
        }
        self.note("best_steps", list(steps.values()))
        for file, step in steps.items():
            if step < 0.85 * self.report["steps"]["steps"]:
                model = sag_dit.load(file, vae=str(self.work / "autoencoder"))
                write_safetensors(self.work / "best", model.denoiser)
                self.export(self.work / "best", f"denoiser-{step}")

    def export(self, run: Path, name: str) -> Path:
        """Write the averaged weights in half precision, and return their folder."""
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(config, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        state = {name: part.half() for name, part in load_file(run / "model.safetensors").items()}
        metadata = {METADATA_KEY: json.dumps(config)}
        save_file(state, folder / "model.safetensors", metadata=metadata)
        self.pack(folder, "config.json", "model.safetensors")
        self.note("parameters", sum(part.numel() for part in state.values()))
        return folder

    def samples(self, folder: Path) -> None:
        """Draw the same classes from the same noise, a row for each guidance."""
        begun = time.monotonic()
        model = sag_dit.load(folder, vae=str(self.work / "autoencoder"))
        device = "cuda" if ON_GPU else "cpu"
        model.denoiser.to(device)
        model.codec.to(device)
        rows = [
            sag_dit.sample(
                model, CLASSES, guidance=terms, steps=2 if self.tiny else 50, batch_size=16
            )
            for terms in GUIDANCE.values()
        ]
        grid = make_grid(torch.cat(rows), nrow=len(CLASSES), padding=1)
        picture = Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())
        size = (picture.width * 2, picture.height * 2)
        picture.resize(size, Image.Resampling.NEAREST).save(self.out / "samples.png")
        self.note("rows", list(GUIDANCE))
        self.note("samples_seconds", time.monotonic() - begun)


def clock(seconds: float) -> str:
    """Return a time as Lightning reads it: days, hours, minutes and seconds."""
    whole = max(1, round(seconds))
    return f"00:{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def read_metrics(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log."""
    with next(run.rglob("metrics.csv")).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Train everything, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("outputs/emoji"), help="of all else")
    parser.add_argument("--autoencoder-seconds", type=float, default=1200)
    parser.add_argument("--seconds", type=float, default=3600, help="to train the denoiser")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--reuse", type=Path, help="an autoencoder's folder instead of training one"
    )
    parser.add_argument("--tiny", action="store_true", help="see all of it work, in a minute")
    options = parser.parse_args()
    run = Run(options.out.resolve(), options.work.resolve(), options.tiny)
    if options.tiny:
        options.autoencoder_seconds, options.seconds = 5.0, 40.0
    if options.reuse:
        shutil.copytree(options.reuse, run.work / "autoencoder", dirs_exist_ok=True)
    else:
        run.autoencoder(options.autoencoder_seconds)
    run.latents()
    run.denoiser(options.seconds, options.ways)
    run.samples(run.export(run.work / "run", "denoiser"))
    run.export_best()


if __name__ == "__main__":
    main()
