"""A UNet is trained, exported, sampled from and fine-tuned like a DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sag_dit.checkpoints import Model, from_denoiser, load
from sag_dit.checkpoints.export import export
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG
from sag_dit.models.unet.adapter import TABLE
from sag_dit.models.unet.network import UNet
from sag_dit.process import DDPM
from sag_dit.sampling import sample
from sag_dit.training.finetune import adapt
from sag_dit.training.objective import Hybrid
from tests.closeness import assert_near
from tests.small import filled


@pytest.fixture(scope="module")
def model() -> Model:
    """Two levels of 8x8 pixels, three classes, trained for a few steps on one batch."""
    torch.manual_seed(0)
    network = UNet(
        input_size=8,
        in_channels=1,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        num_head_channels=32,
        num_classes=3,
        class_dropout_prob=0.1,
    )
    denoiser = ClassConditional(network, DDPM("cosine"), x_0_range=(-1.0, 1.0)).train()
    objective, optimizer = Hybrid(), torch.optim.Adam(network.parameters(), lr=3e-3)
    objective.check(denoiser)
    x_0 = torch.linspace(-1, 1, 8).expand(8, 1, 8, 8)
    losses = []
    for _ in range(24):
        cost = objective(denoiser, x_0, torch.arange(8) % 3)
        optimizer.zero_grad()
        cost.per_image.mean().backward()
        optimizer.step()
        losses.append(float(cost.terms["mse"].mean()))
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    return from_denoiser(denoiser.eval().requires_grad_(False), "small")


@pytest.mark.filterwarnings("ignore:kernel_size")
def test_it_is_sampled_with_guidance_and_goes_through_a_file(model: Model, tmp_path: Path) -> None:
    terms = [CFG(1.5), SAG(0.5, layer="output_blocks.1")]
    images = sample(model, [0, 2], guidance=terms, steps=3, batch_size=2)
    assert images.shape == (2, 1, 8, 8) and not torch.equal(images[0], images[1])
    assert not torch.equal(images, sample(model, [0, 2], steps=3, batch_size=2))
    done = export(model, tmp_path / "out", "safetensors")
    assert "UNet" in (tmp_path / "out" / "README.md").read_text()
    again = load(done.path)
    assert torch.equal(sample(again, [0, 2], guidance=terms, steps=3, batch_size=2), images)


@pytest.mark.parametrize("layout", ["dit", "diffusers"])
def test_layouts_of_transformers_cannot_hold_it(model: Model, tmp_path: Path, layout: str) -> None:
    with pytest.raises(ValueError, match=rf"format={layout}: .*a UNet, where it has a DiT"):
        export(model, tmp_path / "out", layout)


def test_new_classes_and_another_size_keep_all_else(model: Model) -> None:
    adapted = adapt(model, "tuned", ["0", "new"], 16)
    network: Any = adapted.model.class_conditional.network
    before: Any = model.class_conditional.network
    assert (adapted.kept, adapted.new) == (("0",), ("new",))
    old, new = before.state_dict(), network.state_dict()
    # Class 0 keeps its row; a new one starts from the null row, which stays.
    assert torch.equal(new[TABLE], old[TABLE][[0, 3, 3]])
    assert all(torch.equal(new[name], old[name]) for name in old if name != TABLE)
    # At 16 pixels it attends where it did: at the second level.
    assert network.arguments["attention_resolutions"] == [8]
    assert network.layers.keys() == before.layers.keys()
    assert sample(adapted.model, [1], guidance=[CFG(2.0)], steps=2).shape == (1, 1, 16, 16)


def test_a_model_without_classes_learns_some_and_begins_as_it_was() -> None:
    torch.manual_seed(1)
    small = {"input_size": 8, "in_channels": 1, "model_channels": 32, "num_res_blocks": 1}
    network = filled(UNet(channel_mult=(1, 2), attention_resolutions=(4,), num_heads=2, **small))
    denoiser = ClassConditional(network.eval(), DDPM(), x_0_range=(-1.0, 1.0))
    base = from_denoiser(denoiser.requires_grad_(False), "small")
    alone = adapt(base, "tuned", ["photo"], 8)
    assert alone.model.class_conditional.network.num_classes == 0
    adapted = adapt(base, "tuned", ["cat", "dog"], 8)
    tuned = adapted.model.class_conditional
    assert (tuned.num_classes, tuned.network.null_label) == (2, 2) and TABLE in adapted.remade
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        expected = denoiser.evaluate(x_t, t, torch.tensor([0, 0]))
        for cond in (torch.tensor([0, 1]), tuned.null(2)):
            assert_near(tuned.evaluate(x_t, t, cond), expected)
