"""Our numbers equal those of guided and improved diffusion, SAG's fork and SiT."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.parity import unet_fixed as f
from tests.parity import unet_ours
from tests.parity.compare import disagreements


@pytest.fixture(scope="module")
def goldens() -> dict[str, Tensor]:
    return load_file(f.GOLDENS)


@pytest.mark.parametrize("group", unet_ours.GROUPS)
@pytest.mark.filterwarnings("ignore:kernel_size")
def test_agrees_with_the_original(group: str, goldens: dict[str, Tensor]) -> None:
    outputs = unet_ours.compute(group)
    assert outputs.keys() == {key for key in goldens if key.split(".")[0] == group}
    assert disagreements(outputs, goldens) == {}


def test_every_golden_is_compared(goldens: dict[str, Tensor]) -> None:
    assert {key.split(".")[0] for key in goldens} == unet_ours.GROUPS.keys()


def test_goldens_stay_small() -> None:
    assert f.GOLDENS.stat().st_size + f.LAYOUTS.stat().st_size < 200 * 1024
