"""Objectives with modules of their own and an eye on pixels, as REPA's: trained, saved, synced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_dit.checkpoints import load
from sag_dit.data.digits import Digits
from sag_dit.denoiser import Denoiser
from sag_dit.process import NoiseLevel
from sag_dit.training.module import DiffusionModule
from sag_dit.training.objective import Frozen, Losses, Objective, base, features_of, mse
from sag_dit.training.resume import LastCheckpoints, export_run, newest_checkpoint
from tests.training.making import STEADY_ADAM, fresh_model, make_trainer

Named = dict[str, Tensor]


class Repa(Objective, nn.Module):
    """Aligns the first block's features with the means of an image's patches."""

    key = "test_repa"

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Frozen(nn.AvgPool2d(2))
        self.projector = nn.Sequential(nn.Linear(48, 16), nn.SiLU(), nn.Linear(16, 1))

    def losses(
        self,
        denoiser: Denoiser,
        x_0: Tensor,
        cond: Any,
        level: NoiseLevel,
        eps: Tensor,
        pixels: Tensor,
    ) -> Losses:
        assert pixels.dtype == torch.uint8
        torch.testing.assert_close(pixels.float() / 127.5 - 1, x_0)
        with features_of(denoiser.network, "blocks.0") as features:
            error = mse(denoiser, x_0, cond, level, eps)
        here = self.projector(features["blocks.0"])
        wanted = self.encoder(pixels / 255).flatten(2).mT
        apart = (here - wanted).square().mean((1, 2))
        return Losses(error + apart, level, {"apart": apart.detach()})


class Averaged(Repa):
    key = "test_averaged_repa"
    averaged = True


def fit(folder: Path, steps: int, objective: type[Repa] = Repa, **options: Any) -> DiffusionModule:
    """Train to a step, from the newest checkpoint in the folder on."""
    model = fresh_model()
    module = DiffusionModule(model, objective=objective(), optimizer=STEADY_ADAM, ema_decay=0.5)
    trainer = make_trainer(folder, steps, [LastCheckpoints(folder, 2)], **options)
    checkpoint, _ = newest_checkpoint(folder, module)
    trainer.fit(module, datamodule=Digits(8), ckpt_path=checkpoint, weights_only=True)
    if trainer.world_size == 1:
        export_run(trainer, module, folder)
    return module


def named(module: DiffusionModule, start: str) -> Named:
    return {n: t.clone() for n, t in module.state_dict().items() if n.startswith(start)}


@pytest.mark.parametrize("objective", [Repa, Averaged])
def test_its_modules_are_trained_and_gone_on_with_bit_for_bit(
    objective: type[Repa], tmp_path: Path
) -> None:
    first = DiffusionModule(fresh_model(), objective=objective(), optimizer=STEADY_ADAM)
    whole = fit(tmp_path / "whole", 4, objective)
    fit(tmp_path / "parts", 2, objective)
    parts = fit(tmp_path / "parts", 4, objective)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=0, atol=0)
    own = named(whole, "objective.")
    assert len(own) == 4  # the projector's, and nothing of what is frozen
    for name, tensor in named(first, "objective.").items():
        assert not torch.equal(own[name], tensor)
    # Averaged or not, as the class says, and then by the network's own decay.
    averages = named(whole, "averaged_objective.module.")
    assert bool(averages) is objective.averaged
    for name, tensor in averages.items():
        assert not torch.equal(tensor, own[f"objective.{name.rpartition('module.')[2]}"])
    # What is drawn with knows nothing of it.
    exported = load(tmp_path / "whole").class_conditional.network.state_dict()
    averaged = whole.evaluated.network.state_dict()
    assert exported.keys() == averaged.keys()
    torch.testing.assert_close(exported, dict(averaged), rtol=0, atol=0)
    raw = load(tmp_path / "whole" / "checkpoints" / "step-00000004.ckpt", ema=False)
    torch.testing.assert_close(
        raw.class_conditional.network.state_dict(),
        dict(whole.denoiser.network.state_dict()),
        rtol=0,
        atol=0,
    )


def test_the_network_learns_from_its_features(tmp_path: Path) -> None:
    """Gradients reach the block whose features are seen, and no block behind it."""
    module = DiffusionModule(fresh_model(), objective=Repa(), optimizer=STEADY_ADAM)
    pixels, labels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.arange(4)
    objective = module.objective
    with features_of(module.denoiser.network, "blocks.0") as features:
        mse(module.denoiser, pixels / 127.5 - 1, labels, *_level(module.denoiser, pixels))
    objective.projector(features["blocks.0"]).sum().backward()  # type: ignore[attr-defined]
    network: Any = module.denoiser.network
    assert network.blocks[0].mlp.fc1.weight.grad is not None
    assert network.blocks[1].mlp.fc1.weight.grad is None


# What compiles looks at every tensor, also at those of which torch warns.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_features_are_seen_however_blocks_run(way: str) -> None:
    """The same features, and the same gradients from them."""
    found = []
    pixels, labels = torch.randint(0, 256, (4, 1, 8, 8)).byte(), torch.arange(4)
    for changed in (False, True):
        model = fresh_model(class_dropout_prob=0.0)  # which seeds, the projector's weights too
        module = DiffusionModule(model, objective=Repa())
        network: Any = module.denoiser.network
        if changed and way == "checkpointed":
            network.checkpoint_blocks = True
        elif changed:
            for block in network.blocks:
                block.compile(backend="eager")
        torch.manual_seed(1)
        losses = module.losses(module.denoiser, (pixels, labels))
        losses.per_image.mean().backward()
        found.append((losses.terms["apart"], network.blocks[0].mlp.fc1.weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def _level(denoiser: Denoiser, pixels: Tensor) -> tuple[NoiseLevel, Tensor]:
    level = denoiser.process.level(denoiser.process.time_at(torch.full((len(pixels),), 0.5)))
    return level, torch.randn(pixels.shape)


def test_gradients_that_are_not_finite_skip_its_step_too(tmp_path: Path) -> None:
    class Broken(Repa):
        key = "test_broken_repa"

        def losses(self, *args: Any, pixels: Tensor) -> Losses:  # type: ignore[override]
            found = super().losses(*args, pixels=pixels)
            return Losses(found.per_image + 0 * self.projector[0].weight.sum() / 0, found.level)

    before = Broken()
    module = DiffusionModule(fresh_model(), objective=before, optimizer=STEADY_ADAM)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    make_trainer(tmp_path, 2).fit(module, datamodule=Digits(8))
    assert module.skipped == 2
    torch.testing.assert_close(dict(module.state_dict()), start, rtol=0, atol=0)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(TypeError, match=r"class Wrong: expected Objective before nn.Module"):

        class Wrong(nn.Module, Objective):
            def losses(self, *args: Any) -> Any:
                return None

    module = DiffusionModule(fresh_model(), objective=Repa(), optimizer=STEADY_ADAM)
    x_0, labels = torch.zeros(2, 1, 8, 8), torch.arange(2)
    with pytest.raises(ValueError, match=r"objective=Repa: it sees the pixels .* data.images=FOLD"):
        module.losses(module.denoiser, (x_0, labels))
    seen = torch.full((2, 1, 8, 8), 127, dtype=torch.uint8)
    module.losses(module.denoiser, (seen / 127.5 - 1, labels, seen))
    network = module.denoiser.network
    with (
        pytest.raises(ValueError, match=r"'blocks.9': DiT has no module .* expected one such as"),
        features_of(network, "blocks.9"),
    ):
        pass


def test_a_module_in_what_is_none_is_refused() -> None:
    class Holds(Objective):
        def __init__(self, part: object) -> None:
            self.part = part

        def losses(self, *_: Any) -> Losses:
            raise NotImplementedError

    for part in (nn.Linear(2, 2), [nn.Linear(2, 2)], nn.Parameter(torch.zeros(2))):
        with pytest.raises(
            ValueError, match=r"its part would be neither .*\(Objective, nn.Module\)"
        ):
            DiffusionModule(fresh_model(), objective=Holds(part))
    for part in (Frozen(nn.Linear(2, 2)), nn.Linear(2, 2).requires_grad_(False), torch.ones(2)):
        DiffusionModule(fresh_model(), objective=Holds(part))


def test_terms_that_training_logs_itself_are_refused() -> None:
    folder = Path(base.__file__).parents[1]
    source = "".join((folder / f"{name}.py").read_text() for name in ("module", "callbacks"))
    assert {*base.LOGGED} == {*re.findall(r'"train/(\w+)"', source)}
    level = fresh_model().denoiser.process.grid(2)[0]
    for name in base.LOGGED:
        with pytest.raises(ValueError, match=f"training logs train/{name} itself"):
            Losses(torch.zeros(2), level, {name: torch.zeros(2)})


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda error, level: Losses(error.mean(), level), r"per_image \(\) of 2 images"),
        (lambda error, level: Losses(error, level), r"per_image \(2, 1, 8, 8\) of 2 images"),
        (
            lambda error, level: Losses(error.flatten(1).mean(1), level, {"far": error.max()}),
            r"far \(\) of 2 images",
        ),
        (lambda error, level: error.mean(), r"losses returns Tensor: expected .*Losses"),
    ],
)
def test_a_loss_that_is_not_of_each_image_is_told(made: Any, told: str) -> None:
    class Mean(Objective):
        def losses(self, denoiser: Any, x_0: Any, cond: Any, level: Any, eps: Any) -> Any:
            return made((x_0 - eps).square(), level)

    denoiser = fresh_model().class_conditional
    with pytest.raises(ValueError, match=f"objective=Mean: its losses returns.*{told}|{told}"):
        Mean()(denoiser, torch.zeros(2, 1, 8, 8), denoiser.conditions([0, 1]))
