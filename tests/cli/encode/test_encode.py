"""``encode.py``: what it writes, on one rank or two, and after interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sag_dit.codec import VAECodec
from sag_dit.data import encoding
from sag_dit.data.crop import read_crop
from sag_dit.data.images import ImageFolderData, find_images
from sag_dit.data.latents import LatentData
from sag_dit.data.shards import read_index
from tests.cli.encode.conftest import SETTINGS, Contents, Encode, Start
from tests.data.making import picture, truncate


def moments(folder: Path) -> torch.Tensor:
    files = sorted(folder.glob("*.safetensors"))
    return torch.cat([load_file(file)["moments"] for file in files])


def test_moments_are_the_codecs(command: Encode, vae: Path, photos: Path) -> None:
    result = command("dtype=float32")
    assert result.code == 0 and "10/10" in result.err, result.err
    assert result.out == "latents: out (10 images)\n"
    codec, files = VAECodec(vae, slice_size=2), find_images(photos)
    images = torch.stack([torch.from_numpy(read_crop(files.path(i), 16)) for i in range(10)])
    written = moments(result.folder)
    assert written.shape == (10, 2, 2, 4, 8, 8)
    noise = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for flip, seen in enumerate((images, images.flip(-1))):
        mean, std = written[:, flip].unbind(dim=1)
        assert torch.equal(mean, codec.encode(seen)) and (std > 0).all()
        torch.testing.assert_close(mean + std * noise, codec.encode(seen, noise))
    assert not torch.equal(written[:, 0], written[:, 1])


def test_index_says_what_there_is(command: Encode, vae: Path, contents: Contents) -> None:
    folder = command().folder
    shards = [f"latents-{number:05d}.safetensors" for number in range(3)]
    assert set(contents(folder)) == {"config.json", "index.json", *shards}
    index = read_index(folder)
    assert [shard.rows for shard in index.shards] == [4, 4, 2]
    assert {shard.file: shard.sha256 for shard in index.shards}.items() <= contents(folder).items()
    assert index.class_names == ("cats", "dogs") and index.counts == (5, 5)
    assert index.shape == (4, 8, 8) and index.flips == 2 and index.dtype == "float16"
    assert index.vae == str(vae)
    assert index.config["size"] == 16 and index.config["scaling_factor"] == 0.5
    assert json.loads((folder / "index.json").read_text())["images"] == 10


def test_half_precision_and_no_flips_store_less_of_the_same(command: Encode) -> None:
    half, full = moments(command().folder), moments(command("dtype=float32", out="full").folder)
    assert half.dtype == torch.float16 and torch.equal(half, full.half())
    plain = command("flip=false", out="plain").folder
    assert read_index(plain).flips == 1 and torch.equal(moments(plain), half[:, :1])


def test_an_archive_and_a_rectangle_are_encoded(
    command: Encode, photos: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in photos.rglob("*.*g"):
            archive.write(file, file.relative_to(photos))
    packed = command("dtype=float32", root=tmp_path / "photos.zip", out="packed").folder
    folder = command("dtype=float32").folder
    assert torch.equal(moments(packed), moments(folder))
    assert read_index(packed).class_names == ("cats", "dogs")
    wide = command("dtype=float32", "data.size=[16,24]", out="wide").folder
    assert read_index(wide).shape == (4, 8, 12) and moments(wide).shape[-2:] == (8, 12)


def test_training_reads_what_was_written(command: Encode, photos: Path) -> None:
    folder = command("dtype=float32").folder
    latents = LatentData(folder, 4, seed=3, held_out=0.3, workers=0)
    images = ImageFolderData(photos, 16, 4, seed=3, held_out=0.3, workers=0)
    np.testing.assert_array_equal(latents.held_out_images, images.held_out_images)
    latents.prepare_data()
    (written, labels, _), (crops, same_labels) = (
        next(iter(data.train_dataloader())) for data in (latents, images)
    )
    assert torch.equal(labels, same_labels)
    codec = VAECodec(Path(latents.index.vae))
    torch.testing.assert_close(written[:, 0], codec.encode(crops))  # the same images and flips


def test_out_is_named_after_images_and_settings(command: Encode, photos: Path) -> None:
    first, other = command(out="null"), command("rows=3", out="null")
    names = [result.out.split()[1] for result in (first, other)]
    assert all(name.startswith(f"outputs/latents/{photos.name}-") for name in names)
    assert len(set(names)) == 2
    assert command(out="null").encoded == 0


def test_a_background_has_a_folder_of_its_own_but_for_what_was_begun_before(
    command: Encode, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(photos, tmp_path / "photos"))
    image = picture(20, 20).convert("RGBA")
    image.putalpha(0)
    image.save(root / "cats" / "clear.png")
    before = command("data.background=null", out="null", root=root)
    name = before.out.split()[1]
    assert "background" not in json.loads(Path(name, "config.json").read_text())
    # The command of before, which stated no background, finds what it left.
    caplog.clear()
    again = command(out="null", root=root)
    assert (again.encoded, again.out.split()[1]) == (0, name)
    assert "hidden colours show" in caplog.text and "clear.png" in caplog.text
    fresh = command(out="fresh", root=root)
    assert read_index(fresh.folder).config["background"] == "white"
    assert not torch.equal(moments(fresh.folder), moments(Path(name)))
    assert command("data.background=black", out="fresh", root=root).code == 1
    # Names without the background go to the first that asks.
    shutil.rmtree(name)
    names = []
    for colour in (*COLOURS, *COLOURS):
        result = command(f"data.background={colour}", out="null", root=root)
        names.append(result.out.split()[1])
    assert names[0] == name and len(set(names[:3])) == 3 and names[3:] == names[:3]
    assert result.encoded == 0


COLOURS = ("white", "black", "#00ff00")


def test_the_same_command_again_encodes_nothing(command: Encode, contents: Contents) -> None:
    first = command()
    before = contents(first.folder)
    again = command()
    assert (first.encoded, again.encoded) == (10, 0)
    assert again.out == first.out and contents(again.folder) == before


def test_damaged_and_missing_shards_are_made_again(command: Encode, contents: Contents) -> None:
    folder = command().folder
    before = contents(folder)
    content = bytearray((folder / "latents-00001.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "latents-00001.safetensors").write_bytes(content)
    (folder / "latents-00002.safetensors").unlink()
    assert command().encoded == 6
    assert contents(folder) == before


def test_interruption_leaves_whole_shards_and_is_made_up_for(
    command: Encode, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(command(out="whole").folder)
    calls, encode_crops = 0, encoding.encode_crops

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError("no room left")
        return encode_crops(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_crops", failing)
        result = command()
    assert result.code == 1 and "no room left" in result.err
    assert {file.name for file in result.folder.glob("*latents*")} == {"latents-00000.safetensors"}
    with pytest.raises(ValueError, match=r"no index\.json"):
        LatentData(result.folder, 2)
    assert command().encoded == 6
    assert contents(result.folder) == whole


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(
    command: Encode, start: Start, photos: Path, vae: Path, contents: Contents, tmp_path: Path
) -> None:
    alone = command(out="one")
    arguments = (f"data.root={photos}", f"vae={vae}", "rows=4", "out=two=ranks")
    process = start(*arguments, *SETTINGS, "trainer.devices=2", script="encode.py")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out == "latents: two=ranks (10 images)\n"
    assert contents(tmp_path / "two=ranks") == contents(alone.folder)


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_broken_shard(
    command: Encode,
    start: Start,
    vae: Path,
    contents: Contents,
    tmp_path: Path,
    told: signal.Signals,
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(300):
        picture(16, 16, seed=number).save(many / f"{number:03d}.bmp")
    arguments = ("rows=3",)
    whole = contents(command(*arguments, out="whole", root=many).folder)
    given = (f"data.root={many}", f"vae={vae}", "out=cut", *arguments, *SETTINGS)
    process = start(*given, script="encode.py")
    records = tmp_path / "cut" / "records"
    deadline = time.monotonic() + 200
    while len(list(records.glob("*.json"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.001)
    os.killpg(process.pid, told)
    _, err = process.communicate(timeout=60)
    if told == signal.SIGINT:  # Ctrl-C, which the processes that read are told of as well
        assert process.returncode == 130, err
        assert "stopped: what is finished is kept; repeat the command to go on" in err
        assert "Traceback" not in err
    left = {name: sha for name, sha in contents(tmp_path / "cut").items() if "/" not in name}
    shards = {name: sha for name, sha in left.items() if name.startswith("latents-")}
    assert 5 <= len(shards) < 100 and "index.json" not in left
    assert shards.items() <= whole.items()
    resumed = command(*arguments, out="cut", root=many)
    assert 0 < resumed.encoded <= 300 - 3 * (len(shards) - 1)
    assert contents(tmp_path / "cut") == whole


def test_images_that_cannot_be_decoded_are_left_out_and_counted(
    command: Encode, photos: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(photos, tmp_path / "copy"))
    truncate(root / "cats" / "02.png")
    (root / "dogs" / "09.jpg").write_text("no image")
    result = command("workers=1", root=root)
    assert result.code == 0, result.err
    assert result.out == "latents: out (8 images, 2 could not be decoded)\n"
    index = read_index(result.folder)
    assert index.counts == (4, 4) and [shard.rows for shard in index.shards] == [3, 4, 1]
    assert [shard.skipped for shard in index.shards] == [("cats/02.png",), (), ("dogs/09.jpg",)]
    whole = moments(command(out="whole").folder)
    kept = [0, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(moments(result.folder), whole[kept])
    assert LatentData(result.folder, 8, workers=0).labels.tolist() == [0] * 4 + [1] * 4
