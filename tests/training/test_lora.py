"""LoRA: which layers get adapters, what is trained, and weights merged as peft computes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sag_dit.checkpoints.formats import merged
from sag_dit.models import DiT
from sag_dit.training.finetune import LoRA, add_adapters, freeze

MakeDiT = Callable[..., DiT]
KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def forward(network: DiT) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x, torch.tensor([500.0, 3.0]), torch.tensor([1, 10]))


def trained(network: DiT) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_attention_and_mlp_of_every_block(make_dit: MakeDiT) -> None:
    network = make_dit().requires_grad_(True)
    before = forward(network)
    layers = add_adapters(network, LoRA(rank=3))
    assert layers == tuple(f"blocks.{i}.{kind}" for i in range(3) for kind in KINDS)
    assert trained(network) == {f"{n}.lora_{ab}.default.weight" for n in layers for ab in "AB"}
    qkv: Any = network.blocks[0].attn.qkv
    assert qkv.lora_A["default"].weight.shape == (3, 48)
    # B is zero: training begins at the checkpoint.
    torch.testing.assert_close(forward(network), before, rtol=0, atol=0)


def test_chosen_layers_and_frozen_ones(make_dit: MakeDiT) -> None:
    network = make_dit().requires_grad_(True)
    frozen = freeze(network, ["blocks.0", "blocks.2.mlp.fc1.weight"])
    layers = add_adapters(network, LoRA(rank=1, targets=["blocks.?.mlp", "t_embedder"]), frozen)
    assert layers == (
        *("t_embedder.mlp.0", "t_embedder.mlp.2"),
        *("blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "blocks.2.mlp.fc2"),
    )
    assert {name.split(".lora_")[0] for name in trained(network)} == set(layers)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 1.5)])
def test_merged_weights_compute_what_adapters_do(
    make_dit: MakeDiT, alpha: float | None, scale: float
) -> None:
    network, lora = make_dit(), LoRA(rank=4, alpha=alpha)
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    layers = add_adapters(network, lora)
    random = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=random)
    state = merged(network.state_dict(), lora.description)
    changed = {name for name in plain if not torch.equal(state[name], plain[name])}
    assert changed == {f"{name}.weight" for name in layers}
    fc1: Any = network.blocks[1].mlp.fc1
    product = fc1.lora_B["default"].weight @ fc1.lora_A["default"].weight
    expected = plain["blocks.1.mlp.fc1.weight"] + scale * product
    torch.testing.assert_close(state["blocks.1.mlp.fc1.weight"], expected)
    whole = make_dit()
    before = forward(whole)
    whole.load_state_dict(state)
    torch.testing.assert_close(forward(whole), forward(network), rtol=1e-4, atol=1e-4)
    assert (forward(whole) - before).abs().max() > 0.01


def test_adapters_that_cannot_be_merged(make_dit: MakeDiT) -> None:
    network = make_dit()
    add_adapters(network, LoRA(rank=2))
    state = network.state_dict()
    for said in ({"rank": 2}, {"rank": 0, "alpha": 1}, {"rank": "2", "alpha": 1}, ["rank"]):
        with pytest.raises(ValueError, match="expected the numbers rank and alpha"):
            merged(state, said)  # type: ignore[arg-type]
    del state["blocks.0.mlp.fc2.lora_B.default.weight"]
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc2 lacks"):
        merged(state, {"rank": 2, "alpha": 2})


def test_targets_that_cannot_be(make_dit: MakeDiT) -> None:
    network = make_dit().requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"'blocks\.\*\.norm1' matches no linear layer.* blocks\.\*\.attn\.qkv"
    ):
        add_adapters(network, LoRA(rank=2, targets=["blocks.*.attn", "blocks.*.norm1"]))
    with pytest.raises(ValueError, match="all of them are frozen"):
        add_adapters(network, LoRA(rank=2), freeze(network, ["blocks"]))
    assert not any(".lora_" in name for name in network.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank=0: expected"),
        ({"rank": "many"}, "lora.rank=many: expected"),
        ({"rank": True}, "lora.rank=True: expected"),
        ({"rank": 2, "alpha": 0}, "lora.alpha=0: expected"),
        ({"rank": 2, "alpha": "x"}, "lora.alpha=x: expected"),
        ({"rank": 2, "dropout": 1.0}, "lora.dropout=1.0: expected"),
        ({"rank": 2, "targets": []}, r"lora.targets=\[\]: expected a list"),
        ({"rank": 2, "targets": "blocks"}, "lora.targets=blocks: expected a list"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs peft.*pip install -e '\.\[lora\]'"):
        LoRA(rank=2)
