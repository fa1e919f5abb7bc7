"""as_guider(...): terms of this package as a guider of diffusers' modular pipelines."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from sag_dit.denoiser.text_conditional import Inputs, layout_of
from sag_dit.guidance import Term
from sag_dit.pipelines.guide import Call, called, uncached
from sag_dit.pipelines.run import Run, check_scheduler

RESIDUALS = ("additional_residuals", "controlnet")
"""What names of a network's arguments contain that a ControlNet or an adapter brings."""


def as_guider(
    *terms: Term, scheduler: Any, max_rows: int | None = None, seed: int = 0
) -> TermsGuidance:
    """Return terms as a guider for a modular pipeline of diffusers.

    The guider takes the place of the pipeline's: without a :class:`CFG` among the terms there is no
    classifier-free guidance. ``scheduler`` is the pipeline's own, which tells the noise levels. The
    result is that of ``guide(pipe, *terms)`` in the ordinary pipeline of the same parts.

    Raises:
        ValueError: something is no term, a term needs the null prompt that none brings, or the
            scheduler is not known; while drawing, the network or a call of it is not known.

    Example::

        pipe.update_components(guider=as_guider(CFG(5.0), SAG(0.5), scheduler=pipe.scheduler))
        image = pipe(prompt="a corgi", output="images")[0]
    """
    for term in terms:
        if not isinstance(term, Term):
            raise ValueError(f"{term!r}: expected a term, as in as_guider(SAG(0.5), scheduler=...)")
        if getattr(term, "branch", None) == "null" and not any(
            each.from_null and not each.off for each in terms
        ):
            raise ValueError(
                f"{type(term).__name__}(branch='null'): a guider asks for the null prompt where a "
                f"term guides away from it; add CFG, or set branch='cond'"
            )
    check_scheduler(scheduler)
    guider: TermsGuidance = TermsGuidance()
    guider.terms, guider.scheduler = terms, scheduler
    guider.max_rows, guider.seed = max_rows, seed
    return guider


class TermsGuidance(BaseGuidance):  # type: ignore[misc]
    """A guider whose conditions are answered at once, by a guided denoiser of the network.

    A modular pipeline asks the network for one condition after another and tells of no noise level.
    So the network's calls come here, from :meth:`prepare_models` to :meth:`cleanup_models`. All but
    the last of a step are noted down and answered with zeros; with the last one all conditions are
    known, and the guided denoiser asks what its terms need, in batches of its own.

    Example::

        guider = as_guider(SAG(0.5), scheduler=pipe.scheduler)
        pipe.update_components(guider=guider)
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012 - diffusers asks for a list

    terms: tuple[Term, ...] = ()
    scheduler: Any
    max_rows: int | None = None
    seed = 0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self._run: Run | None = None
        self._calls: list[Call] = []
        self._output: Tensor | None = None
        self._hook = ExitStack()

    def new(self, **kwargs: Any) -> NoReturn:
        """Refuse to make a guider of a configuration, which cannot hold terms."""
        raise ValueError(
            "a guider of sag_dit's terms has no configuration to be made from; call "
            "sag_dit.as_guider(...) again"
        )

    def save_config(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to save it, for the same reason."""
        self.new()

    @property
    def num_conditions(self) -> int:
        """Two where a term guides away from the null prompt, at each step; else one."""
        return 1 + (self._enabled and any(term.from_null and not term.off for term in self.terms))

    @property
    def is_conditional(self) -> bool:
        """Whether the call at hand is that of the prompt, which comes first."""
        return bool(self._count_prepared == 1)

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Begin a step; terms remember nothing of a run before.

        Raises:
            ValueError: the scheduler has not moved since the first step: the pipeline has another.
        """
        super().set_state(step, num_inference_steps, timestep)
        self._calls, self._output = [], None
        if step == 0:
            self._run = None
        elif getattr(self.scheduler, "step_index", step) is None:
            raise ValueError(
                f"the {type(self.scheduler).__name__} given to as_guider is not the scheduler that "
                f"this pipeline goes by; make the guider anew with scheduler=pipe.scheduler"
            )

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Return what the network is given for each condition.

        Raises:
            ValueError: there are two and the pipeline brings no null prompt.
        """
        pairs = [each for each in data.values() if isinstance(each, tuple)]
        lacking = not pairs or any(cond is not None and null is None for cond, null in pairs)
        if self.num_conditions == 2 and lacking:
            raise ValueError(
                "a term guides away from the null prompt, and this call brings none; pass "
                "negative_prompt='' (or negative_prompt_embeds)"
            )
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> NoReturn:
        """Refuse pipelines that prepare inputs so, since none of their networks is known."""
        raise ValueError(
            "this modular pipeline's network is not known; expected one of Stable Diffusion XL or "
            "Stable Diffusion 3"
        )

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Have the network's next call answered here."""
        super().prepare_models(denoiser)
        self._hook.close()
        inner = getattr(denoiser, "_orig_mod", denoiser)
        layout = layout_of(inner)
        if self._run is None or self._run.network is not inner:
            check_scheduler(self.scheduler)
            uncached(denoiser, "the network")
            terms = self.terms if self._enabled else ()
            parts = SimpleNamespace(scheduler=self.scheduler)
            self._run = Run(parts, inner, layout, "cond first", terms, self.max_rows, self.seed)
        signature = inspect.signature(type(inner).forward)

        def answer(*args: Any, **kwargs: Any) -> Any:
            try:
                return self._answered(denoiser, Call.of(signature, inner, layout, args, kwargs))
            except BaseException:
                self._hook.close()
                raise

        self._hook.enter_context(called(denoiser, answer))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leave the network as it was."""
        self._hook.close()

    def _answered(self, network: nn.Module, call: Call) -> Any:
        """Note a call down, and with the last one of a step ask the guided denoiser."""
        for name, value in call.arguments.items():
            if value is not None and any(each in name for each in RESIDUALS):
                raise ValueError(
                    f"{name}: guidance beside a ControlNet or an adapter is not known to be right; "
                    f"use a pipeline without"
                )
        self._calls.append(call)
        if len(self._calls) < self.num_conditions:
            return call.formed(torch.zeros_like(call.x))
        # Join the conditions, the prompt's first, as a pipeline's own guidance does.
        run, first, count = self._run, self._calls[0], len(call.x)
        assert run is not None
        shared = run.layout.shared
        inputs = [Inputs.of(each.arguments, count, shared) for each in self._calls]
        joined = inputs[0].join(inputs[1:]).plain()
        x = torch.cat([each.x for each in self._calls])
        # The scale is that of the terms; 1 says that there is nothing beside them.
        output = run.output(x, first.t, joined, 1.0 if len(self._calls) == 2 else None)
        if output is None:
            return network(first.x, timestep=first.t, return_dict=False, **first.arguments)
        self._output = output[:count]
        return call.formed(self._output)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Return what was guided at the last call, or the network's own answer."""
        pred = pred_cond if self._output is None else self._output
        return GuiderOutput(pred=pred, pred_cond=None, pred_uncond=None)
