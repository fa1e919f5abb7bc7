"""NAG and PLADIS, which change how the image looks at the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sag_dit.attention import AttentionTap
from sag_dit.denoiser.text_conditional import Inputs, TokenGrid, UNetText
from sag_dit.guidance import CFG, NAG, PAG, PLADIS, GuidedDenoiser, Term, cost_of
from sag_dit.guidance.nag import AwayFromText
from sag_dit.guidance.pladis import Sparser, entmax
from sag_dit.pipelines import guide
from sag_dit.process import DDPM
from sag_dit.sampler import DDIM
from tests.closeness import assert_near
from tests.guidance.every import MODELS
from tests.guidance.reference import step_at
from tests.pipelines.test_every_method import counted
from tests.pipelines.tiny import CALLS, draw

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
CROSS = ["sd", "sdxl", "pixart"]

# --- the edits, in float64 ------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention with a mask and a scale of its own."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=0.3)


def tensors(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and a mask that is added, of three rows and two heads."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        2 * torch.randn(3, 2, n, 4, generator=random) for n in (queries, keys, keys)
    )
    return query, key, value, torch.randn(3, 1, 1, keys, generator=random)


def edited(edit: AwayFromText | Sparser, given: tuple[Tensor, ...]) -> Tensor:
    """What the second row becomes; the others stay as they were, bit for bit."""
    layers = nn.ModuleDict({"attn": Attention()})
    before = layers["attn"](*given)
    with AttentionTap(layers, edits=[(edit, slice(1, 2))]):
        out: Tensor = layers["attn"](*given)
    assert torch.equal(out[::2], before[::2])
    assert (out[1] - before[1]).abs().max() > 0.01
    return out[1]


def attended(given: tuple[Tensor, ...], keys: list[int]) -> Tensor:
    """Attention of the second row to some keys alone, (heads, queries, e)."""
    query, key, value, mask = (each[1].double() for each in given)
    maps = (0.3 * query @ key[:, keys].mT + mask[..., keys]).softmax(dim=-1)
    return maps @ value[:, keys]


def led(own: Tensor, other: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Equations of the paper, token by token."""
    out = torch.empty_like(own)
    for i in range(own.shape[1]):
        away = own[:, i] + scale * (own[:, i] - other[:, i])
        ratio = away.abs().sum() / own[:, i].abs().sum()
        away = away * min(ratio.item(), tau) / ratio
        out[:, i] = alpha * away + (1 - alpha) * own[:, i]
    return out


@pytest.mark.parametrize(("scale", "tau"), [(0.5, 9.0), (4.0, 1.5)])
def test_nag_of_cross_attention_is_the_paper_s(scale: float, tau: float) -> None:
    given = tensors(6, 5 + 3)
    own, other = attended(given, [0, 1, 2, 3, 4]), attended(given, [5, 6, 7])
    found = edited(AwayFromText("attn", 5, 3, False, scale, tau, 0.25), given)
    assert_near(found, led(own, other, scale, tau, 0.25).float())


def test_nag_of_joint_attention_leads_the_image_and_leaves_each_text_to_itself() -> None:
    image, text, others = [0, 1, 2, 3], [4, 5, 6], [7, 8]
    given = tensors(9, 9)
    own, other = attended(given, image + text), attended(given, image + others)
    expected = torch.cat(
        [led(own[:, image], other[:, image], 3.0, 1.5, 0.4), own[:, text], other[:, others]], dim=1
    )
    found = edited(AwayFromText("attn", 3, 2, True, 3.0, 1.5, 0.4), given)
    assert_near(found, expected.float())


def by_bisection(logits: Tensor) -> Tensor:
    """1.5-entmax from its definition: the threshold at which the map sums to 1."""
    z = logits.double() / 2
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        over = (z - middle).clamp(min=0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (z - low).clamp(min=0).square()


@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
def test_entmax_is_what_its_definition_says(spread: float) -> None:
    logits = spread * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    assert_near(entmax(logits), by_bisection(logits).float(), 1e-5)


def test_pladis_extrapolates_the_map_that_the_layer_has() -> None:
    given = tensors(6, 8)
    query, key, value, mask = (each[1].double() for each in given)
    logits = 0.3 * query @ key.mT + mask
    maps, sparse = logits.softmax(dim=-1), by_bisection(logits)
    assert (sparse == 0).any() and (sparse > 0).sum(-1).amax() > 1
    found = edited(Sparser("attn", 2.0), given)
    assert_near(found, ((maps + 2 * (sparse - maps)) @ value).float())


# --- in pipelines ---------------------------------------------------------------------------------


def with_term(pipe: Any, family: str, *terms: Term, **call: Any) -> Tensor:
    with guide(pipe, *terms):
        return draw(pipe, family, **{"guidance_scale": 2.0, **call})


def texts(pipe: Any, family: str, prompt: str, pooled: str) -> dict[str, Any]:
    """A prompt's embedding beside another one's pooled embedding, as the pipeline takes them."""
    further = {"prompt_2": None, "prompt_3": None, **CALLS["sd3"]} if family == "sd3" else {}
    found, other = (pipe.encode_prompt(each, **further) for each in (prompt, pooled))
    return {"prompt": None, "prompt_embeds": found[0], "pooled_prompt_embeds": other[2]}


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart", "sd3"], indirect=True)
def test_nag_keeps_the_two_texts_apart(pipe: Any, family: str) -> None:
    """At scale -1 the image sees the negative prompt alone; beside itself a prompt is alone."""
    alone = NAG(-1.0, tau=1e6, alpha=1.0)
    found = with_term(pipe, family, alone, prompt="a corgi", negative_prompt="some fog")
    call: dict[str, Any] = {"prompt": "some fog"}
    if family in ("sdxl", "sd3"):
        call = texts(pipe, family, "some fog", "a corgi")
    expected = draw(pipe, family, guidance_scale=1.0, **call)
    plain = draw(pipe, family, guidance_scale=1.0, prompt="a corgi")
    assert float((expected - plain).abs().mean()) > 1e-3 * float(plain.abs().mean())
    assert_near(found, expected, 1e-4)
    same = with_term(pipe, family, NAG(5.0), prompt="a corgi", negative_prompt="a corgi")
    assert_near(same, plain, 1e-4)
    changed = with_term(pipe, family, NAG(5.0), prompt="a corgi", negative_prompt="some fog")
    assert float((changed - plain).abs().mean()) > 1e-4 * float(plain.abs().mean())


@pytest.mark.parametrize("family", ["sd", "sd3"], indirect=True)
def test_nag_needs_no_second_row_and_pladis_none_of_its_own(pipe: Any, family: str) -> None:
    with counted(pipe) as rows:
        with_term(pipe, family, NAG(4.0))
        assert {*rows} == {1}
        rows.clear()
        with_term(pipe, family, NAG(4.0), CFG(2.0))
        # The null prompt's text is shorter, and asked by itself.
        assert {*rows} == {1} and len(rows) == 4
        rows.clear()
        if family == "sd":
            with_term(pipe, family, PLADIS(2.0))
            assert {*rows} == {2} and len(rows) == 2


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_nag_is_the_prompt_s_prediction_beside_other_methods(pipe: Any, family: str) -> None:
    """CFG leads it away from the plain null prompt, and PAG perturbs it, in one step each."""
    step = {"num_inference_steps": 1, "negative_prompt": "some fog"}
    nag = NAG(4.0, alpha=1.0)
    null = draw(pipe, family, prompt="some fog", guidance_scale=1.0, num_inference_steps=1)
    alone = with_term(pipe, family, nag, **step)
    both = with_term(pipe, family, nag, CFG(3.0), **step)
    assert_near(both, null + 3 * (alone - null), 1e-4)
    perturbed = with_term(pipe, family, nag, PAG(1.0), **step)
    without = with_term(pipe, family, PAG(1.0), CFG(1.0000001), **step)
    assert float((perturbed - without).abs().mean()) > 1e-4 * float(alone.abs().mean())


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_schedule_and_interval_say_how_much_and_when(pipe: Any, family: str) -> None:
    for kind in (NAG, PLADIS):
        half = with_term(pipe, family, kind(4.0, schedule=lambda p: 0.5))
        assert_near(half, with_term(pipe, family, kind(2.0)), 1e-5)
        whole = with_term(pipe, family, kind(4.0))
        late = with_term(pipe, family, kind(4.0, interval=(0.5, 1.0)))
        assert not torch.allclose(late, whole) and late.isfinite().all()


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_nag_guides_a_text_model_outside_of_a_pipeline(pipe: Any, family: str) -> None:
    """Its cost is told as no pass more, and paid so."""

    def encoded(prompt: str | None, device: torch.device) -> Inputs:
        text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(len(prompt or "")))
        return Inputs.of({"encoder_hidden_states": text}, count=1)

    grid = TokenGrid((8, 8))
    model = UNetText(pipe.unet, DDPM(), "eps", grid, prompts=["a corgi"], encoder=encoded)
    told = cost_of(model, [NAG(4.0), PLADIS(2.0)], DDIM(), 3)
    assert told.rows == (1, 1, 1) and told.rounds == (1, 1, 1)
    x, step = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        step_at(DDPM(), 4),
    )
    cond = model.conditions([0, 0])
    plain = model(x, step.level, cond).v
    with counted(pipe) as rows:
        found = GuidedDenoiser(model, [NAG(4.0)])(x, step, cond).v
    assert rows == [2]
    assert ((found - plain).abs().flatten(1).amax(1) > 1e-4 * plain.abs().max()).all()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", [NAG(1.0), PLADIS(1.0)])
def test_a_model_without_a_text_is_refused(term: Term) -> None:
    name = term.key
    with pytest.raises(ValueError, match=f"{name}_scale=1.0: guides .*DiT.*{name}_scale=0"):
        GuidedDenoiser(MODELS["eps"], [term])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tau": 0.0}, "tau=0.0"), ({"alpha": 0.0}, "alpha=0.0"), ({"every": 2}, "every=2: NAG asks")],
)
def test_settings_that_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NAG(1.0, **settings)
