"""One call of a guided pipeline: its network's calls, each answered with guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sag_dit.denoiser.text_conditional import Inputs, TextConditional, TokenGrid
from sag_dit.guidance import GuidedDenoiser, Question, Term
from sag_dit.guidance.term import Asking
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Flow, NoiseLevel, Prediction, Process, Step
from sag_dit.process.base import OutputKind
from sag_dit.process.ddpm import CLEAN
from sag_dit.sampler.diffusers import levels_of
from sag_dit.tensors import Images

OwnCFG = Literal["null first", "cond first", "apart"]
"""The order of the rows under a pipeline's own guidance; ``apart`` is a second, later call."""

BY_TIME = (
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
)
"""Schedulers whose level is alphas_cumprod at their time."""

BY_INDEX = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers whose level is their sigma at the current step; most can also run a flow."""

FLOWS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)

FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
"""Schedulers that take a step from one prediction, and add no fresh noise."""

KINDS: dict[str, OutputKind] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x_0",
    "flow_prediction": "v",
}


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler unless its noise levels are known to be read correctly.

    Raises:
        ValueError: the message lists the schedulers that are known.
    """
    known = (*BY_TIME, *BY_INDEX, *FLOWS)
    if not _is_one_of(scheduler, known):
        raise ValueError(
            f"scheduler {type(scheduler).__name__}: its noise levels are not known to be read "
            f"right; expected one of {', '.join(known)}"
        )


def check_renoising(scheduler: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a scheduler whose steps cannot add another prediction's noise back, as CFG++ does.

    Raises:
        ValueError: it mixes predictions, draws noise or clamps x_0; the message says which can.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if not _is_one_of(scheduler, FIRST_ORDER):
        raise ValueError(
            f"scheduler {name}: mixes several predictions or draws noise in a step, and cannot add "
            f"noise back with another prediction than x_0's, as CFG++ does; use "
            f"{', '.join(FIRST_ORDER)}"
        )
    for option in ("stochastic_sampling", "clip_sample", "thresholding"):
        if config.get(option):
            raise ValueError(
                f"scheduler {name} with {option}={config[option]}: its steps cannot add noise back "
                f"with another prediction than x_0's, as CFG++ does; set {option}=False"
            )
    if arguments.get("eta"):
        raise ValueError(
            f"eta={arguments['eta']}: a step that draws noise cannot add noise back with another "
            f"prediction than x_0's, as CFG++ does; set eta=0"
        )


def landing(scheduler: Any, step: Step) -> NoiseLevel:
    """Return the level where a scheduler of first order ends its step.

    DDIM takes strides of its own, and may end before the image is clean.
    """
    if not _is_one_of(scheduler, ("DDIMScheduler",)):
        return step.next
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    t = int(step.level.t) - stride
    squared = float(scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod)
    alpha, sigma = squared**0.5, (1 - squared) ** 0.5
    return NoiseLevel(t=t, alpha=alpha, sigma=sigma, d_alpha=-sigma, d_sigma=alpha)


def _is_one_of(scheduler: Any, names: tuple[str, ...]) -> bool:
    return any(each.__name__ in names for each in type(scheduler).__mro__)


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return _is_one_of(scheduler, FLOWS) or (
        bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    )


def process_of(scheduler: Any) -> Process:
    """Return the kind of process; the levels themselves are the scheduler's."""
    return Flow(time_scale=1000) if _is_flow(scheduler) else DDPM()


def kind_of(scheduler: Any) -> OutputKind:
    """Return what the network puts out; a flow's is always the velocity."""
    return "v" if _is_flow(scheduler) else KINDS[scheduler.config.prediction_type]


def levels(scheduler: Any) -> tuple[NoiseLevel, ...]:
    """Return the level of every evaluation, and the clean one; t is the scheduler's own time."""
    times = scheduler.timesteps.cpu().double().tolist()
    # A flow keeps sigma itself.
    if _is_flow(scheduler):
        sigmas = [*scheduler.sigmas.cpu().double().tolist()[: len(times)], 0.0]
        return tuple(
            NoiseLevel(t=t, alpha=1 - sigma, sigma=sigma, d_alpha=-1.0, d_sigma=1.0)
            for t, sigma in zip([*times, 0.0], sigmas, strict=True)
        )
    # Others keep their sigmas at each step, or look alpha up by the time.
    if _is_one_of(scheduler, BY_INDEX):
        found = levels_of(scheduler)
        return (*(replace(level, t=t) for level, t in zip(found, times, strict=False)), CLEAN)
    squared = scheduler.alphas_cumprod.cpu().double()[scheduler.timesteps.cpu().long()]
    pairs = zip(squared.sqrt().tolist(), (1 - squared).sqrt().tolist(), strict=True)
    return (
        *(
            NoiseLevel(t=t, alpha=alpha, sigma=sigma, d_alpha=-sigma, d_sigma=alpha)
            for t, (alpha, sigma) in zip(times, pairs, strict=True)
        ),
        CLEAN,
    )


def index_of(scheduler: Any, t: float, before: int | None) -> int:
    """Return the scheduler's place in its grid when it is about to be asked at time t.

    ``before`` is its place at the call before, None at the first.
    """
    # Most schedulers know their place, but only after the first step.
    for known in ("step_index", "begin_index"):
        index = getattr(scheduler, known, None)
        if index is not None:
            return int(index)
    # Otherwise it is found by the time: the first place with it, or the nearest one ahead.
    times = scheduler.timesteps.cpu().double()
    if before is None and hasattr(scheduler, "index_for_timestep") and bool((times == t).any()):
        return int(scheduler.index_for_timestep(scheduler.timesteps[times == t][0]))
    ahead = (times - t).abs()[before or 0 :]
    return (before or 0) + int(ahead.argmin())


@dataclass
class _Own:
    """What the pipeline makes of its own rows: the network's answers, and its guidance of them.

    ``scale`` is that of its classifier-free guidance, where terms act on what that has guided, and
    else None.
    """

    answers: tuple[Prediction, ...] = ()
    scale: float | None = None

    @property
    def guidance(self) -> Images | None:
        """What the pipeline adds to the prompt's prediction, None where no term has to know it."""
        if self.scale is None:
            return None
        cond, null = self.answers
        return (self.scale - 1) * (cond.v - null.v)


@dataclass(frozen=True)
class _Rows(Term):
    """Keeps the network's answers for the pipeline's own rows, and contributes nothing."""

    own: _Own = field(default_factory=_Own, compare=False)

    def contribution(self, ask: Question) -> Asking:
        """Ask for the prompt's row."""
        self.own.answers = yield (ask.base,)
        return torch.zeros_like(ask.base.x_t)


@dataclass(frozen=True)
class _RowsOfCFG(_Rows):
    """The same beside the pipeline's own classifier-free guidance, which also wants null rows.

    Terms that act on the guided prediction see what the pipeline makes of both.
    """

    from_null: ClassVar[bool] = True

    def contribution(self, ask: Question) -> Asking:
        """Ask for the prompt's row and the null prompt's."""
        self.own.answers = yield (ask.base, ask.required_null())
        guidance = self.own.guidance
        return torch.zeros_like(ask.base.x_t) if guidance is None else guidance


@dataclass(frozen=True)
class _Guided:
    """A denoiser of the network, and its guidance, for calls of one kind."""

    kind: tuple[object, ...]
    denoiser: TextConditional
    guided: GuidedDenoiser
    rows: _Rows


@dataclass(frozen=True)
class _Last:
    """What was contributed to the last call."""

    index: int
    x_t: Images
    contribution: Images


class Run:
    """One call of a pipeline: where its scheduler is, and what its terms remember.

    ``layout`` is the denoiser of the network's token layout; ``max_rows`` bounds the rows evaluated
    at once, ``seed`` keys the randomness of terms that draw.

    Example::

        run = Run(pipe, network, layout, "null first", terms, max_rows=None, seed=0)
        output = run.output(x, t, {"encoder_hidden_states": text}, cfg=True)
    """

    def __init__(
        self,
        pipe: Any,
        network: nn.Module,
        layout: type[TextConditional],
        own_cfg: OwnCFG,
        terms: Sequence[Term],
        max_rows: int | None,
        seed: int,
    ) -> None:
        self.pipe = pipe
        self.network = network
        self.layout = layout
        self.own_cfg = own_cfg
        self.terms = tuple(terms)
        self.max_rows = max_rows
        self.seed = seed
        on = [term for term in terms if not term.off]
        self.replaces_cfg = any(term.from_null for term in on)
        self.remembers = any(term.remembers for term in on)
        self.on_guided = next((term for term in on if term.on_guided), None)
        self._grid: tuple[NoiseLevel, ...] = ()
        self._begin = 0
        self._index: int | None = None
        self._guided: _Guided | None = None
        self._last: _Last | None = None

    def output(
        self, x: Tensor, t: Tensor | float, arguments: Mapping[str, Any], cfg: float | None
    ) -> Tensor | None:
        """Return what the network should put out for a call, None where that is its own answer.

        ``cfg`` is the scale of the pipeline's own guidance where rows of the null prompt stand
        beside those of the prompt, and None where they do not.

        Raises:
            ValueError: a term cannot guide this call, or the noise level is not known.
        """
        # Where the run stands, and whether any term acts there.
        step = self._step(t)
        if self.replaces_cfg and cfg is None:
            raise ValueError(
                "a term that guides away from the null prompt takes the place of the pipeline's "
                "own guidance, and this call has no null prompt; pass guidance_scale=2 (any value "
                "above 1): the term's own scale is the one that counts"
            )
        acts = self.replaces_cfg or self.remembers
        if not acts and not any(term.active(step) for term in self.terms):
            return None
        # Read x_t and the condition from the call.
        own, channels = self.layout.split(self.network, x)
        grid = self.layout.grid_of(own, arguments)
        x_t = self.layout.unpacked(own, grid).float()
        inputs = Inputs.of(arguments, len(x), self.layout.shared, channels)
        # Guide. Under the pipeline's own CFG the first half of the rows is of one prompt and the
        # second half of the other; each is given back in its place.
        if self._is_repeated(x_t):
            predictions = [self._repeated(x_t, step, inputs)]
        elif cfg is None:
            predictions = [self._guide(x_t, step, inputs, None, grid, x.dtype, None)[0]]
        else:
            count = len(x) // 2
            first, second = inputs.take(slice(count)), inputs.take(slice(count, None))
            if self.own_cfg == "cond first":
                predictions = self._guide(x_t[:count], step, first, second, grid, x.dtype, cfg)
            else:
                both = self._guide(x_t[:count], step, second, first, grid, x.dtype, cfg)
                predictions = both[::-1]
        return torch.cat([self._raw(each) for each in predictions]).to(x.dtype)

    def _step(self, t: Tensor | float) -> Step:
        """Find out where the scheduler is."""
        scheduler = self.pipe.scheduler
        if not self._grid:
            self._grid = levels(scheduler)
        told = float(t.flatten()[0] if isinstance(t, Tensor) else t) * self.layout.time_unit
        index = index_of(scheduler, told, self._index)
        if self._index is None:
            self._begin = index
        self._index = index
        level = self._grid[index]
        # The pipeline may tell the time in 16 bits, which keep two to three digits of it.
        if abs(told - float(level.t)) > 0.01 * abs(told) + 0.01:
            raise ValueError(
                f"the network was called at t={told:g} while the scheduler "
                f"{type(scheduler).__name__} stands at {level.t:g}, so the noise level is not known"
            )
        done = index - self._begin
        count = getattr(self.pipe, "num_timesteps", None) or len(self._grid) - 1 - self._begin
        evaluations = int(getattr(scheduler, "order", 1))
        return Step(done, max(int(count), done + 1), level, self._grid[index + 1], evaluations)

    def _guide(
        self,
        x_t: Images,
        step: Step,
        cond: Inputs,
        null: Inputs | None,
        grid: TokenGrid,
        dtype: torch.dtype,
        cfg: float | None,
    ) -> list[Prediction]:
        """Return the guided prediction, and the null prompt's with the same contribution added.

        Without a null prompt there is one only. ``cfg`` is the scale of the pipeline's guidance.
        """
        current = self._prepared(grid, dtype, null, len(x_t))
        own = current.rows.own
        own.scale = None if self.on_guided is None or self.replaces_cfg else cfg
        # The scheduler makes its step of one prediction.
        result = current.guided(x_t, step, cond).in_one(landing(self.pipe.scheduler, step))
        # The pipeline's own guidance is its own to add.
        contribution = result.v - own.answers[0].v
        if own.guidance is not None:
            contribution = contribution - own.guidance
            result = replace(result, v=result.v - own.guidance)
        self._last = _Last(int(self._index or 0), x_t, contribution)
        if null is None:
            return [result]
        if self.replaces_cfg:
            return [result, result]
        other = own.answers[1]
        return [result, replace(other, v=other.v + contribution)]

    def _prepared(
        self, grid: TokenGrid, dtype: torch.dtype, null: Inputs | None, count: int
    ) -> _Guided:
        """Return the guided denoiser of the calls before, so that terms remember, or a new one."""
        kind = (grid, dtype, null is None, count)
        if self._guided is not None and self._guided.kind == kind:
            self._guided.denoiser.empty = null
            return self._guided
        scheduler = self.pipe.scheduler
        denoiser = self.layout(
            self.network,
            process_of(scheduler),
            kind_of(scheduler),
            grid,
            dtype,
            null,
        )
        rows = _Rows() if null is None or self.replaces_cfg else _RowsOfCFG()
        noise = NoiseSource([self.seed] * count, range(count))
        terms = (rows, *self.terms)
        guided = GuidedDenoiser(denoiser, terms, noise=noise, max_rows=self.max_rows)
        self._guided = _Guided(kind, denoiser, guided, rows)
        return self._guided

    def _is_repeated(self, x_t: Images) -> bool:
        """Whether the pipeline asks once more at the same place, for a guidance of its own.

        FLUX asks so with its null prompt, and Stable Diffusion 3 with some layers skipped.
        """
        last = self._last
        return last is not None and last.index == self._index and torch.equal(last.x_t, x_t)

    def _repeated(self, x_t: Images, step: Step, inputs: Inputs) -> Prediction:
        """Return the network's own prediction with what was contributed before."""
        assert self._guided is not None and self._last is not None
        if self.on_guided is not None:
            raise ValueError(
                f"{type(self.on_guided).__name__} acts on the guided prediction, and "
                f"{type(self.pipe).__name__} guides by itself in a later call of its network; set "
                f"true_cfg_scale=1 (FLUX) or leave out skip_guidance_layers (Stable Diffusion 3)"
            )
        prediction: Prediction = self._guided.denoiser(x_t, step.level, inputs)
        return replace(prediction, v=prediction.v + self._last.contribution)

    def _raw(self, prediction: Prediction) -> Tensor:
        """Turn a prediction into what the network puts out, its variance channels unchanged."""
        kind = kind_of(self.pipe.scheduler)
        output = {"eps": prediction.eps, "v": prediction.v, "x_0": prediction.x_0}[kind]
        if prediction.variance_fraction is not None:
            output = torch.cat([output, 2 * prediction.variance_fraction - 1], dim=1)
        return self.layout.packed(output)
