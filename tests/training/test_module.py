"""DiffusionModule in Lightning's Trainer: it learns, repeats itself exactly, and is read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import sag_dit
from sag_dit.checkpoints import from_denoiser
from sag_dit.codec import VAECodec
from sag_dit.data.digits import CLASS_NAMES, Digits, digits
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import SAG
from sag_dit.models import DiT
from sag_dit.process import DDPM
from sag_dit.sampling import Request, Settings
from sag_dit.training.averaging import warming_average
from sag_dit.training.module import DiffusionModule
from tests.training import making
from tests.training.making import ADAM, Losses, assert_same, fresh_model, state

# Lightning's advice on what these short runs leave out on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to"),
]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    return partial(making.make_trainer, tmp_path)


def average_loss(module: DiffusionModule, batch: tuple[Tensor, Tensor]) -> float:
    """The loss without label dropout over 16 draws of times and noise, always the same."""
    module.eval()
    with torch.no_grad():
        losses = []
        for draw in range(16):
            torch.manual_seed(draw)
            losses.append(float(module.losses(module.denoiser, batch).per_image.mean()))
    module.train()
    return sum(losses) / len(losses)


def test_one_batch_is_learned_by_heart(make_trainer: Callable[..., Trainer]) -> None:
    images, labels = digits("train")
    # Four images, each at eight times and with eight noises a step.
    batch = images[:4].repeat(8, 1, 1, 1), labels[:4].repeat(8)
    module = DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.8)
    before = average_loss(module, batch)
    assert 0.5 < before < 1  # an untrained DiT says 0, and the mean square of v is below 1
    make_trainer(200).fit(module, DataLoader([batch], batch_size=None))
    assert average_loss(module, batch) < before / 4


def fit(
    make_trainer: Callable[..., Trainer], steps: int, seed: int = 0, data_seed: int = 0
) -> tuple[DiffusionModule, list[float]]:
    module = DiffusionModule(fresh_model(), optimizer=ADAM, seed=seed)
    losses = Losses()
    # What was drawn before must not matter.
    torch.rand(steps)
    make_trainer(steps, [losses]).fit(module, datamodule=Digits(16, seed=data_seed))
    return module, losses.values


def test_the_same_seed_gives_the_same_losses_and_weights(
    make_trainer: Callable[..., Trainer],
) -> None:
    first, losses = fit(make_trainer, 5)
    again, same_losses = fit(make_trainer, 5)
    assert losses == same_losses
    assert len(set(losses)) == 5
    assert_same(state(first), state(again))


@pytest.mark.parametrize("other", [{"seed": 1}, {"data_seed": 1}])
def test_another_seed_gives_other_losses(
    make_trainer: Callable[..., Trainer], other: dict[str, int]
) -> None:
    assert fit(make_trainer, 2)[1] != fit(make_trainer, 2, **other)[1]


def checkpointing(folder: Path, every: int) -> list[Callback]:
    return [
        ModelCheckpoint(
            dirpath=folder,
            filename="{step}",
            auto_insert_metric_name=False,
            every_n_train_steps=every,
            save_top_k=-1,
        ),
    ]


@pytest.fixture
def run(make_trainer: Callable[..., Trainer], tmp_path: Path) -> Path:
    """Six steps with a checkpoint every third, named by its step."""
    module = DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.8)
    make_trainer(6, checkpointing(tmp_path / "run", 3)).fit(module, datamodule=Digits(16))
    return tmp_path / "run"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    make_trainer: Callable[..., Trainer], run: Path, tmp_path: Path
) -> None:
    resumed = DiffusionModule(fresh_model(seed=9), optimizer=ADAM, ema_decay=0.8)
    trainer = make_trainer(6, checkpointing(tmp_path / "resumed", 6))
    trainer.fit(resumed, datamodule=Digits(16), ckpt_path=run / "3.ckpt", weights_only=True)
    whole, after = (
        torch.load(folder / "6.ckpt", weights_only=True) for folder in (run, tmp_path / "resumed")
    )
    assert_same(after["state_dict"], whole["state_dict"])
    for name, value in whole["optimizer_states"][0]["state"].items():
        assert_same(after["optimizer_states"][0]["state"][name], value)


def test_a_checkpoint_is_loaded_averaged_or_raw(run: Path) -> None:
    averaged = sag_dit.load(run / "6.ckpt")
    raw = sag_dit.load(run / "6.ckpt", ema=False)
    saved = torch.load(run / "6.ckpt", weights_only=True)
    for model, prefix in ((averaged, "averaged.module."), (raw, "denoiser.")):
        expected = saved["state_dict"][f"{prefix}network.blocks.1.attn.qkv.weight"]
        assert torch.equal(model.denoiser.network.blocks[1].attn.qkv.weight, expected)
    differing = [
        name
        for name, tensor in averaged.denoiser.state_dict().items()
        if not torch.equal(tensor, raw.denoiser.state_dict()[name])
    ]
    assert "network.blocks.1.attn.qkv.weight" in differing
    assert "network.pos_embed" not in differing, "what is not trained is not rounded either"
    # And all that is not weights comes back as well.
    assert averaged.class_names == CLASS_NAMES
    assert averaged.denoiser.process == DDPM("cosine")
    assert averaged.denoiser.kind == "v"
    assert averaged.batch_size == 4
    assert not averaged.denoiser.training


def test_a_module_without_an_optimizer_is_only_for_sampling(
    make_trainer: Callable[..., Trainer],
) -> None:
    with pytest.raises(ValueError, match="optimizer=None: expected an optimiser to train with"):
        make_trainer(1).fit(DiffusionModule(fresh_model()), datamodule=Digits(16))


def test_the_autoencoder_is_no_part_of_what_is_trained_and_saved(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    network = DiT(8, 2, 4, hidden_size=48, depth=1, num_heads=3, num_classes=10)
    denoiser = ClassConditional(network, DDPM())
    module = DiffusionModule(
        from_denoiser(denoiser.train(), "latent", codec=VAECodec(vae)), optimizer=ADAM
    )
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"denoiser"}
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    batch = images, torch.zeros(4, dtype=torch.long)
    trainer = make_trainer(2, checkpointing(tmp_path / "latent", 2))
    trainer.fit(module, DataLoader([batch, batch], batch_size=None))
    assert_same(dict(vae.state_dict()), before)
    assert all(parameter.grad is None for parameter in vae.parameters())
    saved = torch.load(tmp_path / "latent" / "2.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"denoiser"}


def requests(indices: Sequence[int]) -> list[Request]:
    return [Request(i, 0, i % 10, stream=i) for i in indices]


def test_predict_step_draws_twins_and_traces_for_the_gallery_alone(
    make_dit: Callable[..., DiT],
) -> None:
    network = make_dit(in_channels=3)
    model = from_denoiser(ClassConditional(network, DDPM(), x_0_range=(-1, 1)), "tiny")
    settings = Settings(steps=12, guidance=(SAG(scale=1.0, layer="blocks.0"),), batch_size=3)
    seen: list[int] = []
    module = DiffusionModule(
        model, settings=settings, gallery=2, watch=lambda step: seen.append(step.step.index)
    )
    drawn = module.predict_step(requests([1, 2, 5]), 0)
    assert drawn.images.shape == (3, 3, 8, 8)
    assert drawn.images.dtype == torch.uint8
    assert drawn.twins.keys() == drawn.traces.keys() == {1}
    assert not torch.equal(drawn.twins[1], drawn.images[0])
    assert seen == list(range(12))  # the twins' steps are not told of
    # Six steps, evenly spread, first and last included, with what guidance saw there.
    assert [view.index for view in drawn.traces[1].steps] == [0, 2, 4, 7, 9, 11]
    for view in drawn.traces[1].steps:
        assert view.count == 12
        assert view.saliency.shape == view.mask.shape == (4, 4)
        assert abs(view.saliency.mean() - 1) < 1e-5
        assert ((view.saliency > 1.0) == view.mask).all()
        assert view.mask.any() and not view.mask.all()


@pytest.mark.parametrize("guidance", [(), (SAG(scale=0.0),)])
def test_without_sag_there_are_no_views(
    make_dit: Callable[..., DiT], guidance: tuple[SAG, ...]
) -> None:
    model = from_denoiser(ClassConditional(make_dit(in_channels=3), DDPM()), "tiny")
    settings = Settings(steps=3, guidance=guidance, batch_size=2)
    drawn = DiffusionModule(model, settings=settings, gallery=9).predict_step(requests([0, 1]), 0)
    assert {index: trace.steps for index, trace in drawn.traces.items()} == {0: (), 1: ()}
    for index in (0, 1):  # with nothing to guide, a twin is the image
        assert torch.equal(drawn.twins[index], drawn.images[index])


def test_views_stop_where_guidance_does(make_dit: Callable[..., DiT]) -> None:
    model = from_denoiser(ClassConditional(make_dit(in_channels=3), DDPM()), "tiny")
    term = SAG(scale=1.0, interval=(0.5, 1.0))
    settings = Settings(steps=6, guidance=(term,), batch_size=1)
    drawn = DiffusionModule(model, settings=settings, gallery=1).predict_step(requests([0]), 0)
    assert [view.index for view in drawn.traces[0].steps] == [3, 4, 5]


def test_a_warming_average_decays_by_one_plus_n_over_ten_plus_n() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    averaged = AveragedModel(network, multi_avg_fn=warming_average(0.5))
    expected, shown = 0.0, []
    for n in range(20):
        value = float(n * n + 1)
        torch.nn.init.constant_(network.weight, value)
        averaged.update_parameters(network)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if n == 0 else decay * expected + (1 - decay) * value
        shown.append((averaged.module.weight.item(), expected))
    for here, there in shown:
        assert here == pytest.approx(there, rel=1e-5)


def test_a_short_run_s_average_is_nearer_to_its_weights_with_warm_up(
    make_trainer: Callable[..., Trainer],
) -> None:
    distances = []
    for warmup in (False, True):
        torch.manual_seed(0)
        module = DiffusionModule(fresh_model(), optimizer=ADAM, ema_decay=0.999, ema_warmup=warmup)
        make_trainer(12).fit(module, datamodule=Digits(16))
        raw, averaged = module.denoiser.state_dict(), module.evaluated.state_dict()
        distances.append(sum(float((raw[k] - averaged[k]).square().sum()) for k in raw))
    assert distances[1] < distances[0] / 2
