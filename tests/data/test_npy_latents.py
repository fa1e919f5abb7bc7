"""Latents as EDM2's dataset_tool.py writes them, against the numbers that EDM2 makes of them."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sag_dit.checkpoints import EDM2Autoencoder, from_denoiser
from sag_dit.codec import VAECodec
from sag_dit.data.latents import LatentData
from sag_dit.data.npy_latents import NpyLatents
from sag_dit.data.training_batches import Batch
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM
from tests.closeness import assert_near
from tests.data.making import latent_folder, same, save_vae, trainer

SHAPE = (8, 4, 6)
# NVlabs/edm2 at 4bf8162: ImageFolderDataset read the zip that `edm2_zip` writes, and encode_latents
# of StabilityVAEEncoder() was given it with noise of 0 and of 1. Image 3 at row 2, column 5; image
# 0 at row 0, column 0; then the sums of all images, channel by channel.
LABELS = [0, 2, 1, 0, 2]
MEAN = (
    [-0.9089673757553101, -0.14884719252586365, 0.2903921604156494, 0.014478117227554321],
    [-0.5767385959625244, -0.0191652774810791, -0.3592568337917328, 1.0887086391448975],
    [-68.96566995978355, -29.231733739376068, 13.982057019136846, 58.1205770522356],
)
PLUS_STD = (
    [-0.8743768930435181, -0.1257554590702057, 0.3019399344921112, 0.024098306894302368],
    [-66.15114533901215, -26.753466874361038, 16.992807062342763, 61.527059838175774],
)


def arrays(shape: tuple[int, int, int] = SHAPE) -> list[np.ndarray[Any, Any]]:
    """Mean and standard deviation of five images."""
    places = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    found = []
    for number in range(5):
        array = np.sin(places * 0.37 + number * 1.3) * 4 + 1
        array[4:] = np.abs(np.cos(places[4:] * 0.11 + number)) * 0.3
        found.append(array.astype(np.float32))
    return found


def edm2_zip(file: Path, labelled: bool = True, shape: tuple[int, int, int] = SHAPE) -> Path:
    """What ``dataset_tool.py encode --dest=FILE`` leaves: stored .npy, and dataset.json."""
    labels = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number, array in enumerate(arrays(shape)):
            name = f"{number:08d}"[:5] + f"/img-mean-std-{number:08d}.npy"
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(name, content.getvalue())
            labels.append([name, number * 2 % 3])
        archive.writestr("dataset.json", json.dumps({"labels": labels if labelled else None}))
    return file


def edm2_folder(folder: Path) -> Path:
    """The same, with ``--dest`` a folder."""
    with zipfile.ZipFile(edm2_zip(folder.with_name("packed.zip"))) as archive:
        archive.extractall(folder)
    return folder


def as_edm2(folder: Path) -> VAECodec:
    return VAECodec(EDM2Autoencoder(str(save_vae(folder))))


def model_of(codec: Any = None, **options: Any) -> Any:
    known = {"in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    network = DiT(**{"input_size": (4, 6), "patch_size": 2, **known, **options})
    return from_denoiser(ClassConditional(network, DDPM()), "tiny", codec=codec)


def batches(data: LatentData, model: Any, count: int, first: int = 0) -> list[Any]:
    data.trainer = trainer(total_batch_idx=first - 1)
    data.trainer.lightning_module = SimpleNamespace(model=model)
    loader = islice(data.train_dataloader(), count)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize("make", [edm2_zip, edm2_folder])
def test_x_0_is_what_edm2_makes_of_it(make: Callable[[Path], Path], tmp_path: Path) -> None:
    data = LatentData(make(tmp_path / "img512-sd.zip"), 4, workers=0)
    assert data.index.shape == (4, 4, 6)
    assert data.labels.tolist() == LABELS and data.class_names == ("0", "1", "2")
    codec = as_edm2(tmp_path / "vae")
    moments, labels, step = data.dataset.__getitems__(Batch(3, [*range(5)], [False] * 5))
    assert labels.tolist() == LABELS and step == 3
    mean, std = moments.unbind(1)
    bare, more = codec.scaled(mean), codec.scaled(mean + std)
    found = bare[3, :, 2, 5], bare[0, :, 0, 0], bare.double().sum((0, 2, 3))
    for each, expected in zip(found, MEAN, strict=True):
        assert_near(each.double(), torch.tensor(expected, dtype=torch.float64), 1e-6)
    for each, expected in zip(
        (more[3, :, 2, 5], more.double().sum((0, 2, 3))), PLUS_STD, strict=True
    ):
        assert_near(each.double(), torch.tensor(expected, dtype=torch.float64), 1e-6)


def test_batches_are_drawn_afresh_and_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    file, model = edm2_zip(tmp_path / "sd.zip"), model_of(as_edm2(tmp_path / "vae"))
    whole = batches(LatentData(file, 3, workers=0), model, 6)
    assert same(whole, batches(LatentData(file, 3, workers=2), model, 6))
    assert same(whole[2:], batches(LatentData(file, 3, workers=0), model, 4, first=2))
    folder = batches(LatentData(edm2_folder(tmp_path / "folder"), 3, workers=0), model, 6)
    assert same(whole, folder)
    # Other statistics are those of another autoencoder.
    plain = batches(LatentData(file, 3, workers=0), model_of(VAECodec(tmp_path / "vae")), 1)
    z = whole[0][0] * torch.tensor(model.codec.settings["latents_std"]).reshape(-1, 1, 1)
    z += torch.tensor(model.codec.settings["latents_mean"]).reshape(-1, 1, 1)
    assert_near(plain[0][0], (z - 0.1) * 0.5)


def test_it_decodes_what_it_encodes_between_0_and_1(tmp_path: Path) -> None:
    folder = save_vae(tmp_path / "vae")
    codec, plain = VAECodec(EDM2Autoencoder(str(folder))), VAECodec(folder)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = codec.vae.encode(pixels.float() / 127.5 - 1)
    known = plain.vae.encode(pixels.float() / 255).latent_dist
    assert_near(mean, known.mean)
    assert_near(std, known.std)
    x_0, _ = codec.posterior(pixels)
    scale = torch.tensor([0.5 / each for each in (4.17, 4.62, 3.71, 3.28)]).reshape(-1, 1, 1)
    shift = torch.tensor([5.81, 3.25, 0.12, -2.15]).reshape(-1, 1, 1)
    assert_near(x_0, (known.mean - shift) * scale)
    shown = (plain.vae.decode(known.mean).sample * 255).clamp(0, 255)
    assert (codec.decode(x_0).float() - shown).abs().max() <= 1
    moved = EDM2Autoencoder(str(folder), final_mean=0.25, final_std=1.0)
    expected = (known.mean - shift) * 2 * scale + 0.25
    assert_near(VAECodec(moved).encode(pixels), expected)


def test_without_labels_there_is_one_class(tmp_path: Path) -> None:
    data = LatentData(edm2_zip(tmp_path / "sd.zip", labelled=False), 4)
    assert data.class_names == ("0",) and data.labels.tolist() == [0] * 5


def test_the_autoencoder_is_edm2_s_unless_another_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sag_dit.checkpoints.loading import find_codec

    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(tmp_path))
    save_vae(tmp_path / "sd-vae-ft-mse")
    codec = find_codec(LatentData(edm2_zip(tmp_path / "sd.zip"), 4).vae)
    assert isinstance(codec, VAECodec) and isinstance(codec.vae, EDM2Autoencoder)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])


def _no_npy(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("dataset.json", "{}")


def _rewritten(change: Callable[[str, bytes], bytes]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, change(name, content))

    return apply


def _npy(array: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _first(content: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, before: content if name.endswith("0.npy") else before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_cut, "sd.zip cannot be read as zip"),
        (_no_npy, "no .npy file in it: expected latents of encode.py, or of dataset_tool.py"),
        (_rewritten(_first(_npy(np.zeros((7, 4, 6), np.float32)))), r"float32 \(7, 4, 6\): exp"),
        (_rewritten(_first(_npy(np.zeros(SHAPE)))), r"float64 \(8, 4, 6\): expected mean and"),
        (_rewritten(_first(b"\x93NUMPY")), "img-mean-std-00000000.npy cannot be read"),
        (
            _rewritten(
                lambda name, content: (
                    b'{"labels": [["00000/img-mean-std-00000000.npy", 1]]}'
                    if name.endswith("json")
                    else content
                )
            ),
            "lacks 4 of 5 files, the first is 00000/img-mean-std-00000001.npy: expected a label",
        ),
    ],
)
def test_damage_is_told_in_a_sentence(
    damage: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    file = edm2_zip(tmp_path / "sd.zip")
    damage(file)
    with pytest.raises(ValueError, match=told) as caught:
        LatentData(file, 4)
    assert "\n" not in str(caught.value)


def test_one_of_another_shape_ends_with_its_name(tmp_path: Path) -> None:
    folder = edm2_folder(tmp_path / "sd")
    (folder / "00000" / "img-mean-std-00000003.npy").write_bytes(_npy(np.zeros((8, 4, 4), "f4")))
    with pytest.raises(ValueError, match=r"00000003.npy holds float32 \(8, 4, 4\): expected mean"):
        NpyLatents(folder).__getitems__(Batch(0, [3], [False]))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = edm2_zip(tmp_path / "sd.zip")
    codec = as_edm2(tmp_path / "vae")
    LatentData(file, 4).check(model_of(codec))
    with pytest.raises(ValueError, match=r"latents of shape \(4, 4, 6\): expected \(4, 4, 4\)"):
        LatentData(file, 4).check(model_of(codec, input_size=4))
    with pytest.raises(ValueError, match=r"flip=true: .* holds no mirror images"):
        LatentData(file, 4, flip=True)
    with pytest.raises(ValueError, match=r"data.images=photos: latents of EDM2 do not tell"):
        LatentData(file, 4, images="photos")
    other = latent_folder(tmp_path / "ours")
    with pytest.raises(ValueError, match="expected latents of the same classes"):
        LatentData(file, 4, validation=other)
    shutil.copy(file, tmp_path / "second.zip")
    second = LatentData(file, 4, validation=tmp_path / "second.zip", workers=0)
    assert sum(len(batch[1]) for batch in second.val_dataloader()) == 5
    with pytest.raises(ValueError, match=r"raw_std=\[1.0, 1.0\]: expected a number for each"):
        EDM2Autoencoder(str(tmp_path / "vae"), raw_std=[1.0, 1.0])


def test_a_changed_label_changes_the_fingerprint(tmp_path: Path) -> None:
    file = edm2_zip(tmp_path / "sd.zip")
    before = LatentData(file, 4).fingerprint()
    assert before == LatentData(file, 4).fingerprint() and before["images"] == 5
    _rewritten(lambda _, content: content.replace(b'npy", 1]', b'npy", 0]'))(file)
    assert LatentData(file, 4).fingerprint()["sha256"] != before["sha256"]
