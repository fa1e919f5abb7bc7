"""The config of a denoiser: a dictionary of plain values that says how to build it.

Its keys, as in the config.json beside exported weights:

    model        the arguments of a network, and the family of one that is neither a DiT nor a UNet:
                 {"family": "mine", ...}, or the class of one without a family:
                 {"_target_": "my_net.Mine", ...}; input_size is a number or [height, width]
    process      {"schedule": "linear" or "cosine", "num_timesteps": 1000} is a DDPM,
                 {"time_scale": 1.0, "shift": 1.0} a Flow
    kind         "eps", "v", "x_0" or "score"
    x_0_range    [-1, 1] for pixels, null for latents
    class_names  one name per class
    vae          the autoencoder of a latent model: a folder or a hub repository, or the class of
                 one of the user's own, {"_target_": "my_vae.Mine", ...} (optional)
    defaults     what to sample with, {"batch_size": 16} for example (optional)
    lora         {"rank": 8, "alpha": 8.0} where adapters stand beside the weights (optional)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from sag_dit.bounds import Count, checked
from sag_dit.denoiser import ClassConditional
from sag_dit.identity import settings, without_later
from sag_dit.models.family import check_keys, family_for, family_of
from sag_dit.process import DDPM, Flow, Process
from sag_dit.process.base import OutputKind

PROCESSES: dict[tuple[str, ...], type[DDPM] | type[Flow]] = {
    tuple(field.name for field in fields(process)): process for process in (DDPM, Flow)
}
"""A process is known by the names of its settings."""
REQUIRED = ("model", "process", "kind", "x_0_range")


@dataclass(frozen=True)
class _Config:
    """What every config holds; its model and process are held against those they are of."""

    model: Mapping[str, Any]
    process: Any
    kind: OutputKind
    x_0_range: tuple[float, float] | None
    class_names: tuple[str, ...] = ()
    vae: str | Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint recommends to sample with.

    Example:
        >>> Defaults().batch_size
        16
    """

    batch_size: Count = 16


def describe(denoiser: ClassConditional) -> dict[str, Any]:
    """Return the config of a denoiser, without ``vae`` and ``defaults``, which it does not know.

    Raises:
        ValueError: the denoiser's process is none that a config can name.

    Example:
        >>> from sag_dit.models import DiT
        >>> network = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
        >>> describe(ClassConditional(network, DDPM()))["process"]
        {'schedule': 'linear', 'num_timesteps': 1000}
    """
    network, process = denoiser.network, denoiser.process
    if not isinstance(process, tuple(PROCESSES.values())):
        raise ValueError(
            f"process={type(process).__name__}: expected DDPM or Flow, which a config can name"
        )
    # What came later is told where it is not the default, so that runs of a model keep their names.
    return {
        "model": without_later(family_for(network).arguments(network), type(network)),
        "process": settings(process),
        "kind": denoiser.kind,
        "x_0_range": None if denoiser.x_0_range is None else list(denoiser.x_0_range),
        "class_names": list(denoiser.class_names),
    }


def build(config: Mapping[str, Any], *, to_fill: bool = False) -> ClassConditional:
    """Build the denoiser that a config describes, with fresh weights.

    With ``to_fill`` it is to be given others: its own are perhaps without memory, and no random
    number is drawn.

    Raises:
        ValueError: a key is missing or unknown, or a value is impossible.

    Example:
        >>> from sag_dit.models import DiT
        >>> network = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
        >>> config = describe(ClassConditional(network, DDPM()))
        >>> build({**config, "kind": "v"}).kind
        'v'
    """
    check_keys("the config", config, required=REQUIRED)
    if config["kind"] not in get_args(OutputKind):
        raise ValueError(f"kind={config['kind']!r}: expected one of {get_args(OutputKind)}")
    check_keys("the config's model", config["model"], required=())
    found = checked(config, _Config, "the config", open=True)
    family = family_of(config["model"])
    made = family.build_to_fill if to_fill else family.build
    return ClassConditional(
        made(config["model"]),
        build_process(config["process"]),
        kind=found.kind,
        x_0_range=found.x_0_range,
        class_names=found.class_names,
    )


def build_process(settings: Mapping[str, Any]) -> Process:
    """Build the process whose settings these are; those that are left out have their defaults.

    Raises:
        ValueError: no process has settings of these names, or a value is impossible.
    """
    if isinstance(settings, Mapping):
        for names, process in PROCESSES.items():
            if set(settings) <= set(names):
                made: Process = checked(settings, process, "the config", prefix="process.")
                return made
    known = " or ".join(", ".join(names) for names in PROCESSES)
    raise ValueError(f"process={settings!r}: expected a mapping with {known}")
