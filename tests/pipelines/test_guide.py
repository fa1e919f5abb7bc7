"""guide(pipe, ...) in every family: what it changes, and what it leaves to the pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sag_dit.guidance import APG, CFG, PAG, SAG, Term
from sag_dit.pipelines import guide
from tests.closeness import assert_near
from tests.pipelines import tiny
from tests.pipelines.tiny import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def guided(pipe: Any, family: str, *terms: Term, **call: Any) -> Tensor:
    with guide(pipe, *terms):
        return draw(pipe, family, **call)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert_near(ours, theirs, 1e-4)


def test_without_an_active_term_it_is_the_pipeline_bit_for_bit(pipe: Any, family: str) -> None:
    call = {"guidance_scale": 3.0}
    plain = draw(pipe, family, **call)
    terms = (SAG(0.0), PAG(2.0, interval=(1.0, 1.0)), CFG(1.0), APG(1.0))
    assert torch.equal(guided(pipe, family, **call), plain)
    assert torch.equal(guided(pipe, family, *terms, **call), plain)


def one_step(pipe: Any, family: str, *terms: Term, **call: Any) -> Tensor:
    """What the network put out in the only step: its guidance in no way clipped or scaled away."""
    seen: list[Tensor] = []
    step = pipe.scheduler.step

    def watch(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(output.clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = watch
    try:
        # DiT and PixArt call a scheduler of one step by itself; two are enough to look at one.
        guided(pipe, family, *terms, **{"num_inference_steps": 2, **call})
    finally:
        del pipe.scheduler.step
    return seen[0]


def test_the_pipelines_own_cfg_carries_the_guidance_unchanged(pipe: Any, family: str) -> None:
    """Equal contributions d to both rows: u + d + w (c + d - u - d) = u + w (c - u) + d."""
    own: dict[str, Any] = {"guidance_scale": 4.0}
    off: dict[str, Any] = {"guidance_scale": 1.0}
    if family == "flux":
        own, off = {"true_cfg_scale": 4.0, "negative_prompt": "b"}, {}
    terms = (PAG(2.0), SAG(0.5, branch="cond"))
    with_cfg = one_step(pipe, family, *terms, **own) - one_step(pipe, family, **own)
    without = one_step(pipe, family, *terms, **off) - one_step(pipe, family, **off)
    assert float(with_cfg.abs().max()) > 1e-3
    assert_near(with_cfg[:1], without, 1e-3)


def test_beside_cfg_sag_degrades_the_null_prompts_prediction(pipe: Any, family: str) -> None:
    """Its contribution is that of the null prompt drawn by itself, without CFG."""
    if family == "flux":
        pytest.skip("FLUX asks for its null prompt later: SAG degrades the prompt's prediction")
    both, off = {"guidance_scale": 4.0}, {"guidance_scale": 1.0}
    null: Any = 1000 if family == "dit" else "n"
    named = {} if family == "dit" else {"negative_prompt": "n"}
    term = SAG(0.5)
    beside = one_step(pipe, family, term, **both, **named) - one_step(pipe, family, **both, **named)
    alone = one_step(pipe, family, term, prompt=null, **off) - one_step(
        pipe, family, prompt=null, **off
    )
    assert float(alone.abs().max()) > 1e-3
    assert_near(beside[:1], alone, 1e-3)


def test_a_cfg_term_takes_the_place_of_the_pipelines_own(pipe: Any, family: str) -> None:
    if family == "flux":
        with pytest.raises(ValueError, match=r"CFG.*true_cfg_scale"):
            guided(pipe, family, CFG(3.0))
        return
    ours = guided(pipe, family, CFG(3.0), guidance_scale=9.0)
    close(ours, draw(pipe, family, guidance_scale=3.0))
    outside = guided(pipe, family, CFG(3.0, interval=(1.0, 1.0)), guidance_scale=9.0)
    close(outside, draw(pipe, family, guidance_scale=1.0))
    with pytest.raises(ValueError, match="guidance_scale=2"):
        guided(pipe, family, APG(3.0), guidance_scale=1.0)


def test_an_images_guidance_does_not_depend_on_its_batch(pipe: Any, family: str) -> None:
    prompts: Any = [1, 2] if family == "dit" else ["a corgi", "b"]
    call = {"guidance_scale": 3.0}
    terms = (SAG(0.5), PAG(1.0))
    single = [
        guided(
            pipe,
            family,
            *terms,
            prompt=[each],
            generator=[torch.Generator().manual_seed(i)],
            **call,
        )
        for i, each in enumerate(prompts)
    ]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    together = guided(pipe, family, *terms, prompt=prompts, generator=generators, **call)
    close(together, torch.cat(single))
    with guide(pipe, *terms, max_rows=4 if family == "flux" else 2):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        close(draw(pipe, family, prompts, generator=generators, **call), together)


@pytest.mark.parametrize("family", ["sd", "pixart", "sd3", "flux"], indirect=True)
def test_several_images_of_a_prompt_and_sizes_that_are_not_square(pipe: Any, family: str) -> None:
    call = {"num_images_per_prompt": 2, "height": 16, "width": 32, "guidance_scale": 3.0}
    plain = draw(pipe, family, **call)
    changed = guided(pipe, family, SAG(0.5), PAG(1.0), **call)
    assert changed.shape == plain.shape
    assert float((changed - plain).abs().mean()) > 1e-3 * float(plain.abs().mean())
    # The latents (8, 16) lie on a grid of (4, 8) tokens: turned, the mask would not fit.
    turned = guided(pipe, family, SAG(0.5), **{**call, "height": 32, "width": 16})
    assert turned.isfinite().all()


def test_an_interval_counts_the_pipelines_own_steps(pipe: Any, family: str) -> None:
    asked: list[int] = []
    network = getattr(pipe, "unet", None) or pipe.transformer
    hook = network.register_forward_hook(
        lambda _, args, kwargs, out: asked.append(1), with_kwargs=True
    )
    try:
        draw(pipe, family, num_inference_steps=4)
        plain = len(asked)
        asked.clear()
        guided(pipe, family, SAG(0.5, interval=(0.25, 0.75)), num_inference_steps=4)
    finally:
        hook.remove()
    assert (plain, len(asked)) == (4, 6)


def with_few_classes() -> tuple[Any, Any]:
    """A pipeline of ten classes, and one of a thousand whose first ten and null class are these."""
    few, many = tiny.dit(10), tiny.dit()
    weights = dict(many.transformer.state_dict())
    for name, own in few.transformer.state_dict().items():
        if name.endswith("class_embedder.embedding_table.weight"):
            weights[name][:10], weights[name][1000] = own[:10], own[10]
        else:
            weights[name] = own
    many.transformer.load_state_dict(weights)
    few.vae.load_state_dict(many.vae.state_dict())
    return few, many


@pytest.mark.parametrize(
    "terms",
    [
        (SAG(0.5),),
        (CFG(2.0),),
        (SAG(0.5, interval=(0.5, 1.0)),),  # the pipeline's own guidance alone, then ours
    ],
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_null_class_is_the_networks_own(terms: tuple[Term, ...], scale: float) -> None:
    if scale == 1.0 and any(term.from_null for term in terms):
        return
    few, many = with_few_classes()
    call = {"guidance_scale": scale, "prompt": [3, 9]}
    assert torch.equal(guided(few, "dit", *terms, **call), guided(many, "dit", *terms, **call))


def test_a_class_that_the_network_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="class 12 does not exist: expected 0 to 9"):
        guided(tiny.dit(10), "dit", SAG(0.5), prompt=[3, 12], guidance_scale=1.0)


def test_unknown_pipelines_and_layouts_are_refused_by_name() -> None:
    sana = type("SanaPipeline", (), {})()
    with pytest.raises(
        ValueError, match=r"SanaPipeline cannot be guided; known are Stable (.|\n)*linear"
    ):
        guided(sana, "sana", SAG(0.5))
    pag = type("StableDiffusionPAGPipeline", (), {})()
    with pytest.raises(ValueError, match="guides by itself"):
        guided(pag, "pag", SAG(0.5))
    odd = tiny.sd()
    odd.register_modules(
        unet=diffusers.UNet2DModel(
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    )
    with pytest.raises(ValueError, match=r"UNet2DModel.*known are UNet2DConditionModel"):
        guided(odd, "sd", SAG(0.5))
    with pytest.raises(ValueError, match=r"\[SAG.*expected a term"):
        guided(tiny.sd(), "sd", [SAG(0.5)])  # type: ignore[arg-type]


def test_diffusers_own_caches_are_refused() -> None:
    """Put in by the network's method or into its layers, before the guide or within it."""
    config = diffusers.FirstBlockCacheConfig(threshold=0.1)
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel caches.*disable_cache\(\)"):
        pipe = tiny.flux()
        pipe.transformer.enable_cache(config)
        guided(pipe, "flux", SAG(0.5))
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel caches.*load the pipeline"):
        pipe = tiny.flux()
        diffusers.hooks.apply_first_block_cache(pipe.transformer, config)
        guided(pipe, "flux", SAG(0.5))
    pipe = tiny.flux()
    with guide(pipe, SAG(0.5)):
        first = draw(pipe, "flux")
        pipe.transformer.enable_cache(config)
        with pytest.raises(ValueError, match="FluxTransformer2DModel caches"):
            draw(pipe, "flux")
        pipe.transformer.disable_cache()
        assert torch.equal(draw(pipe, "flux"), first)


def test_a_guide_without_with_says_how_it_is_used() -> None:
    with pytest.raises(TypeError, match="write with"):
        guide(object(), SAG(0.75))("a corgi")
    with pytest.warns(UserWarning, match="without `with` guides nothing"):
        guide(object(), SAG(0.75))
