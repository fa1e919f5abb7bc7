"""The sampler of a model that is asked for none."""

from __future__ import annotations

from sag_dit.process import Process
from sag_dit.sampler.base import Sampler
from sag_dit.sampler.ddim import DDIM
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
