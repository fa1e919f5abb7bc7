"""Shared prefixes: branches that differ from a block on are one branch before it.

PAG, SEG, SLG and TPG ask about the image and the condition of another branch of the batch, and
change the network from some block on. So the blocks before it say the same of both. They are
evaluated for one of them, and its rows are copied where the other begins to differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sag_dit.attention import Edit
from sag_dit.guidance.term import Branch

CHAIN = "blocks."
"""How the names of modules within a network's blocks begin."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a branch stands in a batch: its rows join before ``block``, copied from ``source``'s.

    ``source`` is the number of another place of the batch, None for a branch that begins at the
    input.

    Example::

        places = [Place(ask.base), Place(ask.base.edited(Skip("blocks.5")), block=5, source=0)]
    """

    branch: Branch
    block: int = 0
    source: int | None = None


def places_of(branches: Sequence[Branch], share: bool) -> list[Place]:
    """Return branches of one model in the order in which their rows join a batch.

    Each takes over what it shares with the branch before it that is alike for longest. Without
    ``share``, or where the model's network cannot do it, all begin at the input.
    """
    length = branches[0].model.chain_length
    if not share or length is None:
        return [Place(branch) for branch in branches]
    # From which block on each differs from an earlier one. If two earlier ones are alike for
    # equally long, the first is taken: it has joined the batch by then.
    edits = [_by_block(branch) for branch in branches]
    blocks, sources = [0] * len(branches), dict[int, int]()
    for i, branch in enumerate(branches):
        for j, other in enumerate(branches[:i]):
            if branch.x_t is other.x_t and branch.cond is other.cond:
                alike = _alike(edits[i], edits[j], length)
                if alike > blocks[i]:
                    blocks[i], sources[i] = alike, j
    order = sorted(range(len(branches)), key=lambda i: blocks[i])
    place = {i: number for number, i in enumerate(order)}
    return [Place(branches[i], blocks[i], place.get(sources.get(i, -1))) for i in order]


def together(branches: Sequence[Branch]) -> list[Branch]:
    """Return branches such that those of the same image and condition follow one another."""
    groups: dict[tuple[int, int], list[Branch]] = {}
    for branch in branches:
        groups.setdefault((id(branch.x_t), id(branch.cond)), []).append(branch)
    return [branch for group in groups.values() for branch in group]


def rows_per_image(places: Sequence[Place]) -> float:
    """Return the rows that a batch costs for each image.

    A fork counts as its share of the blocks, a crop as its share of the image.
    """
    spared = sum(place.block for place in places)
    model, x_t = places[0].branch.model, places[0].branch.x_t
    length = model.chain_length
    rows = len(places) - spared / length if spared and length else len(places)
    share = x_t[0].numel() / math.prod(model.latent_shape)
    return rows if share == 1 else rows * share


def number_at(places: Sequence[Place], number: int, module: str) -> int:
    """Return the place whose rows are those of place ``number`` while a module runs."""
    block = block_number(module)
    while block is not None and places[number].block > block:
        source = places[number].source
        assert source is not None
        number = source
    return number


def block_number(module: str) -> int | None:
    """Return the number of the block that a module is, or is part of; None outside of the blocks.

    Example:
        >>> block_number("blocks.5.attn"), block_number("blocks.5"), block_number("x_embedder")
        (5, 5, None)
    """
    number = module.removeprefix(CHAIN).partition(".")[0]
    return int(number) if module.startswith(CHAIN) and number.isdecimal() else None


def _by_block(branch: Branch) -> dict[int, list[Edit]] | None:
    """Return a branch's edits by block, None if it edits or reads what is no part of a block."""
    found: dict[int, list[Edit]] = {}
    for edit in branch.edits:
        block = block_number(edit.module)
        if block is None:
            return None
        found.setdefault(block, []).append(edit)
    outside = any(block_number(layer) is None for layer, *_ in branch.captures)
    return None if outside else found


def _alike(
    one: dict[int, list[Edit]] | None, other: dict[int, list[Edit]] | None, length: int
) -> int:
    """Return how many blocks run alike under two sets of edits, at most all but the last."""
    if one is None or other is None:
        return 0
    differing = (block for block in {*one, *other} if one.get(block) != other.get(block))
    return min(differing, default=length - 1)
