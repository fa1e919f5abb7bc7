"""SAG's masks: several layers, quantiles, the masks it is compared with, and the authors' heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sag_dit.attention import AttentionLayer
from sag_dit.attention.saliency import regrouped, saliency
from sag_dit.guidance import SAG, BlurGuidance, GuidedDenoiser
from sag_dit.guidance.sag import MaskKind, mean_saliency
from tests.closeness import assert_near
from tests.guidance.every import MODELS, NOISE, batch, guided
from tests.guidance.reference import Straight, blur, step_at

DENOISER = MODELS["eps"]
STEP = step_at(DENOISER.process, 4)


def seen(layer: int) -> Tensor:
    """Saliency of one block on its grid, by hand."""
    x, y = batch()
    straight = Straight(DENOISER.network, DENOISER.process)  # type: ignore[arg-type]
    return straight.saliency(x, float(STEP.level.t), y, layer)


def expected(mask: Tensor, sigma: float = 1.0, kernel: int = 9) -> Tensor:
    """v with SAG of scale 0.7 by this mask (b, 4, 4), from the paper's form in eps."""
    x, y = batch()
    base = DENOISER(x, STEP.level, y)
    area = mask.float().repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    x_0 = area * blur(base.x_0, kernel, sigma) + (1 - area) * base.x_0
    x_bar = STEP.level.alpha * x_0 + STEP.level.sigma * base.eps
    return base.eps + 0.7 * (base.eps - DENOISER(x_bar, STEP.level, y).eps)


def found(term: BlurGuidance) -> Tensor:
    return guided(DENOISER, [term], STEP).eps


def test_layers_are_averaged_and_a_quantile_is_each_image_s_own() -> None:
    mean = (seen(0) + seen(1)) / 2
    assert not torch.equal(mean > 1, seen(0) > 1)
    for layer in ((0, 1), ("blocks.0", "blocks.1.attn")):
        assert_near(found(SAG(0.7, layer=layer)), expected(mean > 1))
    limit = torch.quantile(mean.flatten(1), 0.8, dim=1)[:, None, None]
    by_quantile = found(SAG(0.7, layer=(0, 1), quantile=0.8))
    assert_near(by_quantile, expected(mean > limit))
    assert ((mean > limit).sum(dim=(1, 2)) == 3).all()


def test_saliency_of_several_grids_is_averaged_on_the_finest() -> None:
    coarse, fine = AttentionLayer("c", (2, 2)), AttentionLayer("f", (4, 4))
    random = torch.Generator().manual_seed(0)
    values = {"c": torch.rand(3, 4, generator=random), "f": torch.rand(3, 16, generator=random)}
    mean = mean_saliency(values, [coarse, fine])
    grown = values["c"].reshape(3, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(mean, (grown + values["f"].reshape(3, 4, 4)) / 2)


def highest(scores: Tensor, count: int) -> Tensor:
    chosen = scores.flatten().argsort(descending=True, stable=True)[:count]
    return torch.zeros(16, dtype=torch.bool).index_fill(0, chosen, True).reshape(4, 4)


@pytest.mark.parametrize("kind", ["random", "high_frequency", "square"])
def test_other_masks_have_as_many_tokens_as_the_attention_s(kind: MaskKind) -> None:
    x, y = batch()
    x_0 = DENOISER(x, STEP.level, y).x_0
    energy = (x_0 - blur(x_0, 9, 1.0)).square().mean(dim=1)
    scores = {
        "random": NOISE.normal(5, (4, 4), purpose=2),
        "high_frequency": energy.reshape(3, 4, 2, 4, 2).mean(dim=(2, 4)),
        "square": torch.tensor(
            [[-max(abs(i - 1.5), abs(j - 1.5)) for j in range(4)] for i in range(4)]
        ).expand(3, 4, 4),
    }[kind]
    areas = (seen(0) > 1).sum(dim=(1, 2)).tolist()
    mask = torch.stack([highest(s, n) for s, n in zip(scores, areas, strict=True)])
    assert not torch.equal(mask, seen(0) > 1)
    assert_near(found(SAG(0.7, mask=kind)), expected(mask))


def test_the_global_mask_reads_no_attention() -> None:
    x, y = batch()
    result = GuidedDenoiser(DENOISER, [SAG(0.7, mask="global")])(x, STEP, y)
    assert result.attention == {}
    assert_near(result.eps, found(BlurGuidance(0.7)))


def test_a_blur_relative_to_the_grid_fits_every_size() -> None:
    everywhere = torch.ones(3, 4, 4, dtype=torch.bool)
    relative = BlurGuidance(0.7, blur_sigma=0.15, blur_in="grid", kernel_size=None)
    assert math.isclose(relative.sigma((8, 12)), 1.2) and relative.kernel((8, 12)) == 9
    assert_near(found(relative), expected(everywhere, 1.2, 9))
    assert BlurGuidance(blur_sigma=2.0, kernel_size=None).kernel((64, 64)) == 13


def test_heads_are_read_as_the_authors_commands_do() -> None:
    """Their qkv (b, k 3 e, n) is laid out head by head, and cut into too few heads."""
    query, key, value = torch.randn(3, 2, 8, 16, 6, generator=torch.Generator().manual_seed(0))
    qkv = torch.cat([torch.stack(qkv) for qkv in zip(query[0], key[0], value[0], strict=True)])
    channels = qkv.transpose(1, 2).reshape(1, 8 * 3 * 6, 16)
    width = channels.shape[1]
    ch = width // (3 * 4)
    q, k, _ = channels.reshape(4, ch * 3, 16).split(ch, dim=1)
    weight = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(ch)
    theirs = weight.softmax(dim=-1).mean(0).sum(0)
    mixed_query, mixed_key = regrouped(query[:1], key[:1], value[:1], 4)
    assert_near(saliency(mixed_query, mixed_key)[0], theirs)
    own = saliency(query[:1], key[:1])[0]
    assert (own - theirs).abs().max() > 0.1
    same = saliency(*regrouped(query[:1], key[:1], value[:1], 8))[0]
    assert_near(same, own)
    with pytest.raises(ValueError, match="48 channels do not divide"):
        regrouped(query, key, value, 5)


def test_sag_reads_the_heads_it_is_told() -> None:
    x, y = batch()
    terms = [SAG(0.7, heads=1), SAG(0.7)]
    read = GuidedDenoiser(DENOISER, terms)(x, STEP, y).attention
    assert set(read) == {"blocks.0.attn", "blocks.0.attn:1 heads"}
    as_one = read["blocks.0.attn:1 heads"]
    torch.testing.assert_close(as_one.mean(dim=1), torch.ones(3))
    assert (as_one - read["blocks.0.attn"]).abs().max() > 1e-2
    mask = as_one.reshape(3, 4, 4) > 1
    assert_near(found(terms[0]), expected(mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "circle"}, "mask='circle': expected one of attention, global"),
        ({"quantile": 1.0}, "quantile=1.0"),
        ({"heads": 0}, "heads=0"),
        ({"blur_in": "pixels"}, "blur_in='pixels'"),
        ({"kernel_size": 4}, "kernel_size=4: expected an odd number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAG(0.7, **options)  # type: ignore[arg-type]
