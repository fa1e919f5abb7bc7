"""Tiny randomly initialised pipelines of every family, built from configs without downloads."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = string.ascii_lowercase + ",."
TOKENS = 12
"""Text tokens of one prompt."""


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer that spells."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> T5TokenizerFast:
    """A tokenizer that spells."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in LETTERS]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0, model_max_length=TOKENS)


def uneven(module: nn.Module, seed: int = 0) -> Any:
    """Shift all weights, so that none is zero and attention is uneven."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            attends = any(part in name for part in ("to_q", "to_k", "add_q", "add_k"))
            scale = 0.5 if attends else 0.05
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def clip(projection: bool = False, width: int = 16, seed: int = 1) -> Any:
    """A CLIP text encoder of one layer."""
    config = CLIPTextConfig(
        vocab_size=58,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=56,
        eos_token_id=57,
        pad_token_id=57,
    )
    made = CLIPTextModelWithProjection if projection else CLIPTextModel
    return uneven(made(config), seed)


def t5(seed: int = 2) -> Any:
    """A T5 encoder of one layer."""
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return uneven(T5EncoderModel(config), seed)


def vae(channels: int = 4) -> diffusers.AutoencoderKL:
    """An autoencoder that halves each side."""
    made = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    return uneven(made, 3)


def unet(in_channels: int = 4, width: int = 16, **options: Any) -> Any:
    """A UNet that attends at 8 x 8 and, in the middle, at 4 x 4."""
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=width,
        **options,
    )
    return uneven(made)


def ddim(**options: Any) -> diffusers.DDIMScheduler:
    """Stable Diffusion's own settings."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **options,
    )


def sd(made: Any = diffusers.StableDiffusionPipeline, in_channels: int = 4) -> Any:
    """Stable Diffusion 1."""
    return made(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(in_channels),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(made: Any = diffusers.StableDiffusionXLPipeline) -> Any:
    """Stable Diffusion XL."""
    network = unet(
        width=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        transformer_layers_per_block=(1, 2),
    )
    return made(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def pixart(made: Any = diffusers.PixArtAlphaPipeline) -> Any:
    """PixArt, with its learned variance."""
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    return made(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=uneven(network),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sd3(made: Any = diffusers.StableDiffusion3Pipeline, medium: bool = True) -> Any:
    """Stable Diffusion 3, or 3.5 medium: its first block attends twice, and queries are normed."""
    options: dict[str, Any] = {}
    if medium:
        options = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=16,
        **options,
    )
    text_5 = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return made(
        transformer=uneven(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True, seed=4),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=uneven(T5EncoderModel(text_5)),
        tokenizer_3=t5_tokenizer(),
    )


def flux(made: Any = diffusers.FluxPipeline, dev: bool = False, fill: bool = False) -> Any:
    """FLUX: schnell, or dev with its embedding of the guidance; fill also sees image and mask."""
    network = diffusers.FluxTransformer2DModel(
        in_channels=48 if fill else 16,
        out_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=dev,
    )
    return made(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=uneven(network),
    )


def dit(classes: int = 1000) -> Any:
    """DiT as released in diffusers."""
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=classes,
    )
    return diffusers.DiTPipeline(
        transformer=uneven(network),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


BUILD: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "dit": dit,
}
CALLS: dict[str, dict[str, Any]] = {
    "sd": {},
    "sdxl": {},
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
    "sd3": {"max_sequence_length": TOKENS},
    "flux": {"max_sequence_length": TOKENS},
    "dit": {},
}
"""What a call of each family has to say because it is tiny."""


def draw(pipe: Any, family: str, prompt: Any = "a corgi", **options: Any) -> torch.Tensor:
    """Draw with two steps and return latents, or images where there are no latents to be had."""
    settings = {**CALLS[family], "num_inference_steps": 2, **options}
    settings.setdefault("generator", torch.Generator().manual_seed(0))
    if family == "dit":
        labels = [prompt] if isinstance(prompt, int) else prompt
        images = pipe([1] if isinstance(labels, str) else labels, output_type="np", **settings)
        return torch.from_numpy(images.images)
    settings.setdefault("height", 16)
    settings.setdefault("width", 16)
    latents: torch.Tensor = pipe(prompt, output_type="latent", **settings).images
    return latents
