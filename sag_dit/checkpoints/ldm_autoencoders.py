"""Autoencoders in the layout of latent diffusion's own code, as VA-VAE, MAR and LDM publish them.

Such a file is a state dict, perhaps within ``state_dict`` or ``model``, without a config: sizes
are read from the weights. What was trained beside the autoencoder, such as a discriminator or the
network that VA-VAE's latents are aligned with, is left on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sag_dit.checkpoints import files
from sag_dit.codec import AUTOENCODERS, STATISTICS_FILE, latent_statistics
from sag_dit.models.unfilled import unfilled

ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
HOLDERS = ("state_dict", "model")
"""Where files hold the weights, if it is not the whole file."""
PREFIXES = ("first_stage_model.", "vae.")
"""Names of the autoencoder within a whole latent diffusion model."""
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
ATTENTION = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.")
SD_CHANNELS = 4
NORM_GROUPS = 32
"""What all of them are normalised in."""


def ldm_file(path: Path) -> Path | None:
    """Return the weights of an autoencoder that are a file, or the one file of a folder.

    A folder with a config.json, or weights named by diffusers, is of its layout: None is returned.

    Raises:
        ValueError: a folder holds several files that it could be.
    """
    if path.is_file():
        return path
    names = [each.name for each in path.glob("*")]
    if "config.json" in names or files.weights_name(names) is not None:
        return None
    found = sorted(
        each for each in path.glob("*") if each.suffix in ENDINGS and each.name != STATISTICS_FILE
    )
    if len(found) > 1:
        raise ValueError(
            f"vae={path}: holds {', '.join(each.name for each in found[:3])}"
            f"{', ...' * (len(found) > 3)}: expected one file of weights, or its path: "
            f"vae={found[0]}"
        )
    return found[0] if found else None


def read_ldm_autoencoder(file: Path) -> nn.Module:
    """Return diffusers' AutoencoderKL with the weights of a file, in eval mode, as float32.

    Its statistics are those of ``latents_stats.pt`` beside the file; without it, one of four
    channels has Stable Diffusion's scaling factor.

    Raises:
        ValueError: it is damaged or of another layout, or no statistics are there.

    Source: Yao et al. 2025 (arXiv 2501.01423), tokenizer/ of hustvl/LightningDiT; the names of
    parameters are mapped by diffusers' ``convert_ldm_vae_checkpoint``.

    Example::

        vae = read_ldm_autoencoder(Path("vavae-imagenet256-f16d32-dinov2.pt"))
    """
    from diffusers import AutoencoderKL

    # Weights and sizes; of statistics, those that come with it.
    state = _weights(file)
    config = _config(state, file)
    channels, statistics = config["latent_channels"], file.parent / STATISTICS_FILE
    if statistics.is_file():
        config |= latent_statistics(statistics, channels)
    elif channels == SD_CHANNELS:
        config["scaling_factor"] = AUTOENCODERS["AutoencoderKL"].scaling_factor
    else:
        raise ValueError(
            f"vae={file}: no {STATISTICS_FILE} beside it: expected the mean and std of each of its "
            f"{channels} channels in that file, as LightningDiT leaves it beside the latents that "
            f"it extracts"
        )
    # Diffusers' network, whose names and shapes they all have to be.
    converted = _converted(state, config)
    with unfilled():
        vae: nn.Module = AutoencoderKL(**config)
    wanted = {name: tuple(each.shape) for name, each in vae.state_dict().items()}
    odd = [n for n in (*wanted, *converted) if wanted.get(n) != _shape(converted.get(n))]
    if odd:
        raise ValueError(
            f"vae={file}: {len(odd)} tensors do not fit an AutoencoderKL of latent diffusion, the "
            f"first is {odd[0]}, there {_shape(converted.get(odd[0]))} and expected "
            f"{wanted.get(odd[0])}; convert it to diffusers' layout"
        )
    # Copies, because a mapped file may change under a running program.
    copies = {name: each.detach().float().clone() for name, each in converted.items()}
    vae.load_state_dict(copies, assign=True)
    return vae.eval().requires_grad_(False)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _weights(file: Path) -> dict[str, Tensor]:
    """Return the autoencoder's own weights under latent diffusion's names.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    held: Any
    if files.container(file) == "safetensors":
        held = files.read_safetensors(file)[0]
    else:
        held = files.read_torch(file)
    for holder in HOLDERS:
        if isinstance(held, Mapping) and isinstance(held.get(holder), Mapping):
            held = held[holder]
    named = held.items() if isinstance(held, Mapping) else ()
    state = {}
    for name, each in named:
        plain = str(name)
        for prefix in PREFIXES:
            plain = plain.removeprefix(prefix)
        if plain.startswith(PARTS) and isinstance(each, Tensor):
            state[plain] = each
    if not {"encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"} <= state.keys():
        first = ", ".join(str(name) for name, _ in [*named][:3])
        raise ValueError(
            f"vae={file}: expected a folder of diffusers' layout, or the weights of an autoencoder "
            f"of latent diffusion's, such as VA-VAE's .pt, with encoder.down.0.block.0 and "
            f"decoder.conv_in; found {first or 'no mapping of names to tensors'}"
        )
    files.refuse_spread(state, file)
    return state


def _config(state: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Return the arguments of the AutoencoderKL whose weights these are.

    Raises:
        ValueError: they are of an autoencoder that none is.
    """

    def count(start: str) -> int:
        places = (re.match(rf"{re.escape(start)}(\d+)\.", name) for name in state)
        return len({found[1] for found in places if found})

    def size(name: str, dimension: int) -> int:
        found = state.get(f"{name}.weight")
        return 0 if found is None or found.ndim <= dimension else found.shape[dimension]

    # Widths and depths.
    levels, blocks = count("encoder.down."), count("encoder.down.0.block.")
    widths = [size(f"encoder.down.{i}.block.{blocks - 1}.conv2", 0) for i in range(levels)]
    latent, quantised = size("decoder.conv_in", 1), "quant_conv.weight" in state
    # What diffusers' cannot be: one vector instead of a distribution, or another width between.
    between = (
        (size("quant_conv", 0), size("post_quant_conv", 1)) if quantised else (2 * latent, latent)
    )
    if size("encoder.conv_out", 0) != 2 * latent or between != (2 * latent, latent):
        raise ValueError(
            f"vae={file}: its encoder puts out {size('encoder.conv_out', 0)} channels, its "
            f"quant_conv {between[0]}, and its decoder takes {latent}: expected mean and variance "
            f"of as many as the decoder takes; an autoencoder that quantises is none of these"
        )
    if not levels or any(width < NORM_GROUPS or width % NORM_GROUPS for width in widths):
        raise ValueError(
            f"vae={file}: its levels are {widths} wide: expected multiples of {NORM_GROUPS}"
        )
    down = [count(f"encoder.down.{i}.attn.") > 0 for i in range(levels)]
    up = [count(f"decoder.up.{i}.attn.") > 0 for i in range(levels)]
    return {
        "in_channels": size("encoder.conv_in", 1),
        "out_channels": size("decoder.conv_out", 0),
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up[::-1]],
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "latent_channels": latent,
        "norm_num_groups": NORM_GROUPS,
        "use_quant_conv": quantised,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def _converted(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights under diffusers' names."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_vae_checkpoint,
        update_vae_attentions_ldm_to_diffusers,
    )

    # Attention beside the blocks of a level, which convert_ldm_vae_checkpoint leaves as it is.
    beside = {name for name in state if ATTENTION.match(name)}
    rest = {name: each for name, each in state.items() if name not in beside}
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(rest, config)
    last = len(config["block_out_channels"]) - 1
    for name in beside:
        part, level = ATTENTION.match(name).groups()  # type: ignore[union-attr]
        place = level if part == "encoder.down" else str(last - int(level))
        mapping = {
            "old": f"{part}.{level}.attn",
            "new": f"{part}_blocks.{place}.attentions",
        }
        update_vae_attentions_ldm_to_diffusers([name], converted, state, mapping=mapping)
    return converted
