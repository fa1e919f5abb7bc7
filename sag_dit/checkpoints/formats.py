"""Each layout of checkpoints, read into one form: our parameter names and a partial config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from torch import Tensor

from sag_dit.bounds import Bounds, Natural, Share, checked
from sag_dit.checkpoints import files
from sag_dit.denoiser.prompts import ENCODE
from sag_dit.identity import settings
from sag_dit.models.family import State, WeightsFile, families, family_of
from sag_dit.process import DDPM, Flow, Process
from sag_dit.process.base import OutputKind
from sag_dit.process.ddpm import BETAS

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
    """

    state: State
    files: tuple[Path, ...]
    stated: Mapping[str, Any] = field(default_factory=dict)
    vae: str | Path | None = None


def read(path: Path, ema: bool) -> Checkpoint:
    """Read a checkpoint of any layout; which one, is read from the files themselves.

    Raises:
        ValueError: it is damaged, foreign, or lacks the weights that ``ema`` asks for.
    """
    if path.is_dir():
        return _read_folder(path, ema)
    if files.container(path) == "safetensors":
        state, stated = files.read_safetensors(path)
        if any(name.startswith("transformer_blocks.") for name in state):
            raise ValueError(
                f"{path}: one file of a diffusers model; pass the folder that holds its config"
            )
        _single_set(path, ema)
        return _as_ours(path, files.unwrapped(state), stated or config_beside(path))
    return _read_torch(path, ema)


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
    candidates += [
        file
        for file in (path / "checkpoints").glob("*")
        if file.suffix in (".ckpt", ".pt") and file.is_file() and not file.name.startswith("best")
    ]
    # A run's export is its end, unless the run went on afterwards. Its best checkpoint is asked
    # for by its own path.
    newest = max(candidates, key=lambda file: file.stat().st_mtime_ns, default=exported)
    if newest != exported:
        return _read_torch(newest, ema)
    if exported.is_file():
        _single_set(path, ema)
        state, stated = files.read_safetensors(exported)
        stated = files.read_json(config) if config.is_file() else stated
        return Checkpoint(files.unwrapped(state), (exported,), stated, stated.get("vae"))
    raise ValueError(
        f"{path}: a folder without checkpoint; expected checkpoints/*.ckpt or *.pt (a run), "
        f"model.safetensors and config.json (an export), or model_index.json (diffusers)"
    )


def _read_torch(path: Path, ema: bool) -> Checkpoint:
    """Read an official .pt, flat or with model, ema and args, or a Lightning .ckpt."""
    value = files.read_torch(path)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: holds a {type(value).__name__}; {files.EXPECTED}")
    stated = config_beside(path)
    if "state_dict" in value:
        return _read_lightning(path, value, stated, ema)
    if isinstance(value.get("ema"), Mapping) or isinstance(value.get("model"), Mapping):
        name = "ema" if ema else "model"
        if not isinstance(value.get(name), Mapping):
            raise ValueError(_lacking(path, ema))
        state = files.unwrapped(files.tensors(value[name], path))
        return _as_ours(path, state, stated, value.get("args"))
    state = files.unwrapped(files.tensors(value, path))
    _single_set(path, ema)
    return _as_ours(path, state, stated)


def _as_ours(path: Path, state: State, stated: Mapping[str, Any], args: Any = None) -> Checkpoint:
    """Return a file's checkpoint, read by the family that its config or its names tell."""
    model = stated.get("model", {})
    if isinstance(model, Mapping):  # What is none, is refused later.
        file = WeightsFile(path, state, stated, args)
        state, stated = family_of(model, state).read(file)
    return Checkpoint(state, (path,), stated, stated.get("vae"))


AVERAGED = "averaged.module."
"""Where a DiffusionModule keeps its averaged denoiser."""


def _read_lightning(
    path: Path, value: Mapping[str, Any], beside: Mapping[str, Any], ema: bool
) -> Checkpoint:
    """Read a Lightning checkpoint: ours, or one of Lightning's own averaging callback.

    Ours holds the average as a module ``averaged`` beside ``denoiser``. With Lightning's callback
    the state_dict is the average, and the raw weights are in ``current_model_state``.
    """
    # Which set of weights is where.
    state = value["state_dict"]
    beside_raw = any(name.startswith(AVERAGED) for name in state)
    if ema and not beside_raw and "current_model_state" not in value:
        raise ValueError(_lacking(path, ema))
    if beside_raw:
        state = {
            name.replace(AVERAGED, "denoiser."): tensor
            for name, tensor in state.items()
            if name.startswith(AVERAGED if ema else "denoiser.")
        }
    elif not ema:
        state = value.get("current_model_state", state)
    # Its config, and adapters that were trained beside the weights.
    stated = value.get("hyper_parameters")
    if not isinstance(stated, Mapping) or not isinstance(stated.get("model"), Mapping):
        stated = beside
    network = files.unwrapped(files.tensors(state, path))
    if stated.get("lora") is not None:
        try:
            network = merged(network, stated["lora"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return Checkpoint(network, (path,), stated, stated.get("vae"))


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
    if index.get("_class_name") in ENCODE:
        raise ValueError(
            f"{path}: a text model, {index['_class_name']}; pass prompt='...' or requests=FILE to "
            f"sample.py, or load it with sag_dit.load_text(ckpt, prompts)"
        )
    known = [family.pipeline for family in families().values() if family.pipeline]
    if index.get("_class_name") not in known:
        raise ValueError(
            f"{path}: a diffusers folder of {index.get('_class_name')}; expected "
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
    """Return the config beside a file, model.json for model.pt or config.json, else nothing."""
    for candidate in (path.with_suffix(".json"), path.with_name("config.json")):
        if candidate.is_file():
            config = files.read_json(candidate)
            if isinstance(config.get("model"), Mapping):
                return config
    return {}


def _single_set(path: Path, ema: bool) -> None:
    """Refuse ema=False where there is one set of weights."""
    if not ema:
        raise ValueError(
            f"ema=false: {path} holds one set of weights, taken to be the averaged ones, as all "
            f"published ones are; leave ema=true"
        )


def _lacking(path: Path, ema: bool) -> str:
    kind, remedy = ("averaged (EMA)", "ema=false") if ema else ("raw", "ema=true")
    return f"ema={str(ema).lower()}: {path} holds no {kind} weights; use {remedy}"
