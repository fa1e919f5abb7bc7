"""What each command takes: the type of every key, its bounds, its meaning, what it determines."""

from collections.abc import Mapping

from sag_dit.cli.keys.drawing import Sample
from sag_dit.cli.keys.evaluating import Evaluate
from sag_dit.cli.keys.key import Closed
from sag_dit.cli.keys.tools import AttentionSheet, Encode, Export
from sag_dit.cli.keys.training import Train

COMMANDS: Mapping[str, type[Closed]] = {
    "sample": Sample,
    "evaluate": Evaluate,
    "train": Train,
    "encode": Encode,
    "export": Export,
    "attention": AttentionSheet,
}
"""The schema of each command."""
