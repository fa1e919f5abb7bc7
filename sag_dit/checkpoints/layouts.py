"""Layouts of other programs, written: facebookresearch/DiT's flat file and diffusers' folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sag_dit.checkpoints import keys
from sag_dit.checkpoints.infer import POSITION_TOLERANCE
from sag_dit.checkpoints.model import Model
from sag_dit.codec import VAECodec
from sag_dit.models import DiT
from sag_dit.models.embeddings import sincos_positions
from sag_dit.process import DDPM

PIPELINE_NULL = 1000
"""The label that DiTPipeline takes for the null class, whatever the model."""

DIFFUSERS_ARITHMETIC = (
    "diffusers' arithmetic differs: it divides the exponents of the time's frequencies by 127, "
    "where the published code has 128, and its default for a LayerNorm's eps is 1e-5, where this "
    "folder states the published 1e-6. So its predictions, and its images, are not those of the "
    "source: on small random models they differ by 1 to 2 % at t=500 and by 2 to 3 % at t=999. "
    "sag_dit reads this folder with the published constants"
)


NO_DIT = "a UNet, where it has a DiT"


def state_of(network: nn.Module) -> keys.State:
    """Return a network's state as contiguous tensors on the CPU, under our names.

    Those of a DiT are the official ones.
    """
    return {
        name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()
    }


def has_null_row(model: Model) -> bool:
    """Whether the label table of a DiT has a row for the null class."""
    network = model.denoiser.network
    return len(network.y_embedder.embedding_table.weight) > network.num_classes


def dit_obstacles(model: Model) -> list[str]:
    """Return why facebookresearch/DiT's code could not hold this model; nothing if it can."""
    if not isinstance(model.denoiser.network, DiT):
        return [NO_DIT]
    height, width = model.denoiser.network.input_size
    return (
        [] if height == width else [f"a rectangular input ({height} x {width}), where it squares"]
    )


def dit_notes(model: Model) -> list[str]:
    """Return what that code's own sampling script would get wrong about this model, a DiT."""
    denoiser = model.denoiser
    differing = [
        what
        for what, differs in (
            (f"it predicts {denoiser.kind}, not eps", denoiser.kind != "eps"),
            (f"its process is {denoiser.process}", denoiser.process != DDPM("linear", 1000)),
            ("it learns no variance", not denoiser.network.learn_sigma),
            ("it has no null class", not has_null_row(model)),
            ("it works on pixels", not isinstance(model.codec, VAECodec)),
        )
        if differs
    ]
    if not differing:
        return []
    return [
        "the network's outputs are equal in facebookresearch/DiT's code, but its sampling scripts "
        f"do not fit this model: {'; '.join(differing)}. Sample with sag_dit"
    ]


def write_dit(folder: Path, model: Model) -> None:
    """Write model.pt, a flat state dict, and config.json, which sag_dit reads beside it."""
    torch.save(state_of(model.denoiser.network), folder / "model.pt")
    text = json.dumps(model.description, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def diffusers_obstacles(model: Model) -> list[str]:
    """Return why diffusers' DiTPipeline could not hold this model; nothing if it can."""
    denoiser, network = model.denoiser, model.denoiser.network
    if not isinstance(network, DiT):
        return [NO_DIT]
    height, width = network.input_size
    hidden = int(network.pos_embed.shape[-1])
    block: Any = network.blocks[0]
    mlp = int(block.mlp.fc1.out_features)
    positions = sincos_positions(hidden, network.grid)
    off = (network.pos_embed[0].cpu().float() - positions).abs().max()
    settings = model.codec.settings if isinstance(model.codec, VAECodec) else {}
    shifted = [
        name for name in ("shift_factor", "latents_mean", "latents_std") if settings.get(name)
    ]
    reasons = (
        (settings == {}, "a pixel model, where it decodes latents with an AutoencoderKL"),
        (height != width, f"a rectangular input ({height} x {width}), where it has squares"),
        (not has_null_row(model), "no null class (its label table has no row for it)"),
        (
            network.num_classes > PIPELINE_NULL,
            f"{network.num_classes} classes, where it takes label {PIPELINE_NULL} for the null "
            f"class",
        ),
        (
            not isinstance(denoiser.process, DDPM),
            f"the process {denoiser.process}, where it has DDPM's linear or cosine betas",
        ),
        (denoiser.kind == "score", "a network of scores, where it has eps, v or x_0"),
        (mlp != 4 * hidden, f"an MLP {mlp / hidden:g} times as wide as the tokens, where it has 4"),
        (not off <= POSITION_TOLERANCE, "positions of its own, where it has the sin-cos table"),
        (
            bool(settings) and denoiser.x_0_range is not None,
            f"latents bounded to {denoiser.x_0_range}",
        ),
        (bool(shifted), f"an autoencoder with {', '.join(shifted)}, which it does not apply"),
    )
    return [reason for holds, reason in reasons if holds]


def diffusers_notes(model: Model) -> list[str]:
    """Return what a user of the folder in diffusers has to know."""
    notes = [DIFFUSERS_ARITHMETIC]
    classes = model.denoiser.num_classes
    if classes != PIPELINE_NULL:
        notes.append(
            f"DiTPipeline takes label {PIPELINE_NULL} for the null class, and this model's is "
            f"{classes}: call it with guidance_scale=1, or guide with sag_dit"
        )
    return notes


def to_diffusers(state: keys.State, depth: int) -> keys.State:
    """Rename an official state to diffusers' parameters, the inverse of ``from_diffusers``.

    The table of positions is left out: diffusers computes it. The embedders are copied into every
    block.
    """
    named: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        for ours, theirs in keys.MODEL.items():
            named[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            for ours, theirs in keys.BLOCK.items():
                named[f"{block}.{theirs}.{part}"] = state[f"blocks.{i}.{ours}.{part}"]
            parts = state[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            for theirs, tensor in zip(keys.QKV, parts, strict=True):
                named[f"{block}.{theirs}.{part}"] = tensor.contiguous()
    for i in range(depth):
        for ours, theirs in keys.EMBEDDERS.items():
            # Copies, for safetensors refuses tensors that share their memory.
            named[f"transformer_blocks.{i}.norm1.emb.{theirs}"] = state[ours].clone()
    return named


def write_diffusers(folder: Path, model: Model) -> None:
    """Write a DiTPipeline's folder: transformer, scheduler, vae and model_index.json.

    diffusers itself builds and saves each part, so that a name or shape that it does not know is an
    error here. For a model that has one of ``diffusers_obstacles`` the result is undefined.
    """
    import diffusers
    from diffusers.models import DiTTransformer2DModel
    from diffusers.schedulers import DDIMScheduler

    denoiser, network, process = model.denoiser, model.denoiser.network, model.denoiser.process
    if not isinstance(process, DDPM) or not isinstance(model.codec, VAECodec):
        raise ValueError(f"{model.name}: {'; '.join(diffusers_obstacles(model))}")
    config = model.description["model"]
    # Without memory or initial values: both come with the state.
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_attention_heads=config["num_heads"],
            attention_head_dim=config["hidden_size"] // config["num_heads"],
            in_channels=config["in_channels"],
            out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1),
            num_layers=config["depth"],
            sample_size=config["input_size"],
            patch_size=config["patch_size"],
            num_embeds_ada_norm=config["num_classes"],
            norm_eps=1e-6,
        )
    state = to_diffusers(state_of(network), config["depth"])
    transformer.load_state_dict(state, strict=True, assign=True)
    transformer.save_pretrained(folder / "transformer")
    scale = 1000 / process.num_timesteps
    DDIMScheduler(
        num_train_timesteps=process.num_timesteps,
        beta_start=1e-4 * scale,
        beta_end=0.02 * scale,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[process.schedule],
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}[denoiser.kind],
        clip_sample=False,
    ).save_pretrained(folder / "scheduler")
    model.codec.vae.save_pretrained(folder / "vae")
    _forget_path(folder / "vae" / "config.json")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": {str(i): name for i, name in enumerate(model.class_names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    text = json.dumps(index, indent=2)
    (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")


def _forget_path(config: Path) -> None:
    """Take out where diffusers had read a part from: a place on this machine."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def bytes_of(model: Model) -> int:
    """Return how many bytes of weights the largest layout takes, without an autoencoder."""
    network = model.denoiser.network
    state = network.state_dict()
    total = sum(tensor.nbytes for tensor in state.values())
    if isinstance(network, DiT):
        total += sum(state[name].nbytes for name in keys.EMBEDDERS) * len(network.blocks)
    return int(total)
