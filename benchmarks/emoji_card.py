"""What the model card of the emoji says of its images: recognised, and how near to known ones.

    python -m benchmarks.emoji_card [--num 310] [--picture docs/images/emoji_neighbours.png]

For each setting: the share of images that the bundled classifier takes for the class that was asked
for, and how far they are from their nearest training image (mirrored or not), as the root mean
square over pixels, in grey levels. Real held-out emoji stand beside them: what is nearer than all
but 1 % of those may be remembered. ``--picture`` writes samples beside their neighbours, and a hash
of what went in; with ``--num 0`` it does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

import sag_dit
from sag_dit import CFG, PAG, SAG
from sag_dit.data.splits import split
from sag_dit.evaluation.classifier import bundled_classifier
from sag_dit.guidance import Term

SETTINGS: dict[str, tuple[Term, ...]] = {
    "unguided": (),
    "SAG 1": (SAG(1.0),),
    "CFG 2": (CFG(2.0),),
    "CFG 2 + SAG 1": (CFG(2.0), SAG(1.0)),
    "CFG 2 + PAG 1": (CFG(2.0), PAG(1.0)),
}
SHOWN, PAIRS, STEPS = "CFG 2 + SAG 1", 32, 20
"""What the picture of neighbours shows: a setting, how many samples, and their steps."""


def nearest(images: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each image to the nearest known one, and which that is."""
    flat = known.flatten(1).float()
    found = [torch.cdist(each.flatten(1).float(), flat).min(1) for each in images.split(64)]
    values = torch.cat([each.values for each in found])
    return values / math.sqrt(flat.shape[1]), torch.cat([each.indices for each in found])


def recognised(images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the classifier takes for their class."""
    judge = bundled_classifier("emoji")
    seen = torch.cat([judge(each).logits.argmax(1) for each in images.split(64)])
    return float((seen == labels).double().mean())


def known() -> Tensor:
    """Return the emoji to train on, and their mirror images, on which the model was trained too."""
    images = split("emoji:train")[0]
    return torch.cat([images, images.flip(-1)])


def drawn(model: sag_dit.LoadedModel, setting: str, count: int) -> Tensor:
    """Return so many images by a setting, classes in turn."""
    classes = [number % len(model.class_names) for number in range(count)]
    terms = SETTINGS[setting]
    return model.sample(classes, guidance=terms, steps=STEPS, batch_size=62).tensor


def picture(model: sag_dit.LoadedModel) -> Image.Image:
    """Return samples, each with its nearest training image on its right."""
    images, train = drawn(model, SHOWN, PAIRS), known()
    pairs = torch.stack([images, train[nearest(images, train)[1]]], dim=1).flatten(0, 1)
    sheet = make_grid(pairs, nrow=16, padding=2, pad_value=255).permute(1, 2, 0)
    return Image.fromarray(sheet.contiguous().numpy())


def ingredients(model: sag_dit.LoadedModel) -> dict[str, Any]:
    """Return what goes into the picture; nothing is drawn."""
    terms = [term.identity(model.denoiser) for term in SETTINGS[SHOWN]]
    code = "".join(map(inspect.getsource, (picture, drawn, nearest)))
    return {
        "guidance": terms,
        "counts": {"pairs": PAIRS, "steps": STEPS},
        "weights": model.sha256,
        "code": hashlib.sha256(code.encode()).hexdigest(),
    }


def main() -> None:
    """Print the table, row by row, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=310, help="images a setting, classes in turn")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    model = sag_dit.load("emoji")
    if options.picture:
        picture(model).save(options.picture)
        text = json.dumps(ingredients(model), indent=1) + "\n"
        options.picture.with_suffix(".json").write_text(text, encoding="utf-8")
    if not options.num:
        return
    train = known()
    real, labels = split("emoji:held_out")
    floor = nearest(real, train)[0]
    bar = floor.quantile(0.01)
    print("| images | recognised | nearest training image, median | nearer than 1 % of real ones |")
    print("|---|---|---|---|")

    def row(name: str, images: Tensor, wanted: Tensor) -> None:
        distances, _ = nearest(images, train)
        near = (distances < bar).double().mean()
        right = recognised(images, wanted)
        print(f"| {name} | {right:.1%} | {distances.median():.1f} | {near:.1%} |", flush=True)

    row(f"{len(real)} real, held out", real, labels)
    for name in SETTINGS:
        images = drawn(model, name, options.num)
        row(name, images, torch.arange(len(images)) % len(model.class_names))


if __name__ == "__main__":
    main()
