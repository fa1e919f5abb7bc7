"""Draw what each guidance method does: ``python -m benchmarks.method_pictures [--ckpt emoji]``.

It writes docs/methods.md and its pictures, and beside them a hash of all that determines each. A
picture whose hash is the same is not drawn again.
tests/test_method_pictures.py compares the hashes, so that a picture of other weights, another
method or other settings is noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import sag_dit
from benchmarks.methods import classes, setting
from sag_dit.guidance import Term
from sag_dit.sampling import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
PICTURES = ROOT / "docs" / "images" / "methods"
RECORD = PICTURES / "drawn.json"
CKPT = "emoji"
STRENGTHS = (0.5, 1.0, 2.0)
"""How far from off the rows below the unguided one are."""
STEPS, SEED, COLUMNS, SIDE = 20, 0, 10, 64

INTRO = """# Methods in pictures

What each method does to images of the bundled model `{ckpt}`, alone, at three scales. All rows of
a picture start from the same noise. The first is unguided, and the number before each other row is
the method's scale. Which scale helps depends on the model, and more is not better: a method that
does too much is seen here as well. [Evaluation](evaluation.md) measures the methods, and
[Guidance](guidance.md) tells what they have in common.

```python
model = sag_dit.load("{ckpt}")
model.sample({classes}, guidance=SAG({scale:g}), steps={steps}, seed={seed})
```

`python -m benchmarks.method_pictures --ckpt {ckpt}` draws them and writes this page.
"""


def shown(model: sag_dit.LoadedModel) -> tuple[str, ...]:
    """Return the classes of the columns, from all over the model's list."""
    names = model.class_names
    return tuple(names[i * len(names) // COLUMNS] for i in range(min(COLUMNS, len(names))))


def refusal(model: sag_dit.LoadedModel, kind: type[Term]) -> str | None:
    """Return why a method cannot guide a model by itself, or None if it can."""
    try:
        terms = [setting(kind, STRENGTHS[0])]
        Settings.of(model, steps=STEPS, guidance=terms).check(model)
    except ValueError as error:
        return str(error)
    return None


def rows(kind: type[Term]) -> Iterator[tuple[str, Sequence[Term]]]:
    """Yield the rows of a method's picture: what stands before each, and its guidance."""
    yield "off", ()
    # The last row of a method with a largest scale is that scale.
    share = min(1.0, (kind.most - kind.neutral) / STRENGTHS[-1])
    for strength in STRENGTHS:
        term = setting(kind, share * strength)
        yield f"{term.scale:g}", (term,)


def picture(model: sag_dit.LoadedModel, kind: type[Term], steps: int = STEPS) -> Image.Image:
    """Return a method's picture: a row for each scale, a column for each class."""
    drawn = [
        (label, model.sample(shown(model), guidance=terms, steps=steps, seed=SEED).images)
        for label, terms in rows(kind)
    ]
    width, height = drawn[0][1][0].size
    zoom = max(1, SIDE // max(width, height))
    across, down, margin = zoom * width + 4, zoom * height + 4, 44
    size = (margin + across * len(drawn[0][1]), down * len(drawn))
    sheet = Image.new("RGB", size, "white")
    write, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for row, (label, images) in enumerate(drawn):
        write.text((margin - 8, (row + 0.5) * down), label, "black", font, anchor="rm")
        for column, image in enumerate(images):
            large = image.convert("RGB").resize(
                (zoom * width, zoom * height), Image.Resampling.NEAREST
            )
            sheet.paste(large, (margin + column * across, row * down + 2))
    return sheet


def inputs(model: sag_dit.LoadedModel, kind: type[Term]) -> str:
    """Return a hash of what determines a picture: weights, settings, and the code above."""
    denoiser = model.denoiser
    guidance = [[term.identity(denoiser) for term in terms] for _, terms in rows(kind)]
    told = [model.sha256, shown(model), guidance, STEPS, SEED, inspect.getsource(picture)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def page(model: sag_dit.LoadedModel, ckpt: str) -> str:
    """Return the page that shows the pictures, and names the methods that have none."""
    drawn = json.loads(RECORD.read_text(encoding="utf-8"))
    some = json.dumps(list(shown(model)[:2]))
    parts = [
        INTRO.format(ckpt=ckpt, classes=some, scale=STRENGTHS[1], steps=STEPS, seed=SEED).rstrip()
    ]
    refused = []
    for kind in classes():
        reason = refusal(model, kind)
        if reason is None and kind.key not in drawn:
            reason = "its picture is still to be drawn"
        if reason is not None:
            refused.append(f"- `{kind.__name__}` ({kind.does}): {reason}.")
            continue
        file = Path(inspect.getfile(kind)).relative_to(ROOT).as_posix()
        parts.append(
            f"## {kind.title}\n\n[`{kind.__name__}`](../{file}) of {kind.source}, off at "
            f"{kind.neutral:g}. What it does: {kind.does}.\n\n"
            f"![{kind.title} at three scales](images/methods/{kind.key}.webp)"
        )
    if refused:
        parts.append("## Not drawn\n\n" + "\n".join(refused))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Draw the pictures that are missing or old, and write them, the hashes and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", default=CKPT, help="the bundled model to draw with")
    ckpt = parser.parse_args().ckpt
    model = sag_dit.load(ckpt)
    PICTURES.mkdir(parents=True, exist_ok=True)
    before = json.loads(RECORD.read_text(encoding="utf-8"))
    record = {"ckpt": ckpt}
    for kind in classes():
        if refusal(model, kind) is not None:
            continue
        file, hashed = PICTURES / f"{kind.key}.webp", inputs(model, kind)
        if before.get(kind.key) != hashed or not file.exists():
            # A model of pixels is small: its enlarged pixels have edges, which stay sharp so.
            sharp = model.vae is None
            picture(model, kind).save(file, lossless=sharp, quality=90, method=6)
            print(f"drawn: {kind.key}", flush=True)
            RECORD.write_text(
                json.dumps({**before, **record, kind.key: hashed}, indent=1) + "\n", "utf-8"
            )
        record[kind.key] = hashed
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(model, ckpt), encoding="utf-8")


if __name__ == "__main__":
    main()
