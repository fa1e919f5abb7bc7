"""Text models asked by themselves: what the network is given, and what is drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sag_dit.api import LoadedModel
from sag_dit.checkpoints import hub, is_text, load, load_text
from sag_dit.checkpoints.formats import read_scheduler
from sag_dit.denoiser.text_conditional import Inputs, PackedText, TokenGrid
from sag_dit.guidance import CFG, PAG, SAG, Asking, Question, Term, cost_of
from sag_dit.pipelines import guide, run
from sag_dit.process import DDPM, Flow
from sag_dit.sampler import DDIM, EulerFlow
from sag_dit.sampler.diffusers import DiffusersSampler
from sag_dit.sampling import Request, Settings, sample, trajectory
from tests.closeness import assert_near
from tests.pipelines import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
SIZE = (16, 32)
FAMILIES = ("sd", "sdxl", "pixart", "sd3", "flux")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A pipeline of each family, and the folder that it was saved in."""

    @cache
    def make(family: str) -> tuple[Any, Path]:
        # SAG's mask is a threshold: weights that differ from run to run meet it now and then.
        torch.manual_seed(0)
        pipe = tiny.flux(dev=True) if family == "flux" else tiny.BUILD[family]()
        pipe.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp(family)
        pipe.save_pretrained(folder)
        return pipe, folder

    return make


Saved = Callable[[str], tuple[Any, Path]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_is_asked_as_its_pipeline_asks_it(family: str, saved: Saved) -> None:
    """The first call of the pipeline, and ours at the same noise, time and prompts."""
    pipe, folder = saved(family)
    calls: list[tuple[dict[str, Any], Tensor]] = []
    network = getattr(pipe, "unet", None) or pipe.transformer

    def watch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        names = ("sample", "timestep") if family.startswith("sd") and family != "sd3" else ()
        names = names or ("hidden_states", "timestep")
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, out[0]))

    hook = network.register_forward_hook(watch, with_kwargs=True)
    try:
        tiny.draw(pipe, family, height=SIZE[0], width=SIZE[1])
    finally:
        hook.remove()
    given, theirs = calls[0]
    length = tiny.TOKENS if family == "sd3" else given["encoder_hidden_states"].shape[1]
    model = load_text(folder, ["another", "a corgi"], size=SIZE)
    denoiser: Any = model.denoiser
    if family in ("pixart", "sd3", "flux"):
        # Published models have more tokens than these have; theirs are padded to as many.
        encode = denoiser._encoder.__wrapped__
        object.__setattr__(encode.wording, "max_length", length)
    x = given.get("sample", given.get("hidden_states"))
    cells = (SIZE[0] // 2, SIZE[1] // 2)
    x_t = denoiser.unpacked(x[-1:], TokenGrid(cells)).float()
    level = run.levels(pipe.scheduler)[0]
    conditions = [denoiser.conditions([1])]
    if len(x) == 2:
        conditions.insert(0, denoiser.null(1))
    for row, cond in enumerate(conditions):
        ours = denoiser.evaluate(x_t, level.times(x_t), cond)
        expected = denoiser.unpacked(theirs[row : row + 1], TokenGrid(cells))
        assert_near(ours, expected, 1e-4)


def latents_of(folder: Path, sampler: Any, guidance: tuple[Any, ...], steps: int) -> Any:
    """Draw one image of a prompt; return its noise and its latent."""
    model = load_text(folder, ["a corgi"], size=SIZE)
    settings = Settings(sampler=sampler, steps=steps, guidance=guidance, batch_size=1)
    request = Request(0, 3, 0, stream=0)
    with torch.no_grad():
        last = [*trajectory(model, [request], settings)][-1]
    from sag_dit.noise import START, NoiseSource

    return NoiseSource([3], [0]).normal(START, model.denoiser.latent_shape), last.x


def test_flux_draws_what_its_guided_pipeline_draws(saved: Saved) -> None:
    pipe, folder = saved("flux")
    terms = (SAG(0.5), PAG(1.0))
    noise, ours = latents_of(folder, EulerFlow(), terms, 3)
    call = {"num_inference_steps": 3, "height": SIZE[0], "width": SIZE[1]}
    with guide(pipe, *terms):
        theirs = pipe(
            "a corgi",
            latents=PackedText.packed(noise),
            max_sequence_length=512,
            output_type="latent",
            **call,
        ).images
    assert_near(PackedText.packed(ours), theirs, 1e-4)


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart", "sd3"])
def test_others_draw_what_their_guided_pipelines_draw(family: str, saved: Saved) -> None:
    """With CFG: our own on this side, the pipeline's on the other."""
    pipe, folder = saved(family)
    before = pipe.scheduler
    sampler: Any = EulerFlow()
    # Left to itself, diffusers' scheduler shifts SD3's grid once more and ends it just above zero.
    call: dict[str, Any] = {"max_sequence_length": 256, "sigmas": [1, 2 / 3, 1 / 3]}
    if family != "sd3":
        sampler = DiffusersSampler("euler")
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
            before.config, timestep_spacing="linspace"
        )
        call = {} if family.startswith("sd") else {**tiny.CALLS[family], "max_sequence_length": 120}
    noise, ours = latents_of(folder, sampler, (SAG(0.5), CFG(3.0)), 3)
    call |= {"num_inference_steps": 3, "height": SIZE[0], "width": SIZE[1]}
    try:
        with guide(pipe, SAG(0.5)):
            theirs = pipe(
                "a corgi", latents=noise, guidance_scale=3.0, output_type="latent", **call
            ).images
    finally:
        pipe.scheduler = before
    assert_near(ours, theirs, 1e-4)


def test_a_prompts_image_does_not_depend_on_other_prompts(saved: Saved) -> None:
    _, folder = saved("pixart")
    one = load_text(folder, ["a corgi"], size=SIZE)
    many = load_text(folder, ["b", "a corgi"], size=SIZE)
    settings: dict[str, Any] = {"steps": 2, "batch_size": 2, "guidance": [SAG(0.5), CFG(2.0)]}
    alone = sample(one, ["a corgi"], **settings)
    assert torch.equal(sample(many, ["a corgi", "b"], **settings)[:1], alone)
    assert one.config == many.config


def test_other_prompts_need_no_other_weights(saved: Saved) -> None:
    first = LoadedModel.of(load_text(saved("pixart")[1], ["a corgi"], size=SIZE))
    second = first.prompted("a tabby")
    assert second.denoiser.network is first.denoiser.network
    drawn = [model.sample(0, steps=2, batch_size=1) for model in (first, second)]
    assert [out.labels for out in drawn] == [("a corgi",), ("a tabby",)]
    assert not torch.equal(drawn[0].tensor, drawn[1].tensor)
    again = second.prompted(["a corgi"]).sample(0, steps=2, batch_size=1)
    assert torch.equal(again.tensor, drawn[0].tensor)
    with pytest.raises(ValueError, match="expected a text model"):
        LoadedModel.of(load("digits")).prompted("a corgi")


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_what_determines_a_model_has_all_settings_that_it_had_first(
    family: str, saved: Saved
) -> None:
    config = load_text(saved(family)[1], ["a corgi"], size=SIZE).config
    betas, flow = {"schedule", "num_timesteps"}, {"time_scale", "shift", "start"}
    assert config["process"].keys() == (betas if family == "sd" else flow)
    told = {"size", "cells", "negative", "max_length", "guidance", "tells_size"}
    assert config["wording"].keys() == told


def test_what_a_folder_is_is_read_from_it(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved("sd")
    assert is_text(folder)
    assert not is_text("digits")
    with pytest.raises(ValueError, match="a text model, StableDiffusionPipeline; pass prompt="):
        load(folder)
    with pytest.raises(ValueError, match=r"ckpt=digits.*takes no prompt"):
        load_text("digits", ["a"])
    with pytest.raises(ValueError, match=r"size=\[15, 16\]: expected multiples of 2"):
        load_text(folder, ["a"], size=(15, 16))
    with pytest.raises(ValueError, match="at least one prompt"):
        load_text(folder, [])
    with pytest.raises(ValueError, match=r"text.guidance=4: .* was not distilled from guidance"):
        load_text(folder, ["a"], guidance=4.0)


def test_a_repository_is_downloaded_whole(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is, is read from its configs; tokenizers and encoders are fetched by diffusers."""
    _, folder = saved("sd")
    asked = []
    monkeypatch.setattr(hub, "snapshot", lambda repository, folders: folder)
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "download", lambda name: asked.append(name) or str(folder)
    )
    model = load_text("owner/tiny-sd", ["a corgi"], size=SIZE)
    assert (asked, model.name) == (["owner/tiny-sd"], "tiny-sd")


def test_a_unets_repository_needs_no_transformer(saved: Saved) -> None:
    assert hub._is_complete(saved("sd")[1], ("transformer", "vae"))
    assert hub._is_complete(saved("sd3")[1], ("transformer", "vae"))
    assert not hub._is_complete(saved("sd")[1], ("scheduler",))


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**FLOW, "shift": 3.0}, (Flow(1000, 3.0), "v")),
        ({"prediction_type": "sample"}, (DDPM("linear"), "x_0")),
        ({**SD, "prediction_type": "v_prediction"}, (DDPM("scaled_linear"), "v")),
        ({"beta_schedule": "squaredcos_cap_v2"}, (DDPM("cosine"), "eps")),
        ({**SD, "beta_end": 0.02}, None),
        ({"rescale_betas_zero_snr": True}, None),
    ],
)
def test_the_process_is_read_from_the_scheduler(
    config: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config))
    if expected is None:
        with pytest.raises(ValueError, match="expected the betas of DDPM"):
            read_scheduler(path, (64, 64))
    else:
        assert read_scheduler(path, (64, 64)) == expected


def test_fluxs_shift_grows_with_the_image(tmp_path: Path) -> None:
    """At 1024 pixels 4,096 tokens, where mu is 1.15."""
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**FLOW, "use_dynamic_shifting": True}))
    process, _ = read_scheduler(path, (128, 128))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = [1 - i / 4 for i in range(4)]
    theirs.set_timesteps(4, sigmas=sigmas, mu=1.15)
    ours = torch.tensor([float(level.sigma) for level in process.grid(4)])
    torch.testing.assert_close(ours, theirs.sigmas, rtol=1e-5, atol=1e-6)


def test_stable_diffusions_levels_are_those_of_its_scheduler() -> None:
    theirs = tiny.ddim().alphas_cumprod.double().sqrt()
    ours = torch.tensor([float(DDPM("scaled_linear").level(t).alpha) for t in (0, 500, 999)])
    torch.testing.assert_close(ours.double(), theirs[[0, 500, 999]], rtol=1e-5, atol=0)


def test_inputs_are_cut_and_joined_by_image() -> None:
    arguments = {
        "hidden": torch.arange(4.0).reshape(4, 1),
        "nested": {"list": [torch.arange(4), torch.zeros(3)], "none": None, "number": 2.0},
        "shared": torch.ones(4, 3),
    }
    inputs = Inputs.of(arguments, 4, ("shared",), torch.ones(4, 2, 8, 8))
    assert inputs.count == 4
    first, second = inputs.take(slice(2)), inputs.take(slice(2, None))
    joined = second.join([first])
    plain = joined.plain()
    assert plain["hidden"].flatten().tolist() == [2, 3, 0, 1]
    assert plain["nested"]["list"][0].tolist() == [2, 3, 0, 1]
    assert plain["nested"]["list"][1].shape == (3,)
    assert plain["shared"].shape == (4, 3)
    assert plain["nested"] is not joined.plain()["nested"]
    assert joined.channels is not None
    assert joined.channels.rows.shape == (4, 2, 8, 8)


def test_tokens_are_packed_as_fluxs_pipeline_packs_them() -> None:
    x = torch.arange(2 * 4 * 8 * 6.0).reshape(2, 4, 8, 6)
    tokens = diffusers.FluxPipeline._pack_latents(x, 2, 4, 8, 6)
    assert torch.equal(PackedText.packed(x), tokens)
    assert torch.equal(PackedText.unpacked(tokens, TokenGrid((8, 6))), x)


@dataclass(frozen=True)
class Curious(Term):
    """Asks once more, if the condition that it is told is one image's."""

    def contribution(self, ask: Question) -> Asking:
        again = [ask.base.at(ask.base.x_t * 2)] * (ask.base.cond.count == 1)
        base, *others = yield ask.base, *again
        return base.v * len(others)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_cost_is_told_of_a_method_that_looks_at_the_condition(
    family: str, saved: Saved
) -> None:
    denoiser = load_text(saved(family)[1], ["a corgi"], size=SIZE).denoiser
    sampler = DDIM() if family == "sd" else EulerFlow()
    cost = cost_of(denoiser, [Curious(1.0), PAG(1.0)], sampler, 2)
    assert (cost.rounds, cost.rows) == ((1, 1), (3, 3))
    # The null prompt and the condition stay two questions.
    assert cost_of(denoiser, [CFG(2.0)], sampler, 2).rows == (2, 2)


HARM = "from pathlib import Path\n\nPath({marker!r}).touch()\n\n\nclass {name}: ...\n"


@pytest.mark.parametrize(
    ("part", "file", "stated", "told"),
    [
        ("scheduler", "evil.py", ["evil", "Evil"], r"scheduler is of \['evil', 'Evil'\]"),
        ("scheduler", "diffusers.py", None, r"diffusers\.py: a model folder's own Python"),
        ("tokenizer", "transformers.py", None, r"transformers\.py: a model folder's own Python"),
        ("text_encoder", "", ["os", "system"], r"text_encoder is of \['os', 'system'\]"),
        ("unet", "", ["diffusers", "DiffusionPipeline"], "unet is of .*DiffusionPipeline"),
        ("unet", "", ["diffusers", ["a"]], "unet is of"),
        ("text_encoder", "", ["transformers", "AutoModel"], "text_encoder is of .*AutoModel"),
        ("text_encoder", "", [["transformers"], "T5EncoderModel"], "text_encoder is of"),
        ("../outside", "", ["diffusers", "DDIMScheduler"], "is no part's name"),
    ],
    ids=str,
)
def test_a_folders_own_python_never_runs(
    saved: Saved, tmp_path: Path, part: str, file: str, stated: Any, told: str
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(saved("sd")[1], folder)
    index = json.loads((folder / "model_index.json").read_text())
    if file:
        name = (stated or index[part])[1]
        (folder / part / file).write_text(HARM.format(marker=str(marker), name=name))
    index[part] = stated or index[part]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=told):
        load_text(folder, ["a corgi"], size=SIZE).denoiser.condition(["a corgi"], "cpu")  # type: ignore[arg-type]
    assert not marker.exists()


@pytest.mark.parametrize("key", ["auto_map", "attn_implementation"])
def test_configs_that_name_code_are_refused(saved: Saved, tmp_path: Path, key: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("sd")[1], folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: "owner/repository"}))
    with pytest.raises(ValueError, match=rf"config\.json: its {key} names code that would be run"):
        load_text(folder, ["a corgi"], size=SIZE)
