"""``sample.py``: draw a set of images, on one device or many, and show them beside their twins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.cli.app import alone_in, launch, quiet_lightning
from sag_dit.cli.batch_size import decided_batch_size
from sag_dit.cli.composing import changed, make, placed
from sag_dit.cli.first_rank import is_first_rank
from sag_dit.cli.keys import Sample, Searches
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.models import load_model
from sag_dit.cli.presets import with_presets
from sag_dit.cli.speed import emulated, in_arithmetic, network_precision, speed_told
from sag_dit.cli.trainer_flags import check_drawing
from sag_dit.cli.values import (
    check_logger,
    check_requests,
    is_auto,
    make_maps,
    make_search,
    make_terms,
    own_sampler,
    why_not,
)
from sag_dit.identity import digest, written
from sag_dit.identity import settings as identity_of

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model
    from sag_dit.guidance import Cost, Term
    from sag_dit.output.folder import SampleFolder
    from sag_dit.output.telling import Recipe
    from sag_dit.sampling import Request, Settings
    from sag_dit.traces import Maps


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything is drawn.

    Example::

        plan = make_plan(config, num_images=8, out=None)
        print(plan.folder.path, len(plan.missing(gallery=4, verify=False)))
    """

    model: Model
    settings: Settings
    requests: Sequence[Request]
    folder: SampleFolder
    pixels: Mapping[str, Any]
    """The folder's identity: :class:`~sag_dit.sampling.Pixels` as plain values."""
    sampler: dict[str, Any]
    """The settings of the sampler, as the configuration states them."""
    maps: Maps | None = None
    """Which attention to keep of the gallery's images."""
    left_out: Mapping[str, float] = field(default_factory=dict)
    """Scales of the guidance that is there by default and that the model cannot have."""

    def missing(self, gallery: int, verify: bool) -> Sequence[Request]:
        """Return the requests that are still to be drawn, the first ``gallery`` with a twin."""
        return self.folder.missing(
            self.requests,
            gallery,
            attention=self.maps is not None,
            verify=verify,
            tell=print if is_first_rank() else None,
        )


def make_plan(
    config: Searches, num_images: int, out: str | None, model: Model | None = None
) -> Plan:
    """Check what is to be drawn, load the model unless it is given, and find the folder.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    from sag_dit.api import with_models
    from sag_dit.checkpoints import is_text
    from sag_dit.data.requests import make_requests, read_requests, renumbered
    from sag_dit.guidance import Cache
    from sag_dit.output.folder import SampleFolder
    from sag_dit.sampler import Sampler
    from sag_dit.sampling import Pixels, Settings
    from sag_dit.search import FKSteering

    check_requests(config)
    guidance = make_terms(config.guidance)
    search = make_search(config.search)
    if not is_auto(config.sampler):
        make(config.sampler, "sampler", Sampler)  # Before a model is loaded.
    model = model or in_arithmetic(load_model(config, config.requests), config)
    left_out = _lacking(config, guidance, model)
    if left_out:
        config = changed("sample", config, left_out)
        guidance = make_terms(config.guidance)
    stated = own_sampler(config.sampler, model.denoiser.process)
    sampler = make(stated, "sampler", Sampler)
    guidance = with_models(guidance)
    asked: Any = config.batch_size
    auto = asked == "auto"
    if auto and isinstance(search, FKSteering):
        raise ValueError(
            f"batch_size=auto beside search=fk: an image's particles are drawn in one batch, which "
            f"has to hold them; state a number, such as batch_size={4 * search.particles}"
        )
    # Until it is found, any number that the other settings allow.
    size = 1 if auto else asked or model.batch_size
    settings = Settings(
        sampler=sampler,
        steps=config.steps,
        guidance=tuple(guidance.values()),
        batch_size=size,
        max_rows=config.max_rows,
        share_prefixes=config.share_prefixes,
        search=search,
        cache=Cache(config.cache.every, config.cache.order),
    )
    settings.check(model)
    model = replace(model, class_names=settings.class_names(model))
    if config.requests is not None:
        prompts = is_text(str(config.ckpt))
        requests: Sequence[Request] = read_requests(
            config.requests, model.class_names, prompts=prompts
        )
        rule: Any = {
            "requests_sha256": hashlib.sha256(Path(config.requests).read_bytes()).hexdigest()
        }
        # Such lines drew other images once, which must not stand beside these.
        if not prompts and renumbered(config.requests, model.class_names):
            rule["numbers"] = "labels"
    else:
        classes = config.classes
        requests = make_requests(num_images, config.seed, classes, model.class_names)
        rule = {"seed": config.seed, "classes": "all" if classes is None else classes}
        if config.prompt is not None:
            rule = {"seed": config.seed, "prompt": config.prompt}
    precision, matmul = network_precision(config), config.matmul
    drawn = Pixels.of(model, settings, guidance, rule, precision, matmul, config.compile)
    pixels = identity_of(drawn)
    if auto:
        # The folder is found before the number is, which it then keeps.
        pixels["batch_size"] = "auto"
    path = Path(out or f"outputs/sample/{model.name}-{digest(pixels)[:8]}")
    if auto:
        size = decided_batch_size(config, path, model, settings, len(requests))
        settings, pixels["batch_size"] = replace(settings, batch_size=size), size
    folder = SampleFolder(path)
    return Plan(model, settings, requests, folder, pixels, stated, left_out=left_out)


def _lacking(config: Searches, guidance: Mapping[str, Term], model: Model) -> dict[str, float]:
    """Return the scales that turn default guidance off which the model cannot have; tell it.

    What the user of ``sample.py`` has stated stays.
    """
    found: dict[str, float] = {}
    if not isinstance(config, Sample) or config.source is None or config.states("experiment"):
        return found
    for name, term in guidance.items():
        scale = f"{name}_scale"
        if term.off or config.states(scale) or config.states(f"guidance.{name}"):
            continue
        reason = why_not(term, model)
        if reason:
            found[scale] = term.neutral
            if is_first_rank():
                print(f"images are drawn with {scale}={term.neutral:g}, since {reason}")
    return found


def run_sample(config: Sample) -> None:
    """Draw what is missing; rank 0 then checks that all is there and writes what shows it."""
    check_logger(config.logger)
    check_drawing(config.trainer)
    gallery = config.gallery.num
    if config.maps and gallery == 0:
        raise ValueError(
            "maps=true keeps the attention of the gallery's images, and gallery.num=0 leaves none; "
            "set gallery.num to how many you want, or maps=false"
        )
    # The folder is claimed before anything is drawn, so that it holds one set.
    plan = make_plan(config, config.num_images, config.out)
    if plan.left_out:
        config = changed("sample", config, plan.left_out)
    how = plan.settings
    cost = how.cost(plan.model.denoiser)
    if config.maps:
        maps = make_maps(config.attention, plan.model, len(cost.rounds), how.guidance)
        plan = replace(plan, maps=maps)
    size = how.batch_size if config.batch_size == "auto" else config.batch_size
    config = placed(replace(config, sampler=plan.sampler, batch_size=size), plan.folder.path)
    plan.folder.claim(plan.pixels, {**to_dict(config), "cost": cost.plain()})
    if is_first_rank():
        told = (f"cost: {cost}", how.useless(plan.model.denoiser), speed_told(config, plan.model))
        print("\n".join(filter(None, told)))
    with alone_in(plan.folder.path):
        if _complete(config, plan, cost) and is_first_rank():
            _finish(config, plan)


def _complete(config: Sample, plan: Plan, cost: Cost) -> bool:
    """Draw what is missing, on all ranks; return whether this is the first one."""
    pending = plan.missing(config.gallery.num, config.verify)
    if not pending:
        return True
    if not plan.folder.writable:
        raise ValueError(
            f"out={plan.folder.path}: {len(pending)} images are missing, and nothing can be "
            f"written there; give permission, or choose another out"
        )
    if not _predict(config, plan, pending, cost):
        return False
    left = [each for each in pending if not plan.folder.image(each.index).exists()]
    if left:
        raise ValueError(
            f"{len(left)} of {len(plan.requests)} images are missing in {plan.folder.path}, "
            f"the first is {left[0].index}; repeat the command to draw them"
        )
    return True


def _beside(plan: Plan, cost: Cost, pending: Sequence[Request], gallery: int, ranks: int) -> None:
    """Tell what twins and padding cost beside the images themselves."""
    from sag_dit.guidance.cost import Batches

    how, batches = plan.settings, Batches(len(pending), plan.settings.batch_size, ranks)
    paired = sum(request.index < gallery for request in pending[:gallery])
    if paired:
        drawn = [how.unguided, *([how.without(how.spared)] if how.spared else [])]
        twins = [each.cost(plan.model.denoiser) for each in drawn]
        print(f"      {batches.twins(paired, cost, twins)}")
        if how.search is not None:
            print("      and these images are drawn once more, to see their attention")
    if batches.padding():
        print(f"      {batches.padding()}")


def _predict(config: Sample, plan: Plan, pending: Sequence[Request], cost: Cost) -> bool:
    """Draw the pending requests on all ranks; return whether this is rank 0."""
    quiet_lightning()
    import torch

    from sag_dit.cli.stopping import LeaveWhenTold, ending_together
    from sag_dit.output.ranks import RankReports
    from sag_dit.output.sheet import SheetText, outline
    from sag_dit.output.telling import how
    from sag_dit.profiling import profiling
    from sag_dit.training.predicting import Predictor
    from sag_dit.training.timing import flops_of, settle
    from sag_dit.training.timing import told as timing

    torch.set_float32_matmul_precision(config.matmul)
    # What sheets say, and the Trainer whose ranks draw.
    folder, recipe, gallery = plan.folder, recipe_of(config, plan), config.gallery.num

    def told(request: Request) -> SheetText:
        assert plan.maps is not None
        name = plan.model.class_names[request.label]
        title = f"{plan.model.name}: {name} (image {request.index})"
        return SheetText(title, how(recipe, plan.model.denoiser), outline(plan.maps.limit))

    predictor = Predictor(partial(make, config.trainer, "trainer"), folder.path, [LeaveWhenTold()])
    trainer = predictor.trainer
    slow = emulated(config, trainer.strategy.root_device)
    if trainer.is_global_zero:
        _beside(plan, cost, pending, gallery, trainer.world_size)
        if slow:
            print(slow)
    reports = RankReports(folder.path, trainer.global_rank, trainer.world_size)
    device = trainer.strategy.root_device
    asked = profiling(partial(settle, device)) if config.profile else nullcontext()
    with ending_together(trainer):
        with reports.reporting(), asked as profile:
            predictor.draw(
                plan.model,
                pending,
                plan.settings,
                write=partial(folder.write, told=told),
                gallery=gallery,
                maps=plan.maps,
                done=len(plan.requests) - len(pending),
            )
        if not trainer.is_global_zero:
            return False
        reports.wait(folder.journal.length)
    reports.clear()
    if profile is not None:
        precision = str(trainer.precision)
        flops = flops_of(plan.model, alone=not any(cost.others))
        print(*timing(profile, flops, device, precision), sep="\n")
    return True


def _finish(config: Sample, plan: Plan) -> None:
    from sag_dit.output.folder import NPZ, gallery_entries, log_gallery, write_manifest, write_npz
    from sag_dit.output.gallery import PAGE, write_gallery
    from sag_dit.output.telling import about_images

    names, page = plan.model.class_names, plan.folder.path / PAGE
    if not plan.folder.writable:
        # All was written before; nothing can be added now.
        if config.npz and not (plan.folder.path / NPZ).exists():
            raise ValueError(
                f"out={plan.folder.path}: npz=true asks for {NPZ}, and nothing can be written "
                f"there; give permission, or choose another out"
            )
        print(f"images: {plan.folder.path / 'images'} ({len(plan.requests)})")
        if page.exists():
            print(f"gallery: {page.resolve()}")
        return
    write_manifest(plan.folder, plan.requests, names)
    if config.npz:
        print(f"npz: {write_npz(plan.folder, plan.requests)}")
    print(f"images: {plan.folder.path / 'images'} ({len(plan.requests)})")
    if plan.maps is not None:
        print(f"attention: {plan.folder.path / 'attention'}")
    shown = plan.requests[: config.gallery.num]
    if not shown:
        return
    entries = gallery_entries(plan.folder, shown, names, plan.settings.spared)
    pixels = written(plan.pixels)
    told = ("model", "sampler", "steps", "guidance", "request", "search")
    shown_settings = {key: pixels[key] for key in told if key in pixels}
    about = about_images(recipe_of(config, plan), plan.settings, plan.model.denoiser)
    page = write_gallery(
        plan.folder.path,
        entries,
        shown_settings,
        f"sag_dit: {plan.model.name}",
        about,
        labels=config.grid.labels,
    )
    logger = make(config.logger, "logger") if config.logger else None
    if logger is not None:
        log_gallery(logger, entries, pixels, about.spared)
        logger.finalize("success")
    print(f"gallery: {page.resolve()}")


def recipe_of(config: Sample, plan: Plan) -> Recipe:
    """Return what draws the images, to tell it."""
    from sag_dit.output.telling import Recipe

    # What is at its default is left out.
    text, precision, decoding = config.text, network_precision(config), config.decoding
    size = None if text.size is None else tuple(text.size)
    loading = {
        "ema": None if config.ema is True else config.ema,
        "vae": config.vae,
        "num_heads": config.num_heads,
        "negative_prompt": text.negative or None,
        "size": size,
        "guidance": text.guidance,
    }
    beside = {
        "imports": config.imports,
        "max_rows": config.max_rows,
        "requests": config.requests,
        "trainer.precision": None if precision == "32-true" else precision,
        "compile": config.compile or None,
        "matmul": None if config.matmul == "highest" else config.matmul,
        "decoding.batch_size": None if decoding.batch_size == 1 else decoding.batch_size,
        "decoding.precision": None if decoding.precision == "32-true" else decoding.precision,
        "decoding.channels_last": decoding.channels_last or None,
    }
    return Recipe(
        config.ckpt,
        plan.settings.sampler,
        steps=config.steps,
        seed=config.seed,
        guidance=make_terms(config.guidance),
        num_classes=len(plan.model.class_names),
        classes=config.classes,
        num_images=config.num_images,
        prompt=config.prompt,
        batch_size=None if config.batch_size == "auto" else config.batch_size,
        share_prefixes=config.share_prefixes,
        search=plan.settings.search,
        cache=plan.settings.cache,
        loading={key: value for key, value in loading.items() if value is not None},
        beside={key: value for key, value in beside.items() if value is not None},
    )


main = partial(launch, "sample", run_sample, prepare=with_presets)
"""Run ``sample.py``, with the arguments of the command line unless others are given."""
