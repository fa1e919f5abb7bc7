"""load: from a name or a path to a model that is ready to sample."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from sag_dit.bounds import checked
from sag_dit.checkpoints import files, formats, zoo
from sag_dit.checkpoints.config import Defaults, build, build_process
from sag_dit.checkpoints.ldm_autoencoders import ldm_file, read_ldm_autoencoder
from sag_dit.checkpoints.model import Model, from_denoiser
from sag_dit.codec import Codec, IdentityCodec, VAECodec
from sag_dit.denoiser import ClassConditional
from sag_dit.models.family import WeightsFile, family_for, family_of
from sag_dit.models.network import Resizable
from sag_dit.models.unet.adapter import CLASSIFIER_SOURCE, read_classifier
from sag_dit.untrusted import TARGET, own_class

if TYPE_CHECKING:
    from sag_dit.models.unet.classifier import Classifier


SHOWN_KEYS = 3


def load(
    ckpt: str | Path,
    *,
    ema: bool | float = True,
    vae: str | Path | Mapping[str, Any] | None = None,
    num_heads: int | None = None,
    size: tuple[int, int] | None = None,
) -> Model:
    """Load a published name, a file or folder of any supported layout, or a hub repository.

    ``ema`` chooses averaged or raw weights, or as a number another average of one of our runs: a
    decay, or below 0.2887 the sigma_rel of a power-function average, see
    :mod:`sag_dit.checkpoints.averages`. ``vae`` overrides the autoencoder of a latent model: a
    folder, ``ema``, ``mse`` or a hub repository, or {"_target_": "my_vae.Mine", ...}, a class of
    your own and its arguments. ``num_heads`` overrides what the checkpoint says
    or what is assumed of it. ``size`` is the height and width in pixels of other images than it
    draws by itself, see :func:`at_size`.

    Raises:
        ValueError: the checkpoint or its autoencoder is not found, damaged, foreign or does not
            fit; or it does not hold the weights that ``ema`` asks for.

    Example:
        >>> load("digits").denoiser.latent_shape
        (1, 8, 8)
    """
    found = zoo.locate(ckpt)
    checkpoint = formats.read(found.path, ema)
    config = full_config(checkpoint, num_heads, latent=vae is not None)
    # Before the weights are copied, so that a missing autoencoder is told at once.
    source = autoencoder(config, vae or checkpoint.vae)
    codec = choose_codec(config, source)
    denoiser = filled(config, checkpoint)
    return from_denoiser(
        denoiser if size is None else at_size(denoiser, size, codec.factor),
        found.name,
        codec=codec,
        sha256=files.sha256(checkpoint.files),
        weights=_weights(ema),
        defaults=config.get("defaults"),
        vae=source,
    )


def at_size(denoiser: ClassConditional, size: tuple[int, int], factor: int = 1) -> ClassConditional:
    """Return a DiT's denoiser of images of another height and width, in pixels.

    Its positions there are its own, resized, as in training on aspect buckets. ``factor`` is the
    autoencoder's pixels per cell. The network is changed in place.

    Raises:
        ValueError: the network is no DiT, or the size no multiple of factor and patch.

    Example:
        >>> from sag_dit.models import DiT
        >>> from sag_dit.process import DDPM
        >>> network = DiT(input_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=2)
        >>> at_size(ClassConditional(network, DDPM()), (6, 12)).latent_shape
        (1, 6, 12)
    """
    network, told = denoiser.network, f"text.size=[{size[0]},{size[1]}]"
    if not isinstance(network, Resizable):
        raise ValueError(
            f"{told}: a {type(network).__name__} draws images of its own size alone: expected null"
        )
    cell = factor * network.patch_size
    if size[0] % cell or size[1] % cell:
        raise ValueError(
            f"{told}: expected multiples of {cell}, the autoencoder's factor {factor} times the "
            f"network's patch_size={network.patch_size}"
        )
    network.resize((size[0] // factor, size[1] // factor))
    return ClassConditional(
        network, denoiser.process, denoiser.kind, denoiser.x_0_range, denoiser.class_names
    )


def _weights(ema: bool | float) -> str:
    if isinstance(ema, bool):
        return "ema" if ema else "raw"
    return f"ema {ema}"


def load_denoiser(ckpt: str | Path, *, ema: bool | float = True) -> ClassConditional:
    """Load a model without its autoencoder, to be asked beside another one.

    Raises:
        ValueError: as :func:`load`.

    Example:
        >>> load_denoiser("digits").class_names[:3]
        ('0', '1', '2')
    """
    found = zoo.locate(ckpt)
    checkpoint = formats.read(found.path, ema)
    return filled(full_config(checkpoint), checkpoint)


def filled(config: Mapping[str, Any], checkpoint: formats.Checkpoint) -> ClassConditional:
    """Build the denoiser of a whole config and give it its weights.

    Raises:
        ValueError: the config is of no network, or the weights do not fit it.
    """
    try:
        denoiser = build(config, to_fill=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    source = family_for(denoiser.network).source
    fill(denoiser.network, checkpoint.state, checkpoint.path, source)
    return denoiser.eval()


def full_config(
    checkpoint: formats.Checkpoint, num_heads: int | None = None, latent: bool = False
) -> dict[str, Any]:
    """Complete what a checkpoint says of its config with what its weights tell.

    A model of one or three channels is a pixel model unless an autoencoder comes with it
    (``latent``). Unstated, process and kind are the published ones: linear betas, 1000 steps, eps;
    the kind of a flow is v.

    Raises:
        ValueError: a stated value is of the wrong kind, or the weights are of no known network.
    """
    path, stated = checkpoint.path, dict(checkpoint.stated)
    for key in ("model", "process", "defaults"):
        if not isinstance(stated.get(key, {}), Mapping):
            raise ValueError(f"{path}: its config's {key} is {stated[key]!r}; expected a mapping")
    checked(
        stated.get("defaults", {}), Defaults, f"{path}: its config", prefix="defaults.", open=True
    )
    files.refuse_spread(checkpoint.state, path)
    model = stated.get("model", {})
    model = family_of(model, checkpoint.state).infer(checkpoint.state, path, model, num_heads)
    latent = latent or checkpoint.vae is not None
    pixels = model["in_channels"] in (1, 3) and not latent
    try:
        process = build_process(stated.get("process", {}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {
        "kind": process.usual_kind,
        "process": {},
        "x_0_range": (-1.0, 1.0) if pixels else None,
        **stated,
        "model": model,
    }


Autoencoder: TypeAlias = str | Mapping[str, Any]
"""Where one is found: a folder or a repository, or a class of the user's own and its arguments."""


def autoencoder(
    config: Mapping[str, Any], vae: str | Path | Mapping[str, Any] | None
) -> Autoencoder | None:
    """Return the autoencoder of a model: the given one, else what its channels suggest.

    One or three channels are pixels (None), four the latents of Stable Diffusion's autoencoder.

    Raises:
        ValueError: none is given, and the channels suggest none.
    """
    channels = config["model"]["in_channels"]
    if vae is not None:
        return autoencoder_named(vae)
    if channels in (1, 3):
        return None
    if channels != 4:
        raise ValueError(
            f"a model of {channels} channels: expected 1 or 3 (pixels) or 4 (latents of Stable "
            f"Diffusion's autoencoder); pass the model's own autoencoder: vae=PATH"
        )
    return zoo.DEFAULT_VAE


def autoencoder_named(vae: str | Path | Mapping[str, Any]) -> str | dict[str, Any]:
    """Return how what is made with an autoencoder records it: a local one by its whole path."""
    if isinstance(vae, Mapping):
        return dict(vae)
    path = Path(vae).expanduser()
    return str(path.absolute() if path.exists() else vae)


def find_codec(vae: Autoencoder | None, slice_size: int = 1) -> Codec:
    """Find an autoencoder; none means pixels.

    The weights of diffusers' layout are read at first use. ``slice_size`` images are coded at once.

    Raises:
        ValueError: it is not found or incomplete, or a class that is not imported.
    """
    if vae is None:
        return IdentityCodec()
    if isinstance(vae, Mapping):
        return VAECodec(own_autoencoder(vae), slice_size)
    folder = zoo.locate_vae(vae)
    file = ldm_file(folder)
    if file is not None:
        return VAECodec(read_ldm_autoencoder(file), slice_size, sha256=files.sha256((file,)))
    weights = files.weights_files(folder)
    if not weights:
        raise ValueError(
            f"vae={folder}: no weights, or not all of them; expected diffusion_pytorch_model.*"
        )
    return VAECodec(folder, slice_size, sha256=files.sha256(weights))


def own_autoencoder(vae: Mapping[str, Any]) -> nn.Module:
    """Build an autoencoder of the user's own from the path of its class and its arguments.

    Raises:
        ValueError: its class is not imported or no torch module, or it refuses an argument.
    """
    kind = own_class(vae.get(TARGET), f"vae.{TARGET}")
    if not issubclass(kind, nn.Module):
        raise ValueError(f"vae.{TARGET}={vae[TARGET]}: expected a torch module")
    try:
        made: nn.Module = kind(**{name: each for name, each in vae.items() if name != TARGET})
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"vae: {vae[TARGET]} cannot be built ({error})") from error
    return made.eval().requires_grad_(False)


def choose_codec(config: Mapping[str, Any], vae: Autoencoder | None) -> Codec:
    """Find a model's autoencoder and check that it fits.

    Raises:
        ValueError: it is not found, incomplete, or has another number of channels.
    """
    codec = find_codec(vae)
    channels = config["model"]["in_channels"]
    if isinstance(codec, VAECodec) and codec.latent_channels != channels:
        raise ValueError(
            f"vae={vae}: its latents have {codec.latent_channels} channels and the model has "
            f"{channels}; pass the autoencoder that the model was trained with: vae=PATH"
        )
    return codec


def fill(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, source: str = "its network"
) -> None:
    """Give a network (also one without memory) its weights, as float32.

    ``source`` says in an error whose parameter names are expected.

    Raises:
        ValueError: names or shapes differ, or weights are whole numbers; the first are named.
    """
    # Names and shapes have to be those of the network, all of them; one that compiles a part of
    # itself has the names of wrappers, which were taken off when the file was read.
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    own = {files.without_wrappers(name): name for name in expected}
    state = {own.get(name, name): tensor for name, tensor in state.items()}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    differing = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems = [
        f"{len(keys)} {what}: {'; '.join(keys[:SHOWN_KEYS])}{', ...' * (len(keys) > SHOWN_KEYS)}"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", differing),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"{path}: the weights do not fit the model\n"
            + "\n".join(problems)
            + f"\nexpected the parameters of {source}; if a config comes "
            "with the file, see that it is this file's"
        )
    # Whole numbers in the place of real ones are quantised, and mean nothing without their scales.
    real = [n for n, tensor in network.state_dict().items() if tensor.is_floating_point()]
    for name in real:
        if not state[name].is_floating_point():
            raise ValueError(
                f"{path}: {name} is {str(state[name].dtype).removeprefix('torch.')}, as quantised "
                f"weights are, whose scales are not read; expected weights in float32, float16 or "
                f"bfloat16"
            )
    # Copies, because a mapped file may change under a running program.
    copies = {
        name: tensor.detach().to(torch.float32, copy=True).contiguous()
        for name, tensor in state.items()
    }
    network.load_state_dict(copies, assign=True)


def load_classifier(classifier: str | Path) -> Classifier:
    """Load one of ADM's classifiers of noisy images, by its published name or a file's path.

    It is a module (x_t, t) -> logits, in eval mode, float32, on the CPU, its weights frozen.

    Raises:
        ValueError: it is not found, damaged, or no classifier.

    Example::

        classifier = load_classifier("64x64_classifier.pt")
    """
    path = zoo.locate_classifier(classifier).path
    state = files.unwrapped(files.tensors(files.read_torch(path), path))
    state, network = read_classifier(WeightsFile(path, state, formats.config_beside(path)))
    fill(network, state, path, CLASSIFIER_SOURCE)
    return network.eval().requires_grad_(False)
