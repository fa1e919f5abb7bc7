"""CLIP's features and score by a tiny random CLIP, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sag_dit.evaluation.dino import resized
from sag_dit.evaluation.scores import verifier_identity
from tests.closeness import assert_near

transformers = pytest.importorskip("transformers")

from sag_dit.evaluation.clip import CLIP, CLIPScore  # noqa: E402
from tests.pipelines.tiny import TOKENS, clip_tokenizer, uneven  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2}
    text = {"vocab_size": 58, "bos_token_id": 56, "eos_token_id": 57, "pad_token_id": 57}
    config = transformers.CLIPConfig(
        text_config={**shape, **text, "max_position_embeddings": TOKENS, "projection_dim": 8},
        vision_config={**shape, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    made = tmp_path_factory.mktemp("clip")
    uneven(transformers.CLIPModel(config)).save_pretrained(made)
    clip_tokenizer().save_pretrained(made)
    return made


PROMPTS = ["a corgi", "two ships, far away", "z"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    random = np.random.Generator(np.random.Philox(key=[1, 0]))
    return torch.from_numpy(random.integers(0, 256, (3, 3, 40, 40), dtype=np.uint8))


@pytest.fixture(scope="module")
def expected(folder: Path, images: torch.Tensor) -> Any:
    """What the whole CLIPModel says of scaled images; test_dino.py compares these with Pillow's."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    scaled = resized(images, 32).permute(0, 2, 3, 1).double().numpy()
    pixels = (scaled / 255 - mean) / std
    tokens = clip_tokenizer()(
        PROMPTS, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return network(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2).float(), **tokens)


def test_features_are_the_embeddings_of_length_1(
    folder: Path, images: torch.Tensor, expected: Any
) -> None:
    found = CLIP(folder)(images).pool
    assert_near(found, expected.image_embeds, 1e-5)
    assert_near(found.norm(dim=1), torch.ones(3))
    grey = images[:, :1]
    assert_near(CLIP(folder)(grey).pool, CLIP(folder)(grey.expand(-1, 3, -1, -1)).pool, 1e-6)


def test_the_score_is_100_times_the_cosine(
    folder: Path, images: torch.Tensor, expected: Any
) -> None:
    cosines = (expected.image_embeds * expected.text_embeds).sum(1)
    assert (cosines > 0.01).any()
    score = CLIPScore(folder)
    assert_near(score(images.float() / 255, PROMPTS), 100 * cosines.clamp(min=0), 1e-4,
                scale=torch.tensor(100.0))  # fmt: skip
    # Another prompt, another score.
    assert not torch.equal(score(images.float() / 255, PROMPTS[::-1]),
                           score(images.float() / 255, PROMPTS))  # fmt: skip


def test_its_weights_are_what_it_is_known_by(folder: Path) -> None:
    told = verifier_identity(CLIPScore(folder))
    assert told["weights"] == CLIP(folder).protocol["weights"] != told["text_weights"]


def test_no_prompts_and_no_weights_are_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compares images with their prompts, and there are none"):
        CLIPScore(folder)(torch.zeros(2, 3, 8, 8), torch.arange(2))
    with pytest.raises(ValueError, match=r"no CLIP with .* could be read.*named by weights=FOLDER"):
        CLIP(tmp_path / "nothing")
    with pytest.raises(ValueError, match="expected a folder as transformers keeps it"):
        CLIP(tmp_path)
