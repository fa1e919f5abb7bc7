"""DiT in the files of other programs: facebookresearch/DiT's flat file and diffusers' folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sag_dit.models.dit.network import POSITION_TOLERANCE, sincos_positions
from sag_dit.models.family import Layout, Source, State
from sag_dit.models.unfilled import unfilled
from sag_dit.process import DDPM

AUTOENCODER = "AutoencoderKL"
"""What DiTPipeline decodes with."""
PIPELINE_NULL = 1000
"""The label that DiTPipeline takes for the null class, whatever the model."""

DIFFUSERS_ARITHMETIC = (
    "diffusers' arithmetic differs: it divides the exponents of the time's frequencies by 127, "
    "where the published code has 128, and its default for a LayerNorm's eps is 1e-5, where this "
    "folder states the published 1e-6. So its predictions, and its images, are not those of the "
    "source; by how much depends on the weights. sag_dit reads this folder with the published "
    "constants"
)
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
"""Our schedules by diffusers' names."""
KINDS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}

# ours -> diffusers, once per model
MODEL = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# ours -> diffusers, within a block
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# ours, once per model -> diffusers, repeated in every block
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# The table of positions is computed; some converters leave it in the file.
POSITIONS = ("pos_embed", "pos_embed.pos_embed")


class OfficialFile(Layout):
    """facebookresearch/DiT's flat state dict, with a config.json beside it that sag_dit reads.

    ``python export.py ckpt=digits format=dit`` writes it.

    Example::

        layout = OfficialFile()
        if not layout.obstacles(source):
            layout.write(Path("my_model"), source)
    """

    program = "facebookresearch/DiT"
    weights = "model.pt"

    def obstacles(self, source: Source) -> list[str]:
        """Return why that code could not hold this DiT: its images are squares."""
        return not_square(source)

    def notes(self, source: Source) -> list[str]:
        """Return what that code's own sampling script would get wrong about this model."""
        kind, process = source.config["kind"], source.process
        differing = [
            what
            for what, differs in (
                (f"it predicts {kind}, not eps", kind != "eps"),
                (f"its process is {process}", process != DDPM("linear", 1000)),
                ("it learns no variance", not source.network.learn_sigma),
                ("it has no null class", not has_null_row(source)),
                ("it works on pixels", not source.autoencoder),
            )
            if differs
        ]
        if not differing:
            return []
        return [
            "the network's outputs are equal in facebookresearch/DiT's code, but its sampling "
            f"scripts do not fit this model: {'; '.join(differing)}. Sample with sag_dit"
        ]

    def write(self, folder: Path, source: Source) -> None:
        """Write model.pt, and config.json."""
        torch.save(source.state, folder / self.weights)
        text = json.dumps(source.config, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def usage(self, source: Source) -> list[str]:
        """Return how that code builds the network and reads the file."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in source.config["model"].items())
        return [
            "In facebookresearch/DiT's own code:",
            "",
            "```python",
            "import torch",
            "from models import DiT",
            "",
            f"network = DiT({arguments})",
            'network.load_state_dict(torch.load("model.pt", weights_only=True))',
            "```",
            "",
            "In sag_dit, with config.json beside it: `sag_dit.load('model.pt')`.",
        ]


class DiffusersFolder(Layout):
    """The folder of diffusers' DiTPipeline.

    ``python export.py ckpt=DiT-XL-2 format=diffusers`` writes it.

    Example::

        layout = DiffusersFolder()
        if not layout.obstacles(source):
            layout.write(Path("my_model"), source)
    """

    program = "diffusers' DiTPipeline"
    has_autoencoder = True

    def obstacles(self, source: Source) -> list[str]:
        """Return why DiTPipeline could not hold this model; nothing if it can."""
        network, config, settings = source.network, source.config, source.autoencoder
        # What has to be computed of the weights and the autoencoder.
        block: Any = network.blocks[0]
        hidden, mlp = int(network.pos_embed.shape[-1]), int(block.mlp.fc1.out_features)
        positions = sincos_positions(hidden, network.grid)
        off = (network.pos_embed[0].cpu().float() - positions).abs().max()
        shifted = [
            name for name in ("shift_factor", "latents_mean", "latents_std") if settings.get(name)
        ]
        # Each of these is fixed in DiTPipeline's code.
        reasons = (
            (not settings, "a pixel model, where it decodes latents with an AutoencoderKL"),
            (
                settings.get("_class_name", AUTOENCODER) != AUTOENCODER,
                f"a {settings.get('_class_name')}, where it decodes latents with an {AUTOENCODER}",
            ),
            (not has_null_row(source), "no null class (its label table has no row for it)"),
            (
                network.num_classes > PIPELINE_NULL,
                f"{network.num_classes} classes, where it takes label {PIPELINE_NULL} for the null "
                f"class",
            ),
            (
                config["process"].get("schedule") not in BETAS,
                f"the process {source.process}, where it has DDPM's linear or cosine betas",
            ),
            (
                config["kind"] not in KINDS,
                f"a network of {config['kind']}s, where it has eps, v or x_0",
            ),
            (
                mlp != 4 * hidden,
                f"an MLP {mlp / hidden:g} times as wide as the tokens, where it has 4",
            ),
            (
                not off <= POSITION_TOLERANCE,
                "positions of its own, where it has the sin-cos table",
            ),
            (
                bool(settings) and config["x_0_range"] is not None,
                f"latents bounded to {tuple(config['x_0_range'] or ())}",
            ),
            (bool(shifted), f"an autoencoder with {', '.join(shifted)}, which it does not apply"),
        )
        return [*not_square(source), *(reason for holds, reason in reasons if holds)]

    def notes(self, source: Source) -> list[str]:
        """Return what a user of the folder in diffusers has to know."""
        notes, classes = [DIFFUSERS_ARITHMETIC], len(source.config["class_names"])
        if classes != PIPELINE_NULL:
            notes.append(
                f"DiTPipeline takes label {PIPELINE_NULL} for the null class, and this model's is "
                f"{classes}: call it with guidance_scale=1, or guide with sag_dit"
            )
        return notes

    def write(self, folder: Path, source: Source) -> None:
        """Write the pipeline's transformer, its scheduler and model_index.json.

        diffusers itself builds and saves each part, so that a name or shape that it does not know
        is an error here.
        """
        import diffusers
        from diffusers.models import DiTTransformer2DModel
        from diffusers.schedulers import DDIMScheduler

        config, process = source.config["model"], source.config["process"]
        # The transformer, without memory or initial values: both come with the state.
        with unfilled():
            transformer = DiTTransformer2DModel(
                num_attention_heads=config["num_heads"],
                attention_head_dim=config["hidden_size"] // config["num_heads"],
                in_channels=config["in_channels"],
                out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1),
                num_layers=config["depth"],
                sample_size=config["input_size"],
                patch_size=config["patch_size"],
                num_embeds_ada_norm=config["num_classes"],
                norm_eps=1e-6,
            )
        state = to_diffusers(source.state, config["depth"])
        transformer.load_state_dict(state, strict=True, assign=True)
        transformer.save_pretrained(folder / "transformer")
        # The scheduler: our betas at any number of times are those of 1000, spread.
        scale = 1000 / process["num_timesteps"]
        DDIMScheduler(
            num_train_timesteps=process["num_timesteps"],
            beta_start=1e-4 * scale,
            beta_end=0.02 * scale,
            beta_schedule=BETAS[process["schedule"]],
            prediction_type=KINDS[source.config["kind"]],
            clip_sample=False,
        ).save_pretrained(folder / "scheduler")
        # The index, which names the parts, the autoencoder's folder among them.
        index = {
            "_class_name": "DiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "id2label": {str(i): name for i, name in enumerate(source.config["class_names"])},
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", AUTOENCODER],
        }
        text = json.dumps(index, indent=2)
        (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")

    def usage(self, source: Source) -> list[str]:
        """Return how diffusers reads the folder and draws."""
        whole = len(source.config["class_names"]) == PIPELINE_NULL
        guidance = "" if whole else ", guidance_scale=1"
        return [
            "```python",
            "from diffusers import DiTPipeline",
            "",
            'pipeline = DiTPipeline.from_pretrained("this folder")',
            f"images = pipeline(class_labels=[0]{guidance}).images",
            "```",
            "",
            "In sag_dit: `sag_dit.load('this folder')`.",
        ]

    def size(self, source: Source) -> int:
        """Return the bytes of the weights, those of the embedders once for every block."""
        state = source.network.state_dict()
        copies = sum(state[name].nbytes for name in EMBEDDERS) * len(source.network.blocks)
        return super().size(source) + int(copies)


def not_square(source: Source) -> list[str]:
    """Return the obstacle of a DiT whose images are not square."""
    height, width = source.network.input_size
    square = height == width
    return [] if square else [f"a rectangular input ({height} x {width}), where it has squares"]


def has_null_row(source: Source) -> bool:
    """Whether the label table of a DiT has a row for the null class."""
    network = source.network
    return bool(len(network.y_embedder.embedding_table.weight) > network.num_classes)


def shared_names(depth: int) -> Iterator[tuple[str, str]]:
    """Yield our name and diffusers' of each tensor that both hold as it is."""
    for part in ("weight", "bias"):
        for ours, theirs in MODEL.items():
            yield f"{ours}.{part}", f"{theirs}.{part}"
        for i, (ours, theirs) in product(range(depth), BLOCK.items()):
            yield f"blocks.{i}.{ours}.{part}", f"transformer_blocks.{i}.{theirs}.{part}"


def joined_names(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Yield our name of each block's queries, keys and values, and diffusers' three."""
    for i, part in product(range(depth), ("weight", "bias")):
        yield f"blocks.{i}.attn.qkv.{part}", [f"transformer_blocks.{i}.{n}.{part}" for n in QKV]


def copied_names(depth: int) -> Iterator[tuple[str, str]]:
    """Yield our name and diffusers' of each tensor of which every block of theirs has a copy."""
    for i, (ours, theirs) in product(range(depth), EMBEDDERS.items()):
        yield ours, f"transformer_blocks.{i}.norm1.emb.{theirs}"


def to_diffusers(state: State, depth: int) -> State:
    """Rename an official state to diffusers' parameters, the inverse of the function below.

    The table of positions is left out: diffusers computes it. The embedders are copied into every
    block.
    """
    named = {theirs: state[ours] for ours, theirs in shared_names(depth)}
    for ours, three in joined_names(depth):
        chunks = (chunk.contiguous() for chunk in state[ours].chunk(3))
        named |= dict(zip(three, chunks, strict=True))
    # Copies, for safetensors refuses tensors that share their memory.
    return named | {theirs: state[ours].clone() for ours, theirs in copied_names(depth)}


def renamed_from_diffusers(state: Mapping[str, Tensor], depth: int) -> State:
    """Rename the parameters of diffusers' DiTTransformer2DModel, joining queries, keys and values.

    The table of positions is left to the caller. Names that have no counterpart are kept, so that
    strict loading reports them; so are absent ones, by their absence.

    Raises:
        ValueError: the blocks' copies of the embedders differ, which no DiT can express.
    """
    left = {name: tensor for name, tensor in state.items() if name not in POSITIONS}
    renamed = {ours: left.pop(theirs) for ours, theirs in shared_names(depth) if theirs in left}
    for ours, three in joined_names(depth):
        if all(name in left for name in three):
            renamed[ours] = torch.cat([left.pop(name) for name in three])
    for ours, theirs in copied_names(depth):
        copy = left.pop(theirs, None)
        if copy is not None and not torch.equal(renamed.setdefault(ours, copy), copy):
            raise ValueError(
                f"{theirs} differs from the first block's; expected the one embedder of a DiT, "
                f"repeated in every block"
            )
    return {**renamed, **left}
