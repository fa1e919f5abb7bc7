"""Samplers by name, and the one of a model that is asked for none."""

from __future__ import annotations

from collections.abc import Iterator

from sag_dit.process import Process
from sag_dit.sampler.base import Sampler
from sag_dit.sampler.ddim import DDIM
from sag_dit.sampler.diffusers import PROVEN, DiffusersSampler
from sag_dit.sampler.ode import EulerFlow


def auto(process: Process, eta: float = 0.0) -> Sampler:
    """Return Euler's method for a flow, and DDIM with this ``eta`` for any other process.

    Raises:
        ValueError: an ``eta`` for a flow, or one outside of [0, 1].

    Example:
        >>> from sag_dit.process import Flow
        >>> auto(Flow()).key
        'euler_flow'
    """
    if not process.is_flow:
        return DDIM(eta)
    if eta:
        raise ValueError(
            f"eta={eta}: expected 0, since a flow is solved by Euler's method; sampler=sde_flow "
            f"adds noise"
        )
    return EulerFlow()


def named(name: str, process: Process) -> Sampler:
    """Return a sampler by the name that it has at the command line, at its defaults.

    Samplers with a ``key`` of their own come first, then diffusers' schedulers; ``auto`` is
    :func:`auto`.

    Raises:
        ValueError: no sampler of that name; those that exist are listed.

    Example:
        >>> from sag_dit.process import DDPM
        >>> named("dpmpp_2m", DDPM()).name
        'dpmpp_2m'
    """
    if name == "auto":
        return auto(process)
    own = own_samplers()
    if name in own:
        return own[name]()
    try:
        return DiffusersSampler(name)
    except ValueError as error:
        raise ValueError(f"{error}; own ones are auto, {', '.join(own)}") from None


def sampler_names() -> list[str]:
    """Return the names that :func:`named` knows.

    Example:
        >>> {"auto", "ddim", "dpmpp_2m"} <= set(sampler_names())
        True
    """
    return ["auto", *own_samplers(), *PROVEN]


def renoising() -> list[str]:
    """Return the names of samplers whose noise may be another prediction's than their x_0.

    Example:
        >>> "ddim" in renoising(), "dpmpp_2m" in renoising()
        (True, False)
    """
    own = [name for name, kind in own_samplers().items() if kind.renoises]
    return [*own, *(name for name, recipe in PROVEN.items() if recipe.renoises)]


def own_samplers() -> dict[str, type[Sampler]]:
    """Return the samplers that have a key of their own, by that key.

    Example:
        >>> own_samplers()["ddim"].__name__
        'DDIM'
    """
    return {kind.key: kind for kind in _keyed(Sampler)}  # type: ignore[type-abstract]


def _keyed(kind: type[Sampler]) -> Iterator[type[Sampler]]:
    for each in kind.__subclasses__():
        if "key" in vars(each):
            yield each
        yield from _keyed(each)
