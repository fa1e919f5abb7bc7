"""Every guidance method in the pipelines of every family: it guides, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.methods import ROWS, classes, setting
from sag_dit.guidance import (
    CFG,
    PAG,
    SAG,
    SEG,
    SLG,
    SWG,
    TPG,
    Autoguidance,
    CFGZero,
    SelfGuidance,
    Term,
)
from sag_dit.pipelines import guide
from tests.closeness import assert_near
from tests.guidance.every import switched_off
from tests.pipelines import tiny
from tests.pipelines.test_traces import network_of, traces
from tests.pipelines.tiny import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
CALL = {"guidance_scale": 3.0}
"""The pipeline's own guidance is on, beside the terms or in whose place they are."""


@cache
def worse(family: str) -> nn.Module:
    """Another network of the family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        network = network_of(tiny.BUILD[family]())
    return tiny.uneven(network, seed=9)  # type: ignore[no-any-return]


VARIANTS: Mapping[str, tuple[Term, ...]] = {
    "SAG's other masks": tuple(
        SAG(0.5, mask=mask) for mask in ("global", "square", "high_frequency", "random")
    ),
    "CFG, rescaled": (CFG(3.0, rescale=0.7),),
    "M-SWG": (SWG(1.0, masked=True),),
    "PAG, soft": (PAG(1.0, softness=0.5),),
    "PAG, heads": (PAG(1.0, heads=[1]), PAG(1.0, heads=[0], softness=0.5)),
}
FURTHER: Mapping[str, tuple[Term, ...]] = {
    "CFG-Zero*": (CFGZero(3.0),),
    "SEG": (SEG(1.0, blur_sigma=0.8),),
}
"""Settings beside a method's own example."""


def method(kind: type[Term], family: str) -> tuple[Term, ...]:
    # Tiny networks hardly tell the words of a text apart.
    strength = 20.0 if "cross" in kind.needs else 1.0
    own = setting(kind, strength, worse=worse(family), classifier=nn.Flatten())
    return (own, *FURTHER.get(kind.title, ()))


METHODS: Mapping[str, Callable[[str], tuple[Term, ...]]] = {
    **{kind.title: partial(method, kind) for kind in classes()},
    **{name: lambda _, terms=terms: terms for name, terms in VARIANTS.items()},
}

FLOWS = {"sd3", "flux"}
CROSS = {"sd", "sdxl", "pixart"}
CANNOT = {
    "flow": "guides flow models",
    "dit": "guides DiT models only",
    "classes": "classes",
    "text": "guides where attention sees a text",
    "cross": "guides cross-attention to a text",
}
"""What a method says that needs it of a pipeline that lacks it."""


def refusal(family: str, kind: type[Term]) -> str | None:
    """What is said of a method in a family, None where it guides."""
    if family == "flux" and kind.from_null:
        return "asks for the null prompt in a call of its own"
    if family == "pixart" and kind.renoises:
        return "scheduler DPMSolverMultistepScheduler.*use DDIMScheduler"
    has = {"blocks", "sizes", "worse", "classifier", *(("flow",) if family in FLOWS else ())}
    has |= {"text", "cross"} if family in CROSS else {"text"} if family == "sd3" else set()
    return next((said for need, said in CANNOT.items() if need in kind.needs - has), None)


REFUSED: dict[tuple[str, str], str] = {
    (family, name): message
    for family in tiny.BUILD
    for name, kind in ROWS.items()
    if (message := refusal(family, kind)) is not None
}
CELLS = [
    (family, name) for family in tiny.BUILD for name in METHODS if (family, name) not in REFUSED
]


def guided(pipe: Any, family: str, term: Term, max_rows: int | None = None, **call: Any) -> Tensor:
    with guide(pipe, term, max_rows=max_rows):
        return draw(pipe, family, **{**CALL, **call})


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """The rows of every call of the pipeline's network."""
    rows: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        rows.append(len(x))

    handle = network_of(pipe).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


DRAWN: dict[tuple[str, int], tuple[list[int], Tensor]] = {}


def without_terms(pipe: Any, family: str, steps: int) -> tuple[list[int], Tensor]:
    """The rows of the pipeline's own calls, and its images."""
    if (family, steps) not in DRAWN:
        with counted(pipe) as rows:
            plain = draw(pipe, family, num_inference_steps=steps, **CALL)
        DRAWN[family, steps] = (rows, plain)
    return DRAWN[family, steps]


@pytest.mark.parametrize(("family", "method"), CELLS, indirect=["family"])
def test_every_method_guides_every_family(pipe: Any, family: str, method: str) -> None:
    """It changes the images, is the same row by row, costs nothing when off, and leaves no trace.

    A term in the place of the pipeline's own guidance asks nothing of that one's scale.
    """
    terms = METHODS[method](family)
    # A step that has one before it, or is not the noisiest, is not the last one, where little is
    # left to change.
    steps = 4 if terms[0].remembers or isinstance(terms[0], SelfGuidance) else 2
    call = {"num_inference_steps": steps}
    own_rows, plain = without_terms(pipe, family, steps)
    before = traces(pipe)
    for term in terms:
        changed = guided(pipe, family, term, **call)
        assert changed.isfinite().all()
        assert float((changed - plain).abs().mean()) > 1e-3 * float(plain.abs().mean()), term
    apart = guided(pipe, family, terms[-1], max_rows=1, **call)
    assert_near(apart, changed, 1e-4)
    assert traces(pipe) == before
    with counted(pipe) as rows:
        off = guided(pipe, family, switched_off(terms[0]), **call)
    assert rows == own_rows
    assert torch.equal(off, plain)
    if terms[0].from_null:
        other = guided(pipe, family, terms[-1], guidance_scale=9.0)
        assert_near(other, changed, 1e-4)


@pytest.mark.parametrize(("family", "method"), REFUSED, indirect=["family"])
def test_what_cannot_guide_a_family_is_refused(pipe: Any, family: str, method: str) -> None:
    for term in METHODS[method](family):
        with pytest.raises(ValueError, match=REFUSED[family, method]):
            guided(pipe, family, term)


def test_a_worse_network_is_of_the_pipelines_kind_and_precision() -> None:
    pipe = tiny.sd()
    pipe.set_progress_bar_config(disable=True)
    for network, message in (
        (worse("pixart"), "PixArtTransformer2DModel.*same kind, UNet2DConditionModel"),
        (tiny.unet(in_channels=3), "latent_shape"),
        (deepcopy(worse("sd")).bfloat16(), r"dtype is torch.bfloat16.*torch.float32"),
        (pipe.unet, "the model itself"),
    ):
        with pytest.raises(ValueError, match=message):
            guided(pipe, "sd", Autoguidance(2.0, worse=network))


def test_autoguidance_extrapolates_from_the_worse_pipeline() -> None:
    """Guided with w = 0 it is the worse network's own pipeline."""
    pipe = tiny.sd3()
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 1.0}
    plain = draw(pipe, "sd3", **call)
    found = guided(pipe, "sd3", Autoguidance(0.0, worse=worse("sd3")), **call)
    pipe.transformer = worse("sd3")
    expected = draw(pipe, "sd3", **call)
    assert float((expected - plain).abs().mean()) > 0.01
    assert_near(found, expected, 1e-4)


@pytest.mark.parametrize("block", ["transformer_blocks.0", "single_transformer_blocks.0"])
@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_as_many_words_as_patches_are_told_apart(pipe: Any, family: str, block: str) -> None:
    """Latents of 8 x 6 are 12 tokens, as many as the text's: a step without the block, by hand."""
    size = {"height": 16, "width": 12, "num_inference_steps": 1}
    network, (kind, _, index) = pipe.transformer, block.partition(".")
    seen: list[tuple[int, int]] = []
    hook = network.get_submodule(block).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (kwargs["hidden_states"].shape[1], kwargs["encoder_hidden_states"].shape[1])
        ),
        with_kwargs=True,
    )
    plain = draw(pipe, family, **size)
    hook.remove()
    assert seen == [(12, 12)]
    found = guided(pipe, family, SLG(1.0, layers=block), **size)
    shuffled = guided(pipe, family, TPG(1.0, layers=block), **size)
    assert float((shuffled - plain).abs().mean()) > 1e-3 * float(plain.abs().mean())
    blocks = getattr(network, kind)
    setattr(network, kind, nn.ModuleList(b for i, b in enumerate(blocks) if i != int(index)))
    try:
        without = draw(pipe, family, **size)
    finally:
        setattr(network, kind, blocks)
    assert float((without - plain).abs().max()) > 1e-2
    assert_near(found, 2 * plain - without, 1e-4)
