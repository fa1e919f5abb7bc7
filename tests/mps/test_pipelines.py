"""Guidance inside diffusers pipelines where the network's device holds no float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from sag_dit.guidance import CFG, PAG, SAG, Term
from sag_dit.pipelines import guide
from tests.pipelines import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
TERMS: tuple[Term, ...] = (SAG(0.5, quantile=0.6), PAG(1.0))


@pytest.mark.parametrize("family", tiny.BUILD)
def test_every_family(mps: torch.device, family: str) -> None:
    terms = TERMS if family == "flux" else (*TERMS, CFG(1.7))

    made = tiny.BUILD[family]()

    def drawn(device: torch.device | str) -> Tensor:
        pipe = deepcopy(made).to(device)
        torch.manual_seed(0)
        with guide(pipe, *terms):
            return tiny.draw(pipe, family, guidance_scale=3.0).cpu()

    torch.testing.assert_close(drawn(mps), drawn("cpu"), rtol=1e-3, atol=1e-3)
