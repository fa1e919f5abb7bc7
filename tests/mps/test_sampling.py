"""Sampling, guidance, codecs and maps where the network's device holds no float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import sag_dit
from sag_dit.checkpoints import from_denoiser
from sag_dit.codec import IdentityCodec, VAECodec
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import SAG, GuidedDenoiser, Term
from sag_dit.process import DDPM, Flow
from sag_dit.sampler import Sampler
from sag_dit.sampling import Request, Settings, draw_batch
from sag_dit.traces import Maps
from tests.conftest import MakeDiT
from tests.data.making import save_vae
from tests.guidance import test_unet_methods as unet
from tests.guidance.every import CELLS, MODELS, NOISE, batch, every
from tests.guidance.reference import step_at
from tests.mps.device import OnDevice

SAMPLERS = sorted(
    path.stem
    for path in (Path(__file__).resolve().parents[2] / "configs/sampler").glob("*.yaml")
    if path.stem != "auto"  # one of the others, by the model
)
STEPS = 10


def sampler_of(name: str) -> Sampler:
    file = Path(__file__).resolve().parents[2] / "configs" / "sampler" / f"{name}.yaml"
    sampler = instantiate(OmegaConf.load(file))
    assert isinstance(sampler, Sampler)
    return sampler


def moved(denoiser: ClassConditional, device: torch.device | str) -> ClassConditional:
    return copy.deepcopy(denoiser).to(device)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler(mps: torch.device, make_dit: MakeDiT, name: str) -> None:
    flow = name.endswith("_flow")
    network = make_dit(learn_sigma=not flow, in_channels=1)
    made = ClassConditional(network, Flow() if flow else DDPM(), "v" if flow else "eps")

    def images(device: torch.device | str) -> Tensor:
        model = from_denoiser(moved(made, device), "small", codec=IdentityCodec())
        return sag_dit.sample(
            model, [3, 7], guidance=[SAG(0.7)], steps=STEPS, sampler=sampler_of(name), batch_size=2
        )

    expected = images("cpu")
    assert expected.float().std() > 1
    found = images(mps)
    assert not isinstance(found, OnDevice) and torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_every_method(mps: torch.device, kind: str, name: str) -> None:
    check(mps, MODELS[kind], every(kind)[name])


@pytest.mark.parametrize("name", unet.TERMS)
def test_every_method_of_a_unet(mps: torch.device, name: str) -> None:
    check(mps, unet.UNET, unet.TERMS[name])


def check(mps: torch.device, denoiser: ClassConditional, term: Term) -> None:
    """Guidance in the middle of a run is the same on both devices, and does something."""
    step = step_at(denoiser.process, 4)

    def guided(device: torch.device | str, *terms: Term) -> Tensor:
        x, y = batch()
        own = moved(denoiser, device)
        # A copy, since what a term brings goes to the device too.
        asked = GuidedDenoiser(own, copy.deepcopy(terms), noise=NOISE)
        if term.remembers:
            asked(1.1 * x.to(device), step_at(denoiser.process, 3), y.to(device))
        return asked(x.to(device), step, y.to(device)).v

    expected = guided("cpu", term)
    assert not torch.equal(expected, guided("cpu"))
    found = guided(mps, term)
    assert found.device == mps
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_the_autoencoder(mps: torch.device, tmp_path: Path) -> None:
    save_vae(tmp_path, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 1.0, 0.5])
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    noise = torch.randn(3, 4, 8, 8)

    def passed(device: torch.device | str) -> list[Tensor]:
        codec = VAECodec(tmp_path, slice_size=2).to(device)
        x_0 = codec.encode(images.to(device), noise)
        return [x_0, codec.decode(x_0), *codec.posterior(images.to(device))]

    for found, expected in zip(passed(mps), passed("cpu"), strict=True):
        assert found.device == mps
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_maps_and_views(mps: torch.device) -> None:
    """What the gallery shows: saliency, masks and a query's map, kept on the CPU."""

    def drawn(device: torch.device | str) -> tuple[Any, ...]:
        model = from_denoiser(moved(MODELS["eps"], device), "small", codec=IdentityCodec())
        settings = Settings.of(model, steps=4, guidance=[SAG(0.7)], batch_size=2)
        requests = [Request(index, 0, 3, stream=index) for index in range(2)]
        maps = Maps(layers=("all",), steps=2, query=(0.2, 0.7))
        batch = draw_batch(model, requests, settings, traced=[1], maps=maps)
        trace = batch.traces[1]
        assert trace.maps is not None
        layers = [
            each
            for layer in trace.maps.layers
            for each in (layer.saliency, layer.mask, layer.query_map)
        ]
        shown = [each for view in trace.steps for each in (view.saliency, view.mask)]
        return batch.images.cpu(), *layers, *shown

    for found, expected in zip(drawn(mps), drawn("cpu"), strict=True):
        assert type(found) is type(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
