"""What fine-tuning does, seen on digits: a model of 0 to 7 learns others, in full and by LoRA.

    python -m benchmarks.finetune_digits [--base-steps 1000] [--steps 300] [--num 400]

A model is trained on the digits 0 to 7, then fine-tuned on 8 and 9, which it has never seen, and on
a folder of images of 0 to 7 inverted, black on white. A classifier fitted on real training digits
says how often a sample is what was asked for, before and after; beside it stands the Frechet
distance of pixels to the held-out real digits. Every run is a command line of ``train.py``, which
is printed. Times are the processor's, on one thread.
"""

from __future__ import annotations

import argparse
import io
import re
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from PIL import Image
from sklearn.svm import SVC

import sag_dit
from benchmarks.digits_card import Vectors, frechet, vectors
from sag_dit.checkpoints import Model
from sag_dit.cli import app, train
from sag_dit.data.digits import digits
from sag_dit.training.finetune import adapt

SMALL = ["model.hidden_size=64", "model.depth=3"]
ONE_CPU = ["trainer.accelerator=cpu", "trainer.devices=1"]
QUIET = ["logger=none", "preview.steps=2", "trainer.enable_progress_bar=false"]
FULL = ["optimizer.lr=1e-3"]
LORA = ["lora.rank=8", "optimizer.lr=5e-3"]
FIRST, NEW = range(8), (8, 9)


def write_inverted(root: Path) -> None:
    """Write the training digits 0 to 7 in black on white, a folder per class."""
    for index, (image, label) in enumerate(zip(*digits("train"), strict=True)):
        if label in FIRST:
            folder = root / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - image[0].numpy()).save(folder / f"{index}.png")


def fit(out: Path, *arguments: str) -> tuple[str, float]:
    """Run ``train.py`` and return what it printed, and the processor time it took in seconds."""
    command = [*arguments, f"out={out}"]
    print("python train.py", *command, flush=True)
    printed, start = io.StringIO(), time.process_time()
    with redirect_stdout(printed):
        app.launch("train", train.run_train, [*command, *QUIET])
    return printed.getvalue(), time.process_time() - start


class Judge:
    """A classifier of real digits, and held-out ones to compare with."""

    def __init__(self, steps: int, num: int) -> None:
        images, labels = digits("train")
        self._classifier = SVC(gamma=0.25, C=10).fit(vectors(images), labels.numpy())
        self._steps, self._num = steps, num

    def cells(self, model: Model, wanted: Sequence[int], inverted: bool) -> str:
        """Draw as many of each wanted digit, and return two cells of the table."""
        classes = [str(wanted[i % len(wanted)]) for i in range(self._num)]
        drawn = vectors(sag_dit.sample(model, classes, steps=self._steps, batch_size=100))
        # Inverted digits are turned back, so that the same classifier judges them.
        drawn = 1 - drawn if inverted else drawn
        right = (self._classifier.predict(drawn).astype(str) == classes).mean()
        return f"{right:.1%} | {frechet(drawn, self._held_out(wanted)):.2f}"

    def real(self, wanted: Sequence[int]) -> str:
        """Return the share of real held-out digits that the classifier recognises."""
        images, labels = digits("held_out")
        chosen = torch.isin(labels, torch.tensor(wanted))
        return f"{self._classifier.score(vectors(images[chosen]), labels[chosen].numpy()):.1%}"

    def _held_out(self, wanted: Sequence[int]) -> Vectors:
        images, labels = digits("held_out")
        return vectors(images[torch.isin(labels, torch.tensor(wanted))])


def main() -> None:
    """Train, fine-tune, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num", type=int, default=400)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs/finetune_digits"))
    options = parser.parse_args()
    out = options.out

    known = f"data.classes={[*FIRST]}".replace(" ", "")
    learn = ["experiment=digits", known, f"max_steps={options.base_steps}"]
    _, seconds = fit(out / "base", *learn, *SMALL, *ONE_CPU)
    write_inverted(out / "inverted")
    images = ["data=folder", f"data.root={out / 'inverted'}", "data.channels=1", "data.flip=false"]
    tasks = {
        "8 and 9": (NEW, ["data=digits", "data.classes=[8,9]"]),
        "0 to 7, inverted": (FIRST, [*images, "data.workers=0"]),
    }
    base = sag_dit.load(out / "base")
    judge = Judge(options.sampling_steps, options.num)
    rows = [("0 to 7", "from scratch", "all", judge.cells(base, FIRST, False), f"{seconds:.0f} s")]
    for task, (wanted, data) in tasks.items():
        inverted = wanted is FIRST
        before = adapt(base, "before", [str(digit) for digit in wanted], 8).model
        rows.append((task, "before", "0", judge.cells(before, wanted, inverted), ""))
        for kind, settings in {"all weights": FULL, "LoRA": LORA}.items():
            names = ("inverted" if inverted else "new", "lora" if settings is LORA else "all")
            folder = out / "-".join(names)
            tune = ["experiment=finetune", f"ckpt={out / 'base'}", *data, "data.batch_size=64"]
            tune += [f"max_steps={options.steps}", "ema.decay=0.98", *settings, *ONE_CPU]
            told, seconds = fit(folder, *tune)
            trained = re.search(r"trained +([\d,]+)", told)
            cells = judge.cells(sag_dit.load(folder), wanted, inverted)
            rows.append((task, kind, trained[1] if trained else "", cells, f"{seconds:.0f} s"))

    print(f"real held-out digits recognised: {judge.real(FIRST)} and {judge.real(NEW)}")
    print("| digits | fine-tuning | parameters trained | recognised | Frechet | processor time |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
