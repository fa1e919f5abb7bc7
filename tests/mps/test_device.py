"""The stand-in refuses what torch refuses on Apple's GPUs, and computes as the CPU does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sag_dit.models import DiT
from tests.mps.device import OnDevice

WIDE: dict[str, Callable[[Tensor], object]] = {
    "moved": lambda x: torch.from_numpy(np.ones(2)).to(x.device),
    "made": lambda x: torch.zeros(2, dtype=torch.float64, device=x.device),
    "stated": lambda x: torch.tensor([1.0], dtype=torch.float64, device=x.device),
    "counted": lambda x: torch.arange(3, dtype=torch.float64, device=x.device),
    "of its kind": lambda x: x.new_full((2,), 1.0, dtype=torch.float64),
    "widened": lambda x: x.double(),
    "summed": lambda x: x.sum(dtype=torch.float64),
    "to an array": lambda x: torch.as_tensor(np.ones(2), device=x.device),
    "within a context": lambda x: in_context(x.device),
    "in a buffer": lambda x: buffered().to(x.device),
}
APART: dict[str, Callable[[Tensor], object]] = {
    "added": lambda x: x + torch.ones(2, 3),
    "joined": lambda x: torch.cat([x, torch.ones(2, 3)]),
    "chosen": lambda x: torch.where(torch.ones(2, 3, dtype=torch.bool), x, x),
}


def in_context(device: torch.device) -> Tensor:
    with device:
        return torch.linspace(0, 1, 3, dtype=torch.float64)


def buffered() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("sums", torch.zeros(2, dtype=torch.float64))
    return module


@pytest.mark.parametrize("name", WIDE)
def test_no_float64_comes_to_be(mps: torch.device, name: str) -> None:
    x = torch.ones(2, 3).to(mps)
    with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64"):
        WIDE[name](x)


@pytest.mark.parametrize("name", APART)
def test_tensors_of_the_cpu_are_no_company(mps: torch.device, name: str) -> None:
    x = torch.ones(2, 3).to(mps)
    with pytest.raises(RuntimeError, match="on the same device"):
        APART[name](x)


def test_numpy_needs_the_cpu(mps: torch.device) -> None:
    x = torch.ones(2).to(mps)
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        x.numpy()
    assert x.cpu().numpy().tolist() == [1, 1]


def test_what_mps_allows(mps: torch.device) -> None:
    x = torch.arange(6.0).view(2, 3).to(mps)
    wide = torch.from_numpy(np.arange(6.0)).view(2, 3)
    assert isinstance(wide.to(mps, torch.float32), OnDevice)
    assert torch.equal((x * torch.tensor(2.0, dtype=torch.float64)).cpu(), 2 * wide.float())
    assert torch.equal(x[torch.tensor([1])].cpu(), wide[1:].float())
    assert torch.equal(x.cpu().double(), wide)
    assert torch.zeros(2, 3).copy_(x).tolist() == x.tolist() == wide.tolist()
    assert (x.device, x.new_zeros(1).device, torch.stack([x, x]).device) == (mps, mps, mps)
    assert (x.cpu().device.type, torch.zeros_like(x, device="cpu").device.type) == ("cpu", "cpu")
    assert x.add_(1) is x and x[0, 0].item() == 1


def test_a_network_is_built_on_the_device(mps: torch.device) -> None:
    """Its positions are computed in float64, on the CPU, whatever device is asked for."""
    with mps:
        network = DiT(8, 2, 4, 16, 1, 2)
    assert {parameter.device for parameter in network.parameters()} == {mps}
    expected = DiT(8, 2, 4, 16, 1, 2).pos_embed
    assert torch.equal(network.pos_embed.cpu(), expected)


def test_training_gives_the_weights_of_the_cpu(mps: torch.device) -> None:
    def trained(device: torch.device | str) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 2))
        network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        for _ in range(3):
            network(torch.ones(5, 3, device=device)).square().mean().backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in network.parameters()]

    assert all(map(torch.equal, trained("cpu"), trained(mps)))
