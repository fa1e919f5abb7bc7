"""Train the small classifiers whose features stand for Inception's on the bundled data sets.

    python -m benchmarks.classifiers digits|patches|emoji [--out FOLDER] [--check]

Seeded; half a minute (digits), three (patches) and twenty (emoji) on one CPU core. ``--check``
trains nothing. Prints accuracy on the held-out images, and what the Frechet distances notice: how
far the held-out half ``report`` is, once changed, from what it was and from the half ``tune``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torchvision.transforms.v2 import RandomAffine
from torchvision.transforms.v2 import functional as change

from sag_dit.data.digits import Digits
from sag_dit.data.emoji import EmojiData
from sag_dit.data.patches import Patches
from sag_dit.data.splits import split
from sag_dit.data.training_batches import StepData
from sag_dit.evaluation.classifier import SmallClassifier, bundled_classifier
from sag_dit.evaluation.metrics import Statistics, frechet_distance

STEPS = {"digits": 2000, "patches": 4000, "emoji": 4000}
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
BATCH = 64


def moved(images: Tensor) -> Tensor:
    """Move each digit by up to one pixel along each axis."""
    side = images.shape[-1]
    padded = pad(images, (1, 1, 1, 1))
    offsets = torch.randint(3, (len(images), 2)).tolist()
    rows = zip(padded, offsets, strict=True)
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in rows])


def recoloured(images: Tensor) -> Tensor:
    """Take colour away from a quarter of the crops and change brightness and contrast of all.

    Most photographs are told by their colour alone; this makes their texture matter as well.
    """
    x = images.float()
    grey = (torch.rand(len(x), 1, 1, 1) < 0.25).float()
    x = torch.lerp(x, x.mean(1, keepdim=True).expand_as(x), grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    contrast = torch.empty(len(x), 1, 1, 1).uniform_(0.8, 1.25)
    brightness = torch.empty(len(x), 1, 1, 1).uniform_(-20, 20)
    return ((x - mean) * contrast + mean + brightness).round().clamp(0, 255).to(torch.uint8)


turn = RandomAffine(degrees=15, translate=(0.08, 0.08), scale=(0.85, 1.15), fill=255)


def turned(images: Tensor) -> Tensor:
    """Turn, move and scale each image a little, over white."""
    return torch.stack([turn(image) for image in images])


DATA: dict[str, Callable[[int], StepData]] = {
    "digits": Digits,
    "patches": Patches,
    "emoji": EmojiData,
}
AUGMENT: dict[str, Callable[[Tensor], Tensor]] = {
    "digits": moved,
    "patches": recoloured,
    "emoji": lambda images: recoloured(turned(images)),
}


def fit(
    model: nn.Module,
    data: StepData,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    learning_rate: float,
) -> None:
    """Minimise the loss of (images, labels) with AdamW over one cycle of learning rates."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
    for step, (images, labels) in zip(range(steps), data.train_dataloader(), strict=False):
        loss = loss_of(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def train(name: str) -> SmallClassifier:
    """Train on the training part alone."""
    torch.manual_seed(0)
    data, augment = DATA[name](BATCH), AUGMENT[name]
    # Channels last is twice as fast on a CPU.
    model = SmallClassifier(name).to(memory_format=torch.channels_last)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(augment(images)).logits, labels, label_smoothing=0.1)

    fit(model, data, loss_of, STEPS[name], LEARNING_RATE)
    return model.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features."""
    one, other = (Statistics(len(x), x.mean(0), x.T.cov()) for x in (a.double(), b.double()))
    return frechet_distance(one, other)


def noisy(images: Tensor) -> Tensor:
    """Add normal noise of 8 grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 8 * noise).round().clamp(0, 255).to(torch.uint8)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "unchanged": lambda images: images,
    "blurred, sigma 0.5": lambda images: change.gaussian_blur(images, [5, 5], [0.5]),
    "blurred, sigma 1": lambda images: change.gaussian_blur(images, [5, 5], [1.0]),
    "sharpened": lambda images: change.adjust_sharpness(images, 2.0),
    "noise of 8 levels": noisy,
    "contrast 1.25": lambda images: change.adjust_contrast(images, 1.25),
    "saturation 1.5": lambda images: change.adjust_saturation(images, 1.5),
    "halves swapped": lambda images: images.roll(images.shape[-1] // 2, -1),
}


def report(model: SmallClassifier) -> None:
    """Print accuracy and what the distances notice."""
    images, labels = split(f"{model.name}:held_out")
    hits = (model(images).logits.argmax(1) == labels).double()
    print(
        f"{hits.mean():.1%} of {len(labels)} held-out images of {model.name} recognised; by class:"
    )
    print(", ".join(f"{number}: {hits[labels == number].mean():.0%}" for number in labels.unique()))
    tune = model(split(f"{model.name}:tune")[0])
    half, half_labels = split(f"{model.name}:report")
    unchanged = model(half)
    print("| report, changed | FID to unchanged | sFID | FID to tune | sFID | recognised |")
    print("|---|---|---|---|---|---|")
    for what, changed in CHANGES.items():
        if half.shape[1] == 1 and "saturation" in what:
            continue
        seen = model(changed(half))
        cells = [
            f"{distance(getattr(seen, part), getattr(other, part)):.2f}"
            for other in (unchanged, tune)
            for part in ("pool", "spatial")
        ]
        right = (seen.logits.argmax(1) == half_labels).double().mean()
        print(f"| {what} | {' | '.join(cells)} | {right:.1%} |")


def main() -> None:
    """Train, save and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--out", type=Path, default=Path("sag_dit/evaluation/weights"))
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        report(bundled_classifier(arguments.name))
        return
    model = train(arguments.name)
    report(model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), arguments.out / f"{model.name}.safetensors")


if __name__ == "__main__":
    main()
