"""compare: settings of one model, drawn at the same seeds, measured and put side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sag_dit.checkpoints import Model
from sag_dit.data.requests import make_requests
from sag_dit.evaluation.features import FeatureExtractor
from sag_dit.guidance import Term, cost_of
from sag_dit.identity import settings as identity_of
from sag_dit.output.progress import Bar
from sag_dit.sampler import Sampler
from sag_dit.sampling import Pixels, Settings, drawn
from sag_dit.study.comparison import Comparison
from sag_dit.study.measurement import Measurement, Setting, ToDraw, base_name, measurement
from sag_dit.study.measuring import Measuring
from sag_dit.study.results import Record
from sag_dit.study.setup import Setup, Setups, check_metrics, example_of


def compare(
    model: Model,
    settings: Mapping[str, Sequence[Term] | Settings],
    *,
    seeds: int = 1,
    seed: int = 0,
    num_images: int = 300,
    classes: Sequence[int | str] | str | None = None,
    steps: int = 50,
    sampler: Sampler | None = None,
    batch_size: int | None = None,
    features: FeatureExtractor | str | None = None,
    reference: str | None = None,
    metrics: Sequence[str] | None = None,
    against: str | None = None,
    repeats: int = 10,
    progress: bool = True,
) -> Comparison:
    """Draw and measure each setting at the same ``seeds`` seeds, ``seed`` the first of them.

    A setting is a list of guidance terms, drawn with ``steps``, ``sampler`` and ``batch_size``, or
    :class:`~sag_dit.sampling.Settings`, which hold all of these. All start from the same noise and
    have the same classes: those of ``classes`` in turn, all of them where it is None, drawn at
    random where it is ``random``. With several seeds each setting tells what it changes against the
    first, or ``against``; with one seed ± comes from ``repeats`` random halves of the images, 0 for
    none. ``features`` (inception, dinov2, digits, patches or a network of your own), ``reference``
    and ``metrics`` are chosen by the images where they are None. Images are drawn where the model
    is: move ``model.denoiser`` to a GPU before.

    The numbers are those of ``evaluate.py`` with the same settings and seeds.

    Raises:
        ValueError: a value that cannot be meant, a setting that the model cannot be drawn with, or
            a reference or weights that are not here; nothing is drawn before.

    Example::

        model = sag_dit.load("digits")
        settings = {"unguided": [], "SAG": [SAG(0.5)], "SAG + CFG": [SAG(0.5), CFG(1.5)]}
        sag_dit.study.compare(model, settings, seeds=3)
    """
    # Everything is checked and put together before the first image is drawn.
    _check(settings, seeds=seeds, repeats=repeats)
    check_metrics(metrics)
    device = model.denoiser.device
    model.codec.to(device)
    setup = Setups(device).setup(
        example_of(model),
        model.class_names,
        features=features,
        reference=reference,
        metrics=metrics,
    )
    # A measurement for each setting and seed: the same requests, so the same noise and classes.
    rule = "all" if classes is None else classes
    measurements: list[Measurement] = []
    for name, chosen in settings.items():
        how = chosen
        if not isinstance(how, Settings):
            how = Settings.of(
                model, sampler=sampler, steps=steps, guidance=how, batch_size=batch_size
            )
        how.check(model)
        setting = Setting(name)
        cost = cost_of(model.denoiser, how.guidance, how.sampler, how.steps)
        for number in range(seed, seed + seeds):
            names = how.class_names(model)
            requests = make_requests(num_images, number, classes, names)
            request = {"seed": number, "classes": rule if isinstance(rule, str) else list(rule)}
            pixels = identity_of(Pixels.of(model, how, _named(how.guidance), request))
            images = ToDraw(model, how, requests, pixels, cost)
            measurements.append(measurement(setting, images, setup, repeats))
    base_name(measurements, against)
    # Only now anything is drawn.
    records = _measured(measurements, setup, progress)
    return Comparison.of(measurements, records, against)


def _check(settings: Mapping[str, object], *, seeds: int, repeats: int) -> None:
    if not settings:
        raise ValueError("settings={}: expected names with their guidance, such as {'plain': []}")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected a whole number, 1 or more")
    if repeats < 0 or repeats == 1:
        raise ValueError(f"repeats={repeats}: expected 0, or 2 or more")


def _named(guidance: Sequence[Term]) -> dict[str, Term]:
    """Return terms by their keys; of several with one key the later ones are numbered."""
    named: dict[str, Term] = {}
    for term in guidance:
        key = getattr(type(term), "key", type(term).__name__)
        count = sum(type(each) is type(term) for each in named.values())
        named[f"{key}_{count + 1}" if count else key] = term
    return named


def _measured(
    measurements: Sequence[Measurement], setup: Setup, progress: bool
) -> dict[str, Record]:
    """Draw and measure each set once, though two settings may come to the same images."""
    records: dict[str, Record] = {}
    bar = Bar()
    try:
        for number, each in enumerate(measurements, start=1):
            if each.identity in records:
                continue
            images = each.images
            assert isinstance(images, ToDraw)
            measuring = Measuring(each, images.model.denoiser.device)
            if progress:
                text = f"{each.setting.name} ({number} of {len(measurements)})"
                bar.begin(text, each.count)
            # Rows of the next batch, which the bar moves by while it is drawn.
            size = images.settings.batch_size
            bar.begin_batch(min(size, each.count))
            for batch in drawn(images.model, images.requests, images.settings, watch=bar.step):
                measuring(batch)
                bar.end_batch()
            records[each.identity] = measuring.record()
    finally:
        bar.stop()
    return records
