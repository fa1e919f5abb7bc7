"""Codec: images of 8-bit pixels <-> the x_0 that a denoiser works on."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeAlias

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from sag_dit.bounds import Bounds, Count, checked
from sag_dit.identity import name_of
from sag_dit.models.unfilled import unfilled
from sag_dit.tensors import Images
from sag_dit.untrusted import read_json

Pixels: TypeAlias = UInt8[Tensor, "b c h w"]


def to_pixels(images: Images) -> Pixels:
    """Turn values in [-1, 1] into pixels: clamp(127.5 x + 128, 0, 255), truncated.

    Source: facebookresearch/DiT, sample_ddp.py.
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def from_pixels(pixels: Pixels) -> Images:
    """Turn pixels into float32 values in [-1, 1]; ``to_pixels`` returns the same pixels."""
    return pixels.float() / 127.5 - 1


WEIGHTS = "diffusion_pytorch_model*"


class Codec(ABC):
    """Turns pixels into x_0 and back, in float32 unless it is told otherwise.

    Attributes:
        factor: pixels per latent cell, along each side.

    Example::

        x_0 = codec.encode(pixels)
        pixels = codec.decode(x_0)
    """

    factor: int

    @abstractmethod
    def decode(self, x: Images) -> Pixels:
        """Return the pixels (b, 1 or 3, h factor, w factor) of x_0 (b, c, h, w)."""

    @abstractmethod
    def encode(self, images: Pixels, noise: Images | None = None) -> Images:
        """Return x_0 (b, c, h, w) of pixels; ``noise`` has x_0's shape and standard deviation 1.

        Without noise the result is the mean of what the codec could return.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what determines the codec's results, as plain values to hash."""

    def computing(
        self, batch_size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False
    ) -> Codec:
        """Return the codec that computes so many images at a time, in this arithmetic.

        One without a network has nothing to compute otherwise, and stays as it is.
        """
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move the codec to a device, in place."""
        return self


class IdentityCodec(Codec):
    """For pixel models: x_0 is the image, in [-1, 1].

    Example:
        >>> IdentityCodec().decode(torch.tensor([[[[-1.0, 0.0, 1.0]]]]))
        tensor([[[[  0, 128, 255]]]], dtype=torch.uint8)
    """

    factor = 1

    def decode(self, x: Images) -> Pixels:
        """Return clamp(127.5 x + 128, 0, 255), truncated."""
        return to_pixels(x)

    def encode(self, images: Pixels, noise: Images | None = None) -> Images:
        """Return pixels / 127.5 - 1; there is nothing to draw, so noise is not used."""
        return from_pixels(images)

    def config(self) -> dict[str, Any]:
        """Return its name; it has no settings."""
        return {"name": "identity"}


class _Kind(NamedTuple):
    """What a diffusers autoencoder of images means where its config does not say it."""

    widths: str
    """The argument with a number for each level of its encoder."""
    levels: tuple[int, ...]
    latent_channels: int
    scaling_factor: float


AUTOENCODERS = {
    # A scaling factor of the time before configs had one.
    "AutoencoderKL": _Kind("block_out_channels", (64,), 4, 0.18215),
    "AsymmetricAutoencoderKL": _Kind("down_block_out_channels", (64,), 4, 0.18215),
    "VQModel": _Kind("block_out_channels", (64,), 3, 0.18215),
    "AutoencoderDC": _Kind("encoder_block_out_channels", (128, 256, 512, 512, 1024, 1024), 32, 1.0),
    "AutoencoderTiny": _Kind("encoder_block_out_channels", (64, 64, 64, 64), 4, 1.0),
}
"""diffusers' autoencoders of images whose config states what their latents are scaled by."""
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""What an autoencoder states of its latents."""
STATISTICS_FILE = "latents_stats.pt"
"""Holds the mean and std of each channel, as LightningDiT leaves them beside VA-VAE."""


class VAECodec(Codec):
    """For latent models: an autoencoder with the statistics that it states itself.

    x_0 = (z - shift) scale, with scale = scaling_factor / std and shift = shift_factor + mean. Most
    configs state a scaling_factor only; the others are then 0 (shift, mean) and 1 (std). Where a
    file ``latents_stats.pt`` lies beside the config, x_0 = (z - mean) / std of that file alone.

    ``vae`` is a folder of diffusers' layout, or a module: one of diffusers', or any that has
    ``encode`` (images in [-1, 1] to z, or to its mean and std), ``decode`` (z to images),
    ``factor`` and ``latent_channels``, and perhaps these statistics as attributes. The config of a
    folder is read at once, its weights only at first use, and diffusers is imported then. Always
    ``slice_size`` images are coded at a time, and a shorter slice is padded: so memory is bounded,
    and the pixels of an image do not depend on how many others are in its batch. ``sha256`` is the
    hash of the weights that
    ``config()`` tells; without it they are hashed.

    Raises:
        ValueError: ``slice_size`` is below 1, the folder holds no autoencoder of images, or the
            module lacks a member.

    Example:
        >>> from diffusers import AutoencoderKL
        >>> codec = VAECodec(AutoencoderKL(block_out_channels=(32,), latent_channels=4))
        >>> codec.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self, vae: nn.Module | Path, slice_size: int = 1, sha256: str | None = None
    ) -> None:
        if slice_size < 1:
            raise ValueError(f"slice_size={slice_size}: expected 1 or more images at a time")
        self.slice_size = slice_size
        self.dtype, self.channels_last = torch.float32, False
        self._sha256 = sha256
        self._device: torch.device | str = "cpu"
        self._module: nn.Module | None = None
        self._folder: Path | None = None
        if isinstance(vae, Path):
            self._folder = vae
            settings = read_vae_config(vae)
            self.kind = str(settings["_class_name"])
        else:
            self._module = vae.eval()
            self._device = next((each.device for each in vae.parameters()), "cpu")
            self.kind = name_of(type(vae))
            if type(vae).__name__ in AUTOENCODERS and isinstance(vae.config, Mapping):
                self.kind = type(vae).__name__
                settings = stated_by(self.kind, vae.config)
            else:
                settings = stated_by_module(vae)
        self.settings: dict[str, Any] = {name: settings.get(name) for name in STATISTICS}
        self.latent_channels = int(settings["latent_channels"])
        self.in_channels = int(settings["in_channels"])
        self.factor = int(settings["factor"])

    @property
    def vae(self) -> Any:
        """The autoencoder, built when it is first asked for."""
        if self._module is None:
            if self._folder is None:
                raise RuntimeError("a VAECodec without module has a folder")
            self._module = self._arranged(build_vae(self._folder).to(self._device))
        return self._module

    def _arranged(self, module: nn.Module) -> nn.Module:
        """Return a module in this codec's arithmetic, in place."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        # By torch's own method: diffusers' warns of parts that stay float32, though it has none.
        nn.Module.to(module, self.dtype, memory_format=layout)  # type: ignore[call-overload]
        return module

    def computing(
        self, batch_size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False
    ) -> VAECodec:
        """Return this codec with other slices, of another type, or laid out channels last.

        The network is computed in ``dtype``; latents are scaled, and pixels rounded, in float32.

        Raises:
            ValueError: ``batch_size`` is below 1.

        Example::

            fast = codec.computing(4, torch.bfloat16, channels_last=True)
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more images at a time")
        asked = (batch_size, dtype, channels_last)
        if asked == (self.slice_size, self.dtype, self.channels_last):
            return self
        made = copy(self)
        # The weights are those of the file, whatever type they are converted to.
        made._sha256 = self.config()["sha256"]
        made.slice_size, made.dtype, made.channels_last = asked
        if self._module is not None:
            made._module = made._arranged(deepcopy(self._module))
        return made

    def _given(self, part: Tensor) -> Tensor:
        """Return what the network is given: of its type and layout."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return part.to(self.dtype, memory_format=layout)

    def _scale_and_shift(self, like: Tensor) -> tuple[Tensor, Tensor]:
        def channels(value: Any) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float32, device=like.device).reshape(-1, 1, 1)

        stated = self.settings
        scale = stated["scaling_factor"] / channels(stated["latents_std"] or 1.0)
        shift = channels(stated["latents_mean"] or 0.0) + (stated["shift_factor"] or 0.0)
        return scale, shift

    def _sliced(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Apply a function to slices of exactly ``slice_size`` images and join the results."""
        results = []
        # Mixed precision is the denoiser's affair; here it would show in the pixels.
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
            for part in batch.split(self.slice_size):
                missing = self.slice_size - len(part)
                padded = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)])
                results.append(function(padded)[: len(part)])
        return torch.cat(results)

    def decode(self, x: Images) -> Pixels:
        """Return the pixels of the latents x, z = x / scale + shift."""

        def pixels(part: Tensor) -> Tensor:
            scale, shift = self._scale_and_shift(part)
            decoded = self.vae.decode(self._given(part / scale + shift))
            sample: Tensor = decoded if isinstance(decoded, Tensor) else decoded.sample
            return to_pixels(sample.contiguous())

        return self._sliced(pixels, x.float())

    def _moments(self, images: Pixels) -> tuple[Images, Images]:
        """Return mean and standard deviation of the posterior of z, before scaling."""

        def moments(part: Tensor) -> Tensor:
            mean, std = _distribution(self.vae.encode(self._given(from_pixels(part))))
            return torch.cat([mean, std], dim=1).float().contiguous()

        mean, std = self._sliced(moments, images).chunk(2, dim=1)
        sides = tuple(side // self.factor for side in images.shape[2:])
        if tuple(mean.shape[1:]) != (self.latent_channels, *sides):
            raise ValueError(
                f"vae={self.kind}: its latents of {tuple(images.shape[2:])} pixels are "
                f"{tuple(mean.shape[1:])}: expected {(self.latent_channels, *sides)}, by its "
                f"{self.latent_channels} channels and its factor {self.factor}"
            )
        return mean, std

    def posterior(self, images: Pixels) -> tuple[Images, Images]:
        """Return mean and standard deviation of x_0, each (b, c, h, w), of pixels."""
        mean, std = self._moments(images)
        scale, shift = self._scale_and_shift(mean)
        return (mean - shift) * scale, std * scale

    def encode(self, images: Pixels, noise: Images | None = None) -> Images:
        """Return (mean + std noise - shift) scale of the posterior, or of its mean."""
        mean, std = self._moments(images)
        return self.scaled(mean if noise is None else mean + std * noise.to(mean))

    def scaled(self, z: Images) -> Images:
        """Return x_0 = (z - shift) scale of what the encoder put out."""
        scale, shift = self._scale_and_shift(z)
        return (z - shift) * scale

    def config(self) -> dict[str, Any]:
        """Return scaling, slices, arithmetic and the sha256 of the weights."""
        if self._sha256 is None:
            self._sha256 = hash_tensors(self.vae)
        told: dict[str, Any] = {
            "name": self.kind,
            **{name: value for name, value in self.settings.items() if value is not None},
            "slice_size": self.slice_size,
            "sha256": self._sha256,
        }
        # Newer than some runs, so told only where it is not as those were.
        if self.dtype != torch.float32:
            told["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.channels_last:
            told["channels_last"] = True
        return told

    def to(self, device: torch.device | str) -> Self:
        """Move the autoencoder, or have it built on that device later."""
        self._device = device
        if self._module is not None:
            self._module.to(device)
        return self


def _distribution(encoded: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of what an encoder put out; one point has the std 0."""
    if isinstance(encoded, tuple) and not hasattr(encoded, "_fields"):
        mean, std = encoded
        return mean, std
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.std
    point = encoded
    if not isinstance(encoded, Tensor):
        point = encoded.latent if hasattr(encoded, "latent") else encoded.latents
    return point, torch.zeros_like(point)


def stated_by(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config of a diffusers autoencoder says of its latents, all of it filled in.

    That is its statistics, and ``factor``, ``latent_channels`` and ``in_channels``.
    """
    known = AUTOENCODERS[kind]
    found = {name: config.get(name) for name in STATISTICS}
    if found["scaling_factor"] is None:
        found["scaling_factor"] = known.scaling_factor
    # Those of the codebook, if it has another number.
    channels = config.get("vq_embed_dim") if kind == "VQModel" else None
    return found | {
        "factor": 2 ** (len(config.get(known.widths) or known.levels) - 1),
        "latent_channels": channels or config.get("latent_channels") or known.latent_channels,
        "in_channels": config.get("in_channels", 3),
    }


ASKED_OF_OWN = ("encode", "decode", "factor", "latent_channels")
"""What an autoencoder of one's own has to have."""


def stated_by_module(vae: nn.Module) -> dict[str, Any]:
    """Return what an autoencoder of one's own says of its latents, see :func:`stated_by`.

    Raises:
        ValueError: it lacks a member, or has statistics of another number of channels.
    """
    # What it is asked for, without which nothing can be encoded.
    lacking = [name for name in ASKED_OF_OWN if not hasattr(vae, name)]
    if lacking:
        raise ValueError(
            f"vae={type(vae).__name__}: lacks {', '.join(lacking)}; expected a module with encode "
            f"(images in [-1, 1] to latents), decode, factor (pixels per latent cell along each "
            f"side) and latent_channels, or one of diffusers' {', '.join(AUTOENCODERS)}"
        )
    # Its statistics, as plain numbers, one for each channel where there are several.
    found: dict[str, Any] = {name: getattr(vae, name, None) for name in STATISTICS}
    for name, value in found.items():
        if isinstance(value, (Tensor, list, tuple)):
            found[name] = torch.as_tensor(value).detach().cpu().double().flatten().tolist()
            if len(found[name]) != vae.latent_channels:
                raise ValueError(
                    f"vae={type(vae).__name__}: {name} has {len(found[name])} numbers: expected "
                    f"one for each of its {vae.latent_channels} channels"
                )
    if found["scaling_factor"] is None:
        found["scaling_factor"] = 1.0
    return found | {
        "factor": vae.factor,
        "latent_channels": vae.latent_channels,
        "in_channels": getattr(vae, "in_channels", 3),
    }


Counts: TypeAlias = tuple[Count, ...]
Layers: TypeAlias = Annotated[int, Bounds(least=0, most=64)]


@dataclass(frozen=True)
class _VAEConfig:
    """What is asked of the config.json of an autoencoder."""

    block_out_channels: Counts | None = None
    down_block_out_channels: Counts | None = None
    encoder_block_out_channels: Counts | None = None
    decoder_block_out_channels: Counts | None = None
    layers_per_block: Layers | None = None
    encoder_layers_per_block: tuple[Layers, ...] | None = None
    decoder_layers_per_block: tuple[Layers, ...] | None = None
    num_encoder_blocks: tuple[Layers, ...] | None = None
    num_decoder_blocks: tuple[Layers, ...] | None = None
    in_channels: Count = 3
    latent_channels: Count | None = None
    vq_embed_dim: Count | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None


def read_vae_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a folder of one of diffusers' autoencoders of images.

    What it leaves out is filled in, see :func:`stated_by`; a file of statistics comes first.

    Raises:
        ValueError: there is none, or it describes something else.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"vae={folder}: expected a folder with the config.json and the weights of one of "
            f"diffusers' autoencoders, such as AutoencoderKL; {path.name} could not be read "
            f"({error})"
        ) from None
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in AUTOENCODERS:
        raise ValueError(
            f"vae={folder}: expected an {', '.join(AUTOENCODERS)}, and its config says {kind!r}; "
            f"another one can be named by vae._target_=MODULE.CLASS"
        )
    # Sizes that a network can have.
    stated = checked(config, _VAEConfig, f"vae={folder}: {path.name}", open=True)
    for name, each in vars(stated).items():
        if isinstance(each, tuple) and "latents" not in name and not 1 <= len(each) <= 16:
            raise ValueError(f"vae={folder}: {path.name}: {name}={each}: expected 1 to 16 numbers")
    # Statistics: the config's, or those of a file beside it.
    found = {**config, **stated_by(kind, config)}
    statistics = folder / STATISTICS_FILE
    if statistics.is_file():
        found |= latent_statistics(statistics, found["latent_channels"])
    for name in ("latents_mean", "latents_std"):
        if found[name] is not None and len(found[name]) != found["latent_channels"]:
            raise ValueError(
                f"vae={folder}: {path.name}: {name} has {len(found[name])} numbers: expected one "
                f"for each of its {found['latent_channels']} channels"
            )
    return found


def latent_statistics(file: Path, channels: int) -> dict[str, Any]:
    """Read a file of ``mean`` and ``std``, each of one number a channel, and nothing else.

    Raises:
        ValueError: it cannot be read or holds something else; nothing is unpickled.
    """
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = (values[name].double().flatten() for name in ("mean", "std"))
        fits = len(mean) == len(std) == channels and bool((std > 0).all())
        if not (fits and mean.isfinite().all() and std.isfinite().all()):
            raise ValueError(f"it has {len(mean)} means and {len(std)} stds")
    except Exception as error:  # torch raises almost any type on a damaged file
        told = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        raise ValueError(
            f"{file}: expected tensors mean and std with one finite number for each of "
            f"{channels} channels, std above 0 ({told})"
        ) from None
    return {
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
    }


def refuse_larger(build: Callable[[], torch.nn.Module], files: Iterable[Path]) -> None:
    """Refuse a network that has more numbers than the files of its weights have bytes.

    It is built without memory, so that a config that states impossible sizes costs nothing.

    Raises:
        ValueError: the network is larger.
    """
    with unfilled():
        numbers = sum(each.numel() for each in build().parameters())
    there = sum(file.stat().st_size for file in files)
    if numbers > there:
        raise ValueError(
            f"its config describes {numbers:,} numbers, and its weights have {there:,} bytes"
        )


def build_vae(folder: Path) -> Any:
    """Build the autoencoder of a local folder in float32, on the CPU, in eval mode.

    Raises:
        ValueError: the weights are missing, damaged or do not fit the config.
    """
    import diffusers

    # model.safetensors or model.fp16.bin: full precision before variants, then safetensors.
    names = [path.name.split(".") for path in folder.glob(WEIGHTS)]
    variants = [(name[1:-1], name[-1]) for name in names if name[-1] in ("safetensors", "bin")]
    variant, end = min(variants, key=lambda v: (v[0], v[1] != "safetensors"), default=([], "bin"))
    kind = getattr(diffusers, str(read_vae_config(folder)["_class_name"]))
    config = read_json(folder / "config.json")
    try:
        refuse_larger(lambda: kind.from_config(config), folder.glob(WEIGHTS))
        vae, report = kind.from_pretrained(
            folder,
            variant=".".join(variant) or None,
            use_safetensors=end == "safetensors",
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and what it calls raise almost any type
        raise ValueError(
            f"vae={folder}: the autoencoder could not be loaded; expected undamaged weights that "
            f"fit its config.json ({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error
    # diffusers would go on with random values.
    if report["missing_keys"]:
        raise ValueError(
            f"vae={folder}: the weights lack {len(report['missing_keys'])} of the autoencoder's "
            f"tensors, first {', '.join(sorted(report['missing_keys'])[:3])}; expected the weights "
            f"that belong to its config.json"
        )
    return vae.eval().requires_grad_(False)


def encoder_of(codec: VAECodec) -> nn.Module:
    """Return the modules that encode; decoders may differ between autoencoders of one kind."""
    vae = codec.vae
    if codec.kind not in AUTOENCODERS:
        whole: nn.Module = vae
        return whole
    parts = {"encoder": vae.encoder}
    if getattr(vae, "quant_conv", None) is not None:
        parts["quant_conv"] = vae.quant_conv
    return nn.ModuleDict(parts)


def hash_tensors(module: torch.nn.Module) -> str:
    """Return the sha256 over the names, types, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
