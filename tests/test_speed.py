"""The arithmetic of drawing: 16-bit networks beside float32, and compiled blocks of any batch."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from sag_dit.checkpoints import Model, from_denoiser, load_text
from sag_dit.cli.composing import compose
from sag_dit.cli.speed import emulated
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, PAG, SAG, GuidedDenoiser, Rewriting, Term
from sag_dit.identity import digest, settings
from sag_dit.models import DiT
from sag_dit.process import DDPM, Step
from sag_dit.sampler import Ancestral, SampleStep, named
from sag_dit.sampling import Pixels, Request, Settings, draw, trajectory
from sag_dit.training.module import DiffusionModule
from sag_dit.training.pending import PendingRequests
from sag_dit.training.predicting import Predictor
from tests.closeness import assert_near
from tests.conftest import MakeDiT
from tests.guidance.every import CELLS, MODELS, NOISE, batch, every
from tests.guidance.test_unet_methods import small_unet
from tests.pipelines import tiny


def requests(count: int) -> list[Request]:
    return [Request(i, 0, i % 10, stream=i) for i in range(count)]


def model_of(network: DiT, **options: Any) -> Model:
    denoiser = ClassConditional(network, DDPM(), x_0_range=(-1, 1), **options)
    return from_denoiser(denoiser.eval(), "tiny")


@pytest.fixture
def model(make_dit: MakeDiT) -> Model:
    return model_of(make_dit(in_channels=3))


# --- 16 bits


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_a_network_of_16_bits_is_guided_in_float32(kind: str, name: str) -> None:
    """Each method's contribution, what it reads and the sum, from predictions that are rounded."""
    whole = MODELS[kind]
    rough = deepcopy(whole).to(torch.bfloat16)
    (x, y), term = batch(), every(kind)[name]
    grid = whole.process.grid(4)
    step = Step(1, 4, grid[1], grid[2])
    seen: list[torch.dtype] = []
    evaluate = GuidedDenoiser._evaluate

    def noting(self: GuidedDenoiser, *args: Any) -> Any:
        answers = evaluate(self, *args)
        for each in answers.values():
            seen.extend(part.dtype for part in (each.v, *each.attention.values()))
        return answers

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedDenoiser, "_evaluate", noting)
        asked = GuidedDenoiser(rough, [term], noise=NOISE)
        if term.remembers:
            asked(1.1 * x, Step(0, 4, grid[0], grid[1]), y)
        found = asked(x, step, y)
    assert {*seen, found.v.dtype} == {torch.float32}
    assert found.v.isfinite().all()
    # Rounded once more, the sum would hold numbers of 8 bits alone, as where nothing is added.
    assert isinstance(term, Rewriting) or not torch.equal(found.v, found.v.bfloat16().float())


def predicted(model: Model, folder: Path, precision: str, how: Settings) -> list[SampleStep]:
    """Draw as ``sample.py`` does; return the sampler's steps."""
    steps: list[SampleStep] = []
    module = DiffusionModule(model, settings=how, watch=steps.append)
    make = partial(Trainer, accelerator="cpu", devices=1, precision=precision)
    data = PendingRequests(requests(2), 2)
    Predictor(make, folder).trainer.predict(module, datamodule=data, return_predictions=False)
    return steps


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler", "ddpm"])
def test_what_is_not_the_networks_stays_float32_in_every_sampler(
    make_dit: MakeDiT, tmp_path: Path, sampler: str, precision: str
) -> None:
    """Lightning makes new tensors 16 bits: times of 981.4 would be 980, variances rounded."""
    asked: list[torch.Tensor] = []

    class Asked(DiT):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            asked.append(t)
            return super().forward(x, t, y)

    network = make_dit(in_channels=3, learn_sigma=False)
    network.__class__ = Asked
    model = model_of(network)
    asked.clear()
    how = Settings(sampler=named(sampler, model.denoiser.process), steps=5, batch_size=2)
    in_python = deepcopy(model)
    steps = predicted(model, tmp_path, precision, how)
    there, asked[:] = list(asked), []
    assert next(network.parameters()).dtype != torch.float32
    assert {step.x.dtype for step in steps} == {torch.float32}

    # The same as with a network of 16 bits in Python, where new tensors are float32.
    in_python.denoiser.to(next(network.parameters()).dtype)
    with torch.no_grad():
        expected = list(trajectory(in_python, requests(2), how))
    assert len(expected) == len(steps) == 5
    assert all(torch.equal(a, b) for a, b in zip(there, asked, strict=True))
    assert torch.equal(steps[-1].x, expected[-1].x)
    assert torch.get_default_dtype() == torch.float32


def test_arithmetic_is_part_of_an_identity_but_not_today_s(model: Model) -> None:
    of = partial(Pixels.of, model, Settings(), {}, {"seed": 0})
    plain = settings(of())
    assert {"matmul", "compile", "islands"}.isdisjoint(plain)
    others = [
        settings(each)
        for each in (
            of(matmul="high"),
            of(compile=True),
            of("bf16-mixed"),
            of("bf16-true"),
            of("16-true"),
        )
    ]
    assert len({digest(each) for each in (plain, *others)}) == 6
    assert [each.get("islands", False) for each in others] == [False, False, False, True, True]


def test_a_gpu_that_emulates_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    cuda, fast = torch.device("cuda", 0), compose("sample", ["speed=fast"])
    assert "Tesla V100 emulates bfloat16, which is slow" in emulated(fast, cuda)
    assert emulated(compose("sample"), cuda) == emulated(fast, torch.device("cpu")) == ""


# --- compiled


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trace as the compiler does, but run the graphs as they are; return how many there are."""
    earnest = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", partialmethod(earnest, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


SETS: dict[str, tuple[Term, ...]] = {
    "unguided": (),
    "CFG": (CFG(1.5),),
    "SAG of the first block": (SAG(1.0, layer=0),),
    "SAG of the last": (SAG(1.0, layer=2),),
    "PAG": (PAG(1.0, layers=(0,)),),
    "CFG that turns on, and SAG that turns off": (
        CFG(1.5, interval=(0.5, 1.0)),
        SAG(1.0, interval=(0.0, 0.7)),
    ),
    "four rows": (CFG(1.5), SAG(1.0), PAG(0.5)),
}


@pytest.mark.parametrize("first", ["unguided", "SAG of the first block", "four rows"])
def test_no_terms_and_no_interval_compile_a_block_anew(
    model: Model, compiling: Any, first: str
) -> None:
    """Whatever came first: one graph for 2 rows, 4 and 8, also where the first block is read."""
    expected = {
        name: draw(deepcopy(model), requests(2), Settings(Ancestral(), 4, terms, 2))
        for name, terms in SETS.items()
    }
    model.denoiser.compile_blocks()
    for name in (first, *SETS):
        images = draw(model, requests(2), Settings(Ancestral(), 4, SETS[name], 2))
        assert (images.int() - expected[name].int()).abs().max() <= 1
        assert compiling() == 1, name
    for size in (3, 5):
        draw(model, requests(3), Settings(steps=2, guidance=SETS["CFG"], batch_size=size))
    assert compiling() == 1


def test_blocks_of_a_unet_are_not_compiled_anew(compiling: Any) -> None:
    """Each kind of block has graphs of its own."""
    eager = from_denoiser(small_unet(), "unet", codec=IdentityCodec())
    model = deepcopy(eager)
    model.denoiser.compile_blocks()
    how = Settings(steps=2, guidance=(), batch_size=2)
    draw(model, requests(2), how)
    graphs = compiling()
    assert graphs > 1
    guided = replace(how, guidance=(CFG(1.5), SAG(1.0)))
    ours, theirs = draw(model, requests(2), guided), draw(eager, requests(2), guided)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    draw(model, requests(3), replace(guided, batch_size=3))
    assert compiling() == graphs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pixart", "sd3"])
def test_blocks_of_a_text_model_are_compiled(family: str, compiling: Any, tmp_path: Path) -> None:
    tiny.BUILD[family]().save_pretrained(tmp_path)
    eager, model = (load_text(tmp_path, ["a corgi"], size=(16, 32)) for _ in range(2))
    how = Settings.of(eager, steps=2, batch_size=2)
    model.denoiser.compile_blocks()
    asked = [Request(0, 0, 0, 0)]
    with torch.no_grad():
        expected = [*trajectory(eager, asked, how)][-1].x
        found = [*trajectory(model, asked, how)][-1].x
        assert compiling() >= 1
        assert_near(found, expected, 1e-3)
        graphs = compiling()
        [*trajectory(model, asked, replace(how, guidance=(CFG(2.0),)))]
    assert compiling() == graphs


def test_one_row_has_a_graph_of_its_own(model: Model, compiling: Any) -> None:
    """A compiler takes 1 for a number that stays; so there are two graphs, and never a third."""
    model.denoiser.compile_blocks()
    how = Settings(steps=4, guidance=(CFG(1.5, interval=(0.5, 1.0)),), batch_size=1)
    draw(model, requests(1), how)
    assert compiling() <= 2
    draw(model, requests(1), replace(how, guidance=SETS["four rows"]))
    draw(model, requests(3), replace(how, batch_size=3))
    assert compiling() <= 2


def test_a_block_that_cannot_be_compiled_is_one_sentence(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no compiler is here")

    def compile_blocks(self: DiT) -> None:
        for block in self.blocks:
            block.compile(fullgraph=True, backend=broken)

    torch._dynamo.reset()
    monkeypatch.setattr(DiT, "compile_blocks", compile_blocks)
    model.denoiser.compile_blocks()
    with pytest.raises(ValueError, match=r"compile=true: a block .*compile=false draws without"):
        draw(model, requests(1), Settings(steps=1, batch_size=2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_compiled_in_earnest(make_dit: MakeDiT) -> None:
    """By the default backend, in bfloat16 as well, without a graph more for CFG.

    In bfloat16 each step amplifies rounding, so that compiled and eager images are as far from
    those in float32, and no nearer to each other.
    """
    how = Settings(steps=4, guidance=(CFG(1.5, interval=(0.5, 1.0)),), batch_size=2)

    def drawn(dtype: torch.dtype, compiled: bool) -> torch.Tensor:
        model = model_of(make_dit(in_channels=3, depth=2))
        model.denoiser.to(dtype)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model.denoiser.compile_blocks()
        with torch.no_grad():
            x = [*trajectory(model, requests(2), how)][-1].x
        assert not compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        return x

    exact = drawn(torch.float32, compiled=False)
    assert_near(drawn(torch.float32, compiled=True), exact, 2e-4)
    coarse, compiled = (drawn(torch.bfloat16, compiled=each) for each in (False, True))
    assert (compiled - exact).abs().max() < 4 * (coarse - exact).abs().max()
