"""Latents from shards: drawn afresh as a function of (seed, step); damage is found and named."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sag_dit.checkpoints import from_denoiser
from sag_dit.codec import VAECodec
from sag_dit.data.latents import LatentData, encoder_sha256, sample_posterior
from sag_dit.data.shards import INDEX, read_index
from sag_dit.data.training_batches import Batch
from sag_dit.denoiser import ClassConditional
from sag_dit.process import DDPM
from tests.conftest import MakeDiT
from tests.data.making import latent_folder, same, save_vae, trainer

FIRST = "latents-00000.safetensors"


def batches(data: LatentData, count: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of x_0 and labels as a model gets them."""
    loader = islice(data.train_dataloader(), count)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_image_is_found_in_its_shard(tmp_path: Path, dtype: torch.dtype) -> None:
    data = LatentData(latent_folder(tmp_path, dtype=dtype), 4, workers=0)
    every = list(range(12))
    moments, labels, step = data.dataset.__getitems__(Batch(7, every, [i % 3 == 0 for i in every]))
    assert moments.shape == (12, 2, 2, 3, 4) and moments.dtype == dtype and step == 7
    expected = torch.tensor([i + 0.5 * (i % 3 == 0) for i in every], dtype=dtype)
    assert torch.equal(moments[:, 0, 0, 0, 0], expected)
    assert (moments[:, 1] == 0.5).all()
    assert labels.tolist() == [i % 2 for i in every]
    assert data.class_names == ("even", "odd")


def test_report_tells_what_was_left_out_when_encoding(tmp_path: Path) -> None:
    root = latent_folder(tmp_path)
    without = "  note: no images are held out: val/loss is not computed"
    whole = ["data: 12 images in 2 classes", "  classes  even (6), odd (6)"]
    assert LatentData(root, 4).report().splitlines() == [*whole, without]
    index = json.loads((root / INDEX).read_text())
    index["shards"][1]["skipped"] = ["odd/a.png"]
    (root / INDEX).write_text(json.dumps(index))
    left_out = "  left out 1 (could not be decoded): odd/a.png"
    assert LatentData(root, 4).report().splitlines() == [*whole, left_out, without]


def test_fingerprint_follows_what_the_index_says(tmp_path: Path) -> None:
    first, same, other = (
        LatentData(latent_folder(tmp_path / str(number), std=std), 4).fingerprint()
        for number, std in enumerate((0.5, 0.5, 0.25))
    )
    assert first == same and first["classes"] == {"even": 6, "odd": 6} and first["images"] == 12
    assert {**other, "sha256": first["sha256"]} == first != other


def test_empty_shards_are_passed_over(tmp_path: Path) -> None:
    data = LatentData(latent_folder(tmp_path, (0, 2, 0, 0, 3, 0)), 2)
    moments, _, _ = data.dataset.__getitems__(Batch(0, [4, 2, 1, 0], [False] * 4))
    assert moments[:, 0, 0, 0, 0].tolist() == [4, 2, 1, 0]


def test_x_0_is_mean_plus_std_times_fresh_noise(tmp_path: Path) -> None:
    data = LatentData(latent_folder(tmp_path, (40,)), 40, workers=0)
    without = LatentData(latent_folder(tmp_path / "mean", (40,), std=0.0), 40, workers=0)
    z = []
    for (x_0, labels), (mean, same_labels) in zip(
        batches(data, 20), batches(without, 20), strict=True
    ):
        assert x_0.dtype == torch.float32 and x_0.shape == (40, 2, 3, 4)
        assert torch.equal(labels, same_labels)
        # The mean tells the image and whether it is mirrored, and half of them are.
        values = mean[:, 0, 0, 0]
        assert sorted(values.floor().tolist()) == list(range(40))
        assert 5 < (values % 1 == 0.5).sum() < 35
        z.append((x_0 - mean) / 0.5)
    drawn = torch.cat(z)
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03
    assert len({step.numpy().tobytes() for step in z}) == 20
    assert len({row.numpy().tobytes() for row in z[0]}) == 40


def test_batches_do_not_depend_on_workers_or_resumption(tmp_path: Path) -> None:
    root = latent_folder(tmp_path)
    alone = batches(LatentData(root, 3, seed=5, workers=0), 8)
    assert same(alone, batches(LatentData(root, 3, seed=5, workers=2), 8))
    resumed = LatentData(root, 3, seed=5, workers=0)
    resumed.trainer = trainer(total_batch_idx=4)
    assert same(alone[5:], batches(resumed, 3))
    assert not same(alone, batches(LatentData(root, 3, seed=6, workers=0), 8))


def test_ranks_draw_different_noise(tmp_path: Path) -> None:
    moments = torch.ones(2, 2, 2, 3, 4)
    one, again, other, later = (
        sample_posterior(moments, 0, step, rank) for step, rank in ((3, 0), (3, 0), (3, 1), (4, 0))
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other) and not torch.equal(one, later)


def test_flips_follow_what_was_encoded(tmp_path: Path) -> None:
    root = latent_folder(tmp_path, flips=1, std=0.0)
    assert all((x_0 % 1 == 0).all() for x_0, _ in batches(LatentData(root, 6, workers=0), 5))
    with pytest.raises(ValueError, match=r"flip=true: .* holds no mirror images"):
        LatentData(root, 6, flip=True)
    both = latent_folder(tmp_path / "both", std=0.0)
    plain = LatentData(both, 6, flip=False, workers=0)
    assert all((x_0 % 1 == 0).all() for x_0, _ in batches(plain, 5))


def test_dataset_travels_to_other_processes_without_its_latents(tmp_path: Path) -> None:
    dataset = LatentData(latent_folder(tmp_path, (400, 300)), 4).dataset
    content = pickle.dumps(dataset)
    assert len(content) < 20_000 < sum(shard.bytes for shard in dataset.index.shards)
    batch = Batch(0, [650, 3], [True, False])
    for mine, theirs in zip(
        dataset.__getitems__(batch)[:2], pickle.loads(content).__getitems__(batch)[:2], strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux' list of open files")
def test_shards_do_not_stay_open(tmp_path: Path) -> None:
    root = latent_folder(tmp_path, (1,) * 40)
    before = len(os.listdir("/proc/self/fd"))
    dataset = LatentData(root, 4).dataset
    assert len(dataset) == 40
    assert len(os.listdir("/proc/self/fd")) - before < 5


def change(root: Path, **values: Any) -> None:
    index = json.loads((root / INDEX).read_text())
    (root / INDEX).write_text(json.dumps({**index, **values}))


def change_shard(root: Path, **values: Any) -> None:
    index = json.loads((root / INDEX).read_text())
    index["shards"][0].update(values)
    (root / INDEX).write_text(json.dumps(index))


def cut(root: Path) -> None:
    content = (root / FIRST).read_bytes()
    (root / FIRST).write_bytes(content[:-100])


def scramble_header(root: Path) -> None:
    content = bytearray((root / FIRST).read_bytes())
    content[8:12] = b"????"
    (root / FIRST).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / INDEX).unlink(), r"no index\.json; expected a folder that encode"),
        (lambda root: (root / INDEX).write_text("{"), r"index\.json: expected a readable"),
        (lambda root: (root / INDEX).write_text("[]"), r"index\.json: .* found a list"),
        (lambda root: change(root, format=9), "its format is 9, expected 1"),
        (lambda root: change(root, images=11), "it says 11 images, its shards 12"),
        (lambda root: change(root, counts=[6]), "2 classes, and counts of 1"),
        (lambda root: change(root, dtype="int8"), "dtype=int8: expected one of float16, float32"),
        (lambda root: change(root, shape=[2, 4, 3]), r"latents-00000.*damaged \(it holds"),
        (lambda root: change(root, flips=1), r"latents-00000.*damaged \(it holds"),
        (lambda root: change(root, dtype="float32"), r"latents-00000.*damaged \(it holds"),
        (lambda root: (root / FIRST).unlink(), "latents-00000.safetensors is missing"),
        (cut, r"latents-00000.safetensors has \d+ bytes, expected \d+"),
        (lambda root: change_shard(root, bytes=1), r"has \d+ bytes, expected 1 bytes"),
        (scramble_header, "latents-00000.safetensors: damaged"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = latent_folder(tmp_path)
    damage(root)
    with pytest.raises(ValueError, match=message):
        LatentData(root, 4).train_dataloader()


def test_changed_bytes_are_found_before_the_first_step(tmp_path: Path) -> None:
    root = latent_folder(tmp_path)
    LatentData(root, 4).prepare_data()
    content = bytearray((root / FIRST).read_bytes())
    content[-1] ^= 1
    (root / FIRST).write_bytes(content)
    with pytest.raises(ValueError, match=r"latents-00000.*sha256 is \w+, expected \w+; repeat"):
        LatentData(root, 4).prepare_data()
    LatentData(root, 4, verify=False).prepare_data()


def test_held_out_latents_are_the_held_out_images(tmp_path: Path) -> None:
    data = LatentData(latent_folder(tmp_path, std=0.0), 4, held_out=0.3, workers=0)
    held = [
        int(value)
        for batch in data.val_dataloader()
        for value in data.on_after_batch_transfer(batch, 0)[0][:, 0, 0, 0]
    ]
    assert held == data.held_out_images.nonzero()[0].tolist() and held
    trained = {int(v) for x_0, _ in batches(data, 20) for v in x_0[:, 0, 0, 0].floor()}
    assert not trained & set(held) and trained | set(held) == set(range(12))


class Watcher(LightningModule):
    """Notes what arrives, and has one weight to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[Tensor, Tensor]] = []
        self.validated: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.trained.append(batch)
        return (self.weight - batch[0].mean()).square()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: LatentData, steps: int, folder: Path, ckpt: Path | None = None) -> Watcher:
    watcher = Watcher()
    fitting = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    fitting.fit(watcher, datamodule=data, ckpt_path=ckpt)
    fitting.save_checkpoint(folder / "last.ckpt")
    return watcher


def test_a_trainer_gets_x_0_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    root = latent_folder(tmp_path / "latents")
    whole = fit(LatentData(root, 3, held_out=0.3, workers=0), 6, tmp_path)
    assert same(whole.trained, batches(LatentData(root, 3, held_out=0.3, workers=0), 6))
    assert whole.validated and same(whole.validated[:1], whole.validated[-1:])
    fit(LatentData(root, 3, held_out=0.3, workers=0), 4, tmp_path)
    rest = fit(LatentData(root, 3, held_out=0.3, workers=0), 6, tmp_path, tmp_path / "last.ckpt")
    assert same(whole.trained[4:], rest.trained)


def test_latents_are_checked_against_the_model(tmp_path: Path, make_dit: MakeDiT) -> None:
    root = latent_folder(tmp_path / "latents")
    codec = VAECodec(save_vae(tmp_path / "vae", latent_channels=2))

    def check(**options: Any) -> None:
        network = make_dit(**{"in_channels": 2, "input_size": (3, 4), "patch_size": 1, **options})
        model = from_denoiser(ClassConditional(network, DDPM()), "tiny", codec=codec)
        LatentData(root, 4).check(model)

    with pytest.raises(ValueError, match=r"was encoded by another autoencoder \(of a test"):
        check(num_classes=2)
    change(root, config={"encoder_sha256": encoder_sha256(codec)})
    check(num_classes=2)
    with pytest.raises(ValueError, match=r"latents of shape \(2, 3, 4\): expected \(2, 4, 4\)"):
        check(num_classes=2, input_size=4)
    with pytest.raises(ValueError, match="the data has 2 classes and the model 10"):
        check()
    assert read_index(root).images == 12


def test_a_second_folder_is_validated_with_and_never_trained_on(tmp_path: Path) -> None:
    first, second = latent_folder(tmp_path / "first", (8,)), latent_folder(tmp_path / "second")
    data = LatentData(first, 4, workers=0, validation=second)
    shown = [batch[0][:, 0, 0, 0, 0].tolist() for batch in data.val_dataloader()]
    assert shown == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len(data.training_images) == 8
    data.prepare_data()
    (second / FIRST).write_bytes(b"damaged" * 100)
    with pytest.raises(ValueError, match=FIRST):
        data.prepare_data()


def test_a_second_folder_has_to_fit_the_first(tmp_path: Path) -> None:
    first, second = latent_folder(tmp_path / "first"), latent_folder(tmp_path / "second")
    with pytest.raises(ValueError, match=r"held_out=0\.1 and validation=.*expected one of them"):
        LatentData(first, 4, held_out=0.1, validation=second)
    index = json.loads((second / INDEX).read_text())
    index["config"]["encoder_sha256"] = "another"
    (second / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected latents of the same classes, shape and autoenc"):
        LatentData(first, 4, validation=second)


def test_a_class_that_the_index_does_not_have_is_named(tmp_path: Path) -> None:
    root = latent_folder(tmp_path)
    change(root, class_names=["all"], counts=[12])
    with pytest.raises(
        ValueError, match=r"\.safetensors: row 1 is of class 1, and the data has 1 class; repeat"
    ):
        _ = LatentData(root, workers=0).dataset
