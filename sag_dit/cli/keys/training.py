"""What ``train.py`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from sag_dit.cli.keys.drawing import Trainer
from sag_dit.cli.keys.key import Closed, Key, Open


class Process:
    """Arguments of the process."""

    num_timesteps: Annotated[int, Key("noise levels", least=1, most=100_000, determines="weights")]


def networks() -> list[str]:
    """Return the network of every family."""
    from sag_dit.models import families

    found = (each.network() for each in families().values())
    return [f"{each.__module__}.{each.__qualname__}" for each in found]


class Network:
    """Arguments of a network; null is what another one takes."""

    family: Annotated[str | None, Key("null: DiT or UNet", determines="weights", later=None)]
    hidden_size: Annotated[int | None, Key("width of a token", least=1, determines="weights")]
    depth: Annotated[int | None, Key("blocks", least=1, determines="weights")]
    num_heads: Annotated[int | None, Key("heads of attention", least=1, determines="weights")]
    patch_size: Annotated[int | None, Key("pixels of a token", least=1, determines="weights")]
    input_size: Annotated[int | None, Key("null: by resolution", least=1, determines="weights")]
    in_channels: Annotated[int | None, Key("null: the data's", least=1, determines="weights")]
    mlp_ratio: Annotated[float | None, Key("width of the MLP", least=0, determines="weights")]
    class_dropout_prob: Annotated[
        float | None, Key("share of labels made null", least=0, most=1, determines="weights")
    ]


class Data:
    """Arguments of the data module."""

    root: Annotated[str, Key("folder", text=True, determines="weights")]
    batch_size: Annotated[
        int, Key("images per step", least=1, most=2**20, determines="weights", words=("bs",))
    ]
    workers: Annotated[
        int | None, Key("processes that read", least=0, most=1024, determines="nothing")
    ]


class Optimizer:
    """Arguments of the optimiser."""

    lr: Annotated[
        float, Key("learning rate", least=0, words=("learning_rate",), determines="weights")
    ]
    weight_decay: Annotated[
        float, Key("decay of weights", least=0, determines="weights", words=("wd",))
    ]


@dataclass(kw_only=True)
class Average(Closed):
    """The average of weights that is sampled with."""

    decay: Annotated[
        float | None,
        Key("of the average; null: no average", least=0, below=1, determines="weights"),
    ]
    warmup: Annotated[
        bool,
        Key(
            "decay grows from 0.1; false: as published",
            determines="weights",
            later=False,
            unnamed=True,
            absent=True,
        ),
    ]


class TrainTrainer(Trainer):
    """Lightning's Trainer, while training."""

    accumulate_grad_batches: Annotated[int, Key("batches in a step", least=1, determines="weights")]
    gradient_clip_val: Annotated[
        float | None, Key("greatest norm; null: any", least=0, determines="weights")
    ]
    enable_progress_bar: Annotated[bool, Key("a bar", determines="nothing")]


@dataclass(kw_only=True)
class Every(Closed):
    """Steps between what is done now and then."""

    checkpoint: Annotated[int, Key("steps between checkpoints", least=1, determines="nothing")]
    validation: Annotated[int, Key("steps between validations", least=1, determines="nothing")]
    preview: Annotated[int, Key("steps between previews", least=1, determines="nothing")]
    log: Annotated[int, Key("steps between numbers logged", least=1, determines="nothing")]


@dataclass(kw_only=True)
class Preview(Closed):
    """Images that are drawn while training."""

    classes: Annotated[
        int | str | list[int | str] | None,
        Key(
            "numbers or names; null: the first eight", names=True, exact=True, determines="nothing"
        ),
    ]
    steps: Annotated[int, Key("denoiser steps", least=1, determines="nothing")]
    guidance: Annotated[Open, Key("terms", determines="nothing")]


class Adapters:
    """Low-rank adapters, with experiment=finetune."""

    rank: Annotated[int | None, Key("of the adapters", least=1, most=16_384, determines="weights")]
    alpha: Annotated[float | None, Key("scale times the rank", determines="weights")]
    dropout: Annotated[
        float, Key("share of inputs left out", least=0, below=1, determines="weights")
    ]


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

    name: Annotated[
        str | int | float,
        Key("short name, part of the run's folder", names=True, determines="weights"),
    ]
    out: Annotated[
        str | None,
        Key(
            "run's folder; null: outputs/train/NAME-HASH",
            text=True,
            folder=True,
            words=("output", "outdir", "output_dir"),
            determines="nothing",
        ),
    ]
    seed: Annotated[
        int, Key("of weights, noise and order", least=0, most=2**64 - 1, determines="weights")
    ]
    max_steps: Annotated[
        int,
        Key(
            "optimiser steps",
            least=1,
            words=("epochs", "max_epochs", "steps", "max_train_steps"),
            determines="nothing",
        ),
    ]
    ckpt: Annotated[
        str | None,
        Key(
            "what to fine-tune, with experiment=finetune; null: fresh weights",
            text=True,
            words=("checkpoint", "model_path", "pretrained"),
            determines="weights",
        ),
    ]
    vae: Annotated[
        str | None,
        Key("autoencoder; null: the checkpoint's, or pixels", text=True, determines="weights"),
    ]
    num_heads: Annotated[
        int | None,
        Key(
            "heads of attention, where ckpt does not tell; of a fresh model model.num_heads",
            least=1,
            determines="weights",
            absent=True,
            added=True,
        ),
    ]
    resolution: Annotated[
        int | None,
        Key("pixels along each side", least=1, words=("image_size",), determines="weights"),
    ]
    patch_size: Annotated[
        int | None,
        Key("pixels of a token's side", least=1, by_checkpoint=True, determines="weights"),
    ]
    num_classes: Annotated[
        int | None, Key("null: the data's", least=1, by_checkpoint=True, determines="weights")
    ]
    kind: Annotated[
        Literal["eps", "v", "x_0"] | None,
        Key(
            "what the network puts out",
            words=("prediction_type",),
            by_checkpoint=True,
            determines="weights",
        ),
    ]
    max_skipped: Annotated[
        int, Key("stop after so many steps without finite gradients", least=1, determines="nothing")
    ]
    compile: Annotated[bool, Key("compile every block by itself", determines="nothing")]
    checkpoint_blocks: Annotated[
        bool, Key("recompute blocks backwards: less memory", determines="nothing")
    ]
    matmul: Annotated[
        Literal["highest", "high", "medium"], Key("float32 products", determines="weights")
    ]
    freeze: Annotated[
        list[str] | None,
        Key("patterns of what is not trained", names=True, absent=True, determines="weights"),
    ]
    sampling: Annotated[
        Open, Key("recommended settings, written into the result", determines="weights")
    ]
    model: Annotated[
        Open | None,
        Key(
            "the network",
            keys=Network,
            asks=networks,
            by_checkpoint=True,
            determines="weights",
        ),
    ]
    process: Annotated[
        Open | None, Key("noise levels", keys=Process, by_checkpoint=True, determines="weights")
    ]
    data: Annotated[Open, Key("images", keys=Data, determines="weights")]
    objective: Annotated[Open | None, Key("the loss", determines="weights")]
    optimizer: Annotated[Open, Key("the optimiser", keys=Optimizer, determines="weights")]
    schedule: Annotated[Open | None, Key("of the learning rate", determines="weights")]
    ema: Annotated[Average, Key("the average", determines="weights")]
    lora: Annotated[Open | None, Key("adapters", keys=Adapters, absent=True, determines="weights")]
    trainer: Annotated[Open, Key("Lightning's Trainer", keys=TrainTrainer, determines="weights")]
    every_n_steps: Annotated[Every, Key("how often", determines="nothing")]
    preview: Annotated[Preview, Key("previews", determines="nothing")]
    logger: Annotated[Open | None, Key("where numbers go", determines="nothing")]
    track: Annotated[Open | None, Key("metrics while training", determines="nothing")]
