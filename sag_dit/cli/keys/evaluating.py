"""What ``evaluate.py`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from sag_dit.cli.keys.drawing import Guides
from sag_dit.cli.keys.key import Closed, Key, Open


@dataclass(kw_only=True)
class EvaluateGallery(Closed):
    """Samples on the page."""

    num: Annotated[int, Key("samples of each setting on the page", least=0, determines="nothing")]


@dataclass(kw_only=True)
class Confidence(Closed):
    """How ± is told."""

    repeats: Annotated[
        int,
        Key(
            "subsets of the images, for what stands behind ±; 0: none",
            least=0,
            refused=(1,),
            expected="0, or 2 or more",
        ),
    ]


class Features:
    """The network that looks at images."""

    weights: Annotated[Any, Key("its file", text=True)]


@dataclass(kw_only=True)
class Evaluate(Guides):
    """Measure images on disk, or of a model while it draws: FID and its companions."""

    examples: ClassVar[tuple[str, ...]] = (
        "python evaluate.py ckpt=digits",
        "python evaluate.py -m ckpt=digits sag_scale=0,0.25,0.5 seeds=3",
    )
    habits: ClassVar[Mapping[str, str]] = {
        "resume": "repeat the command: what is measured is not measured again"
    }
    samples: Annotated[
        str | list[str] | None, Key("images on disk: a folder, an npz, or [several]", text=True)
    ]
    num_images: Annotated[
        int | None,
        Key("null: 300 where drawn, all on disk", least=1, words=("n", "num_samples", "count")),
    ]
    seeds: Annotated[int, Key("draw each setting with so many seeds: mean and spread", least=1)]
    reference: Annotated[str | None, Key("npz or folder; null: the model's own", text=True)]
    metrics: Annotated[Any, Key("list of fid, sfid, is, precision, recall; null: all there are")]
    against: Annotated[
        str | None, Key("row that others are set against; null: the first", text=True)
    ]
    confidence: Annotated[Confidence, Key("how ± is told")]
    keep: Annotated[bool, Key("keep drawn images, in sample.py's folder", determines="nothing")]
    out: Annotated[
        str | None,
        Key(
            "folder of results; null: outputs/evaluate/NAME-HASH",
            text=True,
            folder=True,
            words=("output", "outdir", "output_dir"),
            determines="nothing",
        ),
    ]
    finished: Annotated[
        str, Key("where measured settings are kept", text=True, determines="nothing")
    ]
    plots: Annotated[bool, Key("curves as PNG for a sweep", determines="nothing")]
    gallery: Annotated[EvaluateGallery, Key("the page", determines="nothing")]
    expected: Annotated[Open | None, Key("published numbers; see configs/experiment/paper")]
    features: Annotated[Open | None, Key("the network that looks at images", keys=Features)]
    compare: Annotated[Open | None, Key("settings that are drawn where all guidance is off")]
