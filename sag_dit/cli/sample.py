"""``sample.py``: draw a set of images, on one device or many, and show them beside their twins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.cli.app import alone_in, is_first_rank, launch, quiet_lightning
from sag_dit.cli.composing import make, placed
from sag_dit.cli.keys import Guides, Sample
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.models import load_model
from sag_dit.cli.presets import with_presets
from sag_dit.cli.values import (
    check_logger,
    check_requests,
    is_auto,
    make_maps,
    make_terms,
    own_sampler,
    with_models,
)
from sag_dit.identity import digest, written
from sag_dit.identity import settings as identity_of

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model
    from sag_dit.output.folder import SampleFolder
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

    def missing(self, gallery: int, verify: bool) -> Sequence[Request]:
        """Return the requests that are still to be drawn, the first ``gallery`` with a twin."""
        return self.folder.missing(
            self.requests,
            gallery,
            attention=self.maps is not None,
            verify=verify,
            tell=print if is_first_rank() else None,
        )


def make_plan(config: Guides, num_images: int, out: str | None, model: Model | None = None) -> Plan:
    """Check what is to be drawn, load the model unless it is given, and find the folder.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    from sag_dit.checkpoints import is_text
    from sag_dit.data.requests import make_requests, read_requests, renumbered
    from sag_dit.output.folder import SampleFolder
    from sag_dit.sampler import Sampler
    from sag_dit.sampling import Pixels, Settings

    check_requests(config)
    guidance = make_terms(config.guidance)
    if not is_auto(config.sampler):
        make(config.sampler, "sampler", Sampler)  # Before a model is loaded.
    model = model or load_model(config, config.requests)
    stated = own_sampler(config.sampler, model.denoiser.process)
    sampler = make(stated, "sampler", Sampler)
    guidance = with_models(guidance)
    settings = Settings(
        sampler=sampler,
        steps=config.steps,
        guidance=tuple(guidance.values()),
        batch_size=config.batch_size or model.batch_size,
        max_rows=config.max_rows,
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
    precision = str(config.trainer.get("precision") or "32-true")
    pixels = identity_of(Pixels.of(model, settings, guidance, rule, precision))
    path = Path(out or f"outputs/sample/{model.name}-{digest(pixels)[:8]}")
    return Plan(model, settings, requests, SampleFolder(path), pixels, stated)


def run_sample(config: Sample) -> None:
    """Draw what is missing; rank 0 then checks that all is there and writes what shows it."""
    from sag_dit.guidance import cost_of

    check_logger(config.logger)
    gallery = config.gallery.num
    if config.maps and gallery == 0:
        raise ValueError(
            "maps=true keeps the attention of the gallery's images, and gallery.num=0 leaves none; "
            "set gallery.num to how many you want, or maps=false"
        )
    # The folder is claimed before anything is drawn, so that it holds one set.
    plan = make_plan(config, config.num_images, config.out)
    how = plan.settings
    if config.maps:
        plan = replace(plan, maps=make_maps(config.attention, plan.model, how.steps, how.guidance))
    config = placed(replace(config, sampler=plan.sampler), plan.folder.path)
    cost = cost_of(plan.model.denoiser, how.guidance, how.sampler, how.steps)
    plan.folder.claim(plan.pixels, {**to_dict(config), "cost": cost.plain()})
    if is_first_rank():
        print(f"cost: {cost}")
    with alone_in(plan.folder.path):
        if _complete(config, plan) and is_first_rank():
            _finish(config, plan)


def _complete(config: Sample, plan: Plan) -> bool:
    """Draw what is missing, on all ranks; return whether this is the first one."""
    gallery = config.gallery.num
    pending = plan.missing(gallery, config.verify)
    if not pending:
        return True
    if not plan.folder.writable:
        raise ValueError(
            f"out={plan.folder.path}: {len(pending)} images are missing, and nothing can be "
            f"written there; give permission, or choose another out"
        )
    if not _predict(config.trainer, plan, pending, gallery):
        return False
    left = [each for each in pending if not plan.folder.image(each.index).exists()]
    if left:
        raise ValueError(
            f"{len(left)} of {len(plan.requests)} images are missing in {plan.folder.path}, "
            f"the first is {left[0].index}; repeat the command to draw them"
        )
    return True


def _predict(
    settings: Mapping[str, Any], plan: Plan, pending: Sequence[Request], gallery: int
) -> bool:
    """Draw the pending requests on all ranks; return whether this is rank 0."""
    quiet_lightning()
    from sag_dit.cli.stopping import LeaveWhenTold, ending_together
    from sag_dit.output.ranks import RankReports
    from sag_dit.training.predicting import Predictor

    folder = plan.folder
    predictor = Predictor(partial(make, settings, "trainer"), folder.path, [LeaveWhenTold()])
    trainer = predictor.trainer
    reports = RankReports(folder.path, trainer.global_rank, trainer.world_size)
    with ending_together(trainer):
        with reports.reporting():
            predictor.draw(
                plan.model,
                pending,
                plan.settings,
                [folder.write],
                gallery=gallery,
                maps=plan.maps,
                done=len(plan.requests) - len(pending),
            )
        if not trainer.is_global_zero:
            return False
        reports.wait(folder.journal.length)
    reports.clear()
    return True


def _finish(config: Sample, plan: Plan) -> None:
    from sag_dit.output.folder import gallery_entries, log_gallery, write_manifest, write_npz
    from sag_dit.output.gallery import PAGE, write_gallery

    names, page = plan.model.class_names, plan.folder.path / PAGE
    if not plan.folder.writable:
        # All was written before; nothing can be added now.
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
    entries = gallery_entries(plan.folder, shown, names)
    pixels = written(plan.pixels)
    shown_settings = {
        key: pixels[key] for key in ("model", "sampler", "steps", "guidance", "request")
    }
    page = write_gallery(plan.folder.path, entries, shown_settings, f"sag_dit: {plan.model.name}")
    logger = make(config.logger, "logger") if config.logger else None
    if logger is not None:
        log_gallery(logger, entries, pixels)
        logger.finalize("success")
    print(f"gallery: {page.resolve()}")


main = partial(launch, "sample", run_sample, prepare=with_presets)
"""Run ``sample.py``, with the arguments of the command line unless others are given."""
