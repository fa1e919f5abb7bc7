"""SAG and blur guidance against a straightforward implementation in noise space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, BlurGuidance, GuidedDenoiser, Term
from sag_dit.guidance.sag import attention_mask, fitting_kernel
from sag_dit.process import DDPM, Flow, Process
from tests.closeness import assert_near
from tests.conftest import MakeDiT
from tests.guidance.reference import Straight, blur, step_at

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def batch() -> Batch:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 2, 3])


def guided(
    model: ClassConditional, terms: list[Term], batch: Batch, index: int = 4
) -> tuple[Tensor, Tensor]:
    """The guided and the plain noise at one step."""
    step = step_at(model.process, index)
    x, y = batch
    plain = GuidedDenoiser(model)(x, step, y)
    return GuidedDenoiser(model, terms)(x, step, y).eps, plain.eps


@pytest.mark.parametrize("index", [0, 4, 9])
@pytest.mark.parametrize("x_0_range", [None, (-1.0, 1.0)], ids=["latent", "pixel"])
@pytest.mark.parametrize("process", ["linear", "cosine"])
def test_sag_is_the_paper_s_form_in_eps(
    make_dit: MakeDiT,
    batch: Batch,
    index: int,
    x_0_range: tuple[float, float] | None,
    process: str,
) -> None:
    network = make_dit()
    model = ClassConditional(network, DDPM(process), x_0_range=x_0_range)  # type: ignore[arg-type]
    straight = Straight(network, model.process, x_0_range=x_0_range)
    level = step_at(model.process, index).level
    eps, plain = guided(model, [SAG(scale=0.7, layer="blocks.2", blur_sigma=1.5)], batch, index)
    difference = straight.sag_difference(batch[0], level, batch[1], block=2, blur_sigma=1.5)
    assert difference.abs().max() > 1e-4
    # Compared as what is added, so that a wrong term cannot hide behind a large base.
    assert_near(eps - plain, 0.7 * difference, scale=plain)


@pytest.mark.parametrize("index", [1, 5, 9])
def test_sag_of_a_flow_model_combines_in_eps_too(
    make_dit: MakeDiT, batch: Batch, index: int
) -> None:
    network = make_dit(learn_sigma=False)
    model = ClassConditional(network, Flow(), kind="v")
    straight = Straight(network, model.process, kind="v")
    level = step_at(model.process, index).level
    eps, plain = guided(model, [SAG(scale=0.7, layer="blocks.0")], batch, index)
    difference = straight.sag_difference(batch[0], level, batch[1], block=0)
    assert difference.abs().max() > 1e-3
    assert_near(eps - plain, 0.7 * difference, scale=plain)


def test_a_flow_model_is_guided_at_pure_noise_without_dividing(
    make_dit: MakeDiT, batch: Batch
) -> None:
    """At alpha = 0 blurring x_0 leaves x_t as it is; what stays is delta itself, finite."""
    model = ClassConditional(make_dit(learn_sigma=False), Flow(), kind="v")
    step = step_at(model.process, 0)
    assert step.level.alpha == 0
    base = GuidedDenoiser(model)(batch[0], step, batch[1])
    result = GuidedDenoiser(model, [BlurGuidance(scale=1.0)])(batch[0], step, batch[1])
    assert_near(result.v - base.v, base.x_0 - blur(base.x_0, 9, 1.0))


@pytest.mark.parametrize("flow", [False, True], ids=["vp", "flow"])
def test_guided_x_0_is_the_blurred_image_s_form(
    make_dit: MakeDiT, batch: Batch, flow: bool
) -> None:
    """The same guidance said in x_0: x_0 + s (x_0_tilde - x_0(x_bar)); a check of another kind."""
    network = make_dit(learn_sigma=False)
    process: Process = Flow() if flow else DDPM()
    model = ClassConditional(network, process, kind="v" if flow else "eps")
    step = step_at(process, 5)
    x, y = batch
    base = model(x, step.level, y)
    x_0_tilde = blur(base.x_0, 9, 1.0)
    x_bar = process.add_noise(x_0_tilde, base.eps, step.level)
    worse = model(x_bar, step.level, y)
    result = GuidedDenoiser(model, [BlurGuidance(scale=0.5)])(x, step, y)
    expected = base.x_0 + 0.5 * (x_0_tilde - worse.x_0)
    assert_near(result.x_0, expected)


def test_blur_guidance_is_sag_whose_mask_is_1(denoiser: ClassConditional, batch: Batch) -> None:
    """Saliency is never negative, so a threshold below 0 selects everything."""
    everywhere, plain = guided(denoiser, [SAG(scale=1.0, threshold=-1.0)], batch)
    blurred, _ = guided(denoiser, [BlurGuidance(scale=1.0)], batch)
    assert_near(everywhere, blurred)
    straight = Straight(denoiser.network, denoiser.process)
    level = step_at(denoiser.process, 4).level
    difference = straight.sag_difference(batch[0], level, batch[1], block=None)
    assert_near(blurred - plain, difference, scale=plain)
    masked, _ = guided(denoiser, [SAG(scale=1.0)], batch)
    assert (masked - blurred).abs().max() > 1e-3


def test_a_mask_of_0_guides_nothing(denoiser: ClassConditional, batch: Batch) -> None:
    eps, plain = guided(denoiser, [SAG(scale=1.0, threshold=16.0)], batch)
    assert_near(eps, plain)


@given(
    sigma=st.floats(1e-3, 0.05), seed=st.integers(0, 50), kind=st.sampled_from([SAG, BlurGuidance])
)
@settings(max_examples=10)
def test_blur_sigma_to_0_is_the_identity(sigma: float, seed: int, kind: type[BlurGuidance]) -> None:
    term = kind(scale=1.0, blur_sigma=sigma)
    x_0 = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(term.blurred(x_0), x_0)


def test_guidance_fades_with_the_blur(denoiser: ClassConditional, batch: Batch) -> None:
    strengths = []
    for sigma in (0.01, 0.3, 0.6, 3.0):
        eps, plain = guided(denoiser, [BlurGuidance(scale=1.0, blur_sigma=sigma)], batch)
        strengths.append((eps - plain).abs().mean().item())
    assert strengths[0] < 1e-5
    assert strengths == sorted(strengths)


@pytest.mark.parametrize("size", [(8, 8), (5, 12)])
@pytest.mark.parametrize(("kernel", "sigma"), [(9, 1.0), (3, 9.0), (1, 1.0), (5, 0.4)])
def test_blur_pixel_by_pixel(size: tuple[int, int], kernel: int, sigma: float) -> None:
    x_0 = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    blurred = BlurGuidance(kernel_size=kernel, blur_sigma=sigma).blurred(x_0)
    assert_near(blurred, blur(x_0, kernel, sigma))


@pytest.mark.filterwarnings("ignore:kernel_size=")
@given(kernel=st.integers(0, 40), height=st.integers(1, 32), width=st.integers(1, 32))
def test_kernels_shrink_to_the_largest_odd_size_that_fits(
    kernel: int, height: int, width: int
) -> None:
    kernel = 2 * kernel + 1
    fitting = fitting_kernel(kernel, (height, width))
    odd = range(1, kernel + 1, 2)
    assert fitting == max(k for k in odd if k // 2 < min(height, width))


@pytest.mark.filterwarnings("ignore:kernel_size=")
def test_the_published_kernel_works_on_a_small_latent() -> None:
    x_0 = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    blurred = BlurGuidance(kernel_size=31, blur_sigma=9.0).blurred(x_0)
    assert_near(blurred, blur(x_0, 15, 9.0))


def test_a_reduced_kernel_is_told(denoiser: ClassConditional, batch: Batch) -> None:
    """Silently, a published setting would be another one on a small latent."""
    with pytest.warns(UserWarning, match=r"kernel_size=31.*15"):
        guided(denoiser, [SAG(scale=1.0, kernel_size=31)], batch)


def test_mask_is_strictly_above_the_threshold_and_row_major() -> None:
    saliency = torch.tensor([[0.5, 1.0, 1.5, 0.0, 2.0, 1.01]])
    mask = attention_mask(saliency, (2, 3), 1.0)
    assert mask.tolist() == [[[False, False, True], [False, True, True]]]
    assert attention_mask(saliency, (2, 3), 1.5).sum() == 1


def test_rectangular_grids(wide_denoiser: ClassConditional) -> None:
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    batch = (x, torch.tensor([1, 2]))
    eps, plain = guided(wide_denoiser, [SAG(scale=1.0, layer="blocks.0")], batch)
    straight = Straight(wide_denoiser.network, wide_denoiser.process)
    level = step_at(wide_denoiser.process, 4).level
    difference = straight.sag_difference(x, level, batch[1], block=0)
    assert_near(eps - plain, difference, scale=plain)


def test_the_layer_matters_and_auto_is_the_middle(denoiser: ClassConditional, batch: Batch) -> None:
    by_layer = {
        name: guided(denoiser, [SAG(scale=1.0, layer=name)], batch)[0]
        for name in ("auto", "blocks.0", "blocks.1", "blocks.1.attn", "blocks.2")
    }
    assert torch.equal(by_layer["auto"], by_layer["blocks.1"])
    assert torch.equal(by_layer["auto"], by_layer["blocks.1.attn"])
    assert (by_layer["auto"] - by_layer["blocks.0"]).abs().max() > 1e-3
    assert (by_layer["auto"] - by_layer["blocks.2"]).abs().max() > 1e-3


# --- which branch is degraded ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("branch", "cfg_scale", "degraded"),
    [
        ("auto", 1.0, "cond"),
        ("auto", 3.0, "null"),
        ("cond", 1.0, "cond"),
        ("cond", 3.0, "cond"),
        ("null", 1.0, "null"),
        ("null", 3.0, "null"),
    ],
)
def test_branch_that_sag_degrades(
    denoiser: ClassConditional, batch: Batch, branch: str, cfg_scale: float, degraded: str
) -> None:
    x, y = batch
    null = torch.full_like(y, 10)
    straight = Straight(denoiser.network, denoiser.process)
    level = step_at(denoiser.process, 4).level
    terms: list[Term] = [CFG(cfg_scale), SAG(scale=0.5, branch=branch)]  # type: ignore[arg-type]
    eps, _ = guided(denoiser, terms, batch)
    cond_eps, null_eps = straight.eps(x, level.t, y), straight.eps(x, level.t, null)  # type: ignore[arg-type]
    difference = straight.sag_difference(x, level, null if degraded == "null" else y, block=1)
    expected = null_eps + cfg_scale * (cond_eps - null_eps) + 0.5 * difference
    assert_near(eps, expected)


def test_outside_cfg_s_interval_auto_degrades_the_condition(
    denoiser: ClassConditional, batch: Batch
) -> None:
    terms: list[Term] = [CFG(3.0, interval=(0.0, 0.3)), SAG(scale=0.5)]
    alone: list[Term] = [SAG(scale=0.5)]
    for index, equal in ((2, False), (3, True)):
        both, single = guided(denoiser, terms, batch, index), guided(denoiser, alone, batch, index)
        assert torch.equal(both[0], single[0]) is equal


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SAG, BlurGuidance])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_sigma": 0.0}, "blur_sigma=0.0"),
        ({"blur_sigma": -1.0}, "blur_sigma=-1.0"),
        ({"kernel_size": 4}, "kernel_size=4: expected an odd number"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"branch": "both"}, "branch='both': expected 'auto', 'cond' or 'null'"),
        ({"interval": (0.5, 0.2)}, r"interval=\(0.5, 0.2\)"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    kind: type[BlurGuidance], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)  # type: ignore[arg-type]


def test_what_the_model_lacks_is_refused_before_anything_is_evaluated(make_dit: MakeDiT) -> None:
    model = ClassConditional(make_dit(class_dropout_prob=0.0), DDPM())
    with pytest.raises(ValueError, match=r"branch='null'.*no null condition"):
        GuidedDenoiser(model, [SAG(scale=1.0, branch="null")])
    with pytest.raises(
        ValueError, match=r"'blocks.9'.*blocks.0.attn, blocks.1.attn, blocks.2.attn"
    ):
        GuidedDenoiser(model, [SAG(scale=1.0, layer="blocks.9")])


def test_sag_without_a_null_condition(make_dit: MakeDiT, batch: Batch) -> None:
    """An unconditional model, or one trained without label dropout, is guided all the same."""
    model = ClassConditional(make_dit(class_dropout_prob=0.0), DDPM())
    eps, plain = guided(model, [SAG(scale=1.0)], batch)
    assert (eps - plain).abs().max() > 1e-3
