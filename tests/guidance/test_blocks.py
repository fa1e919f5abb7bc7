"""Edits of blocks as diffusers' transformers call them: by keywords, with two streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionTap
from sag_dit.guidance.slg import Skip
from sag_dit.guidance.tpg import Shuffle

LAST = slice(2, 3)


class TwoStreams(nn.Module):
    """A block of image and text; the last of a network keeps the image only."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        text = encoder_hidden_states * 2 + hidden_states.mean(dim=1, keepdim=True)
        image = hidden_states.cumsum(dim=1) + temb[:, None]
        return None if self.last else text, image


class Network(nn.Module):
    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TwoStreams(), TwoStreams(last)])
        self.unused = nn.Identity()

    def forward(self, image: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        return image if text is None else image + text.sum(dim=1, keepdim=True)


def inputs(text: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    image, words = (torch.randn(3, n, 5, generator=random) for n in (4, text))
    return image, words, torch.randn(3, 5, generator=random)


def test_skipping_a_block_of_two_streams_skips_both() -> None:
    network = Network()
    plain = network(*inputs())
    with AttentionTap(network, edits=[(Skip("blocks.0"), LAST)]):
        found = network(*inputs())
    image, text, temb = inputs()
    text, image = network.blocks[1](image, text, temb)
    torch.testing.assert_close(found[LAST], (image + text.sum(dim=1, keepdim=True))[LAST])
    assert torch.equal(found[:2], plain[:2])


def test_the_last_block_returns_no_text() -> None:
    network = Network(last=True)
    with AttentionTap(network, edits=[(Skip("blocks.1"), LAST)]):
        found = network(*inputs())
    _, image = network.blocks[0](*inputs())
    torch.testing.assert_close(found[LAST], image[LAST])


def test_tokens_that_come_by_keyword_are_shuffled() -> None:
    network, order = Network(), torch.tensor([[2, 0, 3, 1]])
    with AttentionTap(network, edits=[(Shuffle("blocks.0", order), LAST)]):
        found = network(*inputs())
    image, text, temb = inputs()
    torch.testing.assert_close(found[LAST], network(image[:, order[0]], text, temb)[LAST])
    with (
        pytest.raises(ValueError, match=r"was given \(1, 4, 5\): expected tokens of the image"),
        AttentionTap(network, edits=[(Shuffle("blocks.0", order[:, :3]), LAST)]),
    ):
        network(*inputs())


def test_what_cannot_be_told_apart_or_never_runs_is_refused() -> None:
    network = Network()
    with (
        pytest.raises(ValueError, match="a tensor for each of their inputs, of its shape"),
        AttentionTap(network, edits=[(Skip("blocks.0"), LAST)]),
    ):
        network(*inputs(text=4))
    for name in ("unused", "blocks"):
        with (
            pytest.raises(ValueError, match=f"module {name} did not run"),
            AttentionTap(network, edits=[(Skip(name), LAST)]),
        ):
            network(*inputs())
