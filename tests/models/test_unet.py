"""The UNet of ADM and IDDPM: what its flags build, its layers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit.attention import Capture
from sag_dit.denoiser import ClassConditional
from sag_dit.models.unet.classifier import Classifier
from sag_dit.models.unet.network import UNet
from sag_dit.process import DDPM
from tests.closeness import assert_near

FLAGS: dict[str, Any] = {
    "input_size": (8, 16),
    "in_channels": 1,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (4,),
    "num_head_channels": 32,
}


def make(**changed: Any) -> UNet:
    """A small UNet none of whose weights is zero."""
    torch.manual_seed(0)
    network = UNet(**{**FLAGS, **changed})
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> UNet:
    return make(num_classes=5, class_dropout_prob=0.1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([3, 900]), torch.tensor([1, 4])


def test_every_layer_is_captured_on_its_grid_under_both_names(
    unet: UNet, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    model = ClassConditional(unet, DDPM())
    names = [
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]
    assert list(model.layers) == names
    assert {layer.grid for layer in model.layers.values()} == {(4, 8)}
    published = ("input_blocks.3", "middle_block", "output_blocks.0", "output_blocks.1")
    assert [model.layer(name).name for name in published] == names
    assert model.layer("auto").name == "mid_block.attentions.0"
    with pytest.raises(ValueError, match=r"output_blocks.2.*up_blocks.0.*, output_blocks.1$"):
        model.layer("output_blocks.2")
    captures = [Capture(layer) for layer in model.layers.values()]
    prediction = model(batch[0], model.process.level(5), batch[2], captures)
    assert {seen.shape for seen in prediction.attention.values()} == {(2, 32)}
    assert set(prediction.attention) == set(names)


def test_classes_matter_and_an_unconditional_network_does_not_look(
    unet: UNet, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, t, y = batch
    assert unet(x, t, y).shape == (2, 2, 8, 16)
    assert not torch.allclose(unet(x, t, y), unet(x, t, y - 1))
    model = ClassConditional(unet, DDPM())
    null = model.null(2)
    assert null is not None and null.tolist() == [5, 5]
    plain = make()
    assert torch.equal(plain(x, t, y), plain(x, t, y - 1))
    unconditional = ClassConditional(plain, DDPM())
    assert unconditional.null(2) is None
    assert unconditional.num_classes == 1 and unconditional.class_names == ("0",)


def test_labels_are_dropped_in_training_alone(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    always = make(num_classes=5, class_dropout_prob=1.0)
    null = torch.full_like(y, 5)
    assert not torch.equal(always(x, t, y), always(x, t, null))
    always.train()
    assert torch.equal(always(x, t, y), always(x, t, null))


def test_times_are_told_scaled(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    scaled, plain = make(time_scale=0.25), make()
    assert_near(scaled(x, 4 * t, y), plain(x, t, y))
    assert not torch.allclose(scaled(x, t, y), plain(x, t, y))


def test_heads_by_number_split_as_heads_by_width(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    by_number, by_width = make(num_heads=2, num_head_channels=None), make()
    assert torch.equal(by_number(*batch), by_width(*batch))
    assert not torch.equal(make(num_heads=4, num_head_channels=None)(*batch), by_width(*batch))


def test_a_fresh_network_says_nothing(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    assert UNet(**FLAGS)(*batch).abs().max() == 0


def test_half_precision_answers_like_full(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, y = batch
    exact, level = ClassConditional(make(), DDPM()), DDPM().level(400)
    rough = ClassConditional(make(), DDPM()).bfloat16()
    answer = rough(x, level, y)
    assert answer.v.dtype == torch.float32
    assert_near(answer.eps, exact(x, level, y).eps, 0.05)


def test_recomputed_blocks_give_the_same_gradients(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    gradients = []
    for recompute in (False, True):
        network = make().requires_grad_(True).train()
        network.checkpoint_blocks = recompute
        assert network.checkpoint_blocks is recompute
        network(*batch).square().sum().backward()
        gradients.append(network.conv_in.weight.grad)
    assert_near(*gradients)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"input_size": 9}, r"input_size=\(9, 9\): expected multiples of 2"),
        ({"model_channels": 48}, "multiples of 32, found 48"),
        ({"attention_resolutions": (7,)}, "no level is 7 high; expected some of 8, 4"),
        ({"num_heads": 2}, "expected one of them, and null for the other"),
        ({"num_head_channels": None}, "expected one of them"),
        ({"num_head_channels": 48}, "num_head_channels=48: expected a divisor.*64"),
        ({"num_heads": 3, "num_head_channels": None}, "num_heads=3: expected a divisor"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        UNet(**{**FLAGS, **flags})


def test_classifier_gives_logits_whose_gradient_reaches_the_image() -> None:
    torch.manual_seed(0)
    flags = {**FLAGS, "num_classes": 5, "scale_shift_norm": False}
    classifier = Classifier(**flags).eval()
    x = torch.randn(2, 1, 8, 16, requires_grad=True)
    logits = classifier(x, torch.tensor([3, 900]))
    assert logits.shape == (2, 5)
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
