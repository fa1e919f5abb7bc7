"""What methods share that go by earlier steps of the run."""

from __future__ import annotations

from sag_dit.guidance.term import Question
from sag_dit.process import Prediction, Process
from sag_dit.tensors import Images


def heading(prediction: Prediction, process: Process) -> Images:
    """Return a prediction's velocity in coordinates in which a perfect prediction does not turn.

    That is v of a flow, and else eps, along which x_t / alpha moves with sigma / alpha: as long as
    x_0 and eps stay what they are, these stay as well.
    """
    return prediction.v if process.is_flow else prediction.eps


def as_v(change: Images, prediction: Prediction, process: Process) -> Images:
    """Return a change of the heading as one of v at the prediction's x_t."""
    return change if process.is_flow else change / prediction.level.alpha


def begins(ask: Question) -> bool:
    """Whether this is a step's first evaluation, which history holds; told once in each evaluation.

    A solver's second evaluation of a step stands farther on, at a guess. It is guided by what came
    before it, this step's first evaluation included, and leaves no trace itself.
    """
    before = ask.memory.get("number")
    ask.memory["number"] = ask.step.number
    return bool(before != ask.step.number)
