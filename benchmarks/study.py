"""All guidance methods, compared fairly: ``python -m benchmarks.study --budget 60min``.

Trains small models itself: an eps model and a flow model of the digits, three seeds of each, with
an earlier checkpoint as the worse model and a classifier of noisy digits. The bundled patches come
with a short training as theirs, the bundled emoji (``--models emoji``) with nothing. What is tried
of a method follows from its class. The most valuable cells come first; each is a file in
``OUT/rows``, and the same command goes on with those that are missing. Two commands may fill one
folder at the same time, each with other ``--models``.

    python -m benchmarks.study --tiny            # a minute, to see that it works
    python -m benchmarks.study_page              # docs/study.md and its figures, from the rows
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sag_dit
from benchmarks.classifiers import DATA, fit
from sag_dit.checkpoints import Model
from sag_dit.cli.keys import BUDGET
from sag_dit.codec import from_pixels
from sag_dit.files import atomic
from sag_dit.models.unet.classifier import Classifier
from sag_dit.process import Process
from sag_dit.study.field import Deadline, Family, Rules, Subject, field_study
from sag_dit.study.tuning import Budget

ROOT = Path(__file__).resolve().parents[1]
QUIET = ("logger=none", "preview.steps=2", "trainer.enable_progress_bar=false")
FLOW = ("process=flow", "objective=flow", "kind=v")


class Timed(nn.Module):
    """A classifier of noisy images that is told times from 0 to 1000, whatever the process's are.

    Example::

        Timed(classifier, process)(x_t, t)
    """

    def __init__(self, classifier: nn.Module, process: Process) -> None:
        super().__init__()
        self.classifier = classifier
        self.factor = 1000 / float(process.grid(1)[0].t)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.classifier(x_t, t.float() * self.factor)
        return logits


def train(arguments: Sequence[str], out: Path, steps: int, deadline: Deadline) -> bool:
    """Train up to a step, going on where a run was ended; say whether it got there."""
    done = out.with_name(f"{out.name}-{steps}.done")
    if done.exists():
        return True
    if not deadline.left:
        return False
    words = [*arguments, *QUIET, f"max_steps={steps}", f"out={out}"]
    words += ["every_n_steps.checkpoint=200", "every_n_steps.preview=1000000"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], cwd=ROOT)
    try:
        process.wait(None if deadline.left == float("inf") else deadline.left)
    except subprocess.TimeoutExpired:
        # It saves where it is.
        process.terminate()
        process.wait()
        return False
    if process.returncode:
        raise SystemExit(f"training {out} failed; see above")
    done.touch()
    return True


def trained(arguments: Sequence[str], out: Path, steps: int, deadline: Deadline) -> Path | None:
    """Return the folder of a finished training, whose earlier checkpoint lies beside it."""
    # The worse model is the same training after an eighth of its steps.
    early = out.with_name(f"{out.name}-early")
    if not early.exists():
        if not train(arguments, out, max(1, steps // 8), deadline):
            return None
        with atomic(early) as temporary:
            temporary.mkdir()
            for name in ("model.safetensors", "config.json"):
                shutil.copy(out / name, temporary)
    return out if train(arguments, out, steps, deadline) else None


def classifier_of(data: str, model: Model, file: Path, steps: int) -> nn.Module:
    """Return a classifier of a model's noisy images, trained unless it was before."""
    channels, height, _ = model.denoiser.latent_shape
    classifier = Classifier(
        input_size=height,
        in_channels=channels,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(height // 2,),
        num_head_channels=32,
        num_classes=len(model.class_names),
    )
    process = model.denoiser.process
    timed = Timed(classifier, process)
    if not file.exists():
        torch.manual_seed(0)

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            x_0 = from_pixels(images)
            level = process.level(process.time_at(torch.rand(len(x_0))))
            x_t = process.add_noise(x_0, torch.randn_like(x_0), level)
            return cross_entropy(timed(x_t, level.times(x_t)), labels)

        fit(timed, DATA[data](64), loss_of, steps, 1e-3)
        with atomic(file) as temporary:
            safetensors.torch.save_file(classifier.state_dict(), temporary)
    classifier.load_state_dict(safetensors.torch.load_file(file))
    return timed.eval().requires_grad_(False)


def digits(
    name: str, arguments: Sequence[str], seed: int, models: Path, steps: int, deadline: Deadline
) -> Subject | None:
    """Return a digits model of a training seed, with its worse model and a classifier."""
    words = ["experiment=digits", *arguments, f"seed={seed}"]
    out = trained(words, models / f"digits-{name}-{seed}", steps, deadline)
    if out is None or not deadline.left:
        return None
    model = sag_dit.load(str(out))
    worse = sag_dit.load(str(out.with_name(f"{out.name}-early"))).denoiser
    file = models / f"classifier-digits-{name}.safetensors"
    classifier = classifier_of("digits", model, file, max(1, 3 * steps // 4))
    return Subject(model, {"worse": worse, "classifier": classifier})


def patches(models: Path, steps: int, deadline: Deadline) -> Subject | None:
    """Return the bundled patches model, with a short training of its kind and a classifier."""
    # The bundled model had twenty times as many steps.
    out = models / "patches-early"
    if not train(["experiment=patches"], out, max(1, steps // 8), deadline):
        return None
    model = sag_dit.load("patches")
    file = models / "classifier-patches.safetensors"
    classifier = classifier_of("patches", model, file, max(1, 3 * steps // 4))
    worse = sag_dit.load(str(out)).denoiser
    return Subject(model, {"worse": worse, "classifier": classifier})


def emoji(deadline: Deadline) -> Subject | None:
    """Return the bundled emoji model, for which no worse model and no classifier is made."""
    return Subject(sag_dit.load("emoji")) if deadline.left else None


def families(models: Path, trainings: int, steps: int) -> Mapping[str, Family]:
    """Return the families of models by the names of ``--models``, in the order of the study."""

    def of_digits(name: str, *arguments: str) -> Family:
        made: dict[int, Callable[[Deadline], Subject | None]] = {
            seed: partial(digits, name, arguments, seed, models, steps) for seed in range(trainings)
        }
        return Family(f"digits, {name}", made, "digits:tune", "digits:report")

    return {
        "digits-eps": of_digits("eps", "kind=eps"),
        "digits-flow": of_digits("flow", *FLOW),
        "patches": Family(
            "patches", {0: partial(patches, models, steps)}, "patches:tune", "patches:report"
        ),
        "emoji": Family("emoji", {0: emoji}, "emoji:tune", "emoji:report"),
    }


def seconds_of(text: str) -> float:
    """Return a budget of time in seconds.

    Raises:
        ValueError: no number with a unit of time.

    Example:
        >>> seconds_of("90min")
        5400.0
    """
    found = re.fullmatch(BUDGET, text)
    if found is None or found[2] == "passes":
        raise ValueError(f"--budget {text}: expected a time, such as 60min or 8h")
    return Budget.of(float(found[1]), found[2]).amount


USUAL = ("digits-eps", "digits-flow", "patches")
TINY = Rules(steps=2, images=12, seeds=1, scales=1, tuning=12, effects=4, batch_size=12)


def main() -> None:
    """Go on with the study until its budget is spent or nothing is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known, rules = (*USUAL, "emoji"), Rules()
    parser.add_argument("--budget", help="such as 60min or 8h; without it, until all is done")
    parser.add_argument("--out", type=Path, default=Path("outputs/study"))
    parser.add_argument("--models", nargs="+", choices=known, help="all but emoji without it")
    parser.add_argument("--methods", nargs="+", help="titles, such as CFG SAG; all without it")
    parser.add_argument("--trainings", type=int, default=3, help="training seeds of the digits")
    parser.add_argument("--train-steps", type=int, default=2000, help="of each digits model")
    parser.add_argument("--images", type=int, default=rules.images, help="of each cell")
    parser.add_argument("--seeds", type=int, default=rules.seeds, help="sampling seeds")
    parser.add_argument("--scales", type=int, default=rules.scales, help="tried of each method")
    parser.add_argument("--tiny", action="store_true", help="a minute, to see that it works")
    options = parser.parse_args()
    rules = Rules(images=options.images, seeds=options.seeds, scales=options.scales)
    trainings, steps, chosen = options.trainings, options.train_steps, options.models or USUAL
    if options.tiny:
        rules, trainings, steps, chosen = TINY, 1, 8, options.models or ("digits-flow",)
        if options.out == Path("outputs/study"):
            options.out = Path("outputs/study-tiny")
    try:
        deadline = Deadline() if options.budget is None else Deadline(seconds_of(options.budget))
        made = families(options.out / "models", trainings, steps)
        (options.out / "models").mkdir(parents=True, exist_ok=True)
        studied = [made[name] for name in made if name in chosen]
        tell = partial(print, flush=True)
        rows = field_study(studied, options.out, rules, deadline, only=options.methods, tell=tell)
    except ValueError as error:
        parser.error(str(error))
    missing = [row for row in rows if row.missing]
    print(
        f"rows: {len(rows) - len(missing)} in {options.out / 'rows'}, {len(missing)} not possible"
    )


if __name__ == "__main__":
    main()
