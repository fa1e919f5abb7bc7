"""DINOv2 features through timm, for the Fréchet distance that agrees better with human eyes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor
from torch.nn import functional

from sag_dit.checkpoints.files import container, read_torch
from sag_dit.evaluation.features import FeatureExtractor, Features, check_images

SIDE = 224
MODEL = "vit_large_patch14_dinov2.lvd142m"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2(FeatureExtractor):
    """DINOv2's class token, 1,024 values with ViT-L/14; the ``fid`` of these is FD-DINOv2.

    Images are scaled to 224 x 224 by antialiased bicubic interpolation as Pillow does it; then
    ImageNet's mean and deviation. Position embeddings, trained for 37 x 37 patches, are scaled to
    16 x 16 as DINOv2's own code does it (bicubic, no antialiasing, a factor of 16.1 / 37), which
    timm's way differs from.

    ``weights`` is a file of timm's layout, safetensors or torch's; None takes timm's published
    weights from the hub or its cache. ``pretrained=False`` leaves random ones, for tests.

    Raises:
        ValueError: no such model, weights that do not fit or cannot be downloaded.

    Source: Oquab et al., arXiv 2304.07193; Stein et al., arXiv 2306.04675 (dgm-eval).

    Example::

        reference = load_reference("photos/", DINOv2())
    """

    name = "dinov2"
    protocol: Mapping[str, Any]

    def __init__(
        self, model: str = MODEL, weights: str | Path | None = None, *, pretrained: bool = True
    ) -> None:
        super().__init__()
        if "dinov2" not in model or "_reg" in model:
            raise ValueError(
                f"model={model!r}: expected a DINOv2 of timm without registers, such as {MODEL}"
            )
        # The network, with published weights, those of a file, or random ones.
        try:
            network = timm.create_model(
                model, pretrained=pretrained and weights is None, num_classes=0
            )
        except Exception as error:  # the hub's client changes its HTTP library, and so the types
            reason = str(error).strip().split("\n")[0][:200]
            raise ValueError(
                f"model={model}: timm cannot make it or cannot download its weights ({reason}); "
                f"expected a DINOv2 of timm, or weights=PATH to its file"
            ) from None
        if not isinstance(network, VisionTransformer) or network.pos_embed is None:
            raise ValueError(f"model={model!r}: expected a vision transformer, such as {MODEL}")
        if weights is not None:
            _load_weights(network, Path(weights).expanduser())
        # Scale its position embeddings to images of 224 pixels.
        grid = SIDE // network.patch_embed.patch_size[0]
        network.pos_embed = torch.nn.Parameter(
            shrunk(network.pos_embed.detach(), grid, network.num_prefix_tokens)
        )
        network.patch_embed.set_input_size(img_size=(SIDE, SIDE))
        # Preprocessing, and all that changes a feature.
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.protocol = {
            "architecture": model,
            "weights": weights_sha256(network),
            "resize": f"{SIDE} x {SIDE}, bicubic, antialiased, rounded to 0..255",
            "range": "x / 255, ImageNet's mean and deviation",
            "positions": "bicubic, scale (grid + 0.1) / 37, as in DINOv2's own code",
        }

    mean: Tensor
    std: Tensor

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the class tokens of images of one or three channels.

        Raises:
            ValueError: the images are not uint8, or have another number of channels.
        """
        check_images(images)
        scaled = resized(images).expand(-1, 3, -1, -1) / 255
        tokens = self.network.forward_features((scaled - self.mean) / self.std)
        return Features(tokens[:, 0])


def resized(images: UInt8[Tensor, "b c h w"], side: int = SIDE) -> Float[Tensor, "b c s s"]:
    """Return images scaled as Pillow's bicubic filter does, of whole values in 0..255.

    Rows are scaled first, then columns, and each result is rounded to 0..255. Scaling both at once
    would give other pixels where the filter overshoots. (Newer releases of Pillow scale the columns
    of tall images first; for square images that is the same.)
    """
    scaled = images.float()
    for size in ((images.shape[2], side), (side, side)):
        scaled = functional.interpolate(scaled, size, mode="bicubic", antialias=True)
        scaled = scaled.round().clamp(0, 255)
    return scaled


def shrunk(
    positions: Float[Tensor, "1 n d"], grid: int, prefix: int, offset: float = 0.1
) -> Float[Tensor, "1 m d"]:
    """Return position embeddings for grid x grid patches; those of the prefix tokens stay."""
    first, patches = positions[:, :prefix], positions[:, prefix:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return positions
    factor = (grid + offset) / side
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scaled = functional.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([first, scaled.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def _load_weights(network: torch.nn.Module, file: Path) -> None:
    state = load_file(file) if container(file) == "safetensors" else read_torch(file)
    try:
        network.load_state_dict({name: value for name, value in state.items()})
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0:2]
        raise ValueError(
            f"{file}: no weights of {type(network).__name__} in timm's layout ({reason}); expected "
            f"timm's own file, such as {MODEL}'s model.safetensors"
        ) from None


def weights_sha256(network: torch.nn.Module) -> str:
    """Return a sha256 over all weights, whatever file they came from."""
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()
