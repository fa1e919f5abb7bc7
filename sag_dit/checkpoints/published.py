"""The UNets and classifiers that openai/guided-diffusion and openai/improved-diffusion published.

Weights tell a UNet's widths, depth and classes, but neither the size of its images nor its heads,
schedule or times: these are known by the published model that has the same sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

ORDER = "new_attention_order"
"""The key of a config beside published weights that tells how queries, keys and values lie."""
GUIDED = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
IMPROVED = "https://openaipublic.blob.core.windows.net/diffusion/march-2021/"


@dataclass(frozen=True)
class Sizes:
    """What weights tell of a UNet or, with ``learn_sigma`` None, of a classifier.

    ``attending`` are the levels that attend, 0 being the input's.
    """

    in_channels: int
    model_channels: int
    num_res_blocks: int
    channel_mult: tuple[float, ...]
    attending: tuple[int, ...]
    scale_shift_norm: bool
    resblock_updown: bool
    num_classes: int
    learn_sigma: bool | None

    def differences(self, other: Sizes) -> str:
        """Return in words where another has other sizes."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name}={mine[name]!r}, not {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        )


@dataclass(frozen=True)
class Variant:
    """A published file: its sizes, and what its weights do not tell.

    Attributes:
        file: its official name; the address is ``url`` + ``file``.
        input_size: the side of its images.
        arguments: of UNet or Classifier, beside sizes.
        process: the process it was trained on.
        new_attention_order: how its queries, keys and values lie.
        upsampler: whether it enlarges images, which this package does not.
    """

    file: str
    url: str
    sizes: Sizes
    input_size: int
    arguments: Mapping[str, Any]
    process: Mapping[str, Any] = field(default_factory=dict)
    new_attention_order: bool = False
    upsampler: bool = False


def _sizes(model_channels: int, mult: tuple[float, ...], **changed: Any) -> Sizes:
    usual: dict[str, Any] = {
        "in_channels": 3,
        "model_channels": model_channels,
        "num_res_blocks": 2,
        "channel_mult": mult,
        "attending": tuple(range(len(mult)))[-3:],
        "scale_shift_norm": True,
        "resblock_updown": True,
        "num_classes": 1000,
        "learn_sigma": True,
    }
    return Sizes(**{**usual, **changed})


# By the side of the images.
MULT: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
HEADS_OF_64 = {"num_head_channels": 64}
LINEAR = {"schedule": "linear", "num_timesteps": 1000}
COSINE = {"schedule": "cosine", "num_timesteps": 1000}
COSINE_4000 = {"schedule": "cosine", "num_timesteps": 4000}


def _adm(file: str, side: int, **changed: Any) -> Variant:
    arguments = {**HEADS_OF_64, "dropout": changed.pop("dropout", 0.0)}
    sizes = _sizes(256, MULT[side], **changed)
    return Variant(file, GUIDED, sizes, side, arguments, LINEAR)


def _iddpm(file: str, side: int, **changed: Any) -> Variant:
    """Improved diffusion's defaults: four heads, resampling by convolutions, rescaled times."""
    width = changed.pop("model_channels", 128)
    arguments = {"num_heads": 4, "time_scale": 0.25, **changed.pop("arguments", {})}
    process = changed.pop("process", COSINE_4000)
    usual = {"num_res_blocks": 3, "resblock_updown": False, "num_classes": 0}
    levels = len(MULT[side])
    # 16 and 8 attend.
    attending = tuple(level for level in range(levels) if side >> level in (16, 8))
    sizes = _sizes(width, MULT[side], **{**usual, "attending": attending, **changed})
    return Variant(file, IMPROVED, sizes, side, arguments, process)


_BEDROOM: dict[str, Any] = {
    "num_res_blocks": 2,
    "attending": (4,),
    "scale_shift_norm": False,
    "arguments": {"num_heads": 1, "time_scale": 1.0},
    "process": LINEAR,
}

DIFFUSION = (
    Variant(
        "64x64_diffusion.pt",
        GUIDED,
        _sizes(192, MULT[64], num_res_blocks=3),
        64,
        {**HEADS_OF_64, "dropout": 0.1},
        COSINE,
        new_attention_order=True,
    ),
    Variant("128x128_diffusion.pt", GUIDED, _sizes(256, MULT[128]), 128, {"num_heads": 4}, LINEAR),
    _adm("256x256_diffusion.pt", 256),
    _adm("256x256_diffusion_uncond.pt", 256, num_classes=0),
    _adm("512x512_diffusion.pt", 512),
    _adm("lsun_bedroom.pt", 256, num_classes=0, dropout=0.1),
    _adm("lsun_cat.pt", 256, num_classes=0, dropout=0.1),
    _adm("lsun_horse.pt", 256, num_classes=0, dropout=0.1),
    _adm("lsun_horse_nodropout.pt", 256, num_classes=0),
    _iddpm("imagenet64_uncond_100M_1500K.pt", 64),
    _iddpm("imagenet64_uncond_vlb_100M_1500K.pt", 64),
    _iddpm(
        "imagenet64_cond_270M_250K.pt",
        64,
        model_channels=192,
        num_classes=1000,
        arguments={"time_scale": 1.0},
    ),
    _iddpm("cifar10_uncond_50M_500K.pt", 32, arguments={"dropout": 0.3}),
    _iddpm("cifar10_uncond_vlb_50M_500K.pt", 32, arguments={"dropout": 0.3}),
    _iddpm("lsun_uncond_100M_1200K_bs128.pt", 256, **_BEDROOM),
    _iddpm("lsun_uncond_100M_2400K_bs64.pt", 256, **_BEDROOM),
)
UPSAMPLERS = (
    Variant(
        "64_256_upsampler.pt",
        GUIDED,
        _sizes(192, MULT[256], in_channels=6),
        256,
        {"num_heads": 4},
        upsampler=True,
    ),
    Variant(
        "128_512_upsampler.pt",
        GUIDED,
        _sizes(192, MULT[256], in_channels=6, attending=(4, 5)),
        512,
        HEADS_OF_64,
        upsampler=True,
    ),
    Variant(
        "upsample_cond_500K.pt",
        IMPROVED,
        _sizes(192, MULT[256], in_channels=6, attending=(4, 5), resblock_updown=False),
        256,
        {"num_heads": 4},
        upsampler=True,
    ),
)
CLASSIFIERS = tuple(
    Variant(
        f"{side}x{side}_classifier.pt",
        GUIDED,
        _sizes(128, MULT[side], num_res_blocks=4 if side == 64 else 2, learn_sigma=None),
        side,
        HEADS_OF_64,
    )
    for side in (64, 128, 256, 512)
)
ALL = (*DIFFUSION, *UPSAMPLERS, *CLASSIFIERS)


DITS = {"DiT-XL-2-256x256.pt": 32, "SiT-XL-2-256x256.pt": 32, "DiT-XL-2-512x512.pt": 64}
"""The side of the latents of each published DiT and SiT; in all else they are of one size."""
DIT_XL = {"hidden_size": 1152, "depth": 28, "patch_size": 2, "in_channels": 4, "num_classes": 1000}


def check_dit(model: Mapping[str, Any], path: Path) -> None:
    """Refuse a file that has the name of a published DiT and is one of another resolution.

    Raises:
        ValueError: it does; what it looks like is named.
    """
    side, found = DITS.get(path.name), model["input_size"]
    known = [name for name, each in DITS.items() if each == found]
    if side in (None, found) or not known or not model.items() >= DIT_XL.items():
        return
    raise ValueError(
        f"{path}: not the published {path.name}: found input_size={found}, not {side}; it looks "
        f"like {' or '.join(known)}, so give it that name or fetch the file anew"
    )


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether names are those of openai/guided-diffusion or openai/improved-diffusion."""
    return "input_blocks.0.0.weight" in state and "time_embed.0.weight" in state


def is_classifier(state: Mapping[str, Tensor]) -> bool:
    """Whether published weights are those of a classifier, which ends in an attention pool."""
    return "out.2.positional_embedding" in state


def by_file(name: str) -> Variant | None:
    """Return the variant whose official file has this name, or None."""
    return next((variant for variant in ALL if variant.file == name), None)


def alike(sizes: Sizes) -> list[Variant]:
    """Return the variants of these sizes."""
    return [variant for variant in ALL if variant.sizes == sizes]


def resembling(sizes: Sizes) -> str:
    """Return in words which published file weights of these sizes look like."""
    same = alike(sizes)
    if same:
        return f"it looks like {' or '.join(variant.file for variant in same)}"
    mine = asdict(sizes)

    def shared(variant: Variant) -> int:
        return sum(value == mine[name] for name, value in asdict(variant.sizes).items())

    nearest = max(ALL, key=shared)
    return (
        f"no published file has its sizes, and {nearest.file} comes nearest (found "
        f"{sizes.differences(nearest.sizes)})"
    )
