"""Data of one's own: archives, and data sets and modules from a file outside the package."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sag_dit.cli.composing import compose, make_around
from sag_dit.data.map_data import MapData
from sag_dit.data.training_batches import Batch, StepData
from tests.cli.conftest import equal, weights
from tests.data.making import image_folder, same, save_vae, trainer
from tests.data.test_npy_latents import edm2_zip
from tests.data.test_sources import contents, of_shards, write_tar, write_zip
from tests.pages import Page

Command = Callable[..., Any]
ROOT = Path(__file__).parents[2]
AROUND = "sag_dit.data.map_data.MapData"
MINE = '''
import random

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler


class Shapes(Dataset):
    """Discs and squares of random brightness."""

    class_names = ("disc", "square")

    def __init__(self, count=40, size=8):
        self.count, self.size = count, size
        self.labels = [i % 2 for i in range(count)]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        places = np.linspace(-1, 1, self.size)
        a, b = np.abs(places[:, None]), np.abs(places[None])
        inside = np.hypot(a, b) < 0.8 if index % 2 == 0 else np.maximum(a, b) < 0.6
        bright = random.randint(50, 120) + int(torch.randint(100, ())) + np.random.randint(30)
        return torch.from_numpy(inside.astype(np.uint8) * bright)[None], index % 2


class Bare(Dataset):
    """As torchvision's: images of Pillow, no labels, no names."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        from PIL import Image

        return Image.new("L", (8, 8), 20 * index), torch.tensor(index % 3)


class Failing(Dataset):
    """Its second item has a mistake."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(1, 2, 2), 0 if index == 0 else {}["lost"]


class ChannelsLast(Dataset):
    """Images of numpy, of colour in the last axis."""

    labels = [0, 1] * 8

    def __init__(self, floats=False):
        self.dtype = np.float32 if floats else np.uint8

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return np.zeros((8, 8, 3), self.dtype), self.labels[index]


class Module(LightningDataModule):
    """Loaders of shapes."""

    class_names = ("disc", "square")

    def __init__(self, batch_size=8, sampler=False, shuffle=True, **loader):
        super().__init__()
        self.loader = loader
        self.batch_size, self.sampler, self.shuffle = batch_size, sampler, shuffle
        self.made = []

    def prepare_data(self):
        self.made.append("prepared")

    def setup(self, stage):
        self.made.append(stage)
        self.train, self.val = Shapes(40), Shapes(10)

    def train_dataloader(self):
        if self.sampler:
            sampler = WeightedRandomSampler([1.0] * 40, 40)
            return DataLoader(self.train, self.batch_size, sampler=sampler)
        return DataLoader(self.train, self.batch_size, shuffle=self.shuffle, **self.loader)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)


class Stateful(Module):
    def state_dict(self):
        return {"place": 3}


class TwoLoaders(Module):
    def val_dataloader(self):
        return [super().val_dataloader()] * 2


class Noisy(Module):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return images ^ torch.randint(2, images.shape, dtype=torch.uint8), labels


def floats(low=-1.0, high=1.0):
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images * (high - low) + low, torch.arange(20) % 2)
'''

SMALL = (
    *("experiment=digits", "model.hidden_size=48", "model.depth=2", "model.num_heads=3"),
    *("data.batch_size=8", "every_n_steps.checkpoint=2", "every_n_steps.log=1", "max_steps=4"),
)
PHOTOS = (*SMALL[1:4], "experiment=folder", "resolution=8", "patch_size=2", "data.workers=0")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The user's file, in the folder where the command is started."""
    (tmp_path / "my_data.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_data", None)
    import my_data  # type: ignore[import-not-found]

    yield my_data
    sys.modules.pop("my_data", None)


def test_runs_on_archives_end_with_the_weights_of_class_folders(
    train: Command, tmp_path: Path
) -> None:
    photos = image_folder(tmp_path / "photos", ("cats", "dogs", "mice"), each=4)
    file = write_zip(tmp_path / "photos.zip", contents(photos))
    (tmp_path / "shards").mkdir()
    of_shards(photos, tmp_path / "shards")
    # Photos that shrink, so that Adam sees gradients: the same command but for the root.
    small = (*PHOTOS, "data.batch_size=4", "max_steps=3", "name=photos")
    whole = train(*small, f"data.root={photos}", "out=folders")
    assert equal(whole, train(*small, f"data.root={file}", "out=zip"))
    names = "data.class_names=[cats,dogs,mice]"
    shards = (*small, f"data.root={tmp_path}/shards/train-*.tar", names, "out=shards")
    train(*shards, "max_steps=1")
    assert equal(whole, train(*shards))


def test_rectangles_are_trained_on_and_drawn(
    train: Command, in_process: Command, tmp_path: Path
) -> None:
    photos = image_folder(tmp_path / "photos", ("cats", "dogs"), each=4)
    small = (*PHOTOS[:4], "patch_size=2", "data.workers=0", f"data.root={photos}", "max_steps=2")
    wide = train(*small, "data.batch_size=4", "resolution=[8,12]", "out=wide")
    drawn = in_process("sample", f"ckpt={wide}", "num_images=1", "steps=2")
    assert drawn.code == 0, drawn.err
    with Image.open(drawn.folder() / "images" / "000000.png") as image:
        assert image.size == (12, 8)
    for wrong, told in (("[8,13]", "=[8,13]: expected a multiple of 2"), ("[8]", "a list of 2 wh")):
        refused = in_process("train", *small, f"resolution={wrong}", "out=wrong")
        assert refused.code == 1 and told in refused.err, refused.err
    tuned = in_process(
        "train",
        "experiment=finetune",
        f"ckpt={wide}",
        f"data.root={photos}",
        "resolution=[8,12]",
        "max_steps=1",
    )
    assert tuned.code == 1 and "a checkpoint is fine-tuned on squares" in tuned.err


def test_a_changed_archive_is_refused(in_process: Command, tmp_path: Path) -> None:
    photos = image_folder(tmp_path / "photos", ("cats", "dogs"), each=4)
    file = write_zip(tmp_path / "photos.zip", contents(photos))
    small = (*PHOTOS, "data.batch_size=4", "max_steps=1", "out=run", f"data.root={file}")
    assert in_process("train", *small).code == 0
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("cats/more.png", contents(photos)["dogs/01.png"])
    refused = in_process("train", *small, "max_steps=2")
    assert refused.code == 1 and "images of cats: 4, now 5" in refused.err
    file.write_bytes(file.read_bytes()[:900])
    damaged = in_process("train", *small, "max_steps=2")
    assert damaged.code == 1 and "Traceback" not in damaged.err
    assert "photos.zip cannot be read as zip" in damaged.err


@pytest.mark.parametrize("target", ["Shapes", "Noisy"])
def test_a_data_set_of_ones_own_is_trained_on_and_resumed(
    target: str, mine: Any, train: Command, in_process: Command
) -> None:
    own = (*SMALL, f"data._target_=my_data.{target}", "name=shapes", "data.batch_size=8")
    whole = train(*own, "out=whole")
    # Stopped, and gone on with other processes that read.
    train(*own, "out=parts", "max_steps=2")
    assert equal(whole, train(*own, "out=parts", "data.workers=1"))
    assert not equal(whole, train(*own, "out=other", "seed=1"))
    told = in_process("train", *own, "out=told", "max_steps=1").out
    assert "data: 40 images in 2 classes" in told and "8 x 8 pixels in 1 channel," in told
    drawn = in_process("sample", f"ckpt={whole}", "classes=[disc]", "num_images=1", "steps=2")
    assert drawn.code == 0, drawn.err


def test_its_own_arguments_and_ours_are_told_apart(mine: Any, in_process: Command) -> None:
    own = (
        "experiment=digits",
        "data._target_=my_data.Shapes",
        "data.count=30",
        "data.held_out=0.2",
    )
    config = compose("train", own)
    assert config.data == {
        **{"_target_": "my_data.Shapes", "batch_size": 64, "seed": 0},
        **{"count": 30, "held_out": 0.2},
    }
    data = make_around(config.data, "data", AROUND)
    assert isinstance(data, MapData) and len(data.dataset) == 30 and data.held_out == 0.2
    assert 0 < data.held_out_images.sum() < 20
    for wrong, told in (("data.cuont=3", "takes no cuont"), ("data.flip=true", "takes no flip")):
        refused = in_process("train", *own, wrong, "max_steps=1")
        assert refused.code == 1 and told in refused.err and "Traceback" not in refused.err


def test_batches_do_not_depend_on_ranks_workers_or_resumption(mine: Any) -> None:
    def steps(rank: int = 0, world: int = 1, first: int = 0, **options: Any) -> list[Any]:
        data = MapData(mine.Shapes(), 8, workers=0, **options)
        data.trainer = trainer(rank, world, first - 1)
        batches = iter(data.train_dataloader())
        return [next(batches) for _ in range(6)]

    whole = steps()
    assert same(whole, steps()) and same(whole[3:], steps(first=3)[:3])
    halves = [steps(rank, 2) for rank in range(2)]
    joined = [
        tuple(torch.cat(pair) for pair in zip(*both, strict=True))
        for both in zip(*halves, strict=True)
    ]
    assert same(whole, joined)
    # An image looks otherwise at another step.
    assert len({images.amax().item() for images, _ in whole}) > 1


def test_a_data_set_without_labels_or_names_is_read_for_them(mine: Any) -> None:
    data = MapData(mine.Bare(), 4, workers=0, balance=1.0)
    assert data.class_names == ("0", "1", "2")
    assert data.labels.tolist() == [0, 1, 2] * 4
    before = data.fingerprint()
    assert before == MapData(mine.Bare(), 4).fingerprint()
    images, labels = data.dataset.__getitems__(Batch(0, [5], [False]))
    assert images.unique().tolist() == [100] and labels.tolist() == [2]


def test_a_module_brings_its_loaders(mine: Any) -> None:
    module = mine.Module(batch_size=4)
    data = MapData.of(module, seed=3)
    assert module.made == ["prepared", "fit"]
    assert isinstance(data, MapData) and data.batch_size == 4 and data.workers == 0
    same_shapes = MapData(mine.Shapes(), 4, 3, workers=0)
    here, there = (next(iter(each.train_dataloader())) for each in (data, same_shapes))
    assert same([here], [there])
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 10
    assert MapData.of(data) is data


def test_each_loader_keeps_its_collate_fn_and_processes(mine: Any) -> None:
    def brighter(items: list[Any]) -> Any:
        images, labels = torch.utils.data.default_collate(items)
        return images.clamp(min=1), labels

    module = mine.Module(collate_fn=brighter, num_workers=2)
    data = MapData.of(module)
    assert data.workers == 2 and MapData.of(module, workers=0).workers == 0
    data.workers = 0
    training, held_out = data.train_dataloader(), data.val_dataloader()
    least = [next(iter(loader))[0].min().item() for loader in (training, held_out)]
    assert least == [1, 0]


def test_a_module_hears_of_what_ends_its_training(mine: Any) -> None:
    module, heard = mine.Module(), []
    module.on_exception = heard.append
    MapData.of(module).on_exception(failure := KeyError("lost"))
    assert heard == [failure]


class Streams(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda m: MapData.of(m.Module(sampler=True)), "has a WeightedRandomSampler, whose order"),
        (lambda m: MapData.of(m.Module(worker_init_fn=print)), "has a worker_init_fn, which is"),
        (
            lambda m: MapData.of(
                m.Module(collate_fn=lambda _: (torch.zeros(8, 3), torch.zeros(8)))
            ),
            r"collate_fn makes a tuple with images torch.float32 \(8, 3\): expected images",
        ),
        (lambda m: MapData.of(m.Stateful()), "Stateful has its own state_dict, which is not call"),
        (lambda m: MapData.of(m.TwoLoaders()), "val_dataloader returns a list: .*ConcatDataset"),
        (
            lambda m: MapData(m.Shapes(), validation=m.Shapes(size=16)),
            r"on torch.uint8 \(1, 8, 8\) and validates with torch.uint8 \(1, 16, 16\): expected",
        ),
        (lambda m: MapData(Streams()), "Streams streams its items: expected a data set with a"),
        (lambda m: MapData([]), "list: expected a data set with a length, of 1"),
        (lambda m: MapData([1]), r"list: item 0 is a int: expected \(image, label\)"),
        (lambda m: MapData([(torch.zeros(3), 0)]), r"image that is torch.float32 \(3,\): expected"),
        (lambda m: MapData([(torch.zeros(1, 2, 2).short(), 0)]), r"is torch.int16 \(1, 2, 2\)"),
        (lambda m: MapData([(np.zeros((1, 2, 2), np.uint16), 0)]), r"that is uint16 \(1, 2, 2\)"),
        (lambda m: MapData([(torch.zeros(1, 2, 2), 0, "a")]), "item 0 is a tuple of 3 values: exp"),
        (lambda m: MapData([None]), "item 0 is a NoneType: expected"),
        (lambda m: MapData([(torch.zeros(1, 2, 2), 0), {}]), "item 1 is a dict: expected"),
        (lambda m: MapData(m.Failing()), r"Failing: item 1: KeyError: 'lost' \(.*my_data.py, line"),
        (lambda m: MapData([(torch.zeros(1, 2, 2), 0.5)]), "label 0.5: expected"),
        (lambda m: MapData([(torch.zeros(1, 2, 2), True)]), "label True: expected"),
        (lambda m: MapData([(torch.zeros(1, 2, 2), -1)]), "label -1: expected 0 or more"),
        (lambda m: MapData(m.Shapes(), held_out=1.0), "held_out=1.0: expected a share"),
        (lambda m: MapData.of(m.Module(), held_out=0.1), "brings images to validate with"),
    ],
)
def test_what_cannot_be_trained_on_is_told(make: Any, told: str, mine: Any) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        make(mine)
    assert "\n" not in str(caught.value)


def test_images_of_several_shapes_are_told() -> None:
    told = r"item 1 is torch.float32 \(1, 3, 3\), the first .*: expected one shape .*; crop them"
    with pytest.raises(ValueError, match=told):
        MapData([(torch.zeros(1, side, side), 0) for side in (2, 3)], 2, workers=0)
    # One that is not among those that are read at the start is met when it is read.
    images = [(torch.zeros(3 if place == 1 else 1, 2, 2), 0) for place in range(20)]
    data = MapData(images, 2, workers=0)
    told = r"item 1 is .* \(3, 2, 2\), the first .* \(1, 2, 2\): .*; convert them, as image.convert"
    with pytest.raises(ValueError, match=told):
        data.dataset.__getitems__(Batch(0, [0, 1], [False, False]))


@pytest.mark.parametrize("label", [np.int64, np.array, torch.tensor, lambda n: torch.tensor([n])])
def test_arrays_of_numpy_and_single_numbers_are_read(label: Any) -> None:
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)[..., ::-1]
    data = MapData([(pixels[n], label(n)) for n in range(2)], 2, workers=0)
    images, labels = data.dataset.__getitems__(Batch(0, [0, 1], [False, False]))
    assert images.tolist() == pixels.tolist() and labels.tolist() == [0, 1]


def test_what_an_item_draws_at_random_disturbs_nothing_else(mine: Any) -> None:
    data = MapData(mine.Shapes(), 8)
    state = torch.get_rng_state(), random.getstate()
    data.dataset.__getitems__(Batch(3, [1, 2], [False, False]))
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data._target_=my_data.floats", "data.low=0"], "floats from .* to 1: expected uint8"),
        (["data._target_=my_data.floats", "data.low=-3"], "floats from -3.* expected uint8"),
        (
            ["data._target_=my_data.Shapes", "data.size=16"],
            "images of 16 x 16 pixels: expected 8",
        ),
        (["data._target_=my_data.ChannelsLast"], r"images of shape \(8, 8, 3\): .*permute them"),
        (["data._target_=my_data.ChannelsLast", "data.floats=true"], "permute them, a tensor by"),
        (["data._target_=my_data.Shapes", "num_classes=5"], "2 classes and the model 5"),
        (["data._target_=my_data.Nothing"], "my_data"),
        (["data._target_=fractions.Fraction"], "Fraction"),
    ],
)
def test_what_does_not_fit_the_model_is_told_before_training(
    arguments: list[str], told: str, mine: Any, in_process: Command
) -> None:
    refused = in_process("train", *SMALL, *arguments, "out=run")
    assert refused.code == 1 and "Traceback" not in refused.err
    assert re.search(told, refused.err), refused.err
    assert not Path("run").exists()


def test_x_0_as_floats_is_trained_on(mine: Any, train: Command) -> None:
    assert weights(train(*SMALL, "data._target_=my_data.floats", "max_steps=1", "out=run"))


@pytest.mark.slow  # starts two processes three times
def test_two_ranks_that_were_stopped_go_on_to_the_same_weights(mine: Any, tmp_path: Path) -> None:
    """Batches of two ranks are the halves of one's; noise and times are each rank's own."""

    def run(out: str, *more: str) -> Path:
        ranks = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer=ddp", f"out={out}")
        own = (*SMALL, "data._target_=my_data.Noisy", *ranks, *more)
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *own],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / out

    run("parts", "max_steps=2")
    assert equal(run("whole"), run("parts"))


def test_step_data_stays_what_it_is() -> None:
    config = compose("train", ["experiment=digits", "data.classes=[1,2]"])
    data = make_around(config.data, "data", AROUND)
    assert isinstance(data, StepData) and not isinstance(data, MapData)


SECTION = Page.of("data.md")


@pytest.fixture
def as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files and folders that the page speaks of."""
    photos = image_folder(tmp_path / "photos", ("cats", "dogs"), each=4)
    files = contents(photos)
    write_zip(tmp_path / "photos.zip", files)
    (photos / "labels.csv").write_text("".join(f"{n},{n[:3]}\n" for n in files))
    (tmp_path / "shards").mkdir()
    samples = {n.replace("/", "-"): content for n, content in files.items()}
    labels = {f"{n.split('.')[0]}.cls": str(int(n[0] == "d")).encode() for n in samples}
    write_tar(tmp_path / "shards" / "train-000.tar", {**samples, **labels})
    (tmp_path / "described").mkdir()
    told = {name.replace(".cls", ".json"): b'{"label": %s}' % each for name, each in labels.items()}
    write_tar(tmp_path / "described" / "train-000.tar", {**samples, **told})
    edm2_zip(tmp_path / "img16-sd.zip", shape=(8, 8, 8))
    save_vae(tmp_path / "vae")
    SECTION.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in SECTION.files:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_s_files_and_commands_run(as_documented: Path, in_process: Command) -> None:
    ran = [shlex.split(line) for line in SECTION.commands]
    assert len(ran) == 13 and len(SECTION.files) == 2
    for start, module, package, command, *arguments in ran:
        assert (start, module, package) == ("python", "-m", "sag_dit")
        small = SMALL[1:4] if command == "train" else ()
        done = in_process(command, *small, *arguments)
        assert done.code == 0, done.err


def test_the_page_s_classes_are_used_from_python(as_documented: Path) -> None:
    from lightning.pytorch import Trainer
    from my_module import ShapesModule  # type: ignore[import-not-found]
    from my_shapes import Shapes  # type: ignore[import-not-found]

    from sag_dit.checkpoints import from_denoiser
    from sag_dit.denoiser import ClassConditional
    from sag_dit.models import DiT
    from sag_dit.process import DDPM
    from sag_dit.training.module import DiffusionModule

    for data in (MapData(Shapes(), 8, held_out=0.1, workers=0), MapData.of(ShapesModule())):
        network = DiT(8, 2, 1, hidden_size=16, depth=1, num_heads=2, num_classes=2)
        model = from_denoiser(ClassConditional(network, DDPM()), "tiny")
        data.check(model)
        fitted = Trainer(
            max_steps=2,
            accelerator="cpu",
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        fitted.fit(DiffusionModule(model, optimizer=torch.optim.AdamW), data)
        assert fitted.global_step == 2
