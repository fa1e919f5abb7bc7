"""``sample.py``: draw a set of images, on one device or many, and show them beside their twins."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sag_dit.cli.app import KILL, launch, literal, quiet_lightning
from sag_dit.cli.models import load_model
from sag_dit.cli.presets import with_presets
from sag_dit.cli.values import check_logger, check_requests, make_maps, make_terms, with_models
from sag_dit.identity import digest, written
from sag_dit.identity import settings as identity_of

if TYPE_CHECKING:
    from sag_dit.checkpoints import Model
    from sag_dit.output.attention import Maps
    from sag_dit.output.folder import SampleFolder
    from sag_dit.sampling import Request, Settings


@dataclass(frozen=True)
class Pixels:
    """What determines the pixels of a run; what is added to it has to be ``LATER``."""

    model: str
    weights_sha256: str
    network: Mapping[str, Any]
    codec: Mapping[str, Any]
    sampler: Mapping[str, Any]
    steps: int
    guidance: Mapping[str, Any]
    request: Mapping[str, Any]
    batch_size: int
    max_rows: int | None
    precision: str


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything is drawn."""

    model: Model
    settings: Settings
    requests: list[Request]
    folder: SampleFolder
    pixels: Mapping[str, Any]
    """The folder's identity: :class:`Pixels` as plain values."""
    maps: Maps | None = None
    """Which attention to keep of the gallery's images."""

    def missing(self, config: DictConfig) -> list[Request]:
        """Return the requests that are still to be drawn."""
        keeps = self.maps is not None
        return self.folder.missing(self.requests, config.gallery.num, attention=keeps)


def make_plan(config: DictConfig, model: Model | None = None) -> Plan:
    """Check the configuration, load the model unless it is given, and find the folder.

    Raises:
        ValueError: a value that cannot be used; the remedy is named.
    """
    from sag_dit.data.requests import make_requests, read_requests
    from sag_dit.output.folder import SampleFolder
    from sag_dit.sampling import Settings

    check_requests(config)
    if config.maps and config.gallery.num == 0:
        raise ValueError(
            "maps=true keeps the attention of the gallery's images, and gallery.num=0 leaves none; "
            "set gallery.num to how many you want, or maps=false"
        )
    guidance = make_terms(config.guidance)
    sampler = instantiate(config.sampler)
    model = model or load_model(config)
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
        requests = read_requests(config.requests, model.class_names)
        rule: Any = {
            "requests_sha256": hashlib.sha256(Path(config.requests).read_bytes()).hexdigest()
        }
    else:
        classes = config.classes
        if OmegaConf.is_list(classes):
            classes = OmegaConf.to_container(classes)
        requests = make_requests(config.num_images, config.seed, classes, model.class_names)
        rule = {"seed": config.seed, "classes": "all" if classes is None else classes}
        if OmegaConf.select(config, "prompt") is not None:
            rule = {"seed": config.seed, "prompt": config.prompt}
    active = {name: term for name, term in guidance.items() if not term.off}
    pixels = identity_of(
        Pixels(
            model=model.name,
            weights_sha256=model.sha256,
            network=model.config,
            codec=model.codec.config(),
            sampler=sampler.identity(),
            steps=config.steps,
            guidance={name: term.identity(model.denoiser) for name, term in active.items()},
            request=rule,
            batch_size=settings.batch_size,
            max_rows=settings.max_rows,
            precision=str(config.trainer.get("precision") or "32-true"),
        )
    )
    path = Path(config.out or f"outputs/sample/{model.name}-{digest(pixels)[:8]}")
    maps = make_maps(config, model, config.steps, settings.guidance) if config.maps else None
    return Plan(model, settings, requests, SampleFolder(path), pixels, maps)


def run(config: DictConfig) -> None:
    """Draw what is missing; rank 0 then checks that all is there and writes what shows it."""
    from sag_dit.guidance import cost_of

    check_logger(config.logger)
    plan = make_plan(config)
    config.out = literal(str(plan.folder.path))
    how = plan.settings
    cost = cost_of(plan.model.denoiser, how.guidance, how.sampler, how.steps)
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    plan.folder.claim(plan.pixels, {**resolved, "cost": cost.plain()})
    if not _is_launched_rank():
        print(f"cost: {cost}")
    pending = plan.missing(config)
    if pending:
        if not _predict(config, plan, pending):
            return
        left = plan.missing(config)
        if left:
            raise ValueError(
                f"{len(left)} of {len(plan.requests)} images are missing in {plan.folder.path}, "
                f"the first is {left[0].index}; repeat the command to draw them"
            )
    elif _is_launched_rank():
        return
    _finish(config, plan)


def _is_launched_rank() -> bool:
    """Whether this process is a rank other than 0 that torchrun or SLURM has started."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) != 0


def _predict(config: DictConfig, plan: Plan, pending: list[Request]) -> bool:
    """Draw the pending requests on all ranks; return whether this is rank 0."""
    quiet_lightning()
    from lightning.pytorch import Trainer

    from sag_dit.cli.stopping import LeaveWhenTold
    from sag_dit.data.requests import PendingRequests
    from sag_dit.output.progress import SampleProgress
    from sag_dit.output.ranks import RankReports
    from sag_dit.output.writer import PredictionWriter
    from sag_dit.training.module import DiffusionModule

    progress = SampleProgress(plan.folder, len(plan.requests))
    trainer: Trainer = instantiate(
        config.trainer,
        logger=False,
        callbacks=[PredictionWriter(plan.folder), progress, LeaveWhenTold()],
        # Ours instead: sharding of what is pending, no_grad, and a bar over all ranks' images.
        use_distributed_sampler=False,
        inference_mode=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=literal(str(plan.folder.path)),
        _convert_="all",
    )
    module = DiffusionModule(
        plan.model,
        settings=plan.settings,
        gallery=config.gallery.num,
        maps=plan.maps,
        watch=progress.watch,
    )
    reports = RankReports(plan.folder.path, trainer.global_rank, trainer.world_size)
    try:
        with reports.reporting():
            trainer.predict(
                module,
                datamodule=PendingRequests(pending, plan.settings.batch_size),
                return_predictions=False,
            )
        if not trainer.is_global_zero:
            return False
        reports.wait(plan.folder.count)
    except BaseException:
        # Ranks that Lightning has started would go on without this process, holding their devices.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(KILL)
        raise
    reports.clear()
    return True


def _finish(config: DictConfig, plan: Plan) -> None:
    from sag_dit.output.finish import gallery_entries, log_gallery, write_manifest, write_npz
    from sag_dit.output.gallery import write_gallery

    names = plan.model.class_names
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
    logger = instantiate(config.logger) if config.logger else None
    if logger is not None:
        log_gallery(logger, entries, pixels)
        logger.finalize("success")
    print(f"gallery: {page.resolve()}")


def main() -> None:
    """Run ``sample.py``."""
    launch("sample", run, with_presets("sample", sys.argv[1:]))
