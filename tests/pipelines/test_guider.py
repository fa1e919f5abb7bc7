"""as_guider(...): a modular pipeline draws what guide(pipe, ...) draws in the ordinary one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks
from torch import Tensor, nn

import sag_dit
from sag_dit.guidance import CFG, PAG, SAG, HiGS, MomentumGuidance, SelfGuidance, Term
from tests.closeness import assert_near
from tests.pipelines import tiny
from tests.pipelines.test_every_method import counted
from tests.pipelines.test_traces import network_of, traces

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
BLOCKS: dict[str, Any] = {"sdxl": StableDiffusionXLAutoBlocks, "sd3": StableDiffusion3AutoBlocks}
CALL: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}
PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


@cache
def both(family: str) -> tuple[Any, Any]:
    """An ordinary pipeline and a modular one of the same parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = tiny.BUILD[family]()
    modular = BLOCKS[family]().init_pipeline()
    parts = {name: part for name, part in plain.components.items() if part is not None}
    modular.update_components(**{name: parts[name] for name in parts if name in COMPONENTS[family]})
    for pipe in (plain, modular):
        pipe.set_progress_bar_config(disable=True)
    return plain, modular


COMPONENTS = {
    family: {spec.name for spec in blocks().expected_components}
    for family, blocks in BLOCKS.items()
}


FAMILIES = [pytest.param("sdxl", marks=pytest.mark.slow), "sd3"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(pipe: Any, family: str, *terms: Term, **call: Any) -> Tensor:
    """What a modular pipeline draws with these terms as its guider."""
    pipe.update_components(guider=sag_dit.as_guider(*terms, scheduler=pipe.scheduler))
    return with_guider(pipe, family, **call)


def with_guider(pipe: Any, family: str, **call: Any) -> Tensor:
    told = {**CALL, **(tiny.CALLS[family]), **call}
    told |= {"negative_prompt": "b", "prompt": "a corgi", "output_type": "latent"}
    images: Tensor = pipe(**told, output="images", generator=torch.Generator().manual_seed(0))
    return images


def expected(pipe: Any, family: str, *terms: Term) -> Tensor:
    """What the ordinary pipeline draws within guide(...)."""
    scale = 2.0 if any(term.from_null for term in terms) else 1.0
    with sag_dit.guide(pipe, *terms):
        call = {**CALL, "guidance_scale": scale, "negative_prompt": "b"}
        return tiny.draw(pipe, family, **call)


@pytest.mark.parametrize(
    "terms",
    [
        (SAG(0.5),),
        (CFG(3.0), SAG(0.5)),
        (PAG(2.0), SelfGuidance(1.0)),
        (CFG(3.0, interval=(0.0, 0.5)), MomentumGuidance(0.5), HiGS(1.0, t_min=0.0)),
        (SAG(0.5, interval=(0.5, 1.0)),),
        (),
    ],
    ids=lambda terms: "+".join(type(term).__name__ for term in terms) or "nothing",
)
def test_it_draws_what_guide_draws(family: str, terms: tuple[Term, ...]) -> None:
    """At as many passes, twice alike, and nothing is left behind."""
    plain, modular = both(family)
    with counted(plain) as rows:
        theirs = expected(plain, family, *terms)
    before = traces(plain)
    with counted(plain) as own:
        ours = drawn(modular, family, *terms)
    assert_near(ours, theirs)
    assert own == rows
    assert torch.equal(with_guider(modular, family), ours)
    assert traces(plain) == before
    if terms:
        assert (ours - expected(plain, family)).abs().max() > 1e-2


def test_several_images_at_once(family: str) -> None:
    plain, modular = both(family)
    terms = (CFG(3.0), SAG(0.5))
    ours = drawn(modular, family, *terms, num_images_per_prompt=2)
    with sag_dit.guide(plain, *terms):
        call = {**CALL, "guidance_scale": 2.0, "negative_prompt": "b"}
        theirs = tiny.draw(plain, family, num_images_per_prompt=2, **call)
    assert_near(ours, theirs)


def test_it_can_be_switched_off_and_on() -> None:
    """Where no block of the pipeline switches it on, as one of SDXL's does."""
    plain, modular = both("sd3")
    on = drawn(modular, "sd3", CFG(3.0), SAG(0.5))
    modular.guider.disable()
    assert modular.guider.num_conditions == 1
    assert_near(with_guider(modular, "sd3"), expected(plain, "sd3"))
    modular.guider.enable()
    assert torch.equal(with_guider(modular, "sd3"), on)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sag_dit.as_guider("sag", scheduler=tiny.ddim()), "'sag': expected a term"),  # type: ignore[arg-type]
        (
            lambda: sag_dit.as_guider(SAG(0.5, branch="null"), scheduler=tiny.ddim()),
            r"SAG\(branch='null'\).*add CFG",
        ),
        (
            lambda: sag_dit.as_guider(SAG(0.5), scheduler=diffusers.EDMEulerScheduler()),
            "EDMEulerScheduler: its noise levels",
        ),
        (
            lambda: sag_dit.as_guider(SAG(0.5), scheduler=tiny.ddim()).new(),
            "call sag_dit.as_guider",
        ),
        (
            lambda: sag_dit.as_guider(scheduler=tiny.ddim()).prepare_models(nn.Linear(1, 1)),
            "Linear.*known are UNet2DConditionModel",
        ),
        (
            lambda: sag_dit.as_guider(scheduler=tiny.ddim()).prepare_inputs_from_block_state(
                {}, {}
            ),
            "expected one of Stable Diffusion XL",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_null_prompt_that_is_missing_or_another_scheduler_is_refused() -> None:
    """And the network is left as it was."""
    plain, modular = both("sd3")
    tiny.draw(plain, "sd3")
    before = traces(plain)
    modular.update_components(guider=sag_dit.as_guider(CFG(3.0), scheduler=modular.scheduler))
    call = {**CALL, "prompt": "a corgi", "output": "images", **tiny.CALLS["sd3"]}
    with pytest.raises(ValueError, match="this call brings none; pass negative_prompt"):
        modular(**call)
    other = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.set_timesteps(7)
    modular.update_components(guider=sag_dit.as_guider(SAG(0.5), scheduler=other))
    with pytest.raises(ValueError, match=r"not the scheduler.*scheduler=pipe\.scheduler"):
        modular(**call)
    assert traces(plain) == before


def test_diffusers_own_caches_are_refused() -> None:
    pipe = tiny.sd3()
    guider = sag_dit.as_guider(SAG(0.5), scheduler=pipe.scheduler)
    diffusers.hooks.apply_first_block_cache(
        pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.1)
    )
    guider.set_state(0, 3, torch.tensor(1))
    with pytest.raises(ValueError, match="SD3Transformer2DModel caches what its layers compute"):
        guider.prepare_models(pipe.transformer)


def test_a_controlnet_s_residuals_are_refused() -> None:
    network = network_of(both("sdxl")[0])
    guider = sag_dit.as_guider(SAG(0.5), scheduler=both("sdxl")[0].scheduler)
    guider.set_state(0, 3, torch.tensor(1))
    guider.prepare_models(network)
    residuals = (torch.zeros(1),)
    with pytest.raises(ValueError, match="down_block_additional_residuals: guidance beside"):
        network(torch.zeros(1, 4, 8, 8), 1, None, down_block_additional_residuals=residuals)
    assert "_sag_dit_guided" not in vars(type(network))


@pytest.fixture
def example() -> Iterator[str]:
    """The example of the page."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (each for each in found if "as_guider" in each)
    yield text


def test_the_example_of_the_page(example: str) -> None:
    modular = both("sdxl")[1]
    short = example.replace('prompt="a corgi"', 'prompt="a corgi", **short')
    exec(short, {"pipe": modular, "short": CALL})
    assert [type(term) for term in modular.guider.terms] == [CFG, SAG]
