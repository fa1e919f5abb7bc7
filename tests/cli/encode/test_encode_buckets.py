"""``encode.py data.buckets=``: latents of several sizes, and training on them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sag_dit.cli import train as train_command
from sag_dit.cli.app import launch
from sag_dit.codec import VAECodec
from sag_dit.data.images import ImageFolderData
from sag_dit.data.latents import LatentData
from sag_dit.data.shards import read_index
from tests.cli.encode.conftest import SETTINGS, Contents, Encode, Start
from tests.data.making import picture, truncate

BUCKETS = [[12, 24], [16, 16], [24, 12]]
ASKED = f"data.buckets={json.dumps(BUCKETS).replace(' ', '')}"
COUNTS = (6, 5, 3)
SMALL = (
    *("experiment=folder", "data=latents", "model.hidden_size=48", "model.depth=2"),
    *("model.num_heads=3", "resolution=16", "patch_size=2", "data.batch_size=2", "data.workers=0"),
    *("every_n_steps.checkpoint=2", "every_n_steps.log=1", "trainer.accelerator=cpu"),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two classes, whose aspect ratios lie near those of the buckets, mixed."""
    root, number = tmp_path_factory.mktemp("mixed"), 0
    for turn in range(max(COUNTS)):
        for (height, width), count in zip(BUCKETS, COUNTS, strict=True):
            if turn < count:
                folder = root / ("cats", "dogs")[number % 3 == 2]
                folder.mkdir(exist_ok=True)
                image = picture(2 * width + number % 2, 2 * height, seed=number)
                image.save(folder / f"{number:02d}.png")
                number += 1
    return root


def test_each_shard_is_of_one_bucket(command: Encode, photos: Path) -> None:
    result = command(ASKED, "dtype=float32", root=photos)
    assert result.code == 0 and result.encoded == sum(COUNTS), result.err
    assert result.out.startswith("  buckets  [12,24] (6), 16 (5), [24,12] (3)\n")
    index = read_index(result.folder)
    assert index.shape == (4, 8, 8) and index.config["buckets"] == BUCKETS
    found = [(shard.rows, index.shape_of(shard)[1:]) for shard in index.shards]
    assert found == [(4, (6, 12)), (2, (6, 12)), (4, (8, 8)), (1, (8, 8)), (3, (12, 6))]
    for shard in index.shards:
        moments = load_file(result.folder / shard.file)["moments"]
        assert moments.shape == (shard.rows, 2, 2, *index.shape_of(shard))
    again = command(ASKED, "dtype=float32", root=photos)
    assert again.encoded == 0
    truncate(result.folder / index.shards[1].file)
    assert command(ASKED, "dtype=float32", root=photos).encoded == 2


def test_batches_are_those_of_the_images_themselves(command: Encode, photos: Path) -> None:
    folder = command(ASKED, "dtype=float32", root=photos).folder
    latents = LatentData(folder, 2, seed=3, held_out=0.3, workers=0)
    images = ImageFolderData(
        photos, 16, 2, seed=3, held_out=0.3, workers=0, buckets=BUCKETS, background="white"
    )
    latents.prepare_data()
    codec, shapes = VAECodec(Path(latents.index.vae)), set()
    loaders = [data.train_dataloader() for data in (latents, images)]
    for (written, labels, _), (crops, same_labels) in islice(zip(*loaders, strict=False), 12):
        assert torch.equal(labels, same_labels)
        torch.testing.assert_close(written[:, 0], codec.encode(crops))
        shapes.add(written.shape[-2:])
    assert shapes == {(6, 12), (8, 8), (12, 6)}
    line = next(line for line in latents.remarks() if "buckets" in line)
    of = latents.dataset.bucket_of[latents.training_images]  # type: ignore[union-attr]
    counts = np.bincount(of)
    assert f"[12,24] ({counts[0]}), 16 ({counts[1]}), [24,12] ({counts[2]})" in line
    for written, _, _ in latents.val_dataloader():
        assert written.shape[-2:] in shapes


@pytest.mark.slow  # two ranks are processes of their own
def test_two_ranks_write_the_same(
    command: Encode, start: Start, photos: Path, vae: Path, contents: Contents, tmp_path: Path
) -> None:
    alone = command(ASKED, root=photos).folder
    arguments = (f"data.root={photos}", f"vae={vae}", "out=both", "rows=4", ASKED)
    process = start(*arguments, *SETTINGS, "trainer.devices=2", script="encode.py")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert contents(alone) == contents(tmp_path / "both")


def test_they_are_trained_on_also_beside_a_second_folder_and_the_images(
    command: Encode, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = command(ASKED, root=photos).folder

    def train(*arguments: str, out: str) -> dict[str, torch.Tensor]:
        given = (*SMALL, f"data.root={folder}", *arguments, f"out={out}")
        launch("train", train_command.run_train, given)
        return load_file(tmp_path / out / "model.safetensors")

    own = (f"data.validation={folder}", "every_n_steps.validation=3", "track=null")
    whole = train(*own, "max_steps=6", out="whole")
    assert "\n  buckets  [12,24] (6), 16 (5), [24,12] (3)" in capsys.readouterr().out
    rows = (tmp_path / "whole" / "logs" / "metrics.csv").read_text().splitlines()
    assert "val/loss" in rows[0]
    train(*own, "max_steps=3", out="parts")
    parts = train(*own, "max_steps=6", out="parts")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data.buckets=[[16,16],[12,23]]",), "[12,23] are no multiples of 2"),
        (("data.buckets=3",), "data.buckets=3: "),
        (("data.buckets=[[12,24]]",), "data.buckets: 16 is not among them"),
    ],
)
def test_refused(arguments: tuple[str, ...], message: str, command: Encode, photos: Path) -> None:
    result = command(*arguments, root=photos)
    assert result.code == 1 and message in result.err and "Traceback" not in result.err
    assert not result.folder.exists()


def test_a_network_has_to_take_every_bucket(
    command: Encode, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = command("data.buckets=[[16,16],[18,12]]", root=photos).folder
    given = (*SMALL, f"data.root={folder}", "max_steps=1", "out=refused")
    with pytest.raises(SystemExit):
        launch("train", train_command.run_train, given)
    told = capsys.readouterr().err
    assert "[18,12] are no multiples of 4 pixels" in told and "Traceback" not in told
    assert not Path("refused").exists()


def test_a_second_folder_s_sizes_are_checked_too(
    command: Encode, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = command(root=photos, out="plain").folder
    other = command("data.buckets=[[16,16],[18,12]]", root=photos, out="other").folder
    given = (*SMALL, f"data.root={plain}", f"data.validation={other}", "max_steps=1", "out=refused")
    with pytest.raises(SystemExit):
        launch("train", train_command.run_train, given)
    assert "[18,12] are no multiples of 4 pixels" in capsys.readouterr().err
    assert not Path("refused").exists()
