"""What each command takes: the type of every key, its bounds, its meaning, what it determines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar, Literal

from sag_dit.cli.keys.key import HELD_OUT, Closed, Open, Parts, key
from sag_dit.evaluation.kinds import metric_names
from sag_dit.methods import methods

BUDGET = r"(\d[\d_]*\.?\d*(?:e\d+)?) ?(s|sec|min|h|passes)"
"""How a budget is written: a number and its unit."""
OUT = {"text": True, "folder": True, "determines": "nothing"}
OUT_WORDS = "output outdir output_dir"
SEED: Mapping[str, Any] = {"least": 0, "most": 2**64 - 1}
SIZE: Mapping[str, Any] = {"least": 1, "most": 65_536}
BUCKETS: Mapping[str, Any] = {
    **SIZE,
    "expected": "sizes such as [[256,256],[192,320]], or the step of a rule, such as 64, or null",
    "words": "enable_bucket bucket_reso_steps aspect_ratio_buckets",
}
NAMED = f"{', '.join(metric_names())}, or module.NAME"
METRICS: Mapping[str, Any] = {
    "told": f"list of {NAMED}; null: the usual ones",
    "blank": True,
    "expected": "a list, such as metrics=[fid], or null for the usual ones",
}
CKPT: Mapping[str, Any] = {
    "told": "published name, run folder, file or diffusers folder",
    "text": True,
    "expected": "a model to load, such as ckpt=digits",
    "words": "checkpoint model_path weights model",
    "determines": "model",
}
DEVICE: Mapping[str, Any] = {
    "told": "device to compute on",
    "pattern": r"(auto|cpu|cuda|mps|xpu)(:\d+)?",
    "expected": "auto, cpu, cuda, cuda:1 or mps",
}
IMPORTS: Mapping[str, Any] = {
    "told": "modules of your own that hold the classes a checkpoint names, such as [my_net]",
    "expected": "a module or a list of modules, such as imports=[my_net]",
    "determines": "nothing",
    "absent": True,
    "added": True,
}
Classes = int | str | list[int | str] | None


@dataclass
class AutoKeys:
    """Keys of autoguidance that hold free text."""

    ckpt: str | None = key("worse model to guide away from: a name, folder or file", text=True)


@dataclass
class ClassifierKeys:
    """Keys of classifier guidance that hold free text."""

    classifier: str | Open | None = key("classifier that guides: a name or a file", text=True)


@dataclass
class GuidanceKeys:
    """Methods that have such keys, by their own keys."""

    auto: Open | None = key("autoguidance", keys=AutoKeys)
    classifier: Open | None = key("classifier guidance", keys=ClassifierKeys)


@dataclass
class SearchKeys:
    """Keys of a search that hold free text."""

    verifier: str | Open | None = key(
        "what scores images: classifier, or a function or module MODULE.NAME of your own",
        expected="classifier, or the name of a function or module, such as MODULE.NAME",
    )


@dataclass
class TrainerKeys:
    """Lightning's Trainer."""

    devices: int | str | list[int] = key(
        "number of devices, a list of their numbers, or auto", least=-1, most=1024
    )
    num_nodes: int = key("number of machines", least=1, most=65_536)


@dataclass(kw_only=True)
class Text(Closed):
    """Keys of text models."""

    negative: str | None = key(
        "prompt of the null condition; empty: the model's own", text=True, blank=True
    )
    size: list[int] | None = key(
        "[height, width] in pixels, of a DiT of classes too; null: the model's",
        least=1,
        most=65_536,
        length=2,
        expected="[height, width] in pixels, or null",
    )
    guidance: float | None = key(
        "input of models distilled from guidance, such as FLUX dev; null: 3.5"
    )


@dataclass(kw_only=True)
class Attention(Closed):
    """Which attention to keep and show."""

    layers: list[str | int] = key(
        "names of self-attention layers; [auto]: that of SAG, else the middle; or [all]",
        expected="a list of layers, or [all]",
    )
    show: int | list[int] = key(
        "number of steps, evenly spread, or a list of steps",
        least=0,
        expected="how many steps, or a list of their numbers",
    )
    query: list[float] | None = key(
        "place of one token: [down, across], from 0 to less than 1; null: none",
        length=2,
        expected="[down, across], or null",
    )
    threshold: float | None = key(
        "saliency above it counts as masked; null: as guidance.sag has it"
    )


@dataclass(kw_only=True)
class LoadsModel(Closed):
    """Keys of the commands that load a model."""

    ckpt: str = key(**CKPT)
    ema: bool | float = key(
        "true: averaged weights; false: raw ones, if there are both; or another average of a run: "
        "a decay of it, or any sigma_rel below 0.2887",
        least=0,
        below=1,
        refused=(0,),
        expected="true, false, a decay such as 0.9999, or a sigma_rel such as 0.05",
        determines="model",
        published=True,
    )
    vae: str | Open | None = key(
        "autoencoder: a folder, file or hub name, or a class by vae._target_; null: that of ckpt",
        text=True,
        determines="model",
        published=True,
    )
    num_heads: int | None = key(
        "attention heads, if the checkpoint does not say",
        least=1,
        determines="model",
        absent=True,
        added=True,
    )
    imports: str | list[str] | None = key(**IMPORTS)


@dataclass(kw_only=True)
class Draws(LoadsModel):
    """Keys of the commands that draw."""

    prompt: str | None = key(
        "prompt, for a text model", text=True, blank=True, determines="model", published=True
    )
    classes: Classes = key(
        "class numbers or names; null: all in turn (attention.py: the first)",
        exact=True,
        expected="numbers or names of classes, at least one, such as [3,7], or null",
        words="labels class_labels",
        names=True,
        determines="model",
        published=True,
    )
    text: Text = key("for text models", determines="model", published=True)
    steps: int = key(
        "number of denoising steps", least=1, words="num_inference_steps num_steps", published=True
    )
    seed: int = key("seed of the noise", **SEED, words="manual_seed")
    sampler: Open = key("sampler", words="scheduler")


@dataclass(kw_only=True)
class Decoding(Closed):
    """How the autoencoder turns latents into images; a model of pixels has none."""

    batch_size: int = key("latents decoded at once", least=1, most=65_536)
    precision: Literal["32-true", "bf16-true"] = key("32-true: float32; bf16-true: bfloat16")
    channels_last: bool = key("true: channels last in memory, which tensor cores read faster")


@dataclass(kw_only=True)
class Caching(Closed):
    """What the network's blocks put out, used again at later steps; see docs/guidance.md."""

    every: int = key("run the blocks at every so many steps; 1: at all", least=1, later=1)
    order: int = key(
        "between them: 0 takes their outputs over (FORA), 1 to 4 continue them as a Taylor series "
        "(TaylorSeer)",
        least=0,
        most=4,
        later=0,
    )


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
        "file with a line 'seed,class' or 'seed,prompt' for each image; takes the place of "
        "num_images, classes and seed",
        text=True,
        determines="model",
        published=True,
    )
    batch_size: int | None = key(
        "images computed at once; null: as the model recommends", least=1, most=65_536, words="bs"
    )
    max_rows: int | None = key(
        "most rows that the network computes at once; null: no limit", least=1
    )
    compile: bool = key(
        "true: compile every block of the network", determines="model", published=True
    )
    matmul: Literal["highest", "high", "medium"] = key(
        "precision of float32 matrix products: highest, high (TF32) or medium (bfloat16)",
        published=True,
    )
    decoding: Decoding = key("from latents to images", determines="model", published=True)
    share_prefixes: bool = key(
        "true: rows that differ from a block of the network on share the blocks before it",
        later=False,
    )
    cache: Caching = key("of the blocks' outputs, across steps")
    guidance: Parts = key("settings of each method", keys=GuidanceKeys)
    trainer: Open = key(
        "devices and precision, as Lightning's Trainer takes them", keys=TrainerKeys
    )
    logger: Open | None = key("logger that gets the gallery too", determines="nothing")
    profile: bool | None = key(
        "true: tell at the end where the time went", determines="nothing", absent=True, added=True
    )
    experiment: None = key("published settings of a paper", absent=True)


@dataclass(kw_only=True)
class SampleGallery(Closed):
    """The page of images."""

    num: int = key(
        "images that the gallery shows beside their unguided twins; 0: no gallery", least=0
    )


@dataclass(kw_only=True)
class SampleGrid(Closed):
    """The picture of the gallery's images, ``grid.png``."""

    labels: bool = key("true: with settings, classes and numbers; false: the images alone")


@dataclass(kw_only=True)
class Searches(Guides):
    """Keys of the commands that draw whole sets, in which images may be searched for."""

    search: Open | None = key(
        "draws each image several times and keeps one: none, best_of or fk",
        keys=SearchKeys,
        later=None,
        published=True,
    )


@dataclass(kw_only=True)
class Sample(Searches):
    """Draw a set of images, on one device or many, and show them beside their unguided twins."""

    examples: ClassVar[tuple[str, ...]] = (
        "python sample.py ckpt=DiT-XL-2 sag_scale=1.0",
        "python sample.py ckpt=digits classes=[3,7] num_images=8 cfg_scale=1.5",
    )
    habits: ClassVar[Mapping[str, str]] = {"resume": "repeat the command: what is missing is drawn"}
    reference: Any = key(
        "reference that evaluate.py measures a paper's experiment with", absent=True
    )
    expected: Any = key("published numbers that evaluate.py compares with", absent=True)
    num_images: int = key("number of images", least=1, words="n num_samples count")
    batch_size: int | Literal["auto"] | None = key(  # type: ignore[assignment]
        "images computed at once; null: as the model recommends; auto: as many as fit, found once",
        least=1,
        most=65_536,
        words="bs",
        expected="a whole number, 1 to 65,536, auto or null",
    )
    out: str | None = key(
        "folder of the images; null: outputs/sample/NAME-HASH", **OUT, words=OUT_WORDS
    )
    verify: bool = key(
        "true: compare finished images with their hashes; changed ones are drawn again",
        determines="nothing",
    )
    npz: bool = key("true: also write samples.npz for the ADM evaluator", determines="nothing")
    gallery: SampleGallery = key("the page", determines="nothing")
    grid: SampleGrid = key("its picture, grid.png", determines="nothing")
    maps: bool = key("true: keep the attention of the gallery's images", determines="nothing")
    attention: Attention = key("what maps=true keeps", determines="nothing")


@dataclass(kw_only=True)
class EvaluateGallery(Closed):
    """Samples on the page."""

    num: int = key("images of each setting that the page shows", least=0)


@dataclass(kw_only=True)
class ConfidenceKeys(Closed):
    """How the standard errors behind ± are estimated."""

    repeats: int = key(
        "random halves of the images to estimate ± from; 0: no ±",
        least=0,
        most=10_000,
        refused=(1,),
        expected="0, or 2 or more, at most 10,000",
    )


@dataclass
class FeatureKeys:
    """The network that turns images into features."""

    weights: str | None = key("file of the feature network's weights", text=True)


@dataclass(kw_only=True)
class FDrKeys(Closed):
    """The metric fdr: FD by several networks, each over the FD of a real split."""

    features: list[str] | None = key(
        "feature networks, such as [inception,dinov2]",
        expected="a list of feature networks, such as [inception,dinov2]",
    )
    split: str | None = key(
        "real images that the reference does not hold: npz or folder; null: the other half of "
        "the model's own",
        text=True,
    )


@dataclass(kw_only=True)
class Published(Closed):
    """Numbers that somebody has published."""

    source: str = key("publication and table of the numbers")
    metrics: Open = key("published numbers, by metric")
    protocol: Open | None = key("how they were measured", absent=True)
    experiment: str | None = key("experiment that holds the published settings", absent=True)


@dataclass(kw_only=True)
class Evaluate(Searches):
    """Measure FID and other metrics of images on disk, or of images that a model draws."""

    examples: ClassVar[tuple[str, ...]] = (
        "python evaluate.py ckpt=digits",
        "python evaluate.py -m ckpt=digits sag_scale=0,0.25,0.5 seeds=3",
    )
    habits: ClassVar[Mapping[str, str]] = {
        "resume": "repeat the command: what is measured is not measured again"
    }
    ckpt: str | list[str] | None = key(  # type: ignore[assignment]
        **{**CKPT, "told": "a model, or [several trainings of one]; as elsewhere"}
    )
    samples: str | list[str] | None = key(
        "images on disk: a folder, an npz, or [several]",
        text=True,
        expected="at least one folder or npz",
    )
    num_images: int | None = key(
        "number of images; null: 300 of a model, or all on disk",
        least=1,
        words="n num_samples count",
    )
    seeds: int = key(
        "number of seeds that each setting is drawn with, for mean and spread", least=1, most=10_000
    )
    reference: str | None = key(
        "images to compare with: npz or folder; null: the model's own", text=True
    )
    background: str = key("colour behind transparent parts of images on disk", text=True)
    metrics: list[str] | None = key(**METRICS)
    fdr: FDrKeys = key("what the metric fdr compares", later={"features": None, "split": None})
    verifiers: Parts | None = key(
        "NAME._target_: a function or class that scores (images, condition); NAME is then a metric",
        later=None,
    )
    against: str | None = key("row that the others are compared with; null: the first", text=True)
    matched: int = key(
        "below each setting CFG of the same effect, measured on so many images; 0: none",
        least=0,
        most=1_000_000,
        later=0,
    )
    confidence: ConfidenceKeys = key("how ± is told")
    keep: bool = key(
        "true: keep drawn images, in the folder that sample.py would use", determines="nothing"
    )
    out: str | None = key(
        "folder of results; null: outputs/evaluate/NAME-HASH", **OUT, words=OUT_WORDS
    )
    finished: str = key("folder that keeps the numbers of measured settings", **OUT)
    plots: bool = key("true: write the curves of a sweep as PNG files", determines="nothing")
    gallery: EvaluateGallery = key("the page", determines="nothing")
    expected: Published | None = key("published numbers; see configs/experiment/paper")
    features: Open | None = key("feature network", keys=FeatureKeys)
    compare: dict[str, Open] | None = key("settings to compare if all guidance is off")


@dataclass(kw_only=True)
class NoiseProcess(Closed):
    """How an image becomes noise: a diffusion has the first two keys, a flow the others."""

    schedule: Literal["linear", "cosine"] | None = key(
        "diffusion: how fast noise grows", absent=True
    )
    num_timesteps: int | None = key(
        "diffusion: number of noise levels", least=1, most=100_000, absent=True
    )
    time_scale: float | None = key("flow: the time that means pure noise", absent=True)
    shift: float | None = key("flow: above 1, more of the steps lie near noise", absent=True)
    start: float | None = key(
        "flow: where sampling begins; 1 is pure noise", least=0, most=1, absent=True
    )


def networks() -> list[str]:
    """Return the network of every family.

    Example:
        >>> "sag_dit.models.dit.network.DiT" in networks()
        True
    """
    from sag_dit.models import families

    found = (each.network() for each in families().values())
    return [f"{each.__module__}.{each.__qualname__}" for each in found]


@dataclass
class NetworkKeys:
    """Arguments of a network; a key that this kind of network does not take is null."""

    family: str | None = key("kind of network; null: DiT or UNet, by the other keys", later=None)
    hidden_size: int | None = key("width of a token", **SIZE)
    depth: int | None = key("number of blocks", least=1, most=1000)
    num_heads: int | None = key("attention heads", **SIZE)
    patch_size: int | None = key("pixels along each side of a patch", **SIZE)
    input_size: int | None = key("height and width of the input; null: from resolution", **SIZE)
    in_channels: int | None = key("channels of the input; null: as the data has", **SIZE)
    mlp_ratio: float | None = key(
        "width of the MLP, as a multiple of hidden_size", least=0, most=1000
    )
    class_dropout_prob: float | None = key(
        "share of labels left out in training, for guidance", least=0, most=1
    )
    learn_sigma: bool | None = key("true: the network learns the variance as well")
    model_channels: int | None = key("UNet: channels of the first level", **SIZE)
    num_res_blocks: int | None = key("UNet: residual blocks at each level", least=1, most=1000)


@dataclass
class DataKeys:
    """Arguments of the data module."""

    root: str = key("folder, archive or shards of the images, or folder of latents", text=True)
    background: str | None = key(
        "colour behind transparent parts; null: hidden colours show, as in old runs",
        text=True,
        later=None,
        unnamed=True,
    )
    images: str | None = key(
        "folder that latents were encoded from, for an objective that sees pixels",
        text=True,
        later=None,
    )
    labels: str | None = key(
        "CSV or JSON file of each image's class, a column, or a key of the .json of each; null: "
        "class folders",
        text=True,
    )
    class_names: list[str | int] | None = key(
        "names of the classes, in their order; null: those of the data", names=True
    )
    balance: float = key(
        "0: an epoch has every image once; 1: it has all classes equally often",
        least=0,
        most=1,
    )
    buckets: int | list[list[int]] | None = key(
        "sizes [height, width] of which each batch has one, such as [[256,256],[192,320]], or the "
        "step in pixels of those of about one area; null: one size",
        **BUCKETS,
        later=None,
    )
    batch_size: int = key("images in a batch, over all devices", least=1, most=2**20, words="bs")
    workers: int | None = key(
        "reader processes; null: chosen automatically", least=0, most=1024, determines="nothing"
    )


@dataclass
class OptimizerKeys:
    """Arguments of the optimiser."""

    lr: float = key("learning rate", least=0, most=10**6, words="learning_rate")
    betas: list[float] = key(
        "decay rates of the averages of gradients and of their squares",
        least=0,
        below=1,
        length=(2, 3),
    )
    fused: bool | None = key("true: update all parameters in one kernel; null: if the device can")
    weight_decay: float = key("weight decay", least=0, most=10**6, words="wd")
    opt: str = key("of optimizer=timm, its name, such as lamb", absent=True)


@dataclass(kw_only=True)
class FurtherAverages(Closed):
    """Averages of the weights beside the main one."""

    decays: list[float] = key(
        "decays of further averages, such as [0.999,0.9999]", least=0.2887, below=1, blank=True
    )
    sigma_rel: list[float] = key(
        "widths of power-function averages, such as [0.05,0.1], of which any width is made later",
        least=0.001,
        below=0.2886,
        blank=True,
        every="every_n_steps.snapshot",
    )


@dataclass(kw_only=True)
class Average(Closed):
    """The average of the weights, which images are drawn with."""

    decay: float | None = key("decay of the weights' average; null: no average", least=0, below=1)
    warmup: bool = key(
        "true: the decay grows from 0.1; false: it is constant, as published",
        later=False,
        unnamed=True,
        absent=True,
        needs=("ema.decay or ema.further.decays",),
    )
    further: FurtherAverages = key(
        "averages beside it; sample.py and export.py name them by ema=NUMBER",
        later={"decays": [], "sigma_rel": []},
    )


@dataclass
class TrainTrainerKeys(TrainerKeys):
    """Lightning's Trainer, while training."""

    accumulate_grad_batches: int = key("batches that make one optimiser step", least=1)
    gradient_clip_val: float | None = key(
        "greatest norm of the gradients; null or 0: no limit", least=0
    )
    enable_progress_bar: bool = key("true: show a progress bar", determines="nothing")
    limit_train_batches: int = key(
        "training batches of what Lightning calls an epoch", least=1, absent=True, added=True
    )
    overfit_batches: int = key(
        "train on the first so many batches alone, again and again",
        least=0,
        absent=True,
        added=True,
    )
    enable_model_summary: bool = key(
        "true: print the layers and how many parameters they have",
        determines="nothing",
        absent=True,
        added=True,
    )
    num_sanity_val_steps: int = key(
        "validation batches before the first step; -1: all",
        least=-1,
        needs=(HELD_OUT,),
        determines="nothing",
        absent=True,
        added=True,
    )
    callbacks: list[Open] | Open | None = key(
        "callbacks beside those of a run, a mapping with _target_ or a list of them",
        words="callbacks callback",
        absent=True,
        added=True,
    )
    plugins: list[Any] | Open | None = key(
        "plugins beside those of a run, a mapping with _target_ or a list of them",
        words="plugins",
        absent=True,
        added=True,
    )
    profiler: str | Open | None = key(
        "simple, advanced, pytorch, or a mapping with _target_",
        words="profiler",
        determines="nothing",
        named_before=True,
        absent=True,
        added=True,
    )
    max_time: str | Open | None = key(
        "end after so long, DD:HH:MM:SS or {hours: 1}, counted from each start",
        words="max_time",
        determines="nothing",
        named_before=True,
        absent=True,
        added=True,
    )
    fast_dev_run: bool | int = key(
        "true, or how many: run so many steps and a validation, and keep nothing",
        least=0,
        words="fast_dev_run",
        determines="nothing",
        absent=True,
        added=True,
    )
    limit_val_batches: int | float | None = key(
        "validation batches, or a share of them",
        least=0,
        needs=(HELD_OUT,),
        determines="nothing",
        named_before=True,
        absent=True,
        added=True,
    )
    detect_anomaly: bool = key(
        "true: tell which operation made a gradient that is no number",
        determines="nothing",
        named_before=True,
        absent=True,
        added=True,
    )
    logger: list[Open] | Open | None = key(
        "further loggers beside logger, a mapping with _target_ or a list of them",
        determines="nothing",
        absent=True,
        added=True,
    )


@dataclass(kw_only=True)
class Every(Closed):
    """How often a checkpoint, a validation, previews and log entries are made."""

    checkpoint: int = key("steps between checkpoints", least=1)
    snapshot: int = key(
        "steps between snapshots of ema.further.sigma_rel's averages",
        least=1,
        every="every_n_steps.snapshot",
        needs=("ema.further.sigma_rel",),
    )
    validation: int = key(
        "steps between validations", least=1, every="every_n_steps.validation", needs=(HELD_OUT,)
    )
    preview: int = key("steps between previews", least=1, every="every_n_steps.preview")
    log: int = key("steps between log entries", least=1)


@dataclass(kw_only=True)
class EveryMinutes(Closed):
    """How often by the clock."""

    checkpoint: float | None = key(
        "minutes after which a checkpoint is saved between those by steps; null: never",
        least=0.01,
        words="checkpoint_minutes train_time_interval",
    )


@dataclass(kw_only=True)
class Keep(Closed):
    """How much of a run stays on the disk."""

    last: int = key("newest checkpoints that are kept to go on from", least=1, most=10_000)
    best: int = key(
        "checkpoints of the lowest validation loss that are kept; 0: none",
        least=0,
        most=10_000,
        words="save_top_k",
        every="every_n_steps.validation",
        needs=(HELD_OUT,),
    )
    snapshots: int = key(
        "snapshots of each average over ema.further.sigma_rel that are kept",
        least=2,
        most=100_000,
        every="every_n_steps.snapshot",
        needs=("ema.further.sigma_rel",),
    )


@dataclass(kw_only=True)
class Preview(Closed):
    """Images that are drawn while training."""

    classes: Classes = key(
        "class numbers or names; null: the first eight", names=True, exact=True, blank=True
    )
    steps: int = key("number of denoising steps", least=1)
    guidance: Parts = key("guidance of the lower row")


@dataclass(kw_only=True)
class Adapters(Closed):
    """Low-rank adapters (LoRA)."""

    rank: int | None = key("rank of the adapters; null: no adapters", least=1, most=16_384)
    alpha: float | None = key("adapters are multiplied by alpha / rank; null: by 1")
    dropout: float | None = key(
        "share of the adapters' inputs left out",
        least=0,
        below=1,
        absent=True,
        needs=("lora.rank",),
    )
    targets: list[str] | None = key(
        "name patterns of the layers that get adapters",
        names=True,
        absent=True,
        needs=("lora.rank",),
    )


@dataclass(kw_only=True)
class FineTuning(Closed):
    """What is taken of the checkpoint that ckpt names."""

    weights: Literal["average", "raw"] | float = key(
        "average, raw, or another average of a run: a decay, or a sigma_rel below 0.2887",
        least=0,
        below=1,
        refused=(0,),
        expected="average, raw, a decay such as 0.9999, or a sigma_rel such as 0.05",
    )
    optimizer: bool = key("true: also the optimiser's state, of a checkpoint of train.py")


@dataclass(kw_only=True)
class Recommended(Closed):
    """What the trained model recommends to sample with."""

    batch_size: int | None = key(
        "images computed at once", least=1, most=65_536, absent=True, added=True
    )


@dataclass(kw_only=True)
class Track(Closed):
    """What is measured of images drawn during training."""

    every_n_steps: int | None = key(
        "steps between measurements; null: at each preview", least=1, expected="1 or more, or null"
    )
    num_images: int = key("number of images drawn", least=2, expected="2 or more")
    steps: int = key("number of denoising steps", least=1)
    seed: int = key("seed of the noise", **SEED)
    metrics: list[str] | None = key(**METRICS)
    features: str | Open | None = key("feature network, or auto")
    reference: str | None = key(
        "images to compare with: npz or folder; null: the model's own", text=True
    )
    best: bool = key("true: also keep the checkpoint of the lowest FID")


@dataclass(kw_only=True)
class Train(Closed):
    """Train a denoiser and leave a run folder for sample.py; the same command again goes on."""

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

    name: str | int | float = key("short name; the run's folder begins with it", names=True)
    out: str | None = key(
        "folder of the run; null: outputs/train/NAME-HASH", **OUT, words=OUT_WORDS
    )
    seed: int = key("seed of the first weights, the noise and the order of images", **SEED)
    max_steps: int = key(
        "number of optimiser steps",
        least=1,
        words="epochs max_epochs steps max_train_steps",
        determines="nothing",
    )
    ckpt: str | None = key(
        "model to fine-tune, with experiment=finetune; null: train from scratch",
        text=True,
        words="checkpoint model_path pretrained",
    )
    finetune: FineTuning = key(
        "what is taken of ckpt",
        later={"weights": "average", "optimizer": False},
        needs=("ckpt",),
    )
    resume_from: str | None = key(
        "another run, its folder or one checkpoint, to go on from with what is stated here; null: "
        "none",
        text=True,
        words="resume_from_checkpoint ckpt_path init_from",
        later=None,
    )
    resume_optimizer: bool = key(
        "with resume_from: true: its optimiser's state; false: the optimiser begins anew",
        later=True,
        needs=("resume_from",),
    )
    resume_schedule: Literal["continued", "anew"] = key(
        "with resume_from: continued: the learning rate's schedule counts the steps of that run; "
        "anew: it begins here",
        later="continued",
        needs=("resume_from", "schedule"),
    )
    vae: str | Open | None = key(
        "autoencoder, or a class by vae._target_; null: the one of ckpt, or none, for pixels",
        text=True,
    )
    num_heads: int | None = key(
        "attention heads, if ckpt does not say; without ckpt set model.num_heads",
        least=1,
        absent=True,
        added=True,
    )
    imports: str | list[str] | None = key(**IMPORTS)
    resolution: int | list[int] | None = key(
        "pixels along each side of an image, or [height, width]",
        **SIZE,
        length=2,
        words="image_size",
    )
    patch_size: int | None = key("pixels along each side of a patch", **SIZE, by_checkpoint=True)
    num_classes: int | None = key(
        "number of classes; null: as many as the data has", least=1, most=10**6, by_checkpoint=True
    )
    kind: Literal["eps", "v", "x_0"] | None = key(
        "what the network predicts", words="prediction_type", by_checkpoint=True
    )
    changed_data: bool = key(
        "true: go on although the data has changed since the run began", determines="nothing"
    )
    max_skipped: int = key(
        "stop after so many steps in a row without finite gradients", least=1, determines="nothing"
    )
    compile: bool = key("true: compile every block by itself", determines="nothing")
    checkpoint_blocks: bool = key(
        "true: recompute blocks in the backward pass, for less memory", determines="nothing"
    )
    matmul: Literal["highest", "high", "medium"] = key("precision of float32 matrix products")
    freeze: list[str] | None = key(
        "name patterns of parameters that are not trained", names=True, blank=True, absent=True
    )
    sampling: Recommended = key("recommended settings, written into the result")
    model: Open | None = key("the network", keys=NetworkKeys, asks=networks, by_checkpoint=True)
    process: NoiseProcess | None = key("noise levels", by_checkpoint=True)
    data: Open = key("images", keys=DataKeys, around="sag_dit.data.map_data.MapData")
    objective: Open | None = key("the loss")
    optimizer: Open = key("the optimiser", keys=OptimizerKeys)
    param_groups: list[Any] | None = key(
        "rules for parameters by name: no_decay, {layer_decay: 0.8}, {match: PATTERN, lr: 1e-4}",
        blank=True,
        later=[],
        words="parameter_groups",
    )
    schedule: Open | None = key("schedule of the learning rate")
    ema: Average = key("average of the weights")
    lora: Adapters | None = key("adapters", absent=True)
    trainer: Open = key("Lightning's Trainer", keys=TrainTrainerKeys)
    every_n_steps: Every = key("how often", determines="nothing")
    every_n_minutes: EveryMinutes = key("how often by the clock", determines="nothing")
    keep: Keep = key("what stays on the disk", determines="nothing")
    preview: Preview = key("previews", determines="nothing", every="every_n_steps.preview")
    logger: Open | None = key("where numbers go", determines="nothing")
    track: Track | None = key(
        "metrics while training",
        determines="nothing",
        every="track.every_n_steps or every_n_steps.preview",
    )


@dataclass(kw_only=True)
class EncodeData(Closed):
    """The images to encode."""

    root: str = key("folder, archive or shards of the images", text=True)
    labels: str | None = key(
        "CSV or JSON file of each image's class, a column, or a key of the .json of each; null: "
        "class folders",
        text=True,
    )
    class_names: list[str | int] | None = key(
        "names of the classes, in their order; null: those of the data", names=True
    )
    size: int | list[int] = key(
        "pixels along each side of the crop, or [height, width]",
        **SIZE,
        length=2,
        words="resolution image_size",
    )
    buckets: int | list[list[int]] | None = key(
        "sizes [height, width], into one of which each image goes by its aspect ratio, such as "
        "[[256,256],[192,320]], or the step in pixels of those of about one area; null: one size",
        **BUCKETS,
    )
    upright: bool = key("true: turn photos upright by their EXIF note; false: as ADM's loader")
    background: str | None = key(
        "colour behind transparent parts; null: hidden colours show, as in old runs", text=True
    )
    strict: bool = key(
        "true: stop at an image that cannot be read; false: go on", determines="nothing"
    )


@dataclass(kw_only=True)
class Encode(Closed):
    """Encode a folder of images to latents once, on one device or many."""

    examples: ClassVar[tuple[str, ...]] = (
        "python encode.py data.root=photos/ out=latents/",
        "python encode.py data.root=photos/ data.size=512 vae=mse",
    )
    data: EncodeData = key("the images")
    vae: str | Open | None = key(
        "autoencoder: a folder, file or hub name, or a class by vae._target_", text=True
    )
    out: str | None = key("folder of the latents; null: outputs/latents/NAME-HASH", **OUT)
    flip: bool = key("true: encode mirror images as well")
    dtype: Literal["float16", "float32"] = key("type of the stored numbers")
    rows: int = key("images in each shard", least=1, most=2**20)
    slice_size: int = key("images encoded at once", least=1, most=65_536, words="batch_size")
    workers: int | None = key(
        "reader processes per device; null: chosen automatically",
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
    out: str | None = key("new or empty folder; null: outputs/export/NAME-FORMAT", **OUT)


@dataclass(kw_only=True)
class AttentionSheet(Draws):
    """Draw the saliency of every layer at several steps on one sheet, to choose SAG's layer."""

    examples: ClassVar[tuple[str, ...]] = (
        "python attention.py ckpt=DiT-XL-2 classes=[207]",
        "python attention.py ckpt=digits attention.show=3",
    )
    attention: Attention = key("what is shown")
    device: str = key(**DEVICE)
    out: str | None = key("folder of the sheet; null: outputs/attention/NAME", **OUT)


@dataclass(kw_only=True)
class Studio(Closed):
    """Open a page in the browser on which sliders draw, beside unguided twins."""

    examples: ClassVar[tuple[str, ...]] = (
        "python studio.py",
        "python studio.py ckpt=outputs/train/RUN port=null",
    )
    ckpt: str = key(**CKPT)
    imports: str | list[str] | None = key(**IMPORTS)
    prompt: str | None = key("prompt of a text model, at first", text=True, blank=True)
    folder: str | list[str] = key(
        "folder, or [several], whose checkpoints, runs and results can be opened",
        text=True,
        expected="a folder, such as folder=outputs, or a list of folders",
    )
    steps: int = key("number of denoising steps, at first", least=1, most=1000)
    images: int = key("images drawn at once, at first", least=1, most=8)
    device: str = key(**DEVICE)
    upload: float = key("gigabytes that an uploaded checkpoint may have", least=0.001)
    host: str = key("address to listen at; 0.0.0.0 lets other machines in", text=True)
    port: int | None = key("port to listen at; null: a free one", least=1, most=65_535)


@dataclass(kw_only=True)
class Tune(Guides):
    """Find the methods and settings of guidance that serve a model best, for a stated budget."""

    examples: ClassVar[tuple[str, ...]] = (
        "python tune.py ckpt=digits budget=10min",
        "python tune.py ckpt=digits methods=[cfg,pag] max_cost=1.5 budget=200000passes",
    )
    habits: ClassVar[Mapping[str, str]] = {
        "resume": "repeat the command: what is measured is not measured again",
        "n_trials": "budget says how long is searched, such as budget=10min",
    }
    budget: str = key(
        "time or passes of the network that all may take, such as 10min, 2h or 200000passes",
        pattern=BUDGET,
        expected="a time or passes, such as 10min, 2h or 200000passes",
        words="time timeout",
        determines="nothing",
    )
    methods: list[str] | None = key(
        "methods that are tried; null: those of cfg, sag and pag that the model can be drawn with",
        expected="a list of methods, such as methods=[cfg,sag], or null",
    )
    max_cost: float | None = key(
        "most passes that a candidate may take, as a multiple of unguided; null: no limit", least=1
    )
    steps: int | list[int] = key(  # type: ignore[assignment]
        "number of denoising steps, or a list of numbers to try",
        least=1,
        words="num_inference_steps num_steps",
    )
    num_images: int = key(
        "images that every candidate is drawn with; the best get three times as many, and so on",
        least=10,
        words="n num_samples count",
    )
    rungs: int = key(
        "how often the best third goes on with three times the images", least=1, most=6
    )
    seeds: int = key(
        "number of further seeds that the result is confirmed with", least=2, most=10_000
    )
    quality: str = key(f"metric that is made better: {NAMED}")
    reference: str | None = key(
        "images to search with: npz or folder; null: the model's own, such as digits:tune",
        text=True,
    )
    report: str | None = key(
        "other images, to confirm with; null: the model's own, such as digits:report", text=True
    )
    background: str = key("colour behind transparent parts of these images", text=True)
    features: Open | None = key("feature network", keys=FeatureKeys)
    name: str | None = key(
        "name of the preset that is written; null: MODEL_tuned",
        pattern=r"[\w-]+",
        expected="a name of letters, digits, - and _",
        determines="nothing",
    )
    workers: int = key(
        "processes that share the study: start the same command so often",
        least=1,
        most=1024,
        determines="nothing",
    )
    out: str | None = key(
        "folder of the study; null: outputs/tune/NAME-HASH", **OUT, words=OUT_WORDS
    )
    gallery: EvaluateGallery = key("the page", determines="nothing")


COMMANDS: Mapping[str, type[Closed]] = {
    "sample": Sample,
    "evaluate": Evaluate,
    "tune": Tune,
    "train": Train,
    "encode": Encode,
    "export": Export,
    "attention": AttentionSheet,
    "studio": Studio,
}
"""The schema of each command."""
