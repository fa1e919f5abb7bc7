"""The loop that diffusers documents, without a line of the adapter."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable

import diffusers
import numpy as np
import torch
from torch import Tensor

from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM
from sag_dit.sampler.diffusers import PROVEN

Eps = Callable[[Tensor, float, float, float], Tensor]
"""An eps model, told x_t and t; and alpha and sigma, for guidance by hand."""


def by_hand(name: str, eps: Eps, x: Tensor, steps: int, noise: NoiseSource) -> Tensor:
    """Return the image that diffusers' own loop draws on the linear process."""
    recipe, process = PROVEN[name], DDPM()
    options = dict(recipe.options)
    if name == "pndm":
        options["timestep_spacing"] = "trailing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler = getattr(diffusers, recipe.scheduler)(trained_betas=process.betas, **options)
        scheduler.set_timesteps(steps)
    table = np.sqrt(1 / process.alphas_cumprod - 1)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    sample = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x_t = scheduler.scale_model_input(sample, t)
        if scheduler.init_noise_sigma != 1:
            alpha = float(scheduler.scale_model_input(torch.ones(()), t))
        elif name == "pndm":
            alpha = float(scheduler.alphas_cumprod[t].sqrt())
        else:
            alpha = float(1 / (1 + scheduler.sigmas[i].double() ** 2).sqrt())
        sigma, told = math.sqrt(1 - alpha**2), float(t)
        if "karras" in name and not scheduler.timesteps.is_floating_point():
            # Here diffusers rounds the time: the one thing that we do not repeat.
            told = float(scheduler._sigma_to_t(scheduler.sigmas[i].numpy(), np.log(table)))
            assert abs(told - float(t)) <= 0.501
        generator = {"generator": noise.torch_generators(i)} if draws else {}
        sample = scheduler.step(eps(x_t, told, alpha, sigma), t, sample, **generator).prev_sample
    return sample
