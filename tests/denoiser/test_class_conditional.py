"""A DiT as a denoiser: what it is asked, what it answers, and the layers it names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sag_dit.attention import AttentionLayer, Capture
from sag_dit.denoiser import ClassConditional
from sag_dit.models import DiT
from sag_dit.process import DDPM
from tests.closeness import assert_near
from tests.conftest import MakeDiT


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])


def test_eps_and_variance_are_the_two_halves_of_the_output(
    denoiser: ClassConditional, batch: tuple[Tensor, Tensor]
) -> None:
    x_t, y = batch
    level = denoiser.process.level(400)
    output = denoiser.network(x_t, torch.tensor([400, 400]), y)
    prediction = denoiser(x_t, level, y)
    assert_near(prediction.eps, output[:, :4])
    assert prediction.variance_fraction is not None
    assert torch.equal(prediction.variance_fraction, (output[:, 4:] + 1) / 2)
    assert prediction.attention == {} and prediction.x_t is x_t


@pytest.mark.parametrize("kind", ["eps", "v", "x_0"])
def test_output_is_read_as_its_kind(
    make_dit: MakeDiT, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    x_t, y = batch
    network = make_dit(learn_sigma=False)
    model = ClassConditional(network, DDPM(), kind=kind)  # type: ignore[arg-type]
    prediction = model(x_t, model.process.level(400), y)
    assert_near(getattr(prediction, kind), network(x_t, torch.tensor([400, 400]), y))
    assert prediction.variance_fraction is None


def test_an_unknown_kind_is_refused(tiny_dit: DiT) -> None:
    with pytest.raises(ValueError, match=r"epsilon.*eps.*v.*x_0"):
        ClassConditional(tiny_dit, DDPM(), kind="epsilon")  # type: ignore[arg-type]


def test_null_is_the_row_behind_the_classes(make_dit: MakeDiT) -> None:
    model = ClassConditional(make_dit(num_classes=10), DDPM())
    null = model.null(3)
    assert null is not None and null.tolist() == [10, 10, 10] and null.dtype == torch.int64
    assert ClassConditional(make_dit(class_dropout_prob=0.0), DDPM()).null(3) is None


def test_an_unconditional_model_has_one_class_and_no_null(make_dit: MakeDiT) -> None:
    model = ClassConditional(make_dit(num_classes=1, class_dropout_prob=0.0), DDPM())
    x_t = torch.zeros(2, 4, 8, 8)
    assert model(x_t, model.process.level(5), torch.zeros(2, dtype=torch.long)).v.shape == x_t.shape


def test_conditions_join_in_order(denoiser: ClassConditional) -> None:
    joined = denoiser.join([torch.tensor([1, 2]), torch.tensor([10]), torch.tensor([3])])
    assert joined.tolist() == [1, 2, 10, 3]


def test_what_is_known_of_the_model(wide_dit: DiT) -> None:
    model = ClassConditional(wide_dit, DDPM(), x_0_range=(-1.0, 1.0))
    assert model.latent_shape == (4, 8, 12)
    assert model.num_classes == 10 and model.class_names == tuple("0123456789")
    assert model.x_0_range == (-1.0, 1.0)
    assert model.device == torch.device("cpu")
    assert list(model.layers) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert model.layers["blocks.2.attn"] == AttentionLayer("blocks.2.attn", (4, 6), None)


def test_layers_by_name(denoiser: ClassConditional, make_dit: MakeDiT) -> None:
    assert denoiser.layer("blocks.2.attn").name == "blocks.2.attn"
    assert denoiser.layer("blocks.2").name == "blocks.2.attn"
    assert denoiser.layer("auto").name == "blocks.1.attn"
    for depth, middle in ((1, 0), (2, 0), (4, 1), (5, 2)):
        model = ClassConditional(make_dit(depth=depth), DDPM())
        assert model.layer("auto").name == f"blocks.{middle}.attn"
    with pytest.raises(
        ValueError, match=r"'blocks.3'.*blocks.0.attn, blocks.1.attn, blocks.2.attn"
    ):
        denoiser.layer("blocks.3")


def test_every_layer_it_names_can_be_captured(
    wide_denoiser: ClassConditional,
) -> None:
    x_t = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    captures = [Capture(layer) for layer in wide_denoiser.layers.values()]
    prediction = wide_denoiser(x_t, wide_denoiser.process.level(5), torch.tensor([1, 2]), captures)
    assert set(prediction.attention) == set(wide_denoiser.layers)
    assert all(seen.shape == (2, 24) for seen in prediction.attention.values())


def test_class_names_are_one_per_class(tiny_dit: DiT) -> None:
    with pytest.raises(ValueError, match="2 class names for a model of 10 classes"):
        ClassConditional(tiny_dit, DDPM(), class_names=["cat", "dog"])
    names = [f"class {i}" for i in range(10)]
    assert ClassConditional(tiny_dit, DDPM(), class_names=names).class_names == tuple(names)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_half_precision_network_answers_in_the_type_of_x_t(
    tiny_dit: DiT, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    x_t, y = batch
    model = ClassConditional(tiny_dit, DDPM(), kind=kind)  # type: ignore[arg-type]
    level = model.process.level(400)
    exact = model(x_t, level, y)
    rough = model.bfloat16()(x_t, level, y)
    assert rough.v.dtype == torch.float32
    assert rough.variance_fraction is not None
    assert rough.variance_fraction.dtype == torch.float32
    assert_near(rough.eps, exact.eps, 0.05)


def test_levels_per_image_equal_one_level_for_all(
    denoiser: ClassConditional, batch: tuple[Tensor, Tensor]
) -> None:
    x_t, y = batch
    together = denoiser(x_t, denoiser.process.level(torch.tensor([10, 900])), y)
    for i, t in enumerate((10, 900)):
        alone = denoiser(x_t[i : i + 1], denoiser.process.level(t), y[i : i + 1])
        assert_near(together.v[i : i + 1], alone.v)


def test_a_model_without_layers_says_so(make_dit: MakeDiT) -> None:
    model = ClassConditional(make_dit(depth=0), DDPM())
    with pytest.raises(ValueError, match="auto"):
        model.layer("auto")
