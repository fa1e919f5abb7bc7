"""What guide leaves alone: the pipeline's own ways to run, and everything once it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from sag_dit.guidance import PAG, SAG, Question, Term
from sag_dit.guidance.term import Asking
from sag_dit.pipelines import guide
from tests.closeness import assert_near
from tests.pipelines import tiny
from tests.pipelines.tiny import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def network_of(pipe: Any) -> nn.Module:
    found: nn.Module = getattr(pipe, "unet", None) or pipe.transformer
    return found


def traces(pipe: Any) -> list[Any]:
    """Everything that could be left behind: classes, attributes, hooks, attention processors."""
    found: list[Any] = [type(pipe), sorted(vars(pipe))]
    for name, module in network_of(pipe).named_modules():
        hooks = [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
        own = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        found.append((name, type(module), hooks, own))
    return found


@dataclass(frozen=True)
class Raising(Term):
    """A term that goes wrong at its second step, after it has asked."""

    def contribution(self, ask: Question) -> Asking:
        (base,) = yield (ask.base.capturing("auto"),)
        if ask.step.index == 1:
            raise KeyboardInterrupt
        return torch.zeros_like(base.v)


def test_the_pipeline_is_as_it_was_afterwards(pipe: Any, family: str) -> None:
    draw(pipe, family)  # a call sets attributes of its own
    before, plain = traces(pipe), draw(pipe, family)
    with guide(pipe, SAG(0.5), PAG(1.0)):
        draw(pipe, family)
    assert traces(pipe) == before
    with pytest.raises(KeyboardInterrupt), guide(pipe, Raising()):
        draw(pipe, family)
    assert traces(pipe) == before
    assert torch.equal(draw(pipe, family), plain)


def test_a_guided_pipeline_is_still_of_its_class() -> None:
    pipe = tiny.sd()
    made, network = type(pipe), type(pipe.unet)
    with guide(pipe, SAG(0.5)):
        assert isinstance(pipe, made)
        assert isinstance(pipe.unet, network)
        assert (type(pipe).__name__, type(pipe.unet).__name__) == (made.__name__, network.__name__)
        with pytest.raises(ValueError, match="give all terms to one guide"), guide(pipe, PAG(1.0)):
            pass
        with pytest.raises(ValueError, match="outside of its pipeline's call"):
            pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 12, 16))


def test_offloading_goes_on_between_calls() -> None:
    """Each call of the pipeline takes its hooks off the network and puts them on again."""
    pipe = tiny.sd()
    pipe.set_progress_bar_config(disable=True)
    with guide(pipe, SAG(0.5)):
        expected = draw(pipe, "sd")
    pipe.enable_model_cpu_offload(device="cpu")
    with guide(pipe, SAG(0.5)):
        for _ in range(2):
            assert torch.equal(draw(pipe, "sd"), expected)
    assert hasattr(pipe.unet, "_hf_hook")


@pytest.mark.parametrize("family", ["sd", "pixart", "sd3"], indirect=True)
def test_attention_slicing_is_kept_but_where_attention_is_read(pipe: Any, family: str) -> None:
    terms = (SAG(0.5), PAG(1.0))
    with guide(pipe, *terms):
        expected = draw(pipe, family, guidance_scale=3.0)
    before = network_of(pipe).attn_processors
    pipe.enable_attention_slicing(1)
    sliced = network_of(pipe).attn_processors
    try:
        with guide(pipe, *terms):
            changed = draw(pipe, family, guidance_scale=3.0)
        assert network_of(pipe).attn_processors == sliced
    finally:
        network_of(pipe).set_attn_processor(dict(before))
    assert_near(changed, expected, 1e-4)


def test_other_attention_backends_are_kept_but_where_attention_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = tiny.flux()
    pipe.set_progress_bar_config(disable=True)
    with guide(pipe, SAG(0.5)):
        expected = draw(pipe, "flux")
    calls = 0

    def elsewhere(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend without PyTorch's fused attention; diffusers puts heads behind tokens."""
        nonlocal calls
        calls += 1
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        weights = F.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return (weights @ v).transpose(1, 2)

    registry: Any = attention_dispatch._AttentionBackendRegistry
    chosen = AttentionBackendName.XFORMERS
    monkeypatch.setitem(registry._backends, chosen, elsewhere)
    names: Mapping[str, Any] = {"query": 0, "key": 0, "value": 0}
    monkeypatch.setitem(registry._supported_arg_names, chosen, set(names))
    for processor in pipe.transformer.attn_processors.values():
        processor._attention_backend = chosen
    with guide(pipe, SAG(0.5)):
        changed = draw(pipe, "flux")
    assert all(p._attention_backend is chosen for p in pipe.transformer.attn_processors.values())
    # Three layers; two steps of two evaluations, the first of which reads one layer.
    assert calls == 2 * (2 + 3)
    assert_near(changed, expected, 1e-4)


@pytest.mark.parametrize(("family", "dtype"), [("sd", torch.float16), ("flux", torch.bfloat16)])
def test_16_bits(family: str, dtype: torch.dtype) -> None:
    pipe = tiny.BUILD[family]()
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(0)
    shape = (1, 16, 16) if family == "flux" else (1, 4, 8, 8)
    noise = torch.randn(shape, generator=generator)
    with guide(pipe, PAG(1.0)):
        expected = draw(pipe, family, latents=noise, **call)
    plain = draw(pipe, family, latents=noise, **call)
    pipe.to(dtype)
    with guide(pipe, PAG(1.0)):
        changed = draw(pipe, family, latents=noise.to(dtype), **call)
    unguided = draw(pipe, family, latents=noise.to(dtype), **call)
    assert changed.dtype == dtype
    theirs, ours = expected - plain, (changed - unguided).float()
    assert float((ours - theirs).abs().mean()) < 0.5 * float(theirs.abs().mean())


@pytest.mark.slow
def test_compiled_networks_are_guided() -> None:
    pipe = tiny.pixart()
    pipe.set_progress_bar_config(disable=True)
    with guide(pipe, SAG(0.5)):
        expected = draw(pipe, "pixart", guidance_scale=1.0)
    pipe.transformer.compile(backend="eager")
    with guide(pipe, SAG(0.5)):
        changed = draw(pipe, "pixart", guidance_scale=1.0)
    assert_near(changed, expected, 1e-4)
    pipe.transformer._compiled_call_impl = None
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with guide(pipe, SAG(0.5)):
        changed = draw(pipe, "pixart", guidance_scale=1.0)
    assert_near(changed, expected, 1e-4)
