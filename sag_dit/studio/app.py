"""The page: controls on the left, pictures on the right, and what happens between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

from sag_dit.api import LoadedModel, Samples
from sag_dit.checkpoints import zoo
from sag_dit.methods import methods
from sag_dit.output import telling
from sag_dit.sampler import named, sampler_names
from sag_dit.studio import controls, grids, opening, pictures
from sag_dit.studio.asking import AS_SAG, Asked, class_of, option_names
from sag_dit.studio.library import Library
from sag_dit.studio.pictures import Drawing

PAUSE = 0.08
"""Seconds in which a further change replaces the one before, as while a slider is dragged."""
FRAMES = 8
"""Pictures that are shown of a run while it is drawn."""
MOST = 8
"""Images that are drawn at once."""

KEYS = (
    '<p class="keys"><kbd>x</kbd> swaps guided and unguided, or now and A &nbsp; '
    "<kbd>a</kbd> keeps as A &nbsp; <kbd>b</kbd> goes back to A &nbsp; <kbd>s</kbd> stops</p>"
)
COMPUTING = threading.Lock()
"""Held while a network is asked: users take turns, a few steps each."""


@dataclass
class Session:
    """What one open page has drawn.

    A change takes a ticket, and whoever draws for an older one stops.

    Example:
        >>> session = Session()
        >>> session.take() == session.ticket
        True
    """

    ticket: int = 0
    ckpt: str = ""
    drawing: Drawing | None = None
    kept: Drawing | None = None
    settings: list[Any] = field(default_factory=list)
    kept_settings: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)

    def take(self, asked: Sequence[Any] = ()) -> int:
        """Return a new ticket, for what is ``asked``, which makes all others old."""
        self.ticket += 1
        self.asked = list(asked)
        return self.ticket


@dataclass(frozen=True)
class Begin:
    """What the page shows at first.

    ``presets`` holds, by the name of a model, what sample.py draws it with: ``guidance`` and
    ``sampler`` as a configuration states them. Those of ``""`` are for all other models.

    Example:
        >>> Begin(presets={"digits": {"steps": 50}}).preset("digits")["steps"]
        50
    """

    ckpt: str = "digits"
    prompt: str = "a photo of a red fox"
    steps: int = 20
    images: int = 4
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def preset(self, ckpt: str) -> Mapping[str, Any]:
        """Return what a model is drawn with unless the user says otherwise."""
        return self.presets.get(ckpt) or self.presets.get("") or {}


class Page:
    """The components of the page, and what they do.

    Example::

        Page(Library(), Begin()).blocks.launch()
    """

    def __init__(self, library: Library, begin: Begin) -> None:
        self.library, self.begin = library, begin
        self.knobs = controls.knobs(tuple(begin.preset(begin.ckpt).get("guidance", ())))
        self.notes: dict[str, Any] = {}
        self.blocks = gr.Blocks(title="sag_dit studio", analytics_enabled=False, fill_width=True)
        with self.blocks:
            self.session = gr.State(Session())
            with gr.Row(elem_id="studio", equal_height=False):
                with gr.Column(scale=2, min_width=330, elem_id="controls"):
                    self._controls()
                with gr.Column(scale=5, min_width=330, elem_id="view"):
                    self._view()
            self._wire()

    # What is on the page.

    def _controls(self) -> None:
        # Which model draws, and what is asked of it.
        gr.HTML("<h1>sag_dit <span>studio</span></h1>", elem_id="title")
        self.ckpt = gr.Dropdown(
            self.library.choices(), value=self.begin.ckpt, label="model", elem_id="ckpt",
            allow_custom_value=True,
        )  # fmt: skip
        self.upload = gr.UploadButton(
            "Upload a checkpoint", file_types=[*zoo.FILE_SUFFIXES], size="sm", elem_id="upload"
        )
        self.about = gr.HTML(elem_id="about")
        self.prompt = gr.Textbox(
            self.begin.prompt, label="prompt", elem_id="prompt", visible=False, max_lines=3
        )
        self.label = gr.Dropdown([], label="class", elem_id="label", allow_custom_value=True)
        # Which images, and by which sampler, whose own options stand below it.
        with gr.Row():
            self.seed = gr.Number(0, label="seed", precision=0, minimum=0, elem_id="seed",
                                  min_width=100)  # fmt: skip
            self.count = controls.slider(
                1, MOST, self.begin.images, step=1, label="images", elem_id="count", buttons=[],
                min_width=120,
            )  # fmt: skip
        with gr.Row():
            self.steps = controls.slider(
                1, 100, self.begin.steps, step=1, label="steps", elem_id="steps", buttons=[],
                min_width=120,
            )  # fmt: skip
            self.sampler = gr.Dropdown(
                sampler_names(), value="auto", label="sampler", elem_id="sampler", min_width=100
            )
        with gr.Row(elem_id="options"):
            self.options = {
                knob: knob.component(visible=False) for knob in controls.sampler_knobs()
            }
        self.notes["sampler"] = gr.HTML("", elem_classes="note", elem_id="note-sampler")
        gr.HTML("<h2>Guidance</h2>")
        self.knobbed = [each for method in self._methods() for each in self._method(method)]

    def _keyed(self) -> list[controls.Knob]:
        """Return the settings that a grid can go over by keys of their own."""
        return [*controls.sampler_knobs(), *self.knobs]

    def _methods(self) -> list[str]:
        return list(dict.fromkeys(knob.method for knob in self.knobs))

    def _method(self, key: str) -> list[Any]:
        """Show one method: its scales, and folded away when, where and how it acts."""
        own = [knob for knob in self.knobs if knob.method == key]
        title = next(method.title for method in methods() if method.key == key)
        strengths = class_of(next(each for each in methods() if each.key == key)).strengths
        with gr.Group(elem_classes="method", elem_id=f"method-{key}"):
            made = {knob: self._scale(knob, title) for knob in own if knob.name in strengths}
            self.notes[key] = gr.HTML("", elem_classes="note", elem_id=f"note-{key}")
            with gr.Accordion("when, where, how", open=False, elem_classes="more"):
                rest = [knob for knob in own if knob not in made]
                for start in range(0, len(rest), 2):
                    with gr.Row():
                        made |= {knob: knob.component() for knob in rest[start : start + 2]}
        return [made[knob] for knob in own]

    def _scale(self, knob: controls.Knob, title: str) -> Any:
        scale = knob.component()
        scale.label = title if knob.name == "scale" else f"{title}: {knob.name}"
        return scale

    def _view(self) -> None:
        self.problem = gr.HTML("", elem_id="problem")
        self.stage = gr.HTML("", elem_id="stage", min_height=320)
        with gr.Row(elem_id="looking"):
            self.look = gr.Radio(
                ["picture", "saliency", "mask"], value="picture", label="show", elem_id="look",
                min_width=300,
            )  # fmt: skip
            self.layer = gr.Dropdown(
                [AS_SAG], value=AS_SAG, label="of layer", elem_id="layer", allow_custom_value=True,
                min_width=140,
            )  # fmt: skip
            self.step = controls.slider(
                1, self.begin.steps, self.begin.steps, step=1, label="at step", elem_id="step",
                buttons=[], min_width=160,
            )  # fmt: skip
        with gr.Row(elem_id="buttons"):
            self.keep = gr.Button("Keep as A", size="sm", elem_id="keep", min_width=60)
            self.swap = gr.Button("Swap", size="sm", elem_id="swap", min_width=60)
            self.back = gr.Button("Back to A", size="sm", elem_id="back", min_width=60)
            self.stop = gr.Button("Stop", size="sm", elem_id="stop", min_width=60)
        gr.HTML(KEYS)
        with gr.Tabs():
            with gr.Tab("Copy"):
                self._copying()
            with gr.Tab("Strip and grid"):
                self._grid()
            with gr.Tab("Open"):
                self._opening()

    def _copying(self) -> None:
        self.texts = []
        for name, language in (("command", "shell"), ("Python", "python"), ("YAML preset", "yaml")):
            slug = name.split()[0].lower()
            text = gr.Code(
                language=language, label=name, lines=1, interactive=False, wrap_lines=True,
                show_line_numbers=False, elem_id=f"text-{slug}", buttons=[],
            )  # fmt: skip
            button = gr.Button(f"Copy as {name}", size="sm", elem_id=f"copy-{slug}")
            button.click(None, [text], None, js="(text) => studio.copy(text)")
            self.texts.append(text)

    def _grid(self) -> None:
        listed = grids.keys(self._keyed())
        with gr.Row():
            self.x = gr.Dropdown(listed, value="sag.scale", label="across", elem_id="grid-x")
            self.xs = gr.Textbox(
                grids.suggested("sag.scale", self._keyed()), label="its values", elem_id="grid-xs"
            )
        with gr.Row():
            self.y = gr.Dropdown(
                [grids.NONE, *listed], value=grids.NONE, label="down", elem_id="grid-y",
                info="none: a strip",
            )  # fmt: skip
            self.ys = gr.Textbox("", label="its values", elem_id="grid-ys")
        self.fill = gr.Button("Draw the strip or grid", size="sm", elem_id="grid-draw")
        self.notes["grid"] = gr.HTML("", elem_classes="note", elem_id="note-grid")
        self.grid = gr.HTML("", elem_id="grid")

    def _opening(self) -> None:
        with gr.Row():
            self.folder = gr.Dropdown(
                opening.folders_of(self.library.folders), value=None, label="folder",
                info="runs and evaluations in the studio's folders", elem_id="folder",
                allow_custom_value=True, scale=3,
            )  # fmt: skip
            self.row = gr.Dropdown([], label="setting", elem_id="row", visible=False)
        with gr.Row():
            self.look_again = gr.Button("Look again", size="sm", elem_id="look-again")
            self.take = gr.Button("Draw with its settings", size="sm", elem_id="take")
        self.notes["open"] = gr.HTML("", elem_classes="note", elem_id="note-open")
        self.opened = gr.HTML("", elem_id="opened")

    # What happens.

    def _wire(self) -> None:
        basics = [self.ckpt, self.prompt, self.label, self.count, self.seed, self.steps,
                  self.sampler, self.layer]  # fmt: skip
        options = [*self.options.values()]
        self.inputs = [*basics, *options, *self.knobbed]
        drawn = [self.stage, self.problem, self.step, *self.texts, *self.notes.values()]
        typed = (gr.Textbox, gr.Number)
        changes = [
            event
            for each in self.inputs
            if each is not self.ckpt
            for event in ([each.submit, each.blur] if isinstance(each, typed) else [each.input])
        ]
        chosen = [self.label, self.prompt, self.about, self.sampler, self.layer, *options,
                  *self.knobbed]  # fmt: skip
        drawing: dict[str, Any] = {
            "fn": self.draw,
            "inputs": [self.session, *self.inputs],
            "outputs": drawn,
            "show_progress": "hidden",
            "trigger_mode": "multiple",
            "concurrency_limit": None,
            "api_visibility": "private",
        }
        quiet: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "api_visibility": "private",
        }
        gr.on(changes, **drawing)
        self.sampler.change(self.fit, [self.ckpt, self.sampler], options, **quiet)
        choosing = {
            "fn": self.choose,
            "inputs": [self.session, self.ckpt],
            "outputs": [*chosen, self.problem],
        }
        self.blocks.load(**choosing, **quiet).then(**drawing)
        self.ckpt.input(**choosing, **quiet).then(**drawing)
        self.upload.upload(self.uploaded, [self.upload], [self.ckpt], **quiet).then(
            **choosing, **quiet
        ).then(**drawing)
        looks = [self.session, self.look, self.step]
        gr.on([self.look.input, self.step.input], self.show, looks, [self.stage], **quiet)
        self.keep.click(self.pin, looks, [self.stage], **quiet)
        self.swap.click(None, js="() => studio.swap()")
        self.back.click(self.unpin, [self.session], self.inputs, **quiet).then(**drawing)
        self.stop.click(self.halt, [self.session], None, **quiet)
        # Strip and grid.
        for key, values in ((self.x, self.xs), (self.y, self.ys)):
            # Gradio tells of an input whenever a list is left, also as it was.
            key.change(self.suggest, [key], [values], **quiet)
        cells = [self.session, self.x, self.xs, self.y, self.ys, *self.inputs]
        filled = [self.grid, self.notes["grid"], self.problem]
        self.fill.click(self.fill_grid, cells, filled, **quiet)
        # Opening.
        opened = [self.opened, self.row, self.notes["open"]]
        self.folder.input(self.open, [self.folder, self.row], opened, **quiet)
        self.row.input(self.open, [self.folder, self.row], opened, **quiet)
        self.look_again.click(self.relist, None, [self.folder], **quiet)
        self.take.click(
            self.restore,
            [self.session, self.folder, self.row, self.ckpt],
            [self.ckpt, *chosen, self.seed, self.steps, self.notes["open"], self.problem],
            **quiet,
        ).then(**drawing)

    def asked(self, values: Sequence[Any]) -> Asked:
        """Return what the controls say.

        Raises:
            ValueError: a value that cannot be read.
        """
        ckpt, prompt, label, count, seed, steps, sampler, layer, *rest = values
        options, knobs = rest[: len(self.options)], rest[len(self.options) :]
        for name, value in (("model", ckpt), ("images", count), ("seed", seed), ("steps", steps)):
            if value in (None, ""):
                raise ValueError(f"{name}: nothing stands there; choose or type a value")
        return Asked(
            ckpt=ckpt,
            label=label,
            prompt=prompt if self.library.text(ckpt) else None,
            count=int(count),
            seed=int(seed),
            steps=int(steps),
            sampler=sampler,
            options={
                knob.name: knob.read(each) for knob, each in zip(self.options, options, strict=True)
            },
            guidance=controls.guidance(self.knobs, knobs),
            layer=layer,
        )

    def draw(self, session: Session, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the controls say, and yield what is seen of it; a later change ends it."""
        # A field that is left as it was changes nothing.
        if session.asked == list(values):
            yield {self.problem: gr.skip()}
            return
        # Of several changes in a moment only the last is drawn.
        ticket = session.take(values)
        time.sleep(PAUSE)
        if session.ticket != ticket:
            yield {self.problem: gr.skip()}
            return
        try:
            # One drawing computes at a time; others take turns, a frame each.
            with COMPUTING:
                asked = self.asked(values)
                model = self.library.load(asked.ckpt, asked.prompt)
                arguments, terms = asked.drawing(model, self.library.ready), asked.terms()
                told = self._told(asked, model)
                drawing = Drawing(telling.words(list(terms.values()), model.denoiser))
                frames = model.watch(
                    **arguments,
                    every=max(1, asked.steps // FRAMES),
                    stop=lambda: session.ticket != ticket,
                    twins=True,
                    maps=asked.maps(model, terms),
                )
                frame: Samples | None = next(frames, None)
            if frame is None:
                yield {self.problem: gr.skip()}
                return
            yield {self.problem: "", **dict.fromkeys(self.notes.values(), ""), **told}
            while frame is not None and session.ticket == ticket:
                drawing.frames.append(frame)
                session.drawing, session.settings = drawing, list(values)
                yield {
                    self.stage: pictures.stage(drawing, kept=session.kept),
                    self.step: gr.update(maximum=frame.steps, value=frame.step),
                }
                with COMPUTING:
                    frame = next(frames, None)
        except ValueError as error:
            notes = dict.fromkeys(self.notes.values(), "")
            note = self.notes.get(getattr(error, "method", ""))
            if note is not None:
                notes[note] = self._problem(error)
            yield {self.problem: self._problem(error), **notes}

    def _told(self, asked: Asked, model: LoadedModel) -> dict[Any, Any]:
        recipe = asked.recipe(model)
        recipe = replace(recipe, ckpt=self.library.told(recipe.ckpt))
        texts = [telling.command(recipe), telling.python(recipe), telling.preset(recipe)]
        return dict(zip(self.texts, texts, strict=True))

    def _problem(self, error: ValueError) -> str:
        return pictures.problem(self.library.told(str(error)))

    def choose(self, session: Session, ckpt: str) -> dict[Any, Any]:
        """Return what the page shows of a model before anything is drawn with it."""
        # Going past the list of models, by keyboard as well, leaves all settings as they are.
        if ckpt in (session.ckpt, None, ""):
            return {self.problem: gr.skip()}
        try:
            text = self.library.text(ckpt)
            model = self.library.load(ckpt, self.begin.prompt if text else None)
        except ValueError as error:
            return {self.problem: self._problem(error)}
        session.ckpt = ckpt
        preset = self.begin.preset(ckpt)
        sampler, options = opening.stated_sampler(preset.get("sampler") or {})
        listed = list(model.class_names)
        shown = controls.set_to(self.knobs, preset.get("guidance", {}), model.denoiser)
        return {
            self.problem: "",
            self.label: gr.update(choices=listed, value=listed[0], visible=not text),
            self.prompt: gr.update(visible=text),
            self.about: pictures.about(repr(model)),
            self.sampler: gr.update(choices=_samplers(model), value=sampler),
            **self._options(model, sampler, options),
            self.layer: gr.update(choices=[AS_SAG, *model.denoiser.layers], value=AS_SAG),
            **dict(zip(self.knobbed, shown, strict=True)),
        }

    def fit(self, ckpt: str, sampler: str) -> Any:
        """Return which options are shown: those of the sampler."""
        try:
            return [*self._options(self.library.load(ckpt), sampler).values()]
        except ValueError:
            return [gr.skip()] * len(self.options)

    def _options(
        self, model: LoadedModel, sampler: str, stated: Mapping[str, Any] | None = None
    ) -> dict[Any, Any]:
        """Return updates of the samplers' options, at ``stated`` values where those are given."""
        own = option_names(named(sampler, model.denoiser.process))
        return {
            component: gr.update(
                visible=knob.name in own,
                **({} if stated is None else {"value": stated.get(knob.name, knob.default)}),
            )
            for knob, component in self.options.items()
        }

    def uploaded(self, file: str) -> Any:
        """Return the choice of a checkpoint that was uploaded."""
        own = (f"{Path(file).name} (uploaded)", file)
        return gr.update(value=file, choices=[*self.library.choices(), own])

    def show(self, session: Session, look: pictures.Look, step: int | None) -> Any:
        """Return the pictures of what was drawn, at another step or under its attention."""
        if session.drawing is None:
            return gr.skip()
        seen = None if step is None else int(step)
        return pictures.stage(session.drawing, look, seen, session.kept)

    def pin(self, session: Session, look: pictures.Look, step: int | None) -> Any:
        """Keep what was drawn as A."""
        session.kept, session.kept_settings = session.drawing, session.settings
        return self.show(session, look, step)

    def unpin(self, session: Session) -> Any:
        """Return the settings of A to the controls."""
        return session.kept_settings or [gr.skip()] * len(self.inputs)

    def suggest(self, key: str) -> str:
        """Return values of a key to begin with."""
        return "" if key == grids.NONE else grids.suggested(key, self._keyed())

    def fill_grid(
        self, session: Session, x: str, xs: str, y: str, ys: str, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw a strip or a grid, and yield it cell by cell; a change of the controls ends it."""
        ticket = session.take()
        try:
            down = [""] if y == grids.NONE else grids.values_of(y, ys, self._keyed())
            grid = grids.Grid(x, grids.values_of(x, xs, self._keyed()), y, down)
            asked = self.asked(values)
            model = self.library.load(asked.ckpt, asked.prompt)
            cells = grid.drawn(asked, model, self.library.ready)
            yield {self.problem: "", self.notes["grid"]: "", self.grid: grid.page()}
            while session.ticket == ticket:
                with COMPUTING:
                    done = next(cells, None)
                if done is None:
                    return
                yield {self.grid: done.page()}
        except ValueError as error:
            yield dict.fromkeys((self.problem, self.notes["grid"]), self._problem(error))

    def open(self, folder: str | None, name: str | None = None) -> dict[Any, Any]:
        """Show what lies in a folder: a run's pictures, or an evaluation's table."""
        if not folder:
            return {self.notes["open"]: ""}
        try:
            real = self.library.inside(folder)
            rows = opening.table_rows(real)
            place = rows.index(name) if name in rows else 0
            page = opening.open_folder(real, place).page
        except ValueError as error:
            return {self.notes["open"]: self._problem(error)}
        row = gr.update(choices=rows, value=rows[place] if rows else None, visible=bool(rows))
        return {self.opened: page, self.row: row, self.notes["open"]: ""}

    def relist(self) -> Any:
        """Return the folders that are there now."""
        return gr.update(choices=opening.folders_of(self.library.folders))

    def restore(
        self, session: Session, folder: str | None, name: str | None, ckpt: str
    ) -> dict[Any, Any]:
        """Return the settings of an opened folder to the controls."""
        try:
            if not folder:
                raise ValueError("folder: choose one first")
            real = self.library.inside(folder)
            rows = opening.table_rows(real)
            found = opening.open_folder(real, rows.index(name) if name in rows else 0)
            chosen = found.ckpt or ckpt
            model = self.library.load(chosen, found.prompt)
        except ValueError as error:
            return {self.notes["open"]: self._problem(error)}
        session.ckpt = ""  # So that what the folder does not say is the model's own again.
        updates = {**self.choose(session, chosen), self.ckpt: chosen}
        if found.guidance is not None:
            shown = controls.set_to(self.knobs, found.guidance, model.denoiser)
            updates |= dict(zip(self.knobbed, shown, strict=True))
        if found.sampler is not None:
            updates |= self._options(model, found.sampler, found.options or {})
        stated = {
            self.label: found.label, self.prompt: found.prompt, self.seed: found.seed,
            self.steps: found.steps, self.sampler: found.sampler,
        }  # fmt: skip
        for component, value in stated.items():
            if value is not None:
                updates[component] = {**updates.get(component, {}), **gr.update(value=value)}
        return updates

    def halt(self, session: Session) -> None:
        """Stop what is being drawn."""
        session.take()


def _samplers(model: LoadedModel) -> list[str]:
    """Return the names of the samplers that fit a model."""
    process, fitting = model.denoiser.process, []
    for name in sampler_names():
        try:
            named(name, process).check(process, 50)
        except ValueError:
            continue
        fitting.append(name)
    return fitting
