"""Small files in the layouts that the world's DiT checkpoints have."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sag_dit.checkpoints import zoo
from sag_dit.models import DiT
from tests.conftest import MakeDiT

Same = Callable[[DiT, DiT], bool]
NAMES = [f"class {i}, kind {i}" for i in range(10)]


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own is found: no downloaded weights, no cache, no network."""
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(zoo.WEIGHTS_FOLDER, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def same() -> Same:
    """Whether two networks give bit-identical outputs, conditional and null, at several times."""

    def same(one: DiT, other: DiT) -> bool:
        random = torch.Generator().manual_seed(1)
        x = torch.randn(3, one.in_channels, *one.input_size, generator=random)
        t, y = torch.tensor([0, 250, 999]), torch.tensor([0, 9, one.num_classes])
        with torch.no_grad():
            outputs = one(x, t, y), other(x, t, y)
        assert outputs[0].isfinite().all() and outputs[0].abs().max() > 0
        return torch.equal(*outputs)

    return same


@pytest.fixture
def pixel_dit(make_dit: MakeDiT) -> DiT:
    """A pixel model whose two heads of width 64 are those that the rule assumes."""
    return make_dit(in_channels=3, hidden_size=128, num_heads=2, depth=2)


@pytest.fixture
def ema_dit(make_dit: MakeDiT) -> DiT:
    """Other weights of the same size."""
    return make_dit(seed=1, in_channels=3, hidden_size=128, num_heads=2, depth=2)


@pytest.fixture
def flat(pixel_dit: DiT, tmp_path: Path) -> Path:
    """An official file of published weights: the state dict and nothing else."""
    path = tmp_path / "small.pt"
    torch.save(pixel_dit.state_dict(), path)
    return path


@pytest.fixture
def training(pixel_dit: DiT, ema_dit: DiT, tmp_path: Path) -> Path:
    """A file of the official training script, whose args are a pickled Namespace."""
    path = tmp_path / "0000200.pt"
    torch.save(
        {
            "model": pixel_dit.state_dict(),
            "ema": ema_dit.state_dict(),
            "opt": torch.optim.AdamW(pixel_dit.parameters()).state_dict(),
            "args": Namespace(model="DiT-S/2", image_size=256, num_classes=10, vae="mse"),
        },
        path,
    )
    return path


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small AutoencoderKL as diffusers saves it: 4 latent channels, 2 pixels a cell."""
    from diffusers.models import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("models") / "vae"
    vae.save_pretrained(folder)
    return folder


def to_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Write an official state dict under diffusers' names, as its conversion script does."""
    named = {
        "pos_embed.proj.weight": state["x_embedder.proj.weight"],
        "pos_embed.proj.bias": state["x_embedder.proj.bias"],
    }
    for kind in ("weight", "bias"):
        named[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        named[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        emb = f"{theirs}.norm1.emb"
        named[f"{emb}.class_embedder.embedding_table.weight"] = state[
            "y_embedder.embedding_table.weight"
        ]
        for kind in ("weight", "bias"):
            named[f"{emb}.timestep_embedder.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            named[f"{emb}.timestep_embedder.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
            named[f"{theirs}.norm1.linear.{kind}"] = state[f"{ours}.adaLN_modulation.1.{kind}"]
            query, key, value = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            named[f"{theirs}.attn1.to_q.{kind}"] = query
            named[f"{theirs}.attn1.to_k.{kind}"] = key
            named[f"{theirs}.attn1.to_v.{kind}"] = value
            named[f"{theirs}.attn1.to_out.0.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            named[f"{theirs}.ff.net.0.proj.{kind}"] = state[f"{ours}.mlp.fc1.{kind}"]
            named[f"{theirs}.ff.net.2.{kind}"] = state[f"{ours}.mlp.fc2.{kind}"]
    return {name: tensor.contiguous() for name, tensor in named.items()}


@pytest.fixture
def pipeline(tiny_dit: DiT, vae_folder: Path, tmp_path: Path) -> Path:
    """A DiTPipeline's folder, written by diffusers, that holds the weights of ``tiny_dit``."""
    import shutil

    from diffusers.models import DiTTransformer2DModel
    from diffusers.schedulers import DDIMScheduler

    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    transformer.load_state_dict(to_diffusers(tiny_dit.state_dict(), depth=3))
    folder = tmp_path / "small-pipeline"
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    shutil.copytree(vae_folder, folder / "vae")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): name for i, name in enumerate(NAMES)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def edit_json(path: Path, **values: object) -> None:
    """Change some values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
