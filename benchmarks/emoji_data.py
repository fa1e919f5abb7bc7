"""Make the bundled emoji from their sources, and folders of images for ``encode.py`` from them.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python -m benchmarks.emoji_data pack package/assets emoji-test.txt
    python -m benchmarks.emoji_data folder outputs/emoji/images

``emoji-test.txt`` is Unicode's (15.0 or newer; Debian's ``unicode-data`` has it in
``/usr/share/unicode/emoji``): it gives every emoji its name and its subgroup, and
:data:`CLASSES` says which subgroups make a class. The images are laid on white and scaled from 256
to 64 pixels. All of them make one AVIF sheet without subsampled colours: at its size a WebP file
per image is 8 dB further from the originals, and a lossless file would be four times as large.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sag_dit.data.emoji import COLUMNS, FILE, SIZE, write_images
from sag_dit.data.training_batches import name_hash

CLASSES = {
    "happy face": "face-smiling face-affection face-tongue face-hat face-glasses",
    "unhappy face": "face-hand face-neutral-skeptical face-sleepy face-unwell face-concerned "
    "face-negative",
    "monster": "face-costume",
    "animal face": "cat-face monkey-face",
    "heart": "heart",
    "hand": "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands "
    "hand-prop",
    "body part": "body-parts",
    "person": "person person-gesture",
    "worker": "person-role",
    "fantasy figure": "person-fantasy",
    "active person": "person-activity",
    "athlete": "person-sport person-resting",
    "couple or family": "family",
    "mammal": "animal-mammal",
    "bird": "animal-bird",
    "small animal": "animal-amphibian animal-reptile animal-marine animal-bug",
    "plant": "plant-flower plant-other",
    "fruit or vegetable": "food-fruit food-vegetable",
    "food": "food-prepared food-asian food-marine food-sweet drink dishware",
    "place": "place-map place-geographic place-building place-religious place-other hotel",
    "vehicle": "transport-ground transport-water transport-air",
    "clock": "time",
    "sky": "sky & weather",
    "play": "event award-medal sport game arts & crafts",
    "clothing": "clothing",
    "device": "sound music musical-instrument phone computer light & video",
    "office": "book-paper money mail writing office",
    "tool": "lock tool science medical household other-object",
    "sign": "emotion person-symbol warning gender math punctuation currency other-symbol",
    "button": "transport-sign arrow religion zodiac av-symbol keycap alphanum geometric",
    "flag": "flag country-flag subdivision-flag",
}
"""Class -> Unicode's subgroups."""

BY_NAME = {
    "monster": "skull|skull and crossbones|.* face with horns",
    "animal face": "(dog|cat|tiger|horse|cow|pig|mouse|rabbit|dragon) face|fox|wolf|raccoon|lion|"
    "unicorn|moose|hamster|bear|polar bear|koala|panda|frog",
}
"""Class -> names of emoji that belong to it whatever their subgroup."""

SHARE = 0.1
"""Of the families of a class, for tune and for report each."""

COUPLES = {
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "1f9d1-1f91d-1f9d1"),
    "1f48f": "1f9d1-2764-1f48b-1f9d1",
    "1f491": "1f9d1-2764-1f9d1",
}
"""Couples that are one character -> the family of the same couple as a sequence."""


class Emoji(NamedTuple):
    """An emoji of Unicode's list."""

    code: str
    subgroup: str
    name: str


def parse(text: str) -> dict[str, Emoji]:
    """Return all emoji of emoji-test.txt in their order, by code points joined with hyphens.

    Raises:
        ValueError: a line is not as Unicode writes them.
    """
    found, subgroup = {}, ""
    for line in text.splitlines():
        if line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif line and not line.startswith("#"):
            match = re.fullmatch(r"([0-9A-F ]+); ([a-z-]+) +# \S+ E[\d.]+ (.+)", line)
            if match is None:
                raise ValueError(f"{line!r}: expected 'code points; status # emoji version name'")
            code = "-".join(match[1].lower().split())
            found[code] = Emoji(code, subgroup, match[3])
    return found


def normal(name: str) -> str:
    """Return the code points of a file's name, each of four digits or more.

    The names of the flags of England, Scotland and Wales lack the last, a cancel tag.
    """
    code = "-".join(part.zfill(4) for part in re.split("[-_]", name.lower()))
    return f"{code}-e007f" if code.startswith("1f3f4-e0067") else code


def family(code: str) -> str:
    """Return what is common to all tones and genders of one emoji.

    Skin tones, signs of gender, joiners and forms of presentation are left out; a man or a woman
    is a person.
    """
    kept = [p for p in code.split("-") if not re.fullmatch("fe0f|264[02]|200d|1f3f[b-f]", p)]
    neutral = "-".join("1f9d1" if p in ("1f468", "1f469") else p for p in kept)
    return COUPLES.get(neutral, neutral) or code


def class_of(emoji: Emoji) -> str:
    """Return the class of an emoji.

    Raises:
        ValueError: no class holds its subgroup.
    """
    for name, pattern in BY_NAME.items():
        if re.fullmatch(pattern, emoji.name):
            return name
    for name, subgroups in CLASSES.items():
        # A subgroup may hold blanks: sky & weather.
        if f" {emoji.subgroup} " in f" {subgroups} ":
            return name
    raise ValueError(f"{emoji.name}: expected a class for the subgroup {emoji.subgroup!r}")


def splits(families: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return train, tune or report for every image, the same for all of a family.

    Within a class families are ordered by a hash of their code points, which no library's random
    numbers can move: the first tenth is to tune, the second to report, at least one family each.
    """
    members = defaultdict(set)
    # A family belongs to the class of its first member.
    home: dict[str, str] = {}
    for each, name in zip(families, classes, strict=True):
        members[home.setdefault(each, name)].add(each)
    chosen = {}
    for each in members.values():
        ordered = sorted(each, key=name_hash)
        count = max(1, round(SHARE * len(ordered)))
        chosen |= dict.fromkeys(ordered, "train")
        chosen |= dict.fromkeys(ordered[:count], "tune")
        chosen |= dict.fromkeys(ordered[count : 2 * count], "report")
    return [chosen[each] for each in families]


def on_white(path: Path) -> Image.Image:
    """Return an image laid on white and scaled to 64 x 64 pixels, bicubically."""
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn)
    return white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def pack(assets: Path, test: Path, out: Path, quality: int) -> None:
    """Write the one file of all emoji.

    Raises:
        ValueError: an image is of no emoji that Unicode's file knows.
    """
    known = parse(test.read_text(encoding="utf-8"))
    order = {code: place for place, code in enumerate(known)}
    paths = {normal(path.stem): path for path in assets.glob("*.webp")}
    unknown = sorted(paths.keys() - known.keys())
    if unknown:
        raise ValueError(f"{test}: expected every emoji, and {', '.join(unknown)} are missing")
    emoji = [known[code] for code in sorted(paths, key=order.__getitem__)]
    families, classes = [family(each.code) for each in emoji], [class_of(each) for each in emoji]
    sheet = Image.new("RGB", (SIZE * COLUMNS, SIZE * -(-len(emoji) // COLUMNS)), "white")
    for place, each in enumerate(emoji):
        row, column = divmod(place, COLUMNS)
        sheet.paste(on_white(paths[each.code]), (SIZE * column, SIZE * row))
    stream = io.BytesIO()
    sheet.save(stream, "AVIF", quality=quality, subsampling="4:4:4", speed=6)
    table = {
        "classes": sorted(CLASSES),
        "code": [each.code for each in emoji],
        "name": [each.name for each in emoji],
        "family": families,
        "label": [sorted(CLASSES).index(name) for name in classes],
        "split": splits(families, classes),
    }
    with zipfile.ZipFile(out, "w") as file:
        for name, content, method in (
            ("emoji.avif", stream.getvalue(), zipfile.ZIP_STORED),
            ("emoji.json", json.dumps(table, ensure_ascii=False).encode(), zipfile.ZIP_DEFLATED),
        ):
            # A date of its own, so that the same images make the same file.
            file.writestr(zipfile.ZipInfo(name), content, method)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    print(f"{out}: {len(emoji)} emoji, {out.stat().st_size / 1e6:.2f} MB, sha256 {digest}")


def main() -> None:
    """Pack, or write a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    packing = tasks.add_parser("pack", help="make the file that the package carries")
    packing.add_argument("assets", type=Path, help="the folder of 256 x 256 WebP files")
    packing.add_argument("test", type=Path, help="Unicode's emoji-test.txt")
    packing.add_argument("--out", type=Path, default=FILE)
    packing.add_argument("--quality", type=int, default=85)
    writing = tasks.add_parser("folder", help="write train/ and tune/, a folder per class in each")
    writing.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.task == "pack":
        pack(options.assets, options.test, options.out, options.quality)
    else:
        for split in ("train", "tune"):
            write_images(options.out / split, split)


if __name__ == "__main__":
    main()
