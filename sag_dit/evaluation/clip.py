"""CLIP through transformers: image features for CMMD, and the CLIP score of images and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from sag_dit.evaluation.dino import resized, weights_sha256
from sag_dit.evaluation.features import FeatureExtractor, Features, check_images
from sag_dit.tensors import Labels

MODEL = "openai/clip-vit-large-patch14-336"
"""The CLIP of CMMD's authors."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIP(FeatureExtractor):
    """CLIP's image embedding of length 1, 768 values with ViT-L/14; the ``mmd`` of these is CMMD.

    Images are scaled to squares by antialiased bicubic interpolation as Pillow does it; then CLIP's
    mean and deviation.

    ``weights`` is a folder as transformers keeps it, with safetensors; None takes the one that
    CMMD's authors use from the hub or its cache. ``network`` is a CLIPModel that is loaded already.

    Raises:
        ValueError: transformers is not installed, or there is no CLIP in the folder.

    Source: Radford et al., arXiv 2103.00020; Jayasumana et al., arXiv 2401.09603.

    Example::

        reference = load_reference("photos/", CLIP())
    """

    name = "clip"
    protocol: Mapping[str, Any]

    def __init__(self, weights: str | Path | None = None, *, network: Any = None) -> None:
        super().__init__()
        whole = network or _loaded("CLIPModel", weights)
        self.network = nn.ModuleList([whole.vision_model, whole.visual_projection])
        self.side = int(whole.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.protocol = {
            "architecture": f"CLIP, patches of {whole.config.vision_config.patch_size}",
            "weights": weights_sha256(self.network),
            "resize": f"{self.side} x {self.side}, bicubic, antialiased, rounded to 0..255",
            "range": "x / 255, CLIP's mean and deviation; embeddings of length 1",
        }

    mean: Tensor
    std: Tensor

    def forward(self, images: UInt8[Tensor, "b c h w"]) -> Features:
        """Return the embeddings of images of one or three channels.

        Raises:
            ValueError: the images are not uint8, or have another number of channels.
        """
        check_images(images)
        scaled = resized(images, self.side).expand(-1, 3, -1, -1) / 255
        vision, projection = self.network
        embedded = projection(vision(pixel_values=(scaled - self.mean) / self.std).pooler_output)
        return Features(functional.normalize(embedded))


class CLIPScore(nn.Module):
    """100 cos(image, prompt), at least 0: how well an image shows its prompt; a verifier.

    ``weights`` as for :class:`CLIP`, with the text encoder and its tokenizer. Prompts of more
    tokens than the encoder takes are cut.

    Raises:
        ValueError: transformers is not installed, or there is no CLIP in the folder.

    Source: Hessel et al., arXiv 2104.08718, with torchmetrics' factor of 100.

    Example::

        compare(model, settings, verifiers={"clip_score": CLIPScore("clip-vit-base-patch32/")})
    """

    label = "CLIP score"
    higher_is_better = True

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        whole = _loaded("CLIPModel", weights)
        self.images = CLIP(network=whole)
        self.texts = nn.ModuleList([whole.text_model, whole.text_projection])
        self.most = int(whole.config.text_config.max_position_embeddings)
        self.tokenizer = _loaded("CLIPTokenizer", weights)
        text = weights_sha256(self.texts)
        self.protocol = {**self.images.protocol, "text_weights": text, "factor": 100}

    def forward(
        self, images: Float[Tensor, "b c h w"], prompts: Sequence[str] | Labels | None
    ) -> Float[Tensor, "b"]:
        """Return the score of each image and its prompt.

        Raises:
            ValueError: there are no prompts.
        """
        if prompts is None or isinstance(prompts, Tensor):
            raise ValueError(
                "a CLIP score compares images with their prompts, and there are none: expected a "
                "text model, drawn with prompt= or requests="
            )
        seen = self.images((images * 255).round().to(torch.uint8)).pool
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.most, return_tensors="pt"
        )
        text, projection = self.texts
        said = projection(text(**tokens.to(images.device)).pooler_output)
        scores: Tensor = (100 * (seen * functional.normalize(said)).sum(1)).clamp(min=0)
        return scores


def _loaded(kind: str, weights: str | Path | None) -> Any:
    """Return one part of a CLIP, of a class of transformers."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("CLIP needs transformers: pip install -e '.[text]'") from None
    folder = MODEL if weights is None else Path(weights).expanduser()
    known = {} if kind == "CLIPTokenizer" else {"use_safetensors": True, "dtype": torch.float32}
    try:
        if weights is not None and not Path(folder).is_dir():
            raise OSError("no such folder")
        found: Any = getattr(transformers, kind).from_pretrained(folder, **known)
    except Exception as error:  # transformers and the hub's client raise errors of many types
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"weights={folder}: no CLIP with {kind} could be read ({reason}); expected a folder as "
            f"transformers keeps it, such as a copy of {MODEL}, named by weights=FOLDER"
        ) from None
    return found.requires_grad_(False).eval() if isinstance(found, nn.Module) else found
