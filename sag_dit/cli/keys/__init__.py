"""What each command takes: the type of every key, its bounds, its meaning, what it determines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar, Literal

from sag_dit.cli.keys.key import Closed, Open, Parts, key
from sag_dit.methods import methods

OUT = {"text": True, "folder": True, "determines": "nothing"}
OUT_WORDS = "output outdir output_dir"
SEED: Mapping[str, Any] = {"least": 0, "most": 2**64 - 1}
SIZE: Mapping[str, Any] = {"least": 1, "most": 65_536}
METRICS: Mapping[str, Any] = {
    "blank": True,
    "expected": "a list, such as metrics=[fid], or null for all that the features allow",
}
CKPT: Mapping[str, Any] = {
    "told": "published name, run folder, file or diffusers folder",
    "text": True,
    "expected": "a model to load, such as ckpt=digits",
    "words": "checkpoint model_path weights model",
    "determines": "model",
}
Classes = int | str | list[int | str] | None


@dataclass
class AutoKeys:
    """Autoguidance, for its free text."""

    ckpt: str | None = key("the second model", text=True)


@dataclass
class ClassifierKeys:
    """Classifier guidance, for its free text."""

    classifier: str | Open | None = key("the classifier", text=True)


@dataclass
class GuidanceKeys:
    """The terms by name."""

    auto: Open | None = key("autoguidance", keys=AutoKeys)
    classifier: Open | None = key("classifier guidance", keys=ClassifierKeys)


@dataclass
class TrainerKeys:
    """Lightning's Trainer."""

    devices: int | str | list[int] = key("how many, or which", least=-1, most=1024)
    num_nodes: int = key("machines", least=1, most=65_536)


@dataclass(kw_only=True)
class Text(Closed):
    """For text models alone."""

    negative: str | None = key(
        "the null condition's prompt; empty: the model's own", text=True, blank=True
    )
    size: list[int] | None = key(
        "[height, width] in pixels; null: the model's",
        least=1,
        most=65_536,
        length=2,
        expected="[height, width] in pixels, or null",
    )
    guidance: float | None = key("told to models distilled from guidance; null: 3.5")


@dataclass(kw_only=True)
class Attention(Closed):
    """Which attention to keep and show."""

    layers: list[str | int] = key(
        "names of self-attention layers, [auto] or [all]", expected="a list of layers, or [all]"
    )
    show: int | list[int] = key(
        "steps, evenly spread, or a list of their numbers",
        least=0,
        expected="how many steps, or a list of their numbers",
    )
    query: list[float] | None = key(
        "place [down, across] in [0, 1) of a token; null: none",
        length=2,
        expected="[down, across], or null",
    )
    threshold: float | None = key("what saliency exceeds in the mask; null: as sag's")


@dataclass(kw_only=True)
class LoadsModel(Closed):
    """Keys of the commands that load a model."""

    ckpt: str = key(**CKPT)
    ema: bool = key(
        "false: the raw weights, where a file holds both", determines="model", published=True
    )
    vae: str | None = key(
        "autoencoder, a folder or hub name; null: the model's own",
        text=True,
        determines="model",
        published=True,
    )
    num_heads: int | None = key(
        "heads of attention, where a checkpoint does not tell",
        least=1,
        determines="model",
        absent=True,
        added=True,
    )


@dataclass(kw_only=True)
class Draws(LoadsModel):
    """Keys of the commands that draw."""

    prompt: str | None = key(
        "what a text model draws", text=True, blank=True, determines="model", published=True
    )
    classes: Classes = key(
        "numbers or names; null: all in turn, or the first",
        exact=True,
        expected="numbers or names of classes, at least one, such as [3,7], or null",
        words="labels class_labels",
        names=True,
        determines="model",
        published=True,
    )
    text: Text = key("for text models", determines="model", published=True)
    steps: int = key(
        "denoiser steps", least=1, words="num_inference_steps num_steps", published=True
    )
    seed: int = key("of the noise", **SEED, words="manual_seed")
    sampler: Open = key("how steps are taken", words="scheduler")


def _strength(name: str, neutral: float, **known: Any) -> Any:
    return key(f"strength of {name}; {neutral:g} is off", **known)


Scales = make_dataclass(
    "Scales",
    [
        (
            f"{method.key}_scale",
            float,
            _strength(
                method.name,
                method.neutral,
                words="cfg guidance_scale scale" if method.key == "cfg" else "",
            ),
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

    requests: str | None = key(
        "file of 'seed,class' or 'seed,prompt' lines, in place of num_images, classes, seed",
        text=True,
        determines="model",
        published=True,
    )
    batch_size: int | None = key(
        "images computed at once; null: the model's", least=1, most=65_536, words="bs"
    )
    max_rows: int | None = key("most rows of the network at once; null: no bound", least=1)
    guidance: Parts = key("the methods' own keys", keys=GuidanceKeys)
    trainer: Open = key(
        "devices and precision, as Lightning's Trainer takes them", keys=TrainerKeys
    )
    logger: Open | None = key("where the page goes as well", determines="nothing")
    experiment: None = key("settings of a paper", absent=True)


@dataclass(kw_only=True)
class SampleGallery(Closed):
    """The page of images."""

    num: int = key("images shown beside their twins; 0: no page", least=0)


@dataclass(kw_only=True)
class Sample(Guides):
    """Draw a set of images, on one device or many, and show them beside their unguided twins."""

    examples: ClassVar[tuple[str, ...]] = (
        "python sample.py ckpt=DiT-XL-2 sag_scale=1.0",
        "python sample.py ckpt=digits classes=[3,7] num_images=8 cfg_scale=1.5",
    )
    habits: ClassVar[Mapping[str, str]] = {"resume": "repeat the command: what is missing is drawn"}
    reference: Any = key("what an experiment of a paper is measured with", absent=True)
    expected: Any = key("what an experiment of a paper published", absent=True)
    num_images: int = key("how many", least=1, words="n num_samples count")
    out: str | None = key("folder; null: outputs/sample/NAME-HASH", **OUT, words=OUT_WORDS)
    verify: bool = key(
        "true: read finished images, and draw those again that have changed", determines="nothing"
    )
    npz: bool = key("also write samples.npz for the ADM evaluator", determines="nothing")
    gallery: SampleGallery = key("the page", determines="nothing")
    maps: bool = key("true: keep the attention of the gallery's images", determines="nothing")
    attention: Attention = key("what maps=true keeps", determines="nothing")


@dataclass(kw_only=True)
class EvaluateGallery(Closed):
    """Samples on the page."""

    num: int = key("samples of each setting on the page", least=0)


@dataclass(kw_only=True)
class ConfidenceKeys(Closed):
    """How ± is told."""

    repeats: int = key(
        "subsets of the images, for what stands behind ±; 0: none",
        least=0,
        most=10_000,
        refused=(1,),
        expected="0, or 2 or more, at most 10,000",
    )


@dataclass
class FeatureKeys:
    """The network that looks at images."""

    weights: str | None = key("its file", text=True)


@dataclass(kw_only=True)
class Published(Closed):
    """Numbers that somebody has published."""

    source: str = key("the publication and its table")
    metrics: Open = key("the numbers by metric")
    protocol: Open | None = key("how they were measured", absent=True)
    experiment: str | None = key("whose settings are the published ones", absent=True)


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
    ckpt: str | None = key(**CKPT)  # type: ignore[assignment]
    samples: str | list[str] | None = key(
        "images on disk: a folder, an npz, or [several]",
        text=True,
        expected="at least one folder or npz",
    )
    num_images: int | None = key(
        "null: 300 where drawn, all on disk", least=1, words="n num_samples count"
    )
    seeds: int = key("draw each setting with so many seeds: mean and spread", least=1, most=10_000)
    reference: str | None = key("npz or folder; null: the model's own", text=True)
    background: str = key("colour behind what is transparent in images on disk", text=True)
    metrics: list[str] | None = key(
        "list of fid, sfid, is, precision, recall; null: all there are", **METRICS
    )
    against: str | None = key("row that others are set against; null: the first", text=True)
    confidence: ConfidenceKeys = key("how ± is told")
    keep: bool = key("keep drawn images, in sample.py's folder", determines="nothing")
    out: str | None = key(
        "folder of results; null: outputs/evaluate/NAME-HASH", **OUT, words=OUT_WORDS
    )
    finished: str = key("where measured settings are kept", **OUT)
    plots: bool = key("curves as PNG for a sweep", determines="nothing")
    gallery: EvaluateGallery = key("the page", determines="nothing")
    expected: Published | None = key("published numbers; see configs/experiment/paper")
    features: Open | None = key("the network that looks at images", keys=FeatureKeys)
    compare: dict[str, Open] | None = key("settings that are drawn where all guidance is off")


@dataclass(kw_only=True)
class NoiseProcess(Closed):
    """How an image becomes noise: by schedule and num_timesteps, or straight, as a flow."""

    schedule: Literal["linear", "cosine"] | None = key("of a diffusion", absent=True)
    num_timesteps: int | None = key("noise levels", least=1, most=100_000, absent=True)
    time_scale: float | None = key("of a flow: the time of pure noise", absent=True)
    shift: float | None = key("of a flow's grid, towards noise above 1", absent=True)
    start: float | None = key("where a flow's grid begins", least=0, most=1, absent=True)


def networks() -> list[str]:
    """Return the network of every family."""
    from sag_dit.models import families

    found = (each.network() for each in families().values())
    return [f"{each.__module__}.{each.__qualname__}" for each in found]


@dataclass
class NetworkKeys:
    """Arguments of a network; null is what another one takes."""

    family: str | None = key("null: DiT or UNet", later=None)
    hidden_size: int | None = key("width of a token", **SIZE)
    depth: int | None = key("blocks", least=1, most=1000)
    num_heads: int | None = key("heads of attention", **SIZE)
    patch_size: int | None = key("pixels of a token", **SIZE)
    input_size: int | None = key("null: by resolution", **SIZE)
    in_channels: int | None = key("null: the data's", **SIZE)
    mlp_ratio: float | None = key("width of the MLP", least=0, most=1000)
    class_dropout_prob: float | None = key("share of labels made null", least=0, most=1)
    learn_sigma: bool | None = key("the variance is learned as well")
    model_channels: int | None = key("of a UNet: its first width", **SIZE)
    num_res_blocks: int | None = key("of a UNet, at each size", least=1, most=1000)


@dataclass
class DataKeys:
    """Arguments of the data module."""

    root: str = key("folder", text=True)
    background: str | None = key(
        "colour behind what is transparent; null: as runs before there was this key",
        text=True,
        later=None,
        unnamed=True,
    )
    batch_size: int = key("images per step", least=1, most=2**20, words="bs")
    workers: int | None = key("processes that read", least=0, most=1024, determines="nothing")


@dataclass
class OptimizerKeys:
    """Arguments of the optimiser."""

    lr: float = key("learning rate", least=0, words="learning_rate")
    betas: list[float] = key("decays of the averages of gradients", least=0, below=1, length=2)
    fused: bool | None = key("true: one kernel for all parameters; null: where there is one")
    weight_decay: float = key("decay of weights", least=0, words="wd")


@dataclass(kw_only=True)
class Average(Closed):
    """The average of weights that is sampled with."""

    decay: float | None = key("of the average; null: no average", least=0, below=1)
    warmup: bool = key(
        "decay grows from 0.1; false: as published", later=False, unnamed=True, absent=True
    )


@dataclass
class TrainTrainerKeys(TrainerKeys):
    """Lightning's Trainer, while training."""

    accumulate_grad_batches: int = key("batches in a step", least=1)
    gradient_clip_val: float | None = key("greatest norm; null: any", least=0)
    enable_progress_bar: bool = key("a bar", determines="nothing")


@dataclass(kw_only=True)
class Every(Closed):
    """Steps between what is done now and then."""

    checkpoint: int = key("steps between checkpoints", least=1)
    validation: int = key("steps between validations", least=1)
    preview: int = key("steps between previews", least=1)
    log: int = key("steps between numbers logged", least=1)


@dataclass(kw_only=True)
class Preview(Closed):
    """Images that are drawn while training."""

    classes: Classes = key(
        "numbers or names; null: the first eight", names=True, exact=True, blank=True
    )
    steps: int = key("denoiser steps", least=1)
    guidance: Parts = key("terms")


@dataclass(kw_only=True)
class Adapters(Closed):
    """Low-rank adapters."""

    rank: int | None = key("of the adapters; null: none", least=1, most=16_384)
    alpha: float | None = key("scale times the rank; null: the rank")
    dropout: float | None = key("share of inputs left out", least=0, below=1, absent=True)
    targets: list[str] | None = key("patterns of layers", names=True, absent=True)


@dataclass(kw_only=True)
class Recommended(Closed):
    """What the trained model is sampled with unless told otherwise."""

    batch_size: int | None = key("images computed at once", least=1, most=65_536, absent=True)


@dataclass(kw_only=True)
class Track(Closed):
    """What is measured of images drawn during training."""

    every_n_steps: int = key("steps between measurements", least=1, expected="1 or more")
    num_images: int = key("how many are drawn", least=2, expected="2 or more")
    steps: int = key("denoiser steps", least=1)
    seed: int = key("of the noise", **SEED)
    metrics: list[str] | None = key("some of fid, sfid, is, precision, recall", **METRICS)
    features: str | Open | None = key("auto, or a network that looks at images")
    reference: str | None = key("npz or folder; null: the model's own", text=True)
    best: bool = key("keep the checkpoint of the lowest FID as well")


@dataclass(kw_only=True)
class Train(Closed):
    """Train a denoiser and leave a run folder that sample.py reads; a run goes on if repeated."""

    examples: ClassVar[tuple[str, ...]] = (
        "python train.py experiment=digits",
        "python train.py experiment=finetune ckpt=DiT-XL-2 data.root=photos/",
    )
    habits: ClassVar[Mapping[str, str]] = {
        "resume": "repeat the same command: the run goes on where it stopped"
    }

    def unset(self, missing: Sequence[str]) -> str:
        """Return what to tell where it is not said what to train."""
        if not {"name", "max_steps"} & set(missing):
            return super().unset(missing)
        fresh = "experiment=digits or experiment=folder data.root=photos/"
        return (
            f"name and max_steps are not set: choose what to train, such as "
            f"{fresh if self.ckpt is None else f'experiment=finetune ckpt={self.ckpt}'}"
        )

    name: str | int | float = key("short name, part of the run's folder", names=True)
    out: str | None = key("run's folder; null: outputs/train/NAME-HASH", **OUT, words=OUT_WORDS)
    seed: int = key("of weights, noise and order", **SEED)
    max_steps: int = key(
        "optimiser steps",
        least=1,
        words="epochs max_epochs steps max_train_steps",
        determines="nothing",
    )
    ckpt: str | None = key(
        "what to fine-tune, with experiment=finetune; null: fresh weights",
        text=True,
        words="checkpoint model_path pretrained",
    )
    vae: str | None = key("autoencoder; null: the checkpoint's, or pixels", text=True)
    num_heads: int | None = key(
        "heads of attention, where ckpt does not tell; of a fresh model model.num_heads",
        least=1,
        absent=True,
        added=True,
    )
    resolution: int | None = key("pixels along each side", **SIZE, words="image_size")
    patch_size: int | None = key("pixels of a token's side", **SIZE, by_checkpoint=True)
    num_classes: int | None = key("null: the data's", least=1, most=10**6, by_checkpoint=True)
    kind: Literal["eps", "v", "x_0"] | None = key(
        "what the network puts out", words="prediction_type", by_checkpoint=True
    )
    changed_data: bool = key(
        "go on although the data has changed since the run began", determines="nothing"
    )
    max_skipped: int = key(
        "stop after so many steps without finite gradients", least=1, determines="nothing"
    )
    compile: bool = key("compile every block by itself", determines="nothing")
    checkpoint_blocks: bool = key("recompute blocks backwards: less memory", determines="nothing")
    matmul: Literal["highest", "high", "medium"] = key("float32 products")
    freeze: list[str] | None = key(
        "patterns of what is not trained", names=True, blank=True, absent=True
    )
    sampling: Recommended = key("recommended settings, written into the result")
    model: Open | None = key("the network", keys=NetworkKeys, asks=networks, by_checkpoint=True)
    process: NoiseProcess | None = key("noise levels", by_checkpoint=True)
    data: Open = key("images", keys=DataKeys)
    objective: Open | None = key("the loss")
    optimizer: Open = key("the optimiser", keys=OptimizerKeys)
    schedule: Open | None = key("of the learning rate")
    ema: Average = key("the average")
    lora: Adapters | None = key("adapters", absent=True)
    trainer: Open = key("Lightning's Trainer", keys=TrainTrainerKeys)
    every_n_steps: Every = key("how often", determines="nothing")
    preview: Preview = key("previews", determines="nothing")
    logger: Open | None = key("where numbers go", determines="nothing")
    track: Track | None = key("metrics while training", determines="nothing")


@dataclass(kw_only=True)
class EncodeData(Closed):
    """The images to encode."""

    root: str = key("class folders, or a flat folder of images", text=True)
    size: int = key("pixels along each side of the crop", **SIZE, words="resolution image_size")
    upright: bool = key("turn photos as noted; false: as ADM's loader")
    background: str | None = key(
        "colour behind what is transparent; null: as before there was this key", text=True
    )
    strict: bool = key("an image that cannot be read is an error", determines="nothing")


@dataclass(kw_only=True)
class Encode(Closed):
    """Encode a folder of images to latents once, on one device or many."""

    examples: ClassVar[tuple[str, ...]] = (
        "python encode.py data.root=photos/ out=latents/",
        "python encode.py data.root=photos/ data.size=512 vae=mse",
    )
    data: EncodeData = key("the images")
    vae: str | None = key("autoencoder, a folder or hub name", text=True)
    out: str | None = key("folder; null: outputs/latents/NAME-HASH", **OUT)
    flip: bool = key("encode mirror images as well")
    dtype: Literal["float16", "float32"] = key("of what is stored")
    rows: int = key("images per shard", least=1, most=2**20)
    slice_size: int = key("images encoded at once", least=1, most=65_536, words="batch_size")
    workers: int | None = key(
        "processes that read, per device; null: what suits",
        least=0,
        most=1024,
        determines="nothing",
    )
    trainer: Open = key(
        "devices", keys=TrainerKeys, asks=lambda: ["lightning.fabric.Fabric"], determines="nothing"
    )


@dataclass(kw_only=True)
class Export(LoadsModel):
    """Write a model in the layout of another program, or our own, with its card."""

    examples: ClassVar[tuple[str, ...]] = (
        "python export.py ckpt=outputs/train/RUN out=my_model",
        "python export.py ckpt=outputs/train/RUN format=diffusers out=my_model",
    )
    format: Literal["safetensors", "dit", "diffusers"] = key(
        "our own, facebookresearch/DiT's file, or DiTPipeline's folder", words="layout"
    )
    out: str | None = key("folder, new or empty; null: outputs/export/NAME-FORMAT", **OUT)


@dataclass(kw_only=True)
class AttentionSheet(Draws):
    """Draw the saliency of every layer over the steps on one sheet, to choose SAG's layer by."""

    examples: ClassVar[tuple[str, ...]] = (
        "python attention.py ckpt=DiT-XL-2 classes=[207]",
        "python attention.py ckpt=digits attention.show=3",
    )
    attention: Attention = key("what is shown")
    device: str = key(
        "where to compute",
        pattern=r"(auto|cpu|cuda|mps|xpu)(:\d+)?",
        expected="auto, cpu, cuda, cuda:1 or mps",
    )
    out: str | None = key("folder; null: outputs/attention/NAME", **OUT)


COMMANDS: Mapping[str, type[Closed]] = {
    "sample": Sample,
    "evaluate": Evaluate,
    "train": Train,
    "encode": Encode,
    "export": Export,
    "attention": AttentionSheet,
}
"""The schema of each command."""
