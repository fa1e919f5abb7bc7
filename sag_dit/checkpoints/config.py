"""The config of a denoiser: a dictionary of plain values that says how to build it.

Its keys, as in the config.json beside exported weights:

    model        the arguments of DiT, or those of UNet, which has model_channels; input_size is a
                 number or [height, width]
    process      {"schedule": "linear" or "cosine", "num_timesteps": 1000} is a DDPM,
                 {"time_scale": 1.0, "shift": 1.0} a Flow
    kind         "eps", "v", "x_0" or "score"
    x_0_range    [-1, 1] for pixels, null for latents
    class_names  one name per class
    vae          the autoencoder of a latent model: a folder or a hub repository (optional)
    defaults     what to sample with, {"batch_size": 16} for example (optional)
    lora         {"rank": 8, "alpha": 8.0} where adapters stand beside the weights (optional)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from sag_dit.denoiser import ClassConditional
from sag_dit.identity import later, settings, without_later
from sag_dit.models import DiT
from sag_dit.process import DDPM, Flow, Process
from sag_dit.process.base import OutputKind

if TYPE_CHECKING:
    from sag_dit.models.unet import UNet

MODEL_KEYS = tuple(inspect.signature(DiT).parameters)
UNET_KEY = "model_channels"
"""An argument that only a UNet has."""
PROCESSES: dict[tuple[str, ...], type[DDPM] | type[Flow]] = {
    tuple(field.name for field in fields(process)): process for process in (DDPM, Flow)
}
"""A process is known by the names of its settings."""
REQUIRED = ("model", "process", "kind", "x_0_range")


def describe(denoiser: ClassConditional) -> dict[str, Any]:
    """Return the config of a denoiser, without ``vae`` and ``defaults``, which it does not know.

    Raises:
        ValueError: the denoiser's process is none that a config can name.
    """
    network, process = denoiser.network, denoiser.process
    if not isinstance(process, (DDPM, Flow)):
        raise ValueError(
            f"process={type(process).__name__}: expected DDPM or Flow, which a config can name"
        )
    arguments = _arguments(network) if isinstance(network, DiT) else network.arguments
    # What came later is told where it is not the default, so that runs of a model keep their names.
    return {
        "model": without_later(arguments, type(network)),
        "process": settings(process),
        "kind": denoiser.kind,
        "x_0_range": None if denoiser.x_0_range is None else list(denoiser.x_0_range),
        "class_names": list(denoiser.class_names),
    }


def _arguments(network: DiT) -> dict[str, Any]:
    """Return what builds a DiT anew."""
    height, width = network.input_size
    hidden_size = int(network.pos_embed.shape[-1])
    block: Any = network.blocks[0]
    return {
        "input_size": height if height == width else [height, width],
        "patch_size": network.patch_size,
        "in_channels": network.in_channels,
        "hidden_size": hidden_size,
        "depth": len(network.blocks),
        "num_heads": int(block.attn.num_heads),
        "mlp_ratio": mlp_ratio(hidden_size, int(block.mlp.fc1.out_features)),
        "class_dropout_prob": network.y_embedder.dropout_prob,
        "num_classes": network.num_classes,
        "learn_sigma": network.learn_sigma,
    }


def mlp_ratio(hidden_size: int, mlp_size: int) -> float:
    """Return the ratio r with int(hidden_size r) = mlp_size."""
    ratio = mlp_size / hidden_size
    # The quotient is rounded, and its product must not fall below the whole number.
    return ratio if int(hidden_size * ratio) == mlp_size else (mlp_size + 0.5) / hidden_size


def build(config: Mapping[str, Any]) -> ClassConditional:
    """Build the denoiser that a config describes, with fresh weights.

    Raises:
        ValueError: a key is missing or unknown, or a value is impossible.
    """
    _check_keys("the config", config, required=REQUIRED)
    if config["kind"] not in get_args(OutputKind):
        raise ValueError(f"kind={config['kind']!r}: expected one of {get_args(OutputKind)}")
    return ClassConditional(
        build_network(config["model"]),
        build_process(config["process"]),
        kind=config["kind"],
        x_0_range=None if config["x_0_range"] is None else tuple(config["x_0_range"]),
        class_names=config.get("class_names", ()),
    )


def build_network(model: Mapping[str, Any]) -> DiT | UNet:
    """Build the network whose arguments these are, all of DiT's or some of UNet's.

    Raises:
        ValueError: an argument is missing or unknown, or a value is impossible.
    """
    where = "the config's model"
    _check_keys(where, model, required=())
    if UNET_KEY in model:
        from sag_dit.models.unet import UNet

        known = tuple(inspect.signature(UNet.__init__).parameters)[1:]
        _check_keys(where, model, required=("input_size",), known=known)
        return UNet(**model)
    required = tuple(key for key in MODEL_KEYS if key not in later(DiT))
    _check_keys(where, model, required=required, known=MODEL_KEYS)
    size = model["input_size"]
    return DiT(**{**model, "input_size": size if isinstance(size, int) else tuple(size)})


def build_process(settings: Mapping[str, Any]) -> Process:
    """Build the process whose settings these are; those that are left out have their defaults.

    Raises:
        ValueError: no process has settings of these names, or a value is impossible.
    """
    if isinstance(settings, Mapping):
        for names, process in PROCESSES.items():
            if set(settings) <= set(names):
                return process(**settings)
    known = " or ".join(", ".join(names) for names in PROCESSES)
    raise ValueError(f"process={settings!r}: expected a mapping with {known}")


def _check_keys(
    where: str, values: Any, required: tuple[str, ...], known: tuple[str, ...] | None = None
) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping, found a {type(values).__name__}")
    missing = [key for key in required if key not in values]
    unknown = [] if known is None else [str(key) for key in values if key not in known]
    if missing or unknown:
        raise ValueError(
            f"{where}: missing {', '.join(missing) or 'nothing'}, unknown "
            f"{', '.join(unknown) or 'nothing'}; expected {', '.join(known or required)}"
        )
