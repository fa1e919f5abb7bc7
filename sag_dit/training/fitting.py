"""What fits a device's memory: tried there, not computed, so that it holds for any network."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from sag_dit.checkpoints import Model
from sag_dit.codec import VAECodec
from sag_dit.noise import START, NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.sampling import Settings
from sag_dit.tensors import Images


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, in PyTorch's words or a library's."""
    told = str(error).lower()
    full = "out of memory" in told or "alloc_failed" in told
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and full)


def fits(work: Callable[[], object]) -> bool:
    """Whether work finds the memory it needs; what it held is free afterwards."""
    enough = True
    try:
        with torch.no_grad():
            work()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        enough = False
    # Only now, since the error keeps what the work held.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return enough


def ask_once(model: Model, how: Settings) -> None:
    """Ask the network all that a run of one batch does, once for each set of terms that are active.

    The sampler runs through all its steps, so that intervals count; what was asked before is
    answered with zeros.
    """
    denoiser, size = model.denoiser, how.batch_size
    noise = NoiseSource([0] * size, [*range(size)])
    cond = denoiser.conditions([0] * size)
    seen: set[tuple[bool, ...]] = set()
    # A cache fills during its first steps.
    caching = None if how.cache.off else how.guided(denoiser, noise)
    filled = how.cache.every * (how.cache.order + 1)

    def denoise(x_t: Images, step: Step) -> Prediction:
        active = tuple(term.active(step) for term in how.guidance if not term.off)
        if active not in seen or (caching is not None and step.number <= filled):
            seen.add(active)
            return (caching or how.guided(denoiser, noise))(x_t, step, cond)
        zeros = torch.zeros_like(x_t)
        learned = getattr(denoiser.network, "learn_sigma", False)
        return Prediction(x_t, step.level, zeros, variance_fraction=zeros if learned else None)

    x = noise.normal(START, denoiser.latent_shape).to(denoiser.device)
    range_ = denoiser.x_0_range
    for _ in how.sampler.steps(denoise, x, denoiser.process, how.steps, noise, range_):
        pass


def network_fits(model: Model, how: Settings) -> bool:
    """Whether the network has memory for the largest evaluation of a run."""
    return fits(partial(ask_once, model, how))


def decoding_fits(model: Model, how: Settings) -> bool:
    """Whether there is memory to decode a batch."""
    x = torch.zeros(how.batch_size, *model.denoiser.latent_shape, device=model.denoiser.device)
    return fits(partial(model.codec.decode, x))


def largest_batch(model: Model, how: Settings, most: int) -> int:
    """Return the largest power of two up to ``most`` of which a batch fits.

    Raises:
        ValueError: not even one image fits.
    """
    size = 0
    for trial in _doubled(1, most):
        asked = replace(how, batch_size=trial)
        if not (network_fits(model, asked) and decoding_fits(model, asked)):
            break
        size = trial
    if size == 0:
        raise ValueError(too_large(model, replace(how, batch_size=1)))
    return size


def _doubled(first: int, most: int) -> Iterator[int]:
    while first <= most:
        yield first
        first *= 2


def _halved(number: int) -> Iterator[int]:
    """Yield half of a number, half of that, ... down to 1."""
    while number > 1:
        number //= 2
        yield number


def too_large(model: Model, how: Settings) -> str:
    """Return a sentence for a batch that did not fit: what does, tried one after the other.

    First fewer rows at once, which cost the least; then half as many images, and half of that; or
    fewer that are decoded at once.
    """
    size, place = how.batch_size, model.denoiser.device
    told = f"batch_size={size} does not fit the memory of {place}"
    elsewhere = "; images that are drawn so are another set, in another folder"
    rows = [0]
    watched = model.denoiser.register_forward_pre_hook(
        lambda _, given: rows.append(given[0].shape[0])
    )
    try:
        network = network_fits(model, how)
    finally:
        watched.remove()
    if not network:
        # The most rows that were asked at once, as so many times the batch.
        told += f" ({max(rows)} rows at once)" * (max(rows) > size)
        for times in range(max(rows) // size - 1, 0, -1):
            if network_fits(model, replace(how, max_rows=times * size)):
                return f"{told}: max_rows={times * size} does{elsewhere}"
        for fewer in _halved(size):
            asked = replace(how, batch_size=fewer)
            if network_fits(model, asked) and decoding_fits(model, asked):
                return f"{told}: batch_size={fewer} does{elsewhere}"
        return (
            f"{told}, nor does one image: expected a device with more memory, "
            f"trainer.precision=bf16-true, or a smaller model"
        )
    if not decoding_fits(model, how):
        codec = model.codec
        at_once = codec.slice_size if isinstance(codec, VAECodec) else 1
        for fewer in _halved(at_once):
            assert isinstance(codec, VAECodec)
            other = codec.computing(fewer, codec.dtype, codec.channels_last)
            if decoding_fits(replace(model, codec=other), how):
                return (
                    f"decoding {at_once} images at once does not fit the memory of {place}: "
                    f"decoding.batch_size={fewer} does{elsewhere}"
                )
        return (
            f"decoding does not fit the memory of {place}, not even one image: expected a device "
            f"with more memory, or decoding.precision=bf16-true"
        )
    return (
        f"{told} beside what else is kept there, although it does by itself: end other programs on "
        f"that device, or take gallery.num=0 or batch_size={max(size // 2, 1)}"
    )
