"""Text models: a diffusers folder of Stable Diffusion, PixArt, SD 3 or FLUX, asked with prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sag_dit.checkpoints import files, hub, zoo
from sag_dit.checkpoints.formats import read_scheduler
from sag_dit.checkpoints.loading import find_codec
from sag_dit.checkpoints.model import Model, plain_name
from sag_dit.codec import VAECodec
from sag_dit.denoiser.prompts import ENCODE, Wording
from sag_dit.denoiser.text_conditional import TokenGrid, layout_of
from sag_dit.identity import settings
from sag_dit.process import Flow

BATCH_SIZE = 4
MAX_LENGTH = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300, "FluxPipeline": 512}
"""Text tokens of a T5, as the pipelines have them; 256 elsewhere."""
KNOWN = {
    "diffusers": re.compile(
        r"AutoencoderKL|UNet2DConditionModel|(PixArt|SD3|Flux)?Transformer2DModel|\w+Scheduler"
    ),
    "transformers": re.compile(
        r"CLIPTextModel(WithProjection)?|CLIPVisionModelWithProjection|CLIPTokenizer(Fast)?"
        r"|CLIP(ImageProcessor(Fast|Pil)?|FeatureExtractor)|T5EncoderModel|T5Tokenizer(Fast)?"
        r"|Siglip(VisionModel|ImageProcessor)"
    ),
    "stable_diffusion": re.compile(r"StableDiffusionSafetyChecker"),
}
"""The libraries and classes that a pipeline's parts may be of."""
FOREIGN = ("auto_map", "custom_pipeline", "attn_implementation", "_attn_implementation")
"""Keys of a part's config that would have code fetched and run."""
DISTILLED = 3.5
"""What FLUX dev is told of guidance unless asked otherwise, as in its pipeline."""


def is_text(ckpt: str | Path) -> bool:
    """Whether a checkpoint is a folder, or a downloaded hub repository, of a text model.

    Raises:
        ValueError: there is no such checkpoint.

    Example:
        >>> is_text("digits")
        False
    """
    return _pipeline(zoo.locate(ckpt).path) in ENCODE


def _pipeline(path: Path) -> str | None:
    index = path / "model_index.json"
    name = files.read_json(index).get("_class_name") if index.is_file() else None
    return name if isinstance(name, str) else None


def check_parts(folder: Path) -> None:
    """Refuse a pipeline's folder that would have Python of its own, or of others, run.

    diffusers looks for a class first in the folder, and before 0.38 ran what it found there.

    Raises:
        ValueError: a part is of an unknown class, brings Python, or names code elsewhere.
    """
    # Which classes the parts are of: [library, class], or [null, null] for a part that is left out.
    parts = {
        name: value
        for name, value in files.read_json(folder / "model_index.json").items()
        if not name.startswith("_") and isinstance(value, list) and value != [None, None]
    }
    for name, value in parts.items():
        library, made = value if len(value) == 2 else (None, None)
        known = KNOWN.get(library) if isinstance(library, str) else None
        if known is None or not isinstance(made, str) or not known.fullmatch(made):
            raise ValueError(
                f"{folder / 'model_index.json'}: {name} is of {value!r}; expected a class of "
                f"diffusers or transformers that this pipeline has, as no folder's own code is run"
            )
        if Path(name).name != name:
            raise ValueError(f"{folder / 'model_index.json'}: {name!r} is no part's name")
    # What lies in the parts: no Python, and no config that has it fetched.
    for part in (folder / name for name in parts):
        python = next(iter(sorted(part.glob("*.py"))), None)
        if python is not None:
            raise ValueError(
                f"{python}: a model folder's own Python, which is never run; if the model works "
                f"without it, delete it"
            )
        for config in sorted(part.glob("*config.json")):
            foreign = [key for key in FOREIGN if key in files.read_json(config)]
            if foreign:
                raise ValueError(
                    f"{config}: its {foreign[0]} names code that would be run; if the model works "
                    f"without it, delete this key"
                )


def load_text(
    ckpt: str | Path,
    prompts: Sequence[str],
    *,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    vae: str | Path | Mapping[str, Any] | None = None,
) -> Model:
    """Load a text model as one whose classes are ``prompts``.

    ``size`` is (height, width) in pixels, by default what the network was made for. ``guidance`` is
    told to models that were distilled from guidance (FLUX dev), 3.5 by default. Text encoders are
    loaded when a prompt is first asked for.

    Raises:
        ValueError: it is no text model, a part of it is missing or not known, the size does not
            fit, no prompt is given, or a guidance that the model was not distilled from.

    Example::

        model = load_text("stabilityai/stable-diffusion-3-medium-diffusers", ["a red fox"])
        images = sag_dit.sample(model, [0], guidance=[sag_dit.CFG(5.0)])
    """
    # What can be refused without the weights.
    found = zoo.locate(ckpt)
    name = _pipeline(found.path)
    if name is None or name not in ENCODE:
        raise ValueError(
            f"ckpt={ckpt}: {name or 'no diffusers pipeline'}, which takes no prompt; ask for "
            f"classes=... instead, or choose a folder or hub repository of {', '.join(ENCODE)}"
        )
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts={list(prompts)}: expected at least one prompt, as text")
    # The pipeline's parts: its autoencoder and its network, in the layout of its tokens.
    folder = found.path if Path(ckpt).exists() else hub.whole(str(ckpt))
    check_parts(folder)
    index = files.read_json(folder / "model_index.json")
    part = "unet" if "unet" in index else "transformer"
    if not isinstance(index.get(part), list):
        raise ValueError(f"{folder / 'model_index.json'}: expected a unet or a transformer")
    source = dict(vae) if isinstance(vae, Mapping) else str(vae or folder / "vae")
    codec = find_codec(source)
    if not isinstance(codec, VAECodec):
        raise ValueError(f"{folder}: expected an autoencoder in {folder / 'vae'}")
    network = _text_network(folder / part, index[part][1])
    config: Any = network.config
    layout = layout_of(network)
    size = size or _own_size(config, codec.factor, name)
    cells = _cells(size, codec.factor, int(config.get("patch_size") or 1), name)
    # What the prompts are told beside their words.
    distilled = bool(config.get("guidance_embeds"))
    if guidance is not None and not distilled:
        raise ValueError(
            f"text.guidance={guidance:g}: {ckpt} was not distilled from guidance and is not told "
            f"of it; leave it out, and guide by cfg_scale"
        )
    wording = Wording(
        size=size,
        cells=cells,
        negative=negative_prompt,
        max_length=MAX_LENGTH.get(name, 256),
        guidance=DISTILLED if distilled and guidance is None else guidance,
        tells_size=bool(getattr(network, "use_additional_conditions", False)),
    )
    # The denoiser, whose encoders are loaded when a prompt is asked for.
    process, kind = read_scheduler(folder / "scheduler" / "scheduler_config.json", cells)
    denoiser = layout(
        network,
        process,
        kind,
        TokenGrid(cells, wording.max_length if name == "FluxPipeline" else 0),
        prompts=prompts,
        encoder=_Encoder(folder, name, part, wording),
    )
    # ``start`` came later, but has always been told here.
    start = {"start": process.start} if isinstance(process, Flow) else {}
    described = {
        "pipeline": name,
        "network": {key: value for key, value in config.items() if not key.startswith("_")},
        "process": {**settings(process), **start},
        "kind": kind,
        "wording": settings(wording),
        "codec": codec.config(),
    }
    return Model(
        denoiser=denoiser.eval(),
        codec=codec,
        name=plain_name(found.name),
        sha256=files.sha256(_weights(folder, part)),
        config=described,
        class_names=denoiser.class_names,
        defaults={"batch_size": BATCH_SIZE},
        vae=source,
    )


class _Encoder:
    """The pipeline without its network and autoencoder, loaded when first asked."""

    def __init__(self, folder: Path, name: str, part: str, wording: Wording) -> None:
        self.folder = folder
        self.name = name
        self.part = part
        self.wording = wording
        self.pipe: Any = None

    def __call__(self, prompt: str | None, device: torch.device) -> Any:
        """Encode one prompt, so that what it becomes does not depend on others."""
        if self.pipe is None:
            self.pipe = self._loaded()
        self.pipe.to(device, torch.float32)
        return ENCODE[self.name](self.pipe, prompt, self.wording, device)

    def _loaded(self) -> Any:
        import diffusers

        # None skips a part.
        left_out: dict[str, Any] = {self.part: None, "vae": None}
        if self.name == "StableDiffusionPipeline":
            left_out |= {"safety_checker": None, "requires_safety_checker": False}
        made = getattr(diffusers, self.name)
        try:
            return made.from_pretrained(
                self.folder,
                variant=_precision_variant(files.weights_files(self.folder / self.part)[0]),
                local_files_only=True,
                **left_out,
            )
        except ImportError as error:
            raise ValueError(
                f"prompts need transformers and sentencepiece, pip install -e '.[text]': {error}"
            ) from error


def _text_network(folder: Path, name: str) -> nn.Module:
    """Build a pipeline's network in float32, on the CPU, in eval mode.

    Raises:
        ValueError: the weights are missing, damaged or do not fit the config.
    """
    import diffusers

    weights = files.weights_files(folder)
    if not weights:
        raise ValueError(f"{folder}: no weights, or not all; expected diffusion_pytorch_model.*")
    try:
        network, report = getattr(diffusers, name).from_pretrained(
            folder,
            variant=_precision_variant(weights[0]),
            use_safetensors=weights[0].suffix == ".safetensors",
            # Else memory for the initial values stands beside that for the weights.
            low_cpu_mem_usage=find_spec("accelerate") is not None,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and what it calls raise almost any type
        raise ValueError(
            f"{folder}: the network could not be loaded; expected undamaged weights that fit its "
            f"config.json ({type(error).__name__}: {str(error).strip()[:300]})"
        ) from error
    # diffusers would go on with random values.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{folder}: the weights lack {len(missing)} of the network's tensors, first "
            f"{', '.join(missing[:3])}"
        )
    built: nn.Module = network.float().eval().requires_grad_(False)
    return built


def _precision_variant(weights: Path) -> str | None:
    """Read fp16 from diffusion_pytorch_model.fp16.safetensors, or from ...fp16-00001-of-00002..."""
    _, *between, _ = weights.name.split(".")
    return between[0].split("-")[0] if between else None


def _own_size(config: Any, factor: int, name: str) -> tuple[int, int]:
    """Return the size in pixels that a network was made for."""
    side = 128 if name == "FluxPipeline" else config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * factor, width * factor


def _cells(size: tuple[int, int], factor: int, patch: int, name: str) -> tuple[int, int]:
    """Return the size of the latent.

    Raises:
        ValueError: the image's size is no multiple of a token's.
    """
    unit = factor * (2 if name == "FluxPipeline" else patch)
    if any(side < unit or side % unit for side in size):
        raise ValueError(f"size={list(size)}: expected multiples of {unit}, [height, width]")
    return size[0] // factor, size[1] // factor


def _weights(folder: Path, part: str) -> tuple[Path, ...]:
    """Return the weight files that determine what a prompt becomes: network and encoders."""
    found = [*files.weights_files(folder / part)]
    for encoder in sorted(folder.glob("text_encoder*")):
        safe = sorted(encoder.glob("model*.safetensors"))
        found += safe or sorted(encoder.glob("pytorch_model*.bin"))
    return tuple(found)
