"""Saliency and map against an explicit float64 softmax, and the memory they take."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sag_dit.attention import attention_map, saliency
from sag_dit.attention.saliency import CHUNK_ELEMENTS
from tests.closeness import assert_near

# By name, because the package exports a function that is called like its module.
MODULE = importlib.import_module("sag_dit.attention.saliency")


def softmax(
    query: Tensor, key: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """The map by its definition, in float64."""
    query, key = query.double(), key.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bkie,bkje->bkij", query, key) * scale
    if mask is not None and mask.dtype == torch.bool:
        logits = torch.where(mask, logits, torch.tensor(-torch.inf, dtype=torch.float64))
    elif mask is not None:
        logits = logits + mask.double()
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def received(probabilities: Tensor) -> Tensor:
    return probabilities.mean(dim=1).sum(dim=1)


def heads(b: int, k: int, n: int, e: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, b, k, n, e, generator=random) * spread)


@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("tokens", [1, 16, 65])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_exact(width: int, tokens: int, spread: float) -> None:
    query, key = heads(2, 3, tokens, width, spread=spread)
    expected = softmax(query, key)
    seen = saliency(query, key)
    assert seen.dtype == torch.float32 and seen.shape == (2, tokens)
    torch.testing.assert_close(seen.double(), received(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention_map(query, key).double(), expected, rtol=1e-4, atol=1e-6)


@given(
    b=st.integers(1, 3),
    k=st.integers(1, 4),
    n=st.integers(1, 40),
    e=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_mean_is_1_for_any_shape(b: int, k: int, n: int, e: int, seed: int) -> None:
    query, key = heads(b, k, n, e, seed, spread=2.0)
    seen = saliency(query, key)
    torch.testing.assert_close(seen.mean(dim=1), torch.ones(b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.double(), received(softmax(query, key)), rtol=1e-4, atol=1e-4)


def test_uniform_attention_is_1_everywhere() -> None:
    key, _ = heads(1, 2, 9, 8)
    torch.testing.assert_close(saliency(torch.zeros(1, 2, 9, 8), key), torch.ones(1, 9))


def test_a_token_that_all_look_at_receives_everything() -> None:
    query = torch.ones(1, 2, 9, 8)
    key = torch.zeros(1, 2, 9, 8)
    key[:, :, 4] = 100.0
    expected = torch.zeros(1, 9)
    expected[0, 4] = 9.0
    torch.testing.assert_close(saliency(query, key), expected)
    assert attention_map(query, key)[..., 4].eq(1).all()


def test_large_logits_stay_finite_and_exact() -> None:
    """Logits of +-30: without subtracting the largest, float16 would overflow and underflow."""
    signs = torch.randint(0, 2, (2, 2, 3, 17, 1), generator=torch.Generator().manual_seed(0))
    query, key = (signs.float() * 2 - 1) * 30**0.5
    expected = received(softmax(query, key, scale=1.0))
    for dtype in (torch.float32, torch.float64):
        seen = saliency(query.to(dtype), key.to(dtype), scale=1.0)
        torch.testing.assert_close(seen.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_reduced_in_float32(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in heads(2, 3, 33, 64, spread=2.0))
    seen = saliency(query, key)
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen.double(), received(softmax(query, key)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", [saliency, attention_map])
def test_autocast_does_not_reach_it(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Under mixed precision a matrix product would silently run in bfloat16."""
    query, key = heads(2, 3, 33, 64, spread=3.0)
    plain = read(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = read(query, key)
    torch.testing.assert_close(mixed, plain, rtol=1e-6, atol=1e-6)


# --- chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 100, 2 * 3 * 19 * 5, 2 * 3 * 19 * 18, 10**9])
@pytest.mark.parametrize("image", [None, slice(2, 16)])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, elements: int, image: slice | None
) -> None:
    """19 tokens are no multiple of any chunk."""
    query, key = heads(2, 3, 19, 8, spread=2.0)
    mask = torch.randn(19, 19, generator=torch.Generator().manual_seed(1))
    whole = saliency(query, key, mask=mask, tokens=image)
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(saliency(query, key, mask=mask, tokens=image), whole)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation put out, and how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def cost(tokens: int, batch: int = 1, width: int = 8) -> LargestTensor:
    query, key = heads(batch, 4, tokens, width)
    with LargestTensor() as largest:
        saliency(query, key)
    return largest


def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    """The map of 2,048 tokens would hold 64 times as many numbers as that of 256."""
    few, many = cost(256), cost(2048)
    assert few.elements == 4 * 256 * 256
    assert many.elements <= max(CHUNK_ELEMENTS, 8 * few.elements)
    assert many.elements < 4 * 2048 * 2048 / 8


def test_a_large_batch_is_not_read_query_by_query() -> None:
    """Saliency of many images must stay a few large operations, or launching them dominates."""
    assert cost(512, batch=64, width=64).operations < 512


# --- masks and tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(13, 13), (1, 13), (2, 1, 13, 13), (2, 3, 13, 13), (2, 1, 1, 13), (1, 1, 13, 13)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["additive", "boolean"])
def test_masks(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], kind: str) -> None:
    query, key = heads(2, 3, 13, 8)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if kind == "boolean":
        mask = mask > -0.5
        mask[..., 0] = True
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 2 * 3 * 13 * 4)
    expected = softmax(query, key, mask=mask.expand(2, 3, 13, 13))
    assert_near(saliency(query, key, mask=mask).double(), received(expected))
    torch.testing.assert_close(
        attention_map(query, key, mask=mask).double(), expected, rtol=1e-4, atol=1e-6
    )


def test_scale_of_the_call_is_used() -> None:
    query, key = heads(1, 2, 11, 8)
    expected = received(softmax(query, key, scale=0.7))
    assert_near(saliency(query, key, scale=0.7).double(), expected)


@pytest.mark.parametrize("image", [slice(3, None), slice(0, 12), slice(-12, None), slice(2, 14)])
def test_tokens_of_the_image_are_renormalised_to_mean_1(image: slice) -> None:
    query, key = heads(2, 3, 15, 8, spread=2.0)
    part = softmax(query, key)[..., image, image]
    seen = saliency(query, key, tokens=image)
    expected = received(part)
    expected = expected / expected.mean(dim=1, keepdim=True)
    assert seen.shape == (2, 12)
    torch.testing.assert_close(seen.double(), expected, rtol=1e-5, atol=1e-5)
    seen_map = attention_map(query, key, tokens=image)
    torch.testing.assert_close(seen_map.sum(-1), torch.ones(2, 3, 12))
    torch.testing.assert_close(
        seen_map.double(), part / part.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6
    )


def test_a_slice_of_all_tokens_is_no_slice() -> None:
    query, key = heads(2, 3, 15, 8)
    torch.testing.assert_close(saliency(query, key, tokens=slice(0, 15)), saliency(query, key))
