"""Stable Diffusion's autoencoder as NVlabs/edm2 uses it, for latents that were made with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sag_dit.checkpoints import zoo
from sag_dit.codec import build_vae, read_vae_config
from sag_dit.tensors import Images

RAW_MEAN, RAW_STD, FINAL_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5
"""What EDM2 takes the latents' mean and standard deviation to be, and scales the latter to."""


class EDM2Autoencoder(nn.Module):
    """An AutoencoderKL that is given pixels from 0 to 1, with EDM2's statistics of its latents.

    x_0 = (z - raw_mean) final_std / raw_std + final_mean, for each channel. Elsewhere the same
    autoencoder is given pixels from -1 to 1, so that its latents are others: an image decoded
    without this class is pale. ``vae`` is a folder, ``mse``, ``ema`` or a hub repository.

    Source: NVlabs/edm2, training/encoders.py (StabilityVAEEncoder).

    Raises:
        ValueError: the autoencoder is not found, or there are other than one number a channel.

    Example::

        codec = VAECodec(EDM2Autoencoder("mse"))
        pixels = codec.decode(x_0)
    """

    key = "edm2_autoencoder"

    def __init__(
        self,
        vae: str = "mse",
        raw_mean: Sequence[float] = RAW_MEAN,
        raw_std: Sequence[float] = RAW_STD,
        final_mean: float = 0.0,
        final_std: float = FINAL_STD,
    ) -> None:
        super().__init__()
        folder = zoo.locate_vae(vae)
        stated = read_vae_config(folder)
        self.factor, self.latent_channels = int(stated["factor"]), int(stated["latent_channels"])
        for name, values in (("raw_mean", raw_mean), ("raw_std", raw_std)):
            if len(values) != self.latent_channels:
                raise ValueError(
                    f"{name}={list(values)}: expected a number for each of the "
                    f"{self.latent_channels} channels"
                )
        if not (min(raw_std) > 0 and final_std > 0):
            raise ValueError(f"raw_std={list(raw_std)}, final_std={final_std}: expected above 0")
        # As (z - mean) / std, which is how any autoencoder states it.
        self.latents_std = [float(std) / final_std for std in raw_std]
        self.latents_mean = [
            float(mean) - final_mean * std
            for mean, std in zip(raw_mean, self.latents_std, strict=True)
        ]
        self.vae = build_vae(folder)

    def encode(self, images: Images) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z for images (b, 3, h, w) in [-1, 1]."""
        latents = self.vae.encode((images + 1) / 2).latent_dist
        return latents.mean, latents.std

    def decode(self, z: Images) -> Images:
        """Return images (b, 3, h, w) in [-1, 1]."""
        images: Tensor = self.vae.decode(z).sample
        return images * 2 - 1
