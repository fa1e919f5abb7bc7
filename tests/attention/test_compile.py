"""Tapped blocks run eagerly beside compiled ones, in any order, without compiling anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer, AttentionTap, Capture, OutputEdit
from sag_dit.models import DiT
from tests.closeness import assert_near
from tests.conftest import MakeDiT

LAYERS = [AttentionLayer(f"blocks.{i}.attn", (4, 4)) for i in range(3)]


class CountingBackend:
    """Compiles nothing, but counts the graphs it is given and every time one of them runs."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


class Skip(OutputEdit):
    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        return x


@pytest.fixture(autouse=True)
def forget_compiled_code() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([900, 100]), torch.tensor([1, 10])


Seen = tuple[Tensor, list[Tensor]]


def capture(network: DiT, inputs: tuple[Tensor, ...], *indices: int) -> Seen:
    """The output, and the saliency of some layers."""
    with AttentionTap(network, [Capture(LAYERS[i]) for i in indices]) as tap:
        output = network(*inputs)
    return output, [tap.captured[f"blocks.{i}.attn"] for i in indices]


def assert_alike(found: Seen, expected: Seen) -> None:
    assert_near(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert_near(one, other)


def test_tapped_blocks_run_eagerly_and_the_others_compiled(
    make_dit: MakeDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Compile, then capture, plain, another layer, two layers, an edit: one graph throughout."""
    eager, network = make_dit(), make_dit()
    backend = CountingBackend()
    for block in network.blocks:
        block.compile(fullgraph=True, backend=backend)

    def runs(*indices: int) -> int:
        before = backend.runs
        assert_alike(capture(network, inputs, *indices), capture(eager, inputs, *indices))
        return backend.runs - before

    assert_near(network(*inputs), eager(*inputs))
    assert (backend.graphs, backend.runs) == (1, 3)
    assert [runs(1), runs(), runs(2), runs(0, 1), runs(0, 1, 2), runs()] == [2, 3, 2, 1, 0, 3]

    before = backend.runs
    with AttentionTap(network, edits=[(Skip("blocks.1"), slice(0, 2))]):
        skipped = network(*inputs)
    del eager.blocks[1]
    assert_near(skipped, eager(*inputs))
    assert backend.runs - before == 2
    assert backend.graphs == 1, "blocks were compiled anew"


def test_a_capture_before_the_first_compiled_call(
    make_dit: MakeDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    network = make_dit()
    backend = CountingBackend()
    for block in network.blocks:
        block.compile(fullgraph=True, backend=backend)
    first = capture(network, inputs, 0)
    network(*inputs)
    assert_alike(capture(network, inputs, 0), first)
    assert backend.graphs == 1


def test_a_network_compiled_as_a_whole_runs_eagerly_while_tapped(
    make_dit: MakeDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    eager, network = make_dit(), make_dit()
    backend = CountingBackend()
    network.compile(backend=backend)
    network(*inputs)
    before = backend.runs
    assert_alike(capture(network, inputs, 1), capture(eager, inputs, 1))
    with AttentionTap(network, edits=[(Skip("t_embedder.mlp.1"), slice(0, 1))]):
        edited = network(*inputs)
    assert (edited[0] - eager(*inputs)[0]).abs().max() > 1e-4
    assert backend.runs == before
    network(*inputs)
    assert backend.runs > before


def test_an_attention_module_that_is_itself_compiled(
    make_dit: MakeDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    eager, network = make_dit(), make_dit()
    backend = CountingBackend()
    modules: list[nn.Module] = [network.blocks[1].attn, network.blocks[1]]
    for module in modules:
        module.compile(backend=backend)
    network(*inputs)
    assert_alike(capture(network, inputs, 1), capture(eager, inputs, 1))
    assert all(module._compiled_call_impl is not None for module in modules)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
@pytest.mark.slow
def test_compile_blocks_with_the_default_backend(
    make_dit: MakeDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    eager, network = make_dit(depth=2), make_dit(depth=2)
    keys = list(network.state_dict())
    network.compile_blocks()
    assert list(network.state_dict()) == keys
    assert_near(network(*inputs), eager(*inputs))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for indices in ((1,), (), (0,), (0, 1)):
        assert_alike(capture(network, inputs, *indices), capture(eager, inputs, *indices))
    assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
