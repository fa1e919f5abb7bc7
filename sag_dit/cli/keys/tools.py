"""What ``encode.py``, ``export.py`` and ``attention.py`` take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from sag_dit.cli.keys.drawing import Attention, Draws, LoadsModel, Trainer
from sag_dit.cli.keys.key import Closed, Key, Open


@dataclass(kw_only=True)
class EncodeData(Closed):
    """The images to encode."""

    root: Annotated[str, Key("class folders, or a flat folder of images", text=True)]
    size: Annotated[
        int, Key("pixels along each side of the crop", least=1, words=("resolution", "image_size"))
    ]
    upright: Annotated[bool, Key("turn photos as noted; false: as ADM's loader")]
    strict: Annotated[bool, Key("an image that cannot be read is an error", determines="nothing")]


@dataclass(kw_only=True)
class Encode(Closed):
    """Encode a folder of images to latents once, on one device or many."""

    examples: ClassVar[tuple[str, ...]] = (
        "python encode.py data.root=photos/ out=latents/",
        "python encode.py data.root=photos/ data.size=512 vae=mse",
    )
    data: Annotated[EncodeData, Key("the images")]
    vae: Annotated[str | None, Key("autoencoder, a folder or hub name", text=True)]
    out: Annotated[
        str | None,
        Key(
            "folder; null: outputs/latents/NAME-HASH", text=True, folder=True, determines="nothing"
        ),
    ]
    flip: Annotated[bool, Key("encode mirror images as well")]
    dtype: Annotated[Literal["float16", "float32"], Key("of what is stored")]
    rows: Annotated[int, Key("images per shard", least=1)]
    slice_size: Annotated[
        int, Key("images encoded at once", least=1, most=65_536, words=("batch_size",))
    ]
    workers: Annotated[
        int | None,
        Key(
            "processes that read, per device; null: what suits",
            least=0,
            most=1024,
            determines="nothing",
        ),
    ]
    trainer: Annotated[
        Open,
        Key(
            "devices", keys=Trainer, asks=lambda: ["lightning.fabric.Fabric"], determines="nothing"
        ),
    ]


@dataclass(kw_only=True)
class Export(LoadsModel):
    """Write a model in the layout of another program, or our own, with its card."""

    examples: ClassVar[tuple[str, ...]] = (
        "python export.py ckpt=outputs/train/RUN out=my_model",
        "python export.py ckpt=outputs/train/RUN format=diffusers out=my_model",
    )
    format: Annotated[
        Literal["safetensors", "dit", "diffusers"],
        Key("our own, facebookresearch/DiT's file, or DiTPipeline's folder", words=("layout",)),
    ]
    out: Annotated[
        str | None,
        Key("folder, new or empty; null: outputs/export/NAME-FORMAT", text=True, folder=True),
    ]


@dataclass(kw_only=True)
class AttentionSheet(Draws):
    """Draw the saliency of every layer over the steps on one sheet, to choose SAG's layer by."""

    examples: ClassVar[tuple[str, ...]] = (
        "python attention.py ckpt=DiT-XL-2 classes=[207]",
        "python attention.py ckpt=digits attention.show=3",
    )
    attention: Annotated[Attention, Key("what is shown")]
    device: Annotated[
        str,
        Key(
            "where to compute",
            pattern=r"(auto|cpu|cuda|mps|xpu)(:\d+)?",
            expected="auto, cpu, cuda, cuda:1 or mps",
        ),
    ]
    out: Annotated[str | None, Key("folder; null: outputs/attention/NAME", text=True, folder=True)]
