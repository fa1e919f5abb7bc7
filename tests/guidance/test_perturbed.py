"""Guidance away from a perturbed network: PAG, SEG, SLG, TPG and TSG, written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer, AttentionTap
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, SEG, SLG, TPG, TSG, GuidedDenoiser, Term
from sag_dit.guidance.pag import IdentityAttention
from sag_dit.guidance.seg import BlurredQueries
from sag_dit.models import DiT
from sag_dit.process import DDPM, Flow
from tests.closeness import assert_near
from tests.guidance.every import MODELS, NOISE, batch, guided, small_dit
from tests.guidance.reference import blur, step_at

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention from its definition."""
    return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1) @ value


class ByHand(nn.Module):
    """timm's attention written out, so that its middle can be replaced."""

    def __init__(self, module: nn.Module, attention: Attention) -> None:
        super().__init__()
        self.module, self.attention = module, attention

    def forward(self, x: Tensor) -> Tensor:
        module, (b, n, d) = self.module, x.shape
        heads = module.num_heads
        qkv = module.qkv(x).reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)  # type: ignore[operator]
        return module.proj(self.attention(*qkv).transpose(1, 2).reshape(b, n, d))  # type: ignore[operator, no-any-return]


def identity(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.eye(query.shape[2]) @ value


def soft_identity(softness: float, heads: list[int]) -> Attention:
    """SoftPAG from its map: (1 - u) A + u I in the chosen heads."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        maps = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        for head in heads:
            maps[:, head] = (1 - softness) * maps[:, head] + softness * torch.eye(maps.shape[-1])
        return maps @ value

    return attention


def mean_query(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return plain(query.mean(dim=2, keepdim=True) + 0 * query, key, value)


def blurred_queries(sigma: float) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, heads, n, e = query.shape
        images = query.transpose(2, 3).reshape(b, heads * e, 4, 4)
        width = math.ceil(6 * sigma)
        # The authors' rule: six sigmas, made odd, and no wider than the grid.
        smooth = blur(images, min(width + 1 - width % 2, 5), sigma)
        return plain(smooth.reshape(b, heads, e, n).transpose(2, 3), key, value)

    return attention


def with_attention(network: DiT, blocks: list[int], attention: Attention) -> DiT:
    changed = deepcopy(network)
    for i in blocks:
        changed.blocks[i].attn = ByHand(changed.blocks[i].attn, attention)  # type: ignore[union-attr]
    return changed


def skipped(network: DiT, blocks: list[int]) -> DiT:
    changed = deepcopy(network)
    changed.blocks = nn.ModuleList(b for i, b in enumerate(network.blocks) if i not in blocks)
    return changed


def difference(model: ClassConditional, worse: DiT, index: int) -> Tensor:
    """v - v of another network, at one step."""
    x, y = batch()
    level = step_at(model.process, index).level
    other = ClassConditional(worse, model.process, kind=model.kind)
    return model(x, level, y).v - other(x, level, y).v


NETWORK = MODELS["eps"].network
CASES: list[tuple[Term, DiT]] = [
    (PAG(0.7), with_attention(NETWORK, [0], identity)),  # type: ignore[arg-type]
    (PAG(0.7, layers=[0, "blocks.1"]), with_attention(NETWORK, [0, 1], identity)),  # type: ignore[arg-type]
    (PAG(0.7, layers=-1), with_attention(NETWORK, [1], identity)),  # type: ignore[arg-type]
    (PAG(0.7, softness=0.3), with_attention(NETWORK, [0], soft_identity(0.3, [0, 1]))),  # type: ignore[arg-type]
    (PAG(0.7, heads=[1]), with_attention(NETWORK, [0], soft_identity(1.0, [1]))),  # type: ignore[arg-type]
    (
        PAG(0.7, layers=[0, 1], heads=[[1], [0]], softness=0.6),
        with_attention(
            with_attention(NETWORK, [0], soft_identity(0.6, [1])),  # type: ignore[arg-type]
            [1],
            soft_identity(0.6, [0]),
        ),
    ),
    (SEG(0.7), with_attention(NETWORK, [0], mean_query)),  # type: ignore[arg-type]
    (SEG(0.7, blur_sigma=0.8), with_attention(NETWORK, [0], blurred_queries(0.8))),  # type: ignore[arg-type]
    (SEG(0.7, blur_sigma=3.0), with_attention(NETWORK, [0], blurred_queries(3.0))),  # type: ignore[arg-type]
    (SLG(0.7, layers="blocks.1"), skipped(NETWORK, [1])),  # type: ignore[arg-type]
    (SLG(0.7, layers=[0, 1]), skipped(NETWORK, [0, 1])),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("term", "worse"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("model", ["eps", "flow"])
def test_it_is_guidance_away_from_the_perturbed_network(term: Term, worse: DiT, model: str) -> None:
    denoiser = MODELS[model]
    for index in (0, 9):
        step = step_at(denoiser.process, index)
        base = guided(denoiser, [], step).v
        expected = 0.7 * difference(denoiser, worse, index)
        assert expected.abs().max() > 4e-4 * base.abs().max()
        assert_near(guided(denoiser, [term], step).v - base, expected, 2e-5, scale=base)


def test_the_given_condition_is_perturbed_unless_told_otherwise() -> None:
    denoiser = MODELS["eps"]
    step = step_at(denoiser.process, 4)
    x, y = batch()
    null = denoiser.null(3)
    for branch, cond in (("cond", y), ("null", null), ("auto", null)):
        terms = [CFG(1.5), PAG(0.7, branch=branch)]  # type: ignore[arg-type]
        base = guided(denoiser, [CFG(1.5)], step).v
        added = guided(denoiser, terms, step).v - base
        alone = GuidedDenoiser(denoiser, [PAG(0.7)])
        expected = alone(x, step, cond).v - denoiser(x, step.level, cond).v
        assert_near(added, expected, scale=base)


# --- tokens that are not the image's --------------------------------------------------------------


class Sequence(nn.Module):
    """Attention over three tokens of text and six of an image."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 9, 4, generator=random)
    return query, key, value


def edited(edit: IdentityAttention | BlurredQueries) -> Tensor:
    layers = nn.ModuleDict({"attn": Sequence()})
    with AttentionTap(layers, edits=[(edit, slice(1, 2))]):
        out: Tensor = layers["attn"](*tokens())
    torch.testing.assert_close(out[0], plain(*tokens())[0])
    return out[1]


@pytest.mark.parametrize("tokens_at", [slice(3, None), slice(0, 6)])
def test_pag_leaves_the_image_its_text(tokens_at: slice) -> None:
    layer = AttentionLayer("attn", (2, 3), tokens_at)
    query, key, value = (x[1] for x in tokens())
    logits = query @ key.mT / 2
    for i, j in ((i, j) for i in range(9)[tokens_at] for j in range(9)[tokens_at] if i != j):
        logits[:, i, j] = -torch.inf
    found = edited(IdentityAttention("attn", layer.span))
    torch.testing.assert_close(found, logits.softmax(dim=-1) @ value)


@pytest.mark.parametrize("heads", [None, (1,)])
def test_soft_pag_mixes_the_maps_of_its_heads_beside_text(heads: tuple[int, ...] | None) -> None:
    query, key, value = (x[1] for x in tokens())
    logits = query @ key.mT / 2
    image = torch.arange(9) >= 3
    apart = (image[:, None] & image) & ~torch.eye(9, dtype=torch.bool)
    hard, maps = logits.masked_fill(apart, -torch.inf).softmax(dim=-1), logits.softmax(dim=-1)
    for head in heads or (0, 1):
        maps[head] = 0.75 * maps[head] + 0.25 * hard[head]
    found = edited(IdentityAttention("attn", (3, None), softness=0.25, heads=heads))
    torch.testing.assert_close(found, maps @ value)


@pytest.mark.parametrize("sigma", [0.8, math.inf])
def test_seg_blurs_the_queries_of_the_image_only(sigma: float) -> None:
    query, key, value = (x[1].clone() for x in tokens())
    image = query[:, 3:]
    if math.isinf(sigma):
        query[:, 3:] = image.mean(dim=1, keepdim=True)
    else:
        shaped = image.transpose(1, 2).reshape(1, 8, 2, 3)
        query[:, 3:] = blur(shaped, 3, sigma).reshape(2, 4, 6).transpose(1, 2)
    found = edited(BlurredQueries("attn", (2, 3), sigma, (3, None)))
    torch.testing.assert_close(found, plain(query, key, value))


def test_edits_of_one_layer_restrict_it_together() -> None:
    """Where one edit attends through another, both masks hold."""
    layers = nn.ModuleDict({"attn": Sequence()})
    blurring = BlurredQueries("attn", (2, 3), math.inf, (3, None))
    query, key, value = tokens()
    meant = query.clone()
    meant[:, :, 3:] = query[:, :, 3:].mean(dim=2, keepdim=True)
    logits = meant @ key.mT / 2
    image = torch.arange(9) >= 3
    logits[..., (image[:, None] & image) & ~torch.eye(9, dtype=torch.bool)] = -torch.inf
    for edits in ([blurring, PAG_TEXT], [PAG_TEXT, blurring]):
        with AttentionTap(layers, edits=[(edit, slice(None)) for edit in edits]):
            out = layers["attn"](query, key, value)
        torch.testing.assert_close(out, logits.softmax(dim=-1) @ value)


PAG_TEXT = IdentityAttention("attn", (3, None))

# --- random perturbations -------------------------------------------------------------------------


def test_tpg_shuffles_what_enters_each_block() -> None:
    denoiser = MODELS["eps"]
    step = step_at(denoiser.process, 4)
    orders = NOISE.normal(5, (2, 16), purpose=3).argsort(dim=2)
    assert len({tuple(order.tolist()) for order in orders.flatten(0, 1)}) == 6
    network = deepcopy(denoiser.network)
    assert isinstance(network, DiT)
    for i, block in enumerate(network.blocks):
        order = orders[:, i, :, None]
        block.register_forward_pre_hook(
            lambda _, args, order=order: (args[0].gather(1, order.expand_as(args[0])), *args[1:])
        )
    base = guided(denoiser, [], step).v
    added = guided(denoiser, [TPG(0.7, layers=[0, 1])], step).v - base
    assert_near(added, 0.7 * difference(denoiser, network, 4), scale=base)


@pytest.mark.parametrize("process", [DDPM(), Flow(time_scale=1000.0)])
def test_tsg_perturbs_the_time_embedding_of_the_first_blocks(process: DDPM | Flow) -> None:
    kind = "v" if isinstance(process, Flow) else "eps"
    denoiser = ClassConditional(small_dit(), process, kind=kind)  # type: ignore[arg-type]
    step = step_at(process, 4)
    share = float(step.level.t) / 1000
    n = NOISE.normal(5, (16,), purpose=5)
    network = deepcopy(denoiser.network)
    assert isinstance(network, DiT)
    t_emb = network.t_embedder(torch.tensor([float(step.level.t)]))
    noisy = 2.0 * share**0.5 * t_emb.std() * n
    network.blocks[0].adaLN_modulation.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda _, args: (args[0] + noisy,)
    )
    base = guided(denoiser, [], step).v
    added = guided(denoiser, [TSG(1.7, power=0.5, depth=1)], step).v - base
    expected = 0.7 * difference(denoiser, network, 4)
    assert expected.abs().max() > 1e-3 * base.abs().max()
    assert_near(added, expected, scale=base)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SEG(1.0, blur_sigma=0.0), "blur_sigma=0.0"),
        (lambda: SEG(1.0, blur_sigma=math.nan), "blur_sigma=nan: expected a finite number"),
        (lambda: PAG(math.inf), "scale=inf: expected a finite number"),
        (lambda: TSG(2.0, noise=0.0), "noise=0.0"),
        (lambda: TSG(2.0, depth=0), "depth=0"),
        (lambda: PAG(1.0, branch="both"), "branch='both'"),
        (lambda: PAG(1.0, softness=0.0), "softness=0.0: expected more than 0"),
        (lambda: PAG(1.0, softness=1.5), "softness=1.5"),
        (lambda: PAG(1.0, heads=[]), r"heads=\[\]: expected numbers of heads"),
        (lambda: PAG(1.0, heads=[[0], []]), "expected numbers of heads"),
        (lambda: PAG(1.0, heads=[-1]), r"heads=\[-1\]"),
        (lambda: PAG(1.0, heads="0, 3"), "heads='0, 3'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Term], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (PAG(1.0, layers=[2]), "layer 2: expected 0 to 1"),
        (SLG(1.0, layers=["blocks.7"]), "'blocks.7' does not exist"),
        (PAG(1.0, heads=[0, 2]), "head 2 of layer 'blocks.0.attn': expected 0 to 1"),
        (PAG(1.0, heads=[[0], [1]]), "a list for each of the 1 layers"),
    ],
)
def test_layers_that_the_model_lacks_are_refused_before_anything_is_evaluated(
    term: Term, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(MODELS["eps"], [term])


def test_without_a_source_of_noise_nothing_is_drawn() -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="pass noise=NoiseSource"):
        GuidedDenoiser(MODELS["eps"], [TPG(1.0)])(x, step_at(DDPM(), 4), y)
