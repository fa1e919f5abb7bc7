"""Whether two versions of the project give the same numbers, bit for bit (CONTRIBUTING's rule 1).

``python benchmarks/same_numbers.py record before.json``, called in a checkout of one version,
draws, trains, measures, encodes and exports some sixty small settings through the root scripts,
each in an empty folder, and writes a hash of all that came out: names of folders included, since a
run is found again by its name. The same in a checkout of the other version, then
``python benchmarks/same_numbers.py compare before.json after.json``. Both have to run on one
machine, with the same libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path.cwd()
"""The checkout that is tried: where the script is called, not where it lies."""

AUTOENCODER = Path(__file__).resolve().parents[1] / "sag_dit/checkpoints/emoji/autoencoder"
PLACE = Path(tempfile.gettempdir()) / "sag_dit-same-numbers"
"""Where everything is run. Paths stand in what is written, so it is the same for both versions."""

DRAWN = "num_images=5 batch_size=4 steps=4 gallery.num=2"
TRAINED = "max_steps=3 data.batch_size=8 logger=none every_n_steps.preview=2 every_n_steps.log=1"
TINY = "model.hidden_size=16 model.depth=2 model.num_heads=2"
SCALES = {
    "sag": 0.5,
    "blur": 0.5,
    "cfg": 1.5,
    "apg": 1.5,
    "icg": 1.5,
    "pag": 0.5,
    "seg": 0.5,
    "slg": 0.5,
    "tpg": 0.5,
    "tsg": 0.5,
}
DIFFUSERS = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "dpmpp_3m", "unipc", "euler", "lms")


def settings() -> Iterator[tuple[str, str]]:
    """Yield each setting's name and command; ``{NAME}`` is the folder of an earlier one."""
    # Every method, alone and beside CFG, on a class-conditional DiT.
    for name, scale in SCALES.items():
        others = "sag_scale=0 " if name != "sag" else ""
        yield f"digits-{name}", f"sample.py ckpt=digits {others}{name}_scale={scale} {DRAWN}"
    for name in ("sag", "pag", "icg", "tsg"):
        scales = f"sag_scale=0 {name}_scale=0.5" if name != "sag" else "sag_scale=0.5"
        yield f"patches-cfg-{name}", f"sample.py ckpt=patches cfg_scale=1.5 {scales} {DRAWN}"
    yield "digits-unguided", f"sample.py ckpt=digits sag_scale=0 maps=true npz=true {DRAWN}"
    yield (
        "digits-interval",
        "sample.py ckpt=digits guidance.sag.interval=[0.2,0.8] guidance.sag.schedule=cosine "
        f"{DRAWN}",
    )
    yield "digits-rows", f"sample.py ckpt=digits cfg_scale=2 max_rows=4 classes=random {DRAWN}"
    # Every sampler.
    for sampler in ("ddim", "ddim_strided", "ddpm", *DIFFUSERS):
        yield f"digits-{sampler}", f"sample.py ckpt=digits sampler={sampler} {DRAWN}"
    yield "digits-eta", f"sample.py ckpt=digits sampler.eta=1 {DRAWN}"
    # Training: objectives, networks, fine-tuning, and what was trained drawn and exported.
    digits = f"train.py experiment=digits {TRAINED} {TINY}"
    yield "train-mse", digits
    yield "train-min-snr", f"{digits} objective=min_snr kind=v"
    yield "train-dit", f"{digits} objective=dit model.learn_sigma=true"
    yield "train-flow", f"{digits} process=flow objective=flow kind=v"
    yield (
        "train-unet",
        f"train.py experiment=digits_unet {TRAINED.replace('max_steps=3', 'max_steps=2')}",
    )
    finetune = f"train.py experiment=finetune ckpt=digits data=digits name=tuned {TRAINED}"
    yield "train-finetune", finetune
    yield "train-freeze", f"{finetune} freeze=[blocks.0.*]"
    yield "train-lora", f"{finetune} lora.rank=2 lora.alpha=2"
    for sampler in ("euler_flow", "heun_flow", "sde_flow"):
        yield f"flow-{sampler}", f"sample.py ckpt={{train-flow}} sampler={sampler} {DRAWN}"
    yield "unet-sag", f"sample.py ckpt={{train-unet}} sag_scale=0.5 cfg_scale=1.5 {DRAWN}"
    yield (
        "flow-cfgzero",
        f"sample.py ckpt={{train-flow}} sampler=euler_flow cfgzero_scale=1.5 sag_scale=0 {DRAWN}",
    )
    yield "variance", f"sample.py ckpt={{train-dit}} sampler=ddpm {DRAWN}"
    yield (
        "worse",
        "sample.py ckpt=digits sag_scale=0 auto_scale=1.5 guidance.auto.ckpt={train-mse} " + DRAWN,
    )
    for layout in ("safetensors", "dit"):
        yield f"export-{layout}", f"export.py ckpt=digits format={layout}"
    yield "export-run", "export.py ckpt={train-flow}"
    yield "export-lora", "export.py ckpt={train-lora}"
    # Measuring: while drawing, from disk, several settings and seeds.
    yield (
        "evaluate-drawn",
        "evaluate.py ckpt=digits num_images=24 steps=4 batch_size=8 gallery.num=2",
    )
    yield (
        "evaluate-seeds",
        "evaluate.py ckpt=digits num_images=24 steps=3 batch_size=8 compare=guidance seeds=2 "
        "guidance=default",
    )
    yield (
        "evaluate-sweep",
        "evaluate.py -m ckpt=digits num_images=16 steps=3 batch_size=8 sag_scale=0,0.5",
    )
    yield "evaluate-disk", "evaluate.py samples={digits-unguided}/images metrics=[fid,is]"
    yield "attention", "attention.py ckpt=digits steps=4 attention.show=2 classes=[3]"
    # Latents: real image files through an autoencoder, trained on and drawn.
    yield "encode", "encode.py data.root={pictures} data.size=32 vae={autoencoder} flip=true"
    latent = f"size=patches data=latents data.root={{encode}} resolution=32 name=latent {TRAINED}"
    yield "train-latents", f"train.py {latent} {TINY} every_n_steps.checkpoint=10"
    yield "export-diffusers", "export.py ckpt={train-latents} format=diffusers"
    yield "latent-sag", f"sample.py ckpt={{train-latents}} sag_scale=0.5 {DRAWN}"
    # Two ranks, as Lightning starts them.
    two = "trainer.accelerator=cpu trainer.devices=2"
    yield "ranks-sample", f"sample.py ckpt=digits {DRAWN} {two}"
    yield "ranks-train", f"{digits} {two} trainer.strategy=ddp"
    yield (
        "ranks-evaluate",
        f"evaluate.py ckpt=digits num_images=16 steps=3 batch_size=4 {two}",
    )


def write_pictures(folder: Path) -> None:
    """Write two class folders of generated pictures, 40 x 48 pixels."""
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(5):
            coarse = drawn.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
            picture.save(folder / label / f"{number}.png")


def called(script: str, arguments: list[str]) -> None:
    """Call a root script: here where one process is enough, else as a user does.

    Raises:
        RuntimeError: it failed; its last lines are told.
    """
    if "trainer.devices=2" in arguments:
        command = [sys.executable, str(ROOT / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return
    told, sys.argv = io.StringIO(), [str(ROOT / script), *arguments]
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise RuntimeError(told.getvalue()[-2000:]) from error


def outcome(folder: Path) -> dict[str, str]:
    """Return a hash of everything with numbers in a folder, by its place there."""
    found = {}
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        told = content(file)
        if told is not None:
            found[str(file.relative_to(folder))] = hashlib.sha256(told).hexdigest()[:16]
    return found


def content(file: Path) -> bytes | None:
    """Return what has to be equal of a file; None of one that tells of times and versions."""
    import numpy as np
    import torch

    if file.suffix == ".npz":
        arrays = np.load(file)
        return b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays.files))
    if file.suffix in (".ckpt", ".pt"):
        return b"".join(_tensors(torch.load(file, map_location="cpu", weights_only=False)))
    if file.name == "results.json":
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        kept = ("name", "axes", "metrics", "spread", "identities", "change")
        return json.dumps([[row[key] for key in kept] for row in results], sort_keys=True).encode()
    # The pictures that show numbers and words beside images may gain a word.
    if file.suffix == ".png" and file.name != "grid.png" and "attention" not in file.parts:
        return file.read_bytes()
    if file.suffix == ".safetensors" or file.name == "manifest.jsonl":
        return file.read_bytes()
    return None


def _tensors(value: Any) -> Iterator[bytes]:
    """Yield the bytes of all tensors in a nest of mappings and lists, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            # Lightning forgets what it measured last when a run is resumed.
            if key != "current_score":
                yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def record(file: Path, only: str) -> None:
    """Run every setting in a folder of its own and write what came out."""
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.path.insert(0, str(ROOT))
    warmup = "warmup:" in (ROOT / "configs/train.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    place = PLACE
    shutil.rmtree(place, ignore_errors=True)
    write_pictures(place / "pictures")
    shutil.copytree(AUTOENCODER, place / "autoencoder")
    places = {"pictures": "../pictures", "autoencoder": str(place / "autoencoder")}
    for name, command in settings():
        if only and only not in name and not name.startswith(("train-", "encode")):
            continue
        script, *arguments = command.format(**places).split()
        if script == "train.py" and warmup:
            arguments.append("ema.warmup=false")
        (place / name).mkdir()
        os.chdir(place / name)
        try:
            called(script, arguments)
            found[name] = outcome(place / name)
        except RuntimeError as error:
            found[name] = {"failed": str(error)}
        made = sorted((place / name / "outputs").glob("*/*"))
        places[name] = f"../{name}/{made[0].relative_to(place / name)}" if made else name
        print(f"{name}: {len(found[name])} files", flush=True)
        if "failed" in found[name]:
            print(found[name]["failed"][-600:], flush=True)
        os.chdir(ROOT)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(before: Path, after: Path) -> int:
    """Print what differs, and return how many settings do."""
    first, second = (json.loads(file.read_text(encoding="utf-8")) for file in (before, after))
    different = 0
    files = 0
    for name in dict.fromkeys([*first, *second]):
        one, two = first.get(name, {}), second.get(name, {})
        files += len(one)
        wrong = sorted(key for key in {*one, *two} if one.get(key) != two.get(key))
        if wrong or not one or "failed" in one:
            different += 1
            print(f"{name}: {len(wrong)} of {len(one)} differ: {', '.join(wrong[:6])}")
    print(f"{len(first) - different} of {len(first)} settings equal, {files} files")
    return different


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    does = parser.add_subparsers(dest="does", required=True)
    recording = does.add_parser("record", help="run all settings in this checkout")
    recording.add_argument("file", type=Path)
    recording.add_argument("--only", default="", help="settings whose name holds this")
    comparing = does.add_parser("compare", help="compare two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    chosen = parser.parse_args()
    if chosen.does == "record":
        record(chosen.file.absolute(), chosen.only)
    else:
        raise SystemExit(min(1, compare(chosen.before, chosen.after)))


if __name__ == "__main__":
    main()
