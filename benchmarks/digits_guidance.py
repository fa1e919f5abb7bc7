"""What each guidance method does to the bundled digits, at three scales, with a table and a plot.

    python -m benchmarks.digits_guidance [--num 500] [--seeds 3] [--steps 20]

Autoguidance's worse model is the same recipe after a tenth of the training, and classifier
guidance's classifier a small one of ADM's kind, trained on noisy training digits; both are made
first, in some minutes. Then ``evaluate.py ckpt=digits reference=digits:report compare=methods``
measures all settings with the same seeds; what was measured before is not measured again.

Beside the plot, in a JSON file of its name, stands what went into it: the counts, and hashes of the
weights, of the rows, and of the code that makes the second models and draws.
``tests/test_pictures.py`` compares them with what would go in today.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

import sag_dit
from benchmarks.classifiers import fit
from sag_dit.cli import app, evaluate, train
from sag_dit.cli.composing import config_folder
from sag_dit.cli.keys import Evaluate
from sag_dit.codec import from_pixels
from sag_dit.data.digits import Digits
from sag_dit.identity import digest
from sag_dit.models.unet.classifier import Classifier
from sag_dit.process import DDPM

LEARN = ["experiment=digits", "max_steps=400", "logger=none", "preview.steps=2", "ema.warmup=false"]
CLASSIFIER_STEPS = 3000
SHADES = ("#9ecae1", "#4292c6", "#08306b")
"""Of the three scales, from weak to strong."""
NAMES = {"rescaled": "CFG, rescaled", "auto": "autoguidance"}


@dataclass(frozen=True)
class Setting:
    """A row of the table: metrics, and how they differ from unguided at the same seeds.

    ``change`` holds, by metric, the difference and its standard error.
    """

    method: str
    scale: float
    metrics: Mapping[str, float]
    change: Mapping[str, tuple[float, float]]


def small_classifier() -> Classifier:
    """Return ADM's classifier in small, for 8x8 digits."""
    return Classifier(
        input_size=8,
        in_channels=1,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        num_head_channels=32,
        num_classes=10,
    )


def read_classifier(path: str) -> Classifier:
    """Return the classifier whose weights lie at ``path``; named by ``_target_``."""
    model = small_classifier()
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval().requires_grad_(False)


def fit_classifier(path: Path) -> None:
    """Train on noisy training digits, at all times of the process, and write the weights."""
    torch.manual_seed(0)
    model, process = small_classifier(), DDPM("cosine")

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        x_0 = from_pixels(images)
        level = process.level(process.time_at(torch.rand(len(x_0))))
        x_t = process.add_noise(x_0, torch.randn_like(x_0), level)
        return cross_entropy(model(x_t, level.times(x_t)), labels)

    fit(model, Digits(64), loss_of, CLASSIFIER_STEPS, 1e-3)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), path)


def second_models(out: Path) -> list[str]:
    """Make what is not there yet, and return the rows of the methods that need it."""
    worse, classifier = out / "worse", out / "classifier.safetensors"
    if not (worse / "model.safetensors").is_file():
        app.launch("train", train.run_train, [*LEARN, f"out={worse}"])
    if not classifier.is_file():
        fit_classifier(classifier)
    read = f"{{_target_: benchmarks.digits_guidance.read_classifier, path: {classifier}}}"
    rows = [
        f"+compare.auto_{number}={{auto_scale: {scale}, guidance.auto.ckpt: {worse}}}"
        for number, scale in enumerate((1.25, 1.5, 2.0), start=1)
    ]
    rows += [
        f"+compare.classifier_{number}="
        f"{{classifier_scale: {scale}, guidance.classifier.classifier: {read}}}"
        for number, scale in enumerate((0.5, 1.0, 2.0), start=1)
    ]
    return rows


def ingredients(num: int, seeds: int, steps: int) -> dict[str, Any]:
    """Return what goes into the plot; nothing is measured."""
    rows = yaml.safe_load((config_folder() / "compare/methods.yaml").read_text("utf-8"))
    code = [LEARN, CLASSIFIER_STEPS, SHADES, NAMES, *map(inspect.getsource, (second_models, draw))]
    return {
        "counts": {"num": num, "seeds": seeds, "steps": steps},
        "weights": sag_dit.load("digits").sha256,
        "rows": digest(rows),
        "code": hashlib.sha256(json.dumps(code).encode()).hexdigest(),
    }


def settings(rows: Mapping[str, Mapping[str, Any]], results: Sequence[Any]) -> list[Setting]:
    """Return the measured rows of the comparison; rows and results are in the same order."""
    found = []
    for (name, changes), result in zip(rows.items(), results, strict=True):
        scale = next((v for k, v in changes.items() if k.endswith("_scale")), 0.0)
        method = name.rpartition("_")[0] or name
        method = NAMES.get(method, method.upper() if len(method) == 3 else method)
        found.append(Setting(method, scale, result["metrics"], result["change"]))
    return found


def cell(setting: Setting, metric: str) -> str:
    """Return scale and metric, in bold type where it differs from unguided by two errors."""
    text = f"{setting.metrics[metric]:.3g}"
    difference, error = setting.change[metric]
    return f"{setting.scale:g}: " + (f"**{text}**" if abs(difference) > 2 * error else text)


def table(found: Sequence[Setting], metrics: Sequence[str], labels: Mapping[str, str]) -> str:
    """Return a row per method in Markdown: its three scales, for each metric."""
    plain, *guided = found
    titles = (f"{labels[metric]}, unguided {plain.metrics[metric]:.3g}" for metric in metrics)
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (1 + len(metrics)) + "|"]
    for method in dict.fromkeys(each.method for each in guided):
        own = [each for each in guided if each.method == method]
        cells = (", ".join(cell(each, metric) for each in own) for metric in metrics)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Sequence[Setting], labels: Mapping[str, str], file: Path, caption: str) -> None:
    """Draw, for each metric, what every method changes at its three scales."""
    figure = Figure(figsize=(3.0 * len(labels) + 1, 6), dpi=130)
    FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(each.method for each in found[1:]))
    panels = figure.subplots(1, len(labels), sharey=True)
    for axes, (metric, label) in zip(panels, labels.items(), strict=True):
        axes.axvline(0, color="#55555e", linewidth=0.8)
        for row, method in enumerate(methods):
            own = [each for each in found if each.method == method]
            for place, (setting, shade) in enumerate(zip(own, SHADES, strict=True)):
                difference, error = setting.change[metric]
                axes.errorbar(
                    difference, row + 0.22 * (place - 1), xerr=2 * error, fmt="o", color=shade,
                    markersize=5, capsize=2, linewidth=1, label=("weak", "middle", "strong")[place],
                )  # fmt: skip
        axes.set_title(f"{label} {found[0].metrics[metric]:.3g}", loc="left", fontsize=10)
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(axis="x", color="#e0e0dc")
        if metric in ("fid", "sfid"):
            axes.set_xscale("symlog")
        axes.spines[["top", "right", "left"]].set_visible(False)
    first = figure.axes[0]
    first.invert_yaxis()
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles[:3], names[:3], loc="upper right", ncols=3, frameon=False)
    figure.text(0.01, 0.01, caption, fontsize=8, color="#55555e")
    figure.tight_layout(rect=(0, 0.03, 1, 0.95))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    """Measure, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs/digits_guidance"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/digits_guidance.png"))
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: changes are told of 2 seeds or more")
    arguments = [
        "ckpt=digits",
        "reference=digits:report",
        "compare=methods",
        *second_models(options.out),
        f"num_images={options.num}",
        f"seeds={options.seeds}",
        f"steps={options.steps}",
        f"out={options.out}",
        "batch_size=100",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
    ]
    rows: dict[str, Any] = {}

    def run(config: Evaluate) -> None:
        rows.update(config.compare or {})
        evaluate.run_evaluate(config)

    print("python evaluate.py", *arguments, flush=True)
    app.launch("evaluate", run, arguments)
    told: Any = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
    found = settings(rows, told["results"])
    print(table(found, ("fid", "is", "recall"), told["metrics"]))
    caption = (
        f"change against unguided, whose value is in each title; seeds: {options.seeds}, images "
        f"each: {options.num}, steps: {options.steps}; bars are two standard errors over seeds"
    )
    draw(found, told["metrics"], options.plot, caption)
    text = json.dumps(ingredients(options.num, options.seeds, options.steps), indent=1) + "\n"
    options.plot.with_suffix(".json").write_text(text, encoding="utf-8")
    print(f"plot: {options.plot}")


if __name__ == "__main__":
    main()
