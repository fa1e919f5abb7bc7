"""Each layout of checkpoints, read into one form: our parameter names and a partial config."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from torch import Tensor

from sag_dit.bounds import Bounds, Natural, Share, checked
from sag_dit.checkpoints import averages, files, sets, trainers
from sag_dit.checkpoints.config import REQUIRED
from sag_dit.denoiser.prompts import ENCODE
from sag_dit.identity import settings
from sag_dit.models.family import FAMILY, State, WeightsFile, families, family_of
from sag_dit.process import DDPM, Flow, Process
from sag_dit.process.base import OutputKind
from sag_dit.process.ddpm import BETAS
from sag_dit.untrusted import TARGET

log = logging.getLogger(__name__)

BASE = ".base_layer."
DOWN = ".lora_A.default.weight"
UP = ".lora_B.default.weight"


def merged(state: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Add adapters to the weights they adapt and return plain weights under their plain names.

    W + (alpha / rank) B A, where A is (rank, in), B is (out, rank) and W is (out, in). ``lora``
    is what the checkpoint's config says of them, rank and alpha.

    Raises:
        ValueError: ``lora`` lacks these, or an adapted layer its adapter.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
    """
    try:
        scale = lora["alpha"] / lora["rank"]
    except (KeyError, TypeError, ZeroDivisionError):
        raise ValueError(f"lora={lora!r}: expected the numbers rank and alpha") from None
    plain = {}
    for name, tensor in state.items():
        if name.endswith((DOWN, UP)):
            continue
        if name.endswith(f"{BASE}weight"):
            layer = name.removesuffix(f"{BASE}weight")
            if layer + UP not in state or layer + DOWN not in state:
                raise ValueError(f"lora={dict(lora)}: {layer} lacks {layer + UP} or {layer + DOWN}")
            tensor = tensor + scale * (state[layer + UP] @ state[layer + DOWN])
        plain[name.replace(BASE, ".")] = tensor
    return plain


KINDS: dict[str, OutputKind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


MOST_SHIFT = 50
Shift = Annotated[float, Bounds(least=-10, most=10)]


@dataclass(frozen=True)
class Scheduler:
    """What is asked of a scheduler's config; what it leaves out is what its class has.

    Example:
        >>> Scheduler().beta_schedule
        'linear'
    """

    num_train_timesteps: Annotated[int, Bounds(least=1, most=100_000)] = 1000
    beta_schedule: str = "linear"
    beta_start: Share = 1e-4
    beta_end: Share = 0.02
    trained_betas: Any = None
    rescale_betas_zero_snr: Any = None
    prediction_type: str = "epsilon"
    shift: float = 1.0
    use_dynamic_shifting: bool | None = None
    base_image_seq_len: Natural = 256
    max_image_seq_len: Natural = 4096
    base_shift: Shift = 0.5
    max_shift: Shift = 1.15

    def dynamic(self, tokens: int) -> float:
        """Return FLUX's mu, linear in the number of tokens."""
        many = self.max_image_seq_len - self.base_image_seq_len or 1
        rise = self.max_shift - self.base_shift
        return self.base_shift + rise * (tokens - self.base_image_seq_len) / many


def read_scheduler(path: Path, cells: tuple[int, int] = (0, 0)) -> tuple[Process, OutputKind]:
    """Return the process and kind that a scheduler's config states, for an image of so many cells.

    Raises:
        ValueError: the betas or the prediction type are not known.
    """
    # A flow states where it puts its steps, perhaps by the size of the image.
    values = files.read_json(path)
    config = checked(values, Scheduler, str(path), open=True)
    steps = config.num_train_timesteps
    if str(values.get("_class_name")).startswith("FlowMatch"):
        shift = float(config.shift)
        if config.use_dynamic_shifting:
            mu = config.dynamic(cells[0] * cells[1] // 4)
            if abs(mu) > MOST_SHIFT:
                raise ValueError(
                    f"{path}: max_shift={config.max_shift}: expected one that moves the times of "
                    f"this size by at most e^{MOST_SHIFT}, not e^{mu:.3g}"
                )
            shift = math.exp(mu)
        return Flow(time_scale=steps, shift=shift), "v"
    # A DDPM is known by its betas.
    first, last, schedule = config.beta_start, config.beta_end, config.beta_schedule
    stated = {
        "linear": np.linspace(first, last, steps),
        "scaled_linear": np.linspace(first**0.5, last**0.5, steps) ** 2,
        "squaredcos_cap_v2": BETAS["cosine"](steps),
    }.get(schedule)
    changed = config.trained_betas is not None or config.rescale_betas_zero_snr
    names = [
        name
        for name, betas in BETAS.items()
        if stated is not None and not changed and np.allclose(stated, betas(steps))
    ]
    kind = KINDS.get(config.prediction_type)
    if not names or kind is None:
        raise ValueError(
            f"{path}: beta_schedule={schedule!r} from {first} to {last} in {steps} steps, "
            f"prediction_type={config.prediction_type!r}; expected the betas of DDPM "
            f"(linear), Stable Diffusion (scaled_linear) or IDDPM (squaredcos_cap_v2), neither "
            f"trained nor rescaled, and one of {', '.join(KINDS)}"
        )
    return DDPM(cast(Any, names[0]), steps), kind


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        state: weights under our names, in the file's own precision.
        stated: what the checkpoint itself says of its config, perhaps nothing.
        files: the files that hold the weights.
        vae: the autoencoder that comes with it, a folder or a name.

    Example::

        checkpoint = read(Path("DiT-XL-2-256x256.pt"), ema=True)
        print(checkpoint.path, len(checkpoint.state))
    """

    state: State
    files: tuple[Path, ...]
    stated: Mapping[str, Any] = field(default_factory=dict)
    vae: str | Path | Mapping[str, Any] | None = None

    @property
    def path(self) -> Path:
        """The file that messages name, beside which a config can be stated."""
        return self.files[0]


def read(path: Path, ema: bool | float) -> Checkpoint:
    """Read a checkpoint of any layout; which one, is read from the files themselves.

    ``ema`` is a number where a further average of one of our runs is asked for.

    Raises:
        ValueError: it is damaged, foreign, or lacks the weights that ``ema`` asks for.
    """
    if not isinstance(ema, bool):
        return _read_average(path, ema)
    if path.is_dir():
        return _read_folder(path, ema)
    return _read_files((path,), ema)


def _read_folder(path: Path, ema: bool) -> Checkpoint:
    if (path / "model_index.json").is_file():
        return _read_pipeline(path, ema)
    config = path / "config.json"
    if config.is_file() and "_class_name" in files.read_json(config):
        vae = path.parent / "vae"
        _single_set(path, ema)
        return _read_transformer(path, vae if vae.is_dir() else None, {})
    exported = path / "model.safetensors"
    candidates = [exported] if ema and exported.is_file() else []
    candidates += _of_run(path)
    # A run's export is its end, unless the run went on afterwards.
    newest = max(candidates, key=lambda file: file.stat().st_mtime_ns, default=exported)
    if newest != exported:
        return _read_files((newest,), ema)
    weights = trainers.weights_of(path)
    if weights:
        return _read_files(weights, ema, trainers.keeps_state(path), alone=False)
    for pieces in sorted((path / "checkpoints").glob("*"), reverse=True):
        trainers.refuse_pieces(pieces)
    raise ValueError(
        f"{path}: a folder without checkpoint; expected checkpoints/*.ckpt or *.pt (a run), "
        f"model.safetensors and config.json (an export), one file of weights, or "
        f"model_index.json (diffusers)"
    )


def _of_run(path: Path) -> list[Path]:
    """Return the checkpoints in a run's folder; its best ones are asked for by their own paths.

    Files from before a sharded checkpoint, such as what a sharded run began from, are no state of
    the run any more.
    """
    there = [*(path / "checkpoints").glob("*")]
    sharded = (each.stat().st_mtime_ns for each in there if (each / trainers.PIECES).is_file())
    since = max(sharded, default=-1)
    return [
        file
        for file in there
        if file.suffix in (".ckpt", ".pt") and file.is_file() and not file.name.startswith("best")
        if file.stat().st_mtime_ns > since
    ]


def _read_average(path: Path, average: float) -> Checkpoint:
    """Read a further average of a run, or make one of its newest checkpoint and snapshots.

    Raises:
        ValueError: it is no run or checkpoint of ours, or has no such average.
    """
    # The newest checkpoint, or the one that was asked for; and the snapshots until then.
    trainers.refuse_pieces(path)
    newest = max(_of_run(path), key=lambda file: file.stat().st_mtime_ns, default=None)
    checkpoint = path if path.is_file() else newest
    if checkpoint is None and average >= averages.WIDEST:
        for pieces in sorted((path / "checkpoints").glob("*"), reverse=True):
            trainers.refuse_pieces(pieces)
    run = path if path.is_dir() else path.parent.parent
    state: State = {}
    stated: Mapping[str, Any] = {}
    step = None
    if checkpoint is not None:
        value = files.read_torch(checkpoint) if files.container(checkpoint) == "zip" else {}
        hyper = value.get("hyper_parameters") if isinstance(value, Mapping) else None
        if isinstance(hyper, Mapping) and _is_whole(hyper) and "state_dict" in value:
            stated = _stated_config(checkpoint, hyper, alone=True)
            state = dict(files.tensors(value["state_dict"], checkpoint))
            step = value.get("global_step")
        elif path.is_file():
            raise ValueError(
                f"ema={average}: {path} is no checkpoint of a run; expected one, or a run's folder"
            )
    held = averages.held_by(state, run / averages.FOLDER, step)
    made = averages.make_average(average, held, str(path))
    # Without a checkpoint the snapshots say what network they are of.
    if not stated:
        stated = files.read_safetensors(made.files[-1])[1]
    read_from = (checkpoint,) if state and checkpoint is not None else ()
    return _with_adapters(made.state, (*read_from, *made.files), stated)


def _with_adapters(
    network: State, weights: tuple[Path, ...], stated: Mapping[str, Any]
) -> Checkpoint:
    """Return the checkpoint of a network beside whose weights adapters may have been trained.

    Raises:
        ValueError: what is said of the adapters does not fit them.
    """
    if stated.get("lora") is not None:
        try:
            network = merged(network, stated["lora"])
        except ValueError as error:
            raise ValueError(f"{weights[0]}: {error}") from None
    return Checkpoint(network, weights, stated, stated.get("vae"))


def _read_files(
    weights: tuple[Path, ...], ema: bool, raw: bool = False, alone: bool = True
) -> Checkpoint:
    """Read one file of weights, or several that together are one.

    ``raw`` weights were found where a trainer keeps no averaged ones. A file that is not ``alone``
    was found in a folder, whose config then comes before the one in the file.
    """
    # What is in the file, and what it says of its config; in pieces there are tensors alone.
    path = weights[0]
    value: Any
    said: Mapping[str, Any] = {}
    if len(weights) > 1:
        value = files.read_weights(weights)
    elif files.container(path) == "safetensors":
        value, said = files.read_safetensors(path)
        if any(name.startswith("transformer_blocks.") for name in value):
            raise ValueError(
                f"{path}: one file of a diffusers model; pass the folder that holds its config"
            )
    else:
        value = files.read_torch(path)
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: holds a {type(value).__name__}; {files.EXPECTED}")
        hyper = value.get("hyper_parameters")
        said = hyper if isinstance(hyper, Mapping) and _is_whole(hyper) else {}
    stated = _stated_config(path, said, alone)
    if stated.get("lora") is not None and "state_dict" not in value:  # a run's snapshot
        return _with_adapters(dict(files.tensors(value, path)), weights, stated)
    # A checkpoint of our own runs has a config, and perhaps adapters.
    if said and "state_dict" in value:
        return _read_own_run(path, value, stated, ema)
    args = {**_flat_config(path), **_arguments(value)}
    if trainers.is_deepspeed(value):
        value, raw = trainers.whole_module(value, path), True
    return _as_ours(weights, _network(path, value, stated, ema, raw), stated, args)


def _arguments(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the training script that a file holds."""
    for key in ("args", "hyper_parameters", "hparams", "config"):
        args = value.get(key)
        args = vars(args) if isinstance(args, Namespace) else args
        if isinstance(args, Mapping) and args:
            return _plain_config(args)
    return {}


def _plain_config(args: Mapping[Any, Any]) -> dict[str, Any]:
    """Return those arguments that are words or numbers."""
    kinds = (str, int, float)
    return {str(name): item for name, item in args.items() if isinstance(item, kinds)}


def _flat_config(path: Path) -> dict[str, Any]:
    """Return the arguments of a network's class as the hub's mixin leaves them in config.json."""
    config = path.with_name("config.json")
    said = files.read_json(config) if config.is_file() else {}
    return {} if any(key in said for key in REQUIRED) else _plain_config(said)


def _is_whole(config: Mapping[str, Any]) -> bool:
    return all(key in config for key in REQUIRED)


def _network(
    path: Path, value: Mapping[str, Any], stated: Mapping[str, Any], ema: bool, raw: bool
) -> State:
    """Return the network of a file's content, averaged or raw; ``raw`` tells of a single set.

    Raises:
        ValueError: the file lacks the weights that ``ema`` asks for, or holds no tensors.
    """
    # Lightning's own callback keeps the average where else the raw weights are.
    if "current_model_state" in value:
        value = {"ema": value.get("state_dict"), "model": value["current_model_state"]}
    # A family from outside is known by its config alone, and its names are left as they are.
    model = stated.get("model")
    described = isinstance(model, Mapping) and (FAMILY in model or TARGET in model)
    found = [] if described else sets.sets_in(value)
    if any(each.state for each in found):
        if len(found) == 1 and not found[0].averaged and _is_flat(value, found[0]):
            _single_set(path, ema, raw)
            return found[0].state
        return sets.chosen(found, ema, path)
    # What is not recognised is taken from the usual places, so that errors tell what is there.
    usual = {key: value[key] for key in ("ema", *RAW) if isinstance(value.get(key), Mapping)}
    if not usual:
        _single_set(path, ema, raw)
        return files.unwrapped(files.tensors(value, path))
    name = next((key for key in usual if (key == "ema") == ema), None)
    if name is None:
        raise ValueError(sets.no_such_kind(path, ema))
    return files.unwrapped(files.tensors(usual[name], path))


RAW = ("model", "state_dict")
"""Where a trainer's file usually has its raw weights."""


def _is_flat(value: Mapping[str, Any], found: sets.WeightSet) -> bool:
    """Whether a set stands in a file itself, under no key."""
    return any(
        isinstance(item, Tensor) and files.without_wrappers(str(name)).startswith(found.where)
        for name, item in value.items()
    )


def _as_ours(
    weights: tuple[Path, ...], state: State, stated: Mapping[str, Any], args: Mapping[str, Any]
) -> Checkpoint:
    """Return a file's checkpoint, read by the family that its config or its names tell."""
    model = stated.get("model", {})
    if isinstance(model, Mapping):  # What is none, is refused later.
        file = WeightsFile(weights[0], state, stated, args)
        state, stated = family_of(model, state).read(file)
    return Checkpoint(state, weights, stated, _stated_vae(stated, weights[0]))


def _stated_vae(stated: Mapping[str, Any], path: Path) -> str | Path | Mapping[str, Any] | None:
    """Return the autoencoder that a config names, which may be a folder beside the weights."""
    vae = stated.get("vae")
    if vae and isinstance(vae, str) and (path.parent / vae).is_dir():
        return path.parent / vae
    return vae


AVERAGED = "averaged.module."
"""Where a DiffusionModule keeps its averaged denoiser."""


def _read_own_run(
    path: Path, value: Mapping[str, Any], stated: Mapping[str, Any], ema: bool
) -> Checkpoint:
    """Read a Lightning checkpoint that holds our config.

    Ours holds the average as a module ``averaged`` beside ``denoiser``. With Lightning's callback
    the state_dict is the average, and the raw weights are in ``current_model_state``.
    """
    # Which set of weights is where.
    state = files.tensors(value.get("state_dict"), path)
    beside_raw = any(name.startswith(AVERAGED) for name in state)
    if ema and not beside_raw and "current_model_state" not in value:
        raise ValueError(sets.no_such_kind(path, ema))
    if beside_raw:
        state = {
            name.replace(AVERAGED, "denoiser."): tensor
            for name, tensor in state.items()
            if name.startswith(AVERAGED if ema else "denoiser.")
        }
    elif not ema:
        state = value.get("current_model_state", state)
    # Adapters may have been trained beside the weights.
    return _with_adapters(files.unwrapped(files.tensors(state, path)), (path,), stated)


@dataclass(frozen=True)
class PipelineIndex:
    """What is asked of a pipeline's ``model_index.json`` beside its parts.

    Example:
        >>> PipelineIndex({"0": "cat"}).id2label
        {'0': 'cat'}
    """

    id2label: Mapping[str, str] | None = None


def _read_pipeline(path: Path, ema: bool) -> Checkpoint:
    """Read a folder that diffusers saved of a class-conditional pipeline."""
    index = files.read_json(path / "model_index.json")
    name = str(index.get("_class_name"))
    if name in ENCODE:
        raise ValueError(
            f"{path}: a text model, {name}; pass prompt='...' or requests=FILE to "
            f"sample.py, or load it with sag_dit.load_text(ckpt, prompts)"
        )
    known = [family.pipeline for family in families().values() if family.pipeline]
    if name not in known:
        raise ValueError(
            f"{path}: a diffusers folder of {name}; expected "
            f"{' or '.join(known)}, which is class-conditional"
        )
    _single_set(path, ema)
    named = checked(index, PipelineIndex, str(path / "model_index.json"), open=True)
    labels = named.id2label or {}
    scheduler = path / "scheduler" / "scheduler_config.json"
    stated: dict[str, Any] = {}
    if scheduler.is_file():
        process, kind = read_scheduler(scheduler)
        stated = {"process": settings(process), "kind": kind}
    vae = path / "vae"
    return _read_transformer(path / "transformer", vae if vae.is_dir() else None, stated, labels)


def _read_transformer(
    path: Path,
    vae: Path | None,
    stated: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Read a folder of one of diffusers' networks, with the arithmetic of the published code."""
    config = files.read_json(path / "config.json")
    family = next((each for each in families().values() if each.reads_diffusers(config)), None)
    if family is None:
        known = ", ".join(each.diffusers for each in families().values() if each.diffusers)
        raise ValueError(f"{path}: a {config.get('_class_name')}; expected diffusers' {known}")
    weights = files.weights_files(path)
    if not weights:
        raise ValueError(f"{path}: no weights, or not all; expected diffusion_pytorch_model.*")
    state, model = family.from_diffusers(files.read_weights(weights), config, path)
    classes = range(model["num_classes"])
    names = [labels.get(str(i), str(i)) for i in classes] if labels else []
    return Checkpoint(state, weights, {**stated, "model": model, "class_names": names}, vae)


def config_beside(path: Path) -> dict[str, Any]:
    """Return the config beside a file, model.json for model.pt and config.json, else nothing."""
    return _stated_config(path, {}, alone=True)


def _stated_config(path: Path, said: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    """Join what a file says of its config with what is stated beside it.

    model.json is about model.pt and comes before all. config.json is about a folder: it comes
    before the file if the folder was asked for, else after it, and then it adds nothing to a whole
    config.
    """
    general, own = (
        files.read_json(place) if place.is_file() else {}
        for place in (path.with_name("config.json"), path.with_suffix(".json"))
    )
    # Such a file may be about anything: without a model it is no config of ours.
    own = own if isinstance(own.get("model"), Mapping) else {}
    if alone and (_is_whole(said) or not isinstance(general.get("model"), Mapping)):
        general = {}
    if not any(key in general for key in REQUIRED):
        general = {}  # see _flat_config
    joined: dict[str, Any] = {}
    for config in (general, said, own) if alone else (said, general, own):
        before, model = joined.get("model"), config.get("model")
        joined.update(config)
        if isinstance(before, Mapping) and isinstance(model, Mapping):
            joined["model"] = {**before, **model}
    return joined


def _single_set(path: Path, ema: bool, raw: bool = False) -> None:
    """Refuse ema=False where there is one set of weights, unless these are known to be raw."""
    if raw and ema:
        log.warning("%s: its trainer keeps no averaged weights; the raw ones are taken", path)
    if not ema and not raw:
        raise ValueError(
            f"ema=false: {path} holds one set of weights, taken to be the averaged ones, as all "
            f"published ones are; leave ema=true"
        )
