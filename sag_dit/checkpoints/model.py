"""Model: a denoiser together with what it takes to sample from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sag_dit.checkpoints.config import describe
from sag_dit.codec import Codec, IdentityCodec
from sag_dit.denoiser import ClassConditional, Denoiser
from sag_dit.denoiser.checking import check_network
from sag_dit.identity import name_of
from sag_dit.raised import is_ours
from sag_dit.untrusted import TARGET

BATCH_SIZE = 16


@dataclass(frozen=True, eq=False)
class Model:
    """A denoiser, its codec and its name, ready to sample.

    It is not made by hand: :func:`sag_dit.load` reads one, and
    :func:`sag_dit.checkpoints.from_denoiser` makes one of a network in memory,
    ``from_denoiser(ClassConditional(network, DDPM()), "mine")``.

    Attributes:
        denoiser: as loaded, in eval mode, float32, on the CPU; see :attr:`class_conditional`.
        codec: pixels <-> the denoiser's x_0; an autoencoder's weights are read at first use.
        name: what the checkpoint is called, fit for a folder's name.
        sha256: of the weights file, or over several files' sha256; empty for weights in memory.
        config: all that determines the model's arithmetic, as plain values to hash.
        class_names: one per class.
        defaults: what the checkpoint recommends to sample with, perhaps nothing.
        vae: where the codec's autoencoder was found, None for a pixel model.
        lora: rank and alpha of adapters in a denoiser that is being trained, None without.

    Example:
        >>> import sag_dit
        >>> sag_dit.load("digits").class_names[:3]
        ('0', '1', '2')
    """

    denoiser: Denoiser
    codec: Codec
    name: str
    sha256: str
    config: Mapping[str, Any]
    class_names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    vae: str | Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None

    @property
    def class_conditional(self) -> ClassConditional:
        """The denoiser, as one of classes: what is trained, exported and described.

        Raises:
            ValueError: it is a text model's.
        """
        if not isinstance(self.denoiser, ClassConditional):
            raise ValueError(
                f"{self.name}: a text model, which is neither trained nor exported; expected a "
                f"model of classes"
            )
        return self.denoiser

    @property
    def batch_size(self) -> int:
        """The network's compute batch that the checkpoint recommends, else 16."""
        return int(self.defaults.get("batch_size", BATCH_SIZE))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of the images that it draws."""
        channels, height, width = self.denoiser.latent_shape
        factor = self.codec.factor
        return (channels if factor == 1 else 3), height * factor, width * factor

    @property
    def description(self) -> dict[str, Any]:
        """The config that rebuilds the model from its weights: what a checkpoint stores."""
        vae = {} if self.vae is None else {"vae": self.vae}
        lora = {} if self.lora is None else {"lora": dict(self.lora)}
        return {**describe(self.class_conditional), **vae, **lora, "defaults": dict(self.defaults)}


def plain_name(name: str) -> str:
    """Return a name fit for a folder."""
    return re.sub(r"[^\w.+-]+", "-", name)


def from_denoiser(
    denoiser: ClassConditional,
    name: str,
    *,
    codec: Codec | None = None,
    sha256: str = "",
    weights: str = "ema",
    defaults: Mapping[str, Any] | None = None,
    vae: str | Mapping[str, Any] | None = None,
) -> Model:
    """Make a model of a denoiser in memory.

    ``codec`` may be left out for pixel models. ``weights`` tells averaged ("ema") from raw ("raw")
    ones where a file holds both.

    A network whose class is not one of this package's is asked once, see
    :func:`sag_dit.denoiser.checking.check_network`.

    Raises:
        ValueError: a latent model without a codec, or a network whose answer cannot be used.

    Example:
        >>> from sag_dit.models import DiT
        >>> from sag_dit.process import DDPM
        >>> network = DiT(input_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=2)
        >>> from_denoiser(ClassConditional(network, DDPM()), "my model").name
        'my-model'
    """
    # Pixels need no autoencoder, latents do.
    channels = denoiser.latent_shape[0]
    if codec is None:
        if channels not in (1, 3):
            raise ValueError(
                f"a model of {channels} channels works on latents: expected a codec, such as "
                f"VAECodec(AutoencoderKL.from_pretrained(...))"
            )
        codec = IdentityCodec()
    if not is_ours(type(denoiser.network)):
        check_network(denoiser)
    # What determines its results, which the identity of a run holds.
    config = {**describe(denoiser), "weights": weights, "codec": codec.config()}
    del config["class_names"]  # names determine no pixel
    if TARGET in config["model"]:
        config["model"] = {**config["model"], TARGET: name_of(type(denoiser.network))}
    return Model(
        denoiser=denoiser,
        codec=codec,
        name=plain_name(name),
        sha256=sha256,
        config=config,
        class_names=denoiser.class_names,
        defaults=dict(defaults or {}),
        vae=vae,
    )
