"""What the commands that draw have in common, and ``sample.py`` has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, ClassVar

from sag_dit.cli.keys.key import Closed, Key, Open
from sag_dit.methods import methods


class AutoTerm:
    """Autoguidance, for its free text."""

    ckpt: Annotated[Any, Key("the second model", text=True)]


class ClassifierTerm:
    """Classifier guidance, for its free text."""

    classifier: Annotated[Any, Key("the classifier", text=True)]


class Guidance:
    """The terms by name."""

    auto: Annotated[Open | None, Key("autoguidance", keys=AutoTerm)]
    classifier: Annotated[Open | None, Key("classifier guidance", keys=ClassifierTerm)]


class Trainer:
    """Lightning's Trainer."""

    devices: Annotated[int | str | list[int], Key("how many, or which", least=-1, most=1024)]
    num_nodes: Annotated[int, Key("machines", least=1, most=65_536)]


@dataclass(kw_only=True)
class Text(Closed):
    """For text models alone."""

    negative: Annotated[
        str | None, Key("the null condition's prompt; empty: the model's own", text=True)
    ]
    size: Annotated[
        list[int] | None,
        Key(
            "[height, width] in pixels; null: the model's",
            least=1,
            length=2,
            expected="[height, width] in pixels, or null",
        ),
    ]
    guidance: Annotated[float | None, Key("told to models distilled from guidance; null: 3.5")]


@dataclass(kw_only=True)
class Attention(Closed):
    """Which attention to keep and show."""

    layers: Annotated[
        list[str | int],
        Key(
            "names of self-attention layers, [auto] or [all]", expected="a list of layers, or [all]"
        ),
    ]
    show: Annotated[
        int | list[int],
        Key(
            "steps, evenly spread, or a list of their numbers",
            least=0,
            expected="how many steps, or a list of their numbers",
        ),
    ]
    query: Annotated[
        list[float] | None,
        Key(
            "place [down, across] in [0, 1) of a token; null: none",
            length=2,
            expected="[down, across], or null",
        ),
    ]
    threshold: Annotated[float | None, Key("what saliency exceeds in the mask; null: as sag's")]


@dataclass(kw_only=True)
class LoadsModel(Closed):
    """Keys of the commands that load a model."""

    ckpt: Annotated[
        str | None,
        Key(
            "published name, run folder, file or diffusers folder",
            text=True,
            words=("checkpoint", "model_path", "weights", "model"),
            determines="model",
        ),
    ]
    ema: Annotated[
        bool,
        Key("false: the raw weights, where a file holds both", determines="model", published=True),
    ]
    vae: Annotated[
        str | None,
        Key(
            "autoencoder, a folder or hub name; null: the model's own",
            text=True,
            determines="model",
            published=True,
        ),
    ]
    num_heads: Annotated[
        int | None,
        Key(
            "heads of attention, where a checkpoint does not tell",
            least=1,
            determines="model",
            absent=True,
            added=True,
        ),
    ]


@dataclass(kw_only=True)
class Draws(LoadsModel):
    """Keys of the commands that draw."""

    prompt: Annotated[
        str | None,
        Key("what a text model draws", text=True, determines="model", published=True),
    ]
    classes: Annotated[
        int | str | list[int | str] | None,
        Key(
            "numbers or names; null: all in turn, or the first",
            exact=True,
            expected="numbers or names of classes, such as [3,7], or null",
            words=("labels", "class_labels"),
            names=True,
            determines="model",
            published=True,
        ),
    ]
    text: Annotated[Text, Key("for text models", determines="model", published=True)]
    steps: Annotated[
        int,
        Key(
            "denoiser steps",
            least=1,
            words=("num_inference_steps", "num_steps"),
            published=True,
        ),
    ]
    seed: Annotated[int, Key("of the noise", least=0, most=2**64 - 1, words=("manual_seed",))]
    sampler: Annotated[Open, Key("how steps are taken", words=("scheduler",))]


Scales = make_dataclass(
    "Scales",
    [
        (
            f"{method.key}_scale",
            Annotated[
                float,
                Key(
                    f"strength of {method.name}; {method.neutral:g} is off",
                    words=("cfg", "guidance_scale", "scale") if method.key == "cfg" else (),
                ),
            ],
        )
        for method in methods()
    ],
    bases=(Closed,),
    kw_only=True,
)
"""The strength of every guidance method that there is."""


@dataclass(kw_only=True)
class Guides(Scales, Draws):  # type: ignore[misc, valid-type]
    """Keys of the commands that draw with guidance."""

    requests: Annotated[
        str | None,
        Key(
            "file of 'seed,class' or 'seed,prompt' lines, in place of num_images, classes, seed",
            text=True,
            determines="model",
            published=True,
        ),
    ]
    batch_size: Annotated[
        int | None,
        Key("images computed at once; null: the model's", least=1, most=65_536, words=("bs",)),
    ]
    max_rows: Annotated[
        int | None, Key("most rows of the network at once; null: no bound", least=1)
    ]
    guidance: Annotated[Open, Key("the methods' own keys", keys=Guidance)]
    trainer: Annotated[
        Open, Key("devices and precision, as Lightning's Trainer takes them", keys=Trainer)
    ]
    logger: Annotated[Open | None, Key("where the page goes as well", determines="nothing")]
    experiment: Annotated[None, Key("settings of a paper", absent=True)]


@dataclass(kw_only=True)
class SampleGallery(Closed):
    """The page of images."""

    num: Annotated[
        int, Key("images shown beside their twins; 0: no page", least=0, determines="nothing")
    ]


@dataclass(kw_only=True)
class Sample(Guides):
    """Draw a set of images, on one device or many, and show them beside their unguided twins."""

    examples: ClassVar[tuple[str, ...]] = (
        "python sample.py ckpt=DiT-XL-2 sag_scale=1.0",
        "python sample.py ckpt=digits classes=[3,7] num_images=8 cfg_scale=1.5",
    )
    habits: ClassVar[Mapping[str, str]] = {"resume": "repeat the command: what is missing is drawn"}
    reference: Annotated[Any, Key("what an experiment of a paper is measured with", absent=True)]
    expected: Annotated[Any, Key("what an experiment of a paper published", absent=True)]
    num_images: Annotated[int, Key("how many", least=1, words=("n", "num_samples", "count"))]
    out: Annotated[
        str | None,
        Key(
            "folder; null: outputs/sample/NAME-HASH",
            text=True,
            folder=True,
            words=("output", "outdir", "output_dir"),
            determines="nothing",
        ),
    ]
    npz: Annotated[bool, Key("also write samples.npz for the ADM evaluator", determines="nothing")]
    gallery: Annotated[SampleGallery, Key("the page", determines="nothing")]
    maps: Annotated[
        bool, Key("true: keep the attention of the gallery's images", determines="nothing")
    ]
    attention: Annotated[Attention, Key("what maps=true keeps", determines="nothing")]
