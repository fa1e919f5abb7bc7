"""The model that ``train.py`` trains: a fresh one of the configured size, or a checkpoint's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sag_dit.bounds import shown
from sag_dit.cli.app import fail
from sag_dit.cli.composing import (
    arguments_of,
    as_typed,
    check_target,
    config_folder,
    fitted,
    named_by,
    taken_by,
)
from sag_dit.cli.keys import Train
from sag_dit.cli.keys.key import keys_of, mapping_of, to_dict
from sag_dit.untrusted import TARGET, read_yaml

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model
    from sag_dit.data.training_batches import StepData
    from sag_dit.training.finetune import LoRA


def refuse_foreign_sizes(command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments; refuse sizes of a DiT that the network which they name does not take.

    What files fill in of these is left out by itself.
    """
    typed = as_typed(arguments)
    target = typed.get(f"model.{TARGET}", "")
    try:
        taken = taken_by(target) if target else None
    except Exception:  # What is wrong with its file is told when it is made.
        taken = None
    if taken is not None:
        stated = {"patch_size": ["patch_size"]} if typed.get("patch_size", "null") != "null" else {}
        size = config_folder() / "size" / f"{typed.get('size')}.yaml"
        if size.is_file():
            stated["size"] = list(read_yaml(size))
        for key, names in stated.items():
            if not {*taken}.intersection(names):
                fail(
                    f"{key}={typed[key]}: {target} takes no {' or '.join(names)}; leave {key} out, "
                    f"and set what it takes as model.NAME"
                )
    return list(arguments)


def make_model(config: Train, data: StepData) -> Model:
    """Build a fresh model of the configured size for the data's classes.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    from sag_dit.checkpoints import build, from_denoiser
    from sag_dit.checkpoints.loading import find_codec
    from sag_dit.codec import VAECodec
    from sag_dit.data.crop import sides, told_size

    if config.num_heads is not None:
        raise ValueError(
            f"num_heads={config.num_heads}: of the checkpoint that ckpt names; a fresh model has "
            f"model.num_heads={config.num_heads}"
        )
    if config.lora is not None or config.freeze:
        raise ValueError("lora and freeze are for a model that ckpt names: leave them out")
    if config.finetune.weights != "average" or config.finetune.optimizer:
        raise ValueError("finetune.weights and .optimizer are for a model that ckpt names")
    if config.model is None or config.resolution is None or config.patch_size is None:
        raise ValueError(
            "a fresh model needs model, resolution and patch_size: expected none of them null; "
            "size=S, B, L or XL fills model"
        )
    # Its autoencoder, and what of the images' side the network and that divide.
    settings, takes = network_settings(config.model)
    vae = config.vae or data.vae
    codec = find_codec(vae)
    patch = config.patch_size if takes is None or "patch_size" in takes else 1
    cell = codec.factor * patch
    height, width = sides(config.resolution)
    if height % cell or width % cell:
        raise ValueError(
            f"resolution={told_size(config.resolution)}: expected a multiple of {cell}, the "
            f"autoencoder's factor {codec.factor} times patch_size={patch}"
        )
    # The sizes of x_t, and the classes, as far as the network takes them.
    latent = isinstance(codec, VAECodec)
    channels = codec.latent_channels if isinstance(codec, VAECodec) else data.channels
    grid = [height // codec.factor, width // codec.factor]
    side = grid[0] if height == width else grid
    names = list(data.class_names)
    num_classes = config.num_classes or len(names)
    sizes = {"input_size": side, "in_channels": channels, **settings, "num_classes": num_classes}
    settings |= {name: value for name, value in sizes.items() if takes is None or name in takes}
    # The model, described as a checkpoint describes it.
    description = {
        "model": settings,
        "process": to_dict(config.process),
        "kind": config.kind,
        "x_0_range": None if latent else [-1.0, 1.0],
        "class_names": names if len(names) == num_classes else [],
    }
    denoiser, name = build(description), str(config.name)
    shape = (channels, *grid)
    if TARGET in settings and denoiser.latent_shape != shape:
        raise ValueError(
            f"model.{TARGET}={settings[TARGET]}: its x_t is {denoiser.latent_shape}: expected "
            f"{shape}, that of the data at resolution={told_size(config.resolution)}"
        )
    defaults = to_dict(config.sampling)
    return from_denoiser(denoiser, name, codec=codec, defaults=defaults, vae=vae)


def network_settings(
    model: Mapping[str, Any],
) -> tuple[dict[str, Any], Collection[str] | None]:
    """Return a network's settings, and the names of its arguments where they are its class's own.

    Raises:
        ValueError: an argument that it does not take, or no class of that name.
    """
    hint, told = keys_of(Train)["model"]
    declared = keys_of(mapping_of(hint, told))
    # Null is what only the other kind of network takes.
    stated = {name: value for name, value in model.items() if value is not None}
    if TARGET in stated:
        _, given = check_target(stated, "model")
        for name, value in given.items():
            if isinstance(value, Mapping) and TARGET in value:
                raise ValueError(
                    f"model.{name}={shown(value)}: the arguments of a network are plain values, "
                    f"since they stand in every checkpoint: expected one, such as a name that "
                    f"{stated[TARGET]} looks up itself"
                )
        takes: Collection[str] | None = arguments_of(stated[TARGET])
        if takes is None:
            takes = named_by(stated[TARGET]) or None
        return {TARGET: stated[TARGET], **given}, takes
    own = {name: value for name, value in stated.items() if name not in declared}
    return stated | fitted(own, "model", told.asks()), None


def load_base(config: Train) -> tuple[Model, Train]:
    """Load the model to fine-tune; return the configuration with it, whose resolution follows.

    That is ``resolution``, if null, and ``data.size``.

    Raises:
        ValueError: the checkpoint cannot be loaded, its weights are NaN or infinite, or a key is
            set that it determines.
    """
    from sag_dit.checkpoints import load
    from sag_dit.checkpoints.export import check_finite
    from sag_dit.training.finetune import resolution_of

    determined = (key for key, (_, told) in keys_of(Train).items() if told.by_checkpoint)
    stated = [key for key in determined if getattr(config, key) is not None]
    if "size" in config.typed:  # Of which the experiment leaves nothing.
        stated.append("size")
    if stated:
        raise ValueError(
            f"ckpt={config.ckpt} determines {', '.join(stated)}: expected null, as in "
            f"experiment=finetune, which leaves these to the checkpoint and the data"
        )
    lora_settings(config)  # Before a checkpoint is downloaded.
    weights = config.finetune.weights
    ema = weights == "average" if isinstance(weights, str) else weights
    _one_side(config)
    base = load(str(config.ckpt), ema=ema, vae=config.vae, num_heads=config.num_heads)
    check_finite(base.class_conditional.network.state_dict(), f"ckpt={config.ckpt}")
    side = _one_side(config) or resolution_of(base)
    data = {**config.data, "size": side} if "size" in config.data else config.data
    return base, replace(config, resolution=side, data=data)


def _one_side(config: Train) -> int | None:
    """Return the resolution to fine-tune at, which is that of squares.

    Raises:
        ValueError: it is one of rectangles.
    """
    if isinstance(config.resolution, list):
        raise ValueError(
            f"resolution={config.resolution}: a checkpoint is fine-tuned on squares: expected one "
            f"number; rectangles are trained from scratch, without ckpt"
        )
    return config.resolution


def lora_settings(config: Train) -> LoRA | None:
    """Return what adapters to train, None for the weights themselves.

    Raises:
        ValueError: a value is out of its range, or peft is not installed.
    """
    from sag_dit.training.finetune import LoRA

    if config.lora is None:
        return None
    if config.lora.rank is None:
        if config.lora.alpha is not None:
            raise ValueError(
                f"lora.alpha={config.lora.alpha}: scales adapters, and lora.rank=null trains none: "
                f"expected lora.rank=8 or another beside it, or no lora.alpha"
            )
        return None
    return LoRA(**to_dict(config.lora))


def adapt_model(config: Train, base: Model, data: StepData) -> tuple[Model, str, Collection[str]]:
    """Make a loaded model fit the data, and return it with the report of what was done.

    The names are those of parameters that were made anew.

    Raises:
        ValueError: the data does not fit, or a pattern to freeze or to adapt matches nothing.
    """
    from sag_dit.models import family_for
    from sag_dit.training.finetune import (
        adapt,
        adaptation_report,
        add_adapters,
        freeze,
        resolution_of,
    )

    side = _one_side(config) or resolution_of(base)
    adapted = adapt(base, str(config.name), data.class_names, side)
    network = adapted.model.class_conditional.network
    frozen = freeze(network, config.freeze or ())
    lora = lora_settings(config)
    if lora is None:
        return adapted.model, adaptation_report(base, adapted), adapted.remade
    tables = family_for(network).label_tables(network)
    layers = add_adapters(network, lora, frozen)
    # New classes have no rows but those that are learned now.
    for table in tables.keys() & dict(network.named_parameters()).keys():
        learned = table in adapted.remade and table not in frozen
        network.get_parameter(table).requires_grad_(learned)
    report = adaptation_report(base, adapted, layers)
    return replace(adapted.model, lora=lora.description), report, adapted.remade
