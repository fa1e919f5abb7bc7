"""Checking the values of a configuration before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from sag_dit.guidance import Term

WHOLE: dict[str, tuple[int, int | None, bool]] = {
    "steps": (1, None, False),
    "num_images": (1, None, False),
    "seed": (0, 2**64 - 1, False),
    "batch_size": (1, None, True),
    "max_rows": (1, None, True),
    "gallery.num": (0, None, False),
}
"""Keys of sample.yaml that take whole numbers: the least, the most, and whether null is allowed."""


def check_values(config: DictConfig) -> None:
    """Refuse numbers that cannot be meant.

    Raises:
        ValueError: the key, its value and what was expected.
    """
    for key, (least, most, optional) in WHOLE.items():
        value: Any = OmegaConf.select(config, key)
        if value is None and optional:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            bounds = f"{least} or more" if most is None else f"{least} to 2^64 - 1"
            raise ValueError(
                f"{key}={value}: expected a whole number, {bounds}{', or null' * optional}"
            )


def make_terms(guidance: DictConfig) -> dict[str, Term]:
    """Build the guidance terms by name; an entry that is null is none.

    Raises:
        ValueError: an entry that names no term.
    """
    from sag_dit.guidance import Term

    terms: dict[str, Term] = {}
    for name, node in guidance.items():
        if node is None:
            continue
        if not OmegaConf.is_dict(node) or "_target_" not in node:
            raise ValueError(
                f"guidance.{name!s}={node!r}: expected a mapping with _target_, the class of a term"
            )
        term = instantiate(node, _convert_="all")
        if not isinstance(term, Term):
            raise ValueError(
                f"guidance.{name!s}: {node['_target_']} is no guidance method; expected a subclass "
                f"of sag_dit.guidance.Term"
            )
        terms[str(name)] = term
    return terms
