"""Each layout of checkpoints, read into one form: our parameter names and a partial config."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sag_dit.checkpoints import files, infer_unet, keys, published, sit
from sag_dit.checkpoints.lora import merged
from sag_dit.denoiser.prompts import ENCODE
from sag_dit.models import SIZES
from sag_dit.models.embeddings import sincos_positions


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        state: weights under our names, in the file's own precision.
        stated: what the checkpoint itself says of its config, perhaps nothing.
        files: the files that hold the weights.
        vae: the autoencoder that comes with it, a folder or a name.
    """

    state: keys.State
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
        return _as_ours(path, keys.unwrapped(state), stated or config_beside(path))
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
        return Checkpoint(keys.unwrapped(state), (exported,), stated, stated.get("vae"))
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
        state = keys.unwrapped(files.tensors(value[name], path))
        said = _from_args(value.get("args"), state)
        stated = {**said, **stated, "model": {**said["model"], **stated.get("model", {})}}
        return _as_ours(path, state, stated, value.get("args"))
    state = keys.unwrapped(files.tensors(value, path))
    _single_set(path, ema)
    return _as_ours(path, state, stated)


def _as_ours(
    path: Path, state: keys.State, stated: Mapping[str, Any], args: Any = None
) -> Checkpoint:
    """Return a file's checkpoint, a published UNet or a SiT in our form.

    A config that states a process is one of ours, and its weights are read as they are.
    """
    if published.is_published(state):
        converted = infer_unet.convert(state, path, stated)
        process = {"process": converted.process} if converted.process else {}
        own = {name: value for name, value in stated.items() if name != published.ORDER}
        config = {**process, **own, "model": converted.model}
        return Checkpoint(converted.state, (path,), config, stated.get("vae"))
    prediction = None if "process" in stated else sit.prediction_of(path, args)
    if prediction is not None:
        state, said = sit.from_sit(state, prediction)
        stated = {**said, **stated}
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
    stated = value.get("hyper_parameters")
    if not isinstance(stated, Mapping) or not isinstance(stated.get("model"), Mapping):
        stated = beside
    network = keys.unwrapped(files.tensors(state, path))
    if stated.get("lora") is not None:
        try:
            network = merged(network, stated["lora"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return Checkpoint(network, (path,), stated, stated.get("vae"))


def _from_args(args: Any, state: keys.State) -> dict[str, Any]:
    """Return what the arguments of DiT's or SiT's official training script say."""
    said: dict[str, Any] = {"model": {}}
    if not isinstance(args, Namespace):
        return said
    size = SIZES.get(str(getattr(args, "model", "")).replace("SiT-", "DiT-"))
    proj = state.get("x_embedder.proj.weight")
    if size and proj is not None and proj.shape[0] == size["hidden_size"]:
        said["model"]["num_heads"] = size["num_heads"]
    if isinstance(getattr(args, "num_classes", None), int):
        said["model"]["num_classes"] = args.num_classes
    if proj is not None and proj.shape[1] == 4 and getattr(args, "vae", None) in ("ema", "mse"):
        said["vae"] = args.vae
    return said


def _read_pipeline(path: Path, ema: bool) -> Checkpoint:
    """Read a folder that diffusers saved of a DiTPipeline."""
    index = files.read_json(path / "model_index.json")
    if index.get("_class_name") in ENCODE:
        raise ValueError(
            f"{path}: a text model, {index['_class_name']}; pass prompt='...' or requests=FILE to "
            f"sample.py, or load it with sag_dit.load_text(ckpt, prompts)"
        )
    if index.get("_class_name") != "DiTPipeline":
        raise ValueError(
            f"{path}: a diffusers folder of {index.get('_class_name')}; expected DiTPipeline, the "
            f"class-conditional DiT"
        )
    _single_set(path, ema)
    labels = index.get("id2label") or {}
    scheduler = path / "scheduler" / "scheduler_config.json"
    stated = _from_scheduler(scheduler) if scheduler.is_file() else {}
    vae = path / "vae"
    return _read_transformer(path / "transformer", vae if vae.is_dir() else None, stated, labels)


def _read_transformer(
    path: Path,
    vae: Path | None,
    stated: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Read a folder of diffusers' DiTTransformer2DModel, with the reference's arithmetic.

    diffusers itself divides the time's frequencies by 127 instead of 128 and adds 1e-5 instead of
    1e-6 in a norm; the published weights were trained with the latter of each.
    """
    config = files.read_json(path / "config.json")
    name = config.get("_class_name")
    # Published folders still bear the name of the class that DiT was split from.
    known = name == "DiTTransformer2DModel" or (
        name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    )
    if not known:
        raise ValueError(f"{path}: a {name}; expected diffusers' DiTTransformer2DModel")
    expected = {"attention_bias": True, "activation_fn": "gelu-approximate"}
    strange = [key for key, value in expected.items() if config.get(key, value) != value]
    if strange:
        raise ValueError(f"{path}: {strange[0]}={config[strange[0]]!r}, which no DiT has")
    heads = config.get("num_attention_heads", 16)
    hidden = heads * config.get("attention_head_dim", 72)
    channels, patch = config.get("in_channels", 4), config.get("patch_size", 2)
    size, classes = config.get("sample_size", 32), config.get("num_embeds_ada_norm", 1000)
    depth = config.get("num_layers", 28)
    weights = files.weights_files(path)
    if not weights:
        raise ValueError(f"{path}: no weights, or not all; expected diffusion_pytorch_model.*")
    try:
        state = keys.from_diffusers(files.read_weights(weights), depth)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    state["pos_embed"] = sincos_positions(hidden, (size // patch, size // patch))[None]
    model = {
        "input_size": size,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
        "num_classes": classes,
        "learn_sigma": (config.get("out_channels") or channels) == 2 * channels,
    }
    names = [labels.get(str(i), str(i)) for i in range(classes)] if labels else []
    return Checkpoint(state, weights, {**stated, "model": model, "class_names": names}, vae)


def _from_scheduler(path: Path) -> dict[str, Any]:
    """Return the process and kind that a diffusers scheduler's config states."""
    config = files.read_json(path)
    steps = config.get("num_train_timesteps", 1000)
    schedule = config.get("beta_schedule", "linear")
    betas = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    names = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
    kind = config.get("prediction_type", "epsilon")
    scaled = all(
        math.isclose(beta, published * 1000 / steps)
        for beta, published in zip(betas, (1e-4, 0.02), strict=True)
    )
    changed = config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr")
    known = schedule in names and kind in kinds and not changed
    if not known or (schedule == "linear" and not scaled):
        raise ValueError(
            f"{path}: beta_schedule={schedule!r} from {betas[0]} to {betas[1]} in {steps} steps, "
            f"prediction_type={kind!r}; expected linear from 1e-4 to 0.02 (at 1000 steps) or "
            f"squaredcos_cap_v2, neither trained nor rescaled, and one of {', '.join(kinds)}"
        )
    return {
        "process": {"schedule": names[schedule], "num_timesteps": steps},
        "kind": kinds[kind],
    }


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
