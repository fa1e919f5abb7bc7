"""How images are drawn, told in words, as a command line, and as Python to copy.

A :class:`Recipe` is what somebody would type to draw a set of images. :func:`command` and
:func:`python` write it so that both draw the same pixels as the recipe does, whatever presets and
defaults say. :func:`words` tells the guidance to somebody who knows the methods but not this code.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import yaml

from sag_dit.methods import methods
from sag_dit.untrusted import TARGET

if TYPE_CHECKING:
    from sag_dit.denoiser import Denoiser
    from sag_dit.guidance import Cache, Term
    from sag_dit.output.gallery import About
    from sag_dit.sampler import Sampler
    from sag_dit.sampling import Search, Settings

WIDTH = 88
"""Characters in a line of Python, as formatters have it."""
OF_WHEN = ("scale", "interval", "interval_in", "schedule", "every", "layer", "layers")
"""Settings of a term that words tell in a way of their own."""
OF_TEXT = {"negative_prompt": "text.negative", "size": "text.size", "guidance": "text.guidance"}
"""Keys of the command for options of :func:`sag_dit.load_text`."""
FIRST = {0.5: "half", 1 / 3: "third", 0.25: "quarter"}


@dataclass(frozen=True)
class Recipe:
    """What draws a set of images, as it is typed.

    ``ckpt`` is empty for a model that was made in memory. ``guidance`` holds the terms by name, in
    the order in which they are added; models that they need are named, not loaded. ``classes`` are
    as ``sample.py`` takes them, and ``num_classes`` is how many the model has. A text model has a
    ``prompt``, or several in Python alone, which ``classes`` then number. ``loading`` are the
    options of :func:`sag_dit.load` that are not at their defaults, or of a text model those of
    :func:`sag_dit.load_text`. ``beside`` are keys of the command that Python has no short form for.

    Example:
        >>> from sag_dit.sampler import DDIM
        >>> recipe = Recipe("digits", DDIM(), num_classes=10, classes=[3], num_images=1)
        >>> command(recipe)
        "python sample.py ckpt=digits num_images=1 'classes=[3]' seed=0 steps=50 sampler=ddim sag_scale=0"
    """  # noqa: E501

    ckpt: str
    sampler: Sampler
    steps: int = 50
    seed: int = 0
    guidance: Mapping[str, Term] = field(default_factory=dict)
    num_classes: int = 1
    classes: Sequence[int | str] | str | int | None = None
    num_images: int = 16
    prompt: str | Sequence[str] | None = None
    batch_size: int | None = None
    share_prefixes: bool = False
    search: Search | None = None
    cache: Cache | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that are on."""
        return {name: term for name, term in self.guidance.items() if not term.off}

    @property
    def caching(self) -> dict[str, int]:
        """What is stated of the cache; nothing where it is off."""
        return {} if self.cache is None or self.cache.off else _changed(self.cache)


def words(guidance: Sequence[Term], model: Denoiser) -> str:
    """Return the guidance in words, each term with all that is not as it is by default.

    Example:
        >>> import sag_dit
        >>> from sag_dit import CFG, SAG
        >>> words([CFG(1.5), SAG(0.5, interval=(0.5, 1))], sag_dit.load("digits").denoiser)
        'SAG 0.5 in the second half, layer 1, beside CFG 1.5'
    """
    terms = [term for term in guidance if not term.off]
    # What guides away from the null condition is the background that others act on.
    main = [_term_words(term, model) for term in terms if not term.from_null]
    other = [_term_words(term, model) for term in terms if term.from_null]
    if not main:
        main, other = other, []
    told = ", beside ".join(" and ".join(each) for each in (main, other) if each)
    return told[:1].upper() + told[1:] if told else "no guidance"


def effect(guidance: Sequence[Term]) -> str:
    """Return what guidance did to images, for somebody who knows no methods; empty without any.

    Example:
        >>> from sag_dit import SAG
        >>> effect([SAG(0.5)])
        'SAG moved each image away from a copy that is blurred where the model itself looks'
    """
    told = {name_of_method(term): type(term).moves for term in guidance if not term.off}
    if not told:
        return ""
    first, *others = (f"{name} {{}}{moves}" for name, moves in told.items())
    text = " and ".join([first.format("moved each image "), *(each.format("") for each in others)])
    return text[:1].upper() + text[1:]


def how(recipe: Recipe, model: Denoiser) -> str:
    """Return the recipe's guidance, steps and sampler in words.

    Example:
        >>> import sag_dit
        >>> from sag_dit.sampler import DDIM
        >>> how(Recipe("digits", DDIM(), steps=20), sag_dit.load("digits").denoiser)
        'no guidance; 20 steps of ddim, seed 0'
    """
    guidance = words([*recipe.guidance.values()], model)
    kind = type(recipe.sampler)
    sampler = getattr(recipe.sampler, "name", getattr(kind, "key", kind.__name__))
    told = [f"{guidance}; {recipe.steps} steps of {sampler}"]
    if recipe.cache is not None and not recipe.cache.off:
        order = f" (order {recipe.cache.order})" if recipe.cache.order else ""
        told.append(f"blocks every {recipe.cache.every} steps{order}")
    told += [] if "requests" in recipe.beside else [f"seed {recipe.seed}"]
    search = "" if recipe.search is None else f"; {recipe.search}"
    return ", ".join(told) + search


def about_images(recipe: Recipe, settings: Settings, model: Denoiser) -> About:
    """Return what a gallery tells of how its images were drawn.

    Example::

        page = write_gallery(folder, pairs, {}, "mine", about_images(recipe, settings, denoiser))
    """
    from sag_dit.output.gallery import About
    from sag_dit.sampling import key_of

    def written_by(write: Callable[[Recipe], str]) -> str:
        try:
            return write(recipe)
        except ValueError as error:  # Networks that Python has made have no name to type.
            return f"# {error}"

    terms = [term for term in settings.guidance if not term.off]
    spared = [term for term in terms if key_of(term) == settings.spared]
    # What to look at is the work of the method that the middle column lacks.
    seen = (spared or terms)[-1:]
    return About(
        words=how(recipe, model),
        moves=effect(terms),
        look=seen[0].look if seen else "",
        spared=f"all but {name_of_method(spared[0])}" if spared else "",
        command=written_by(command),
        python=written_by(python),
    )


def name_of_method(term: Term) -> str:
    """Return what texts call a method: its title, or the name of a class that has none."""
    return str(getattr(type(term), "title", type(term).__name__))


def command(recipe: Recipe) -> str:
    """Return the command line that draws the images, to paste into a shell.

    Raises:
        ValueError: a setting that no command line can hold, such as a network in memory.
    """
    arguments = [f"{key}={_argument(key, value)}" for key, value in _keys(recipe).items()]
    return shlex.join(["python", "sample.py", *arguments])


def preset(recipe: Recipe) -> str:
    """Return an experiment, a YAML file for ``configs/experiment``, that draws the images.

    ``python sample.py experiment=NAME`` then draws them, where the file is NAME.yaml.

    Raises:
        ValueError: a setting that no file can hold, such as a network in memory.
    """
    chosen, values = [], dict[str, Any]()
    for key, value in _keys(recipe).items():
        if key in ("sampler", "guidance", "search"):
            chosen.append({f"override /{key}": value})
            continue
        inside = values
        *around, name = key.split(".")
        for each in around:
            inside = inside.setdefault(each, {})
        yaml_text(value, key)  # Refuses what is in memory.
        inside[name] = _yaml_value(value)
    text = yaml.safe_dump({"defaults": chosen, **values}, sort_keys=False, allow_unicode=True)
    told = "# python sample.py experiment=NAME, with this file as configs/experiment/NAME.yaml"
    return f"# @package _global_\n{told}\n{text}"


class _Free(str):
    """The value of a key that takes any text as it is."""


def _yaml_value(value: Any) -> Any:
    """Return a value as YAML writes it, in which no text is an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", str(value))
    return [_yaml_value(each) for each in value] if isinstance(value, Sequence) else value


def _argument(key: str, value: Any) -> str:
    return _as_is(value) if isinstance(value, _Free) else yaml_text(value, key)


def _keys(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of the command that draws the images, with plain values."""
    terms = recipe.terms
    given: dict[str, Any] = {"ckpt": _Free(_file(recipe))}
    for name, value in recipe.loading.items():
        if name == "dtype":
            raise ValueError(f"dtype={value}: only Python draws in it bit for bit")
        if isinstance(value, Mapping):  # A class of the user's own, and its arguments.
            given |= {f"{name}.{key}": each for key, each in value.items()}
        elif name != "device":  # sample.py finds its devices itself.
            given[OF_TEXT.get(name, name)] = _free(value)
    # Which images.
    if "requests" not in recipe.beside:
        given["num_images"] = recipe.num_images
        if isinstance(recipe.prompt, str):
            given["prompt"] = _Free(recipe.prompt)
        elif recipe.prompt is not None:
            raise ValueError("prompts: sample.py takes one, or reads several from requests=FILE")
        elif recipe.classes is not None:
            given["classes"] = recipe.classes
        given["seed"] = recipe.seed
    given["steps"] = recipe.steps
    # How. Every setting is stated, so that a preset of the model changes nothing.
    given |= _sampler_keys(recipe.sampler)
    if terms:
        given["guidance"] = "default"
    given["sag_scale"] = 0
    for name, term in terms.items():
        given |= _term_keys(name, term)
    if recipe.batch_size is not None:
        given["batch_size"] = recipe.batch_size
    if recipe.share_prefixes:
        given["share_prefixes"] = True
    if recipe.search is not None:
        given |= _search_keys(recipe.search)
    given |= {f"cache.{name}": value for name, value in recipe.caching.items()}
    return given | {key: _free(value) for key, value in recipe.beside.items()}


def _file(recipe: Recipe) -> str:
    if not recipe.ckpt:
        raise ValueError("the model was made in memory, so no text can load it")
    return recipe.ckpt


def _own_modules(recipe: Recipe) -> list[str]:
    """Return the modules of the user's own that hold what is loaded."""
    stated = recipe.beside.get("imports") or []
    own = (each[TARGET] for each in recipe.loading.values() if isinstance(each, Mapping))
    named = [stated] if isinstance(stated, str) else [*stated]
    return sorted({*named, *(str(each).rpartition(".")[0] for each in own)})


def _free(value: Any) -> Any:
    return _Free(value) if isinstance(value, str) else value


def python(recipe: Recipe) -> str:
    """Return Python code that draws the images; they are then ``out.images``.

    Raises:
        ValueError: a setting that the code cannot state in a few lines.
    """
    beside = {key: value for key, value in recipe.beside.items() if key != "imports"}
    if beside:
        key, value = next(iter(beside.items()))
        raise ValueError(f"{key}={value}: model.sample does not take it, sample.py does")
    imports: dict[str, set[str]] = {}
    guidance = [_constructor(term, imports) for term in recipe.terms.values()]
    # The model.
    loading = [f"{key}={_code(value)}" for key, value in recipe.loading.items()]
    loader, prompts = "load", list[str]()
    if recipe.prompt is not None:
        listed = [recipe.prompt] if isinstance(recipe.prompt, str) else [*recipe.prompt]
        loader, prompts = "load_text", [_code(listed)]
    load = _call(f"sag_dit.{loader}", [_code(_file(recipe)), *prompts, *loading])
    # The images.
    arguments = [
        _python_classes(recipe, imports),
        *([f"guidance={_bracketed(guidance)}"] if guidance else []),
        f"sampler={_python_sampler(recipe.sampler, imports)}",
        f"steps={recipe.steps}",
        f"seed={recipe.seed}",
        *([f"batch_size={recipe.batch_size}"] if recipe.batch_size is not None else []),
        *(["share_prefixes=True"] if recipe.share_prefixes else []),
        *([f"search={_python_search(recipe.search, imports)}"] if recipe.search else []),
        *([_python_cache(recipe, imports)] if recipe.caching else []),
    ]
    modules = ["import sag_dit", *(["import torch"] if "dtype" in recipe.loading else [])]
    modules += [f"import {each}" for each in _own_modules(recipe)]
    lines = [f"from {home} import {', '.join(sorted(imports[home]))}" for home in sorted(imports)]
    draw = _call("model.sample", arguments)
    return "\n".join([*modules, *lines, "", f"model = {load}", f"out = {draw}"])


def yaml_text(value: Any, key: str) -> str:
    """Return a plain value as the command line reads it back.

    Raises:
        ValueError: it is no plain value, and ``key`` has it.

    Example:
        >>> yaml_text([0.5, None, "cat face", "blocks.3"], "any")
        '[0.5,null,"cat face",blocks.3]'
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII)
        reserved = value.lower() in ("null", "true", "false", "nan", "inf")
        if plain and not reserved:
            return value
        return hydra_quoted(value) if re.search(r'["\\$]', value) else f'"{value}"'
    if isinstance(value, Sequence):
        return f"[{','.join(yaml_text(each, key) for each in value)}]"
    raise ValueError(f"{key}: a {type(value).__name__} in memory, which a command cannot name")


def hydra_quoted(text: str) -> str:
    r"""Return a text in quotes, so that Hydra reads it as it is.

    Example:
        >>> print(hydra_quoted("it's"))
        'it\'s'
    """
    # Within quotes a backslash means itself unless quotes or an interpolation follow it.
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    text = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", text)
    text = re.sub(r"(\\+)$", lambda m: m[1] * 2, text)
    return f"'{text}'"


def _as_is(value: str) -> str:
    """Return a value of a key that takes any text as it is, unless it would mean something else."""
    odd = value in ("", "null") or value[:1] in ("'", '"', "{", "[")
    return hydra_quoted(value) if odd else value


def _term_words(term: Term, model: Denoiser) -> str:
    rest = [f"{' '.join(key.split('_'))} {_said(value)}" for key, value in _changed(term).items()
            if key not in OF_WHEN]  # fmt: skip
    when = _interval(term.interval, term.interval_in)
    rise = {"constant": "", "linear": "rising evenly", "cosine": "rising as a cosine"}
    ramp = rise[term.schedule] if isinstance(term.schedule, str) else "by a schedule of its own"
    head = " ".join(filter(None, (name_of_method(term), f"{term.scale:.4g}", when)))
    held = "" if term.every == 1 else f"asked every {term.every} steps and held between"
    return ", ".join(filter(None, (head, ramp, held, _layers(term, model), *rest)))


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_said, value))
    return str(value) if isinstance(value, (str, int)) else "in memory"


def _interval(interval: tuple[float | None, float | None], unit: str) -> str:
    start, stop = interval
    if unit != "progress":
        name = {"t": "t", "sigma": "sigma / alpha"}[unit]
        low = "" if start is None else f"above {start:.4g}"
        high = "" if stop is None else f"up to {stop:.4g}"
        return f"at {name} {' '.join(filter(None, (low, high)))}" if low or high else ""
    assert start is not None and stop is not None
    if (start, stop) == (0.0, 1.0):
        return ""
    share = stop - start
    part = next((name for each, name in FIRST.items() if abs(share - each) < 0.005), "")
    part = part or f"{100 * share:.3g} %"
    if start == 0:
        return f"in the first {part}"
    if stop == 1:
        return f"in the {'second' if part == 'half' else 'last'} {part}"
    return f"from {100 * start:.3g} % to {100 * stop:.3g} % of the steps"


def _layers(term: Term, model: Denoiser) -> str:
    """Return the self-attention layers that a term reads or changes, by number where it can."""
    from sag_dit.guidance.perturbed import layers_of

    wanted = getattr(term, "layer", getattr(term, "layers", None))
    if wanted is None:
        return ""
    names = [layer.name for layer in layers_of(model, wanted)]
    names = [re.sub(r"^blocks\.(\d+)\.attn$", r"\1", name) for name in names]
    return f"layer{'s' * (len(names) > 1)} {', '.join(names)}"


def _changed(thing: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their defaults, and those without one."""
    found = {each.name: (getattr(thing, each.name), each) for each in fields(thing)}
    return {name: value for name, (value, each) in found.items() if value != each.default}


def _sampler_keys(sampler: Sampler) -> dict[str, Any]:
    kind = type(sampler)
    options = _changed(sampler)
    if not kind.__module__.startswith("sag_dit."):
        choice = {"sampler._target_": _home(kind)}
    else:
        # One of diffusers' is chosen by its own name.
        choice = {"sampler": options.pop("name", None) or kind.key}
    return choice | {f"sampler.{key}": each for key, each in options.items()}


def _term_keys(name: str, term: Term) -> dict[str, Any]:
    kind, options = type(term), _changed(term)
    path = f"guidance.{name}"
    if name in {each.key for each in methods() if each.name == kind.__name__}:
        given: dict[str, Any] = {f"{name}_scale": term.scale}
    else:
        given = {f"{path}._target_": _home(kind), f"{path}.scale": term.scale}
    options.pop("scale", None)
    return given | {f"{path}.{key}": value for key, value in options.items()}


def _search_keys(search: Search) -> dict[str, Any]:
    kind, options = type(search), _changed(search)
    choice = {"search": kind.key}
    if not kind.__module__.startswith("sag_dit."):
        choice = {"search._target_": _home(kind)}
    verifier = options.get("verifier")
    if verifier is not None and hasattr(verifier, "__qualname__"):
        options["verifier"] = _home(verifier)
    return choice | {f"search.{key}": value for key, value in options.items()}


def _python_search(search: Search, imports: dict[str, set[str]]) -> str:
    """Return the code that makes a search; a verifier of the user's own is imported."""
    options, given = _changed(search), list[str]()
    verifier = options.get("verifier")
    if verifier is not None and hasattr(verifier, "__qualname__"):
        home, _, name = _home(verifier).rpartition(".")
        imports.setdefault(home, set()).add(name)
        given = [f"verifier={name}"]
        del options["verifier"]
    home, _, name = _home(type(search)).rpartition(".")
    imports.setdefault("sag_dit" if home.startswith("sag_dit.") else home, set()).add(name)
    return _call(name, [*_options(None, options, imports), *given], width=0)


def _home(kind: type) -> str:
    """Return where a class can be imported from.

    Raises:
        ValueError: it was made in a notebook, a script or a function.
    """
    if kind.__module__ == "__main__" or "<" in kind.__qualname__:
        raise ValueError(f"{kind.__qualname__}: put it into a file of its own, to be imported")
    return f"{kind.__module__}.{kind.__qualname__}"


def _constructor(thing: Any, imports: dict[str, set[str]]) -> str:
    """Return the code that makes a term or a sampler; what it imports is added."""
    kind = type(thing)
    home = _home(kind).rpartition(".")[0]
    if kind.__name__ in {each.name for each in methods() if each.module == home}:
        home = "sag_dit"
    elif home.startswith("sag_dit.sampler.") and not home.endswith(".diffusers"):
        home = "sag_dit.sampler"
    imports.setdefault(home, set()).add(kind.__name__)
    options = _changed(thing)
    first = [_code(options.pop("scale", thing.scale))] if hasattr(thing, "scale") else []
    return _call(kind.__name__, [*first, *_options(thing, options, imports)], width=0)


def _python_sampler(sampler: Sampler, imports: dict[str, set[str]]) -> str:
    """Return a sampler's name as code, or what makes one that is not at its defaults."""
    keys = _sampler_keys(sampler)
    return _code(keys["sampler"]) if [*keys] == ["sampler"] else _constructor(sampler, imports)


def _python_cache(recipe: Recipe, imports: dict[str, set[str]]) -> str:
    imports.setdefault("sag_dit", set()).add("Cache")
    return f"cache=Cache({', '.join(f'{key}={value}' for key, value in recipe.caching.items())})"


def _options(thing: Any, options: dict[str, Any], imports: dict[str, set[str]]) -> list[str]:
    from sag_dit.guidance import Autoguidance, ClassifierGuidance

    # The command line names models; Python gives them.
    if isinstance(thing, Autoguidance) and thing.ckpt is not None:
        imports.setdefault("sag_dit.checkpoints", set()).add("load_denoiser")
        raw = "" if options.pop("ema", True) else ", ema=False"
        worse = f"worse=load_denoiser({_code(options.pop('ckpt'))}{raw})"
        return [worse, *_options(None, options, imports)]
    if isinstance(thing, ClassifierGuidance) and isinstance(thing.classifier, str):
        imports.setdefault("sag_dit.checkpoints", set()).add("load_classifier")
        classifier = f"classifier=load_classifier({_code(options.pop('classifier'))})"
        return [classifier, *_options(None, options, imports)]
    return [f"{key}={_code(value, key)}" for key, value in options.items()]


def _code(value: object, key: str = "") -> str:
    """Return a plain value as Python code."""
    if isinstance(value, (tuple, list)):
        listed = ", ".join(_code(each, key) for each in value)
        return f"[{listed}]" if isinstance(value, list) else f"({listed}{',' * (len(value) == 1)})"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float)) or type(value).__name__ == "dtype":
        return repr(value)
    raise ValueError(f"{key}: a {type(value).__name__} in memory, which no text can make")


def _python_classes(recipe: Recipe, imports: dict[str, set[str]]) -> str:
    """Return the list of the images' classes as code."""
    count, classes = recipe.num_images, recipe.classes
    if isinstance(recipe.prompt, str):
        return "[0]" if count == 1 else f"[0] * {count}"
    if classes == "random":
        imports.setdefault("sag_dit.data.requests", set()).add("make_requests")
        asked = f'make_requests({count}, {recipe.seed}, "random", model.class_names)'
        return f"[each.label for each in {asked}]"
    if classes is None:
        known = recipe.num_classes
        return f"range({count})" if count <= known else f"[n % {known} for n in range({count})]"
    listed = [classes] if isinstance(classes, (int, str)) else list(classes)
    if count <= len(listed):
        return _code(listed[:count])
    if count % len(listed) == 0:
        return f"{_code(listed)} * {count // len(listed)}"
    return f"[{_code(listed)}[n % {len(listed)}] for n in range({count})]"


def _bracketed(items: Sequence[str]) -> str:
    one = items[0] if len(items) == 1 else f"[{', '.join(items)}]"
    if len(one) <= WIDTH - 14:
        return one
    return "\n".join(["[", *(f"        {each}," for each in items), "    ]"])


def _call(name: str, arguments: Sequence[str], width: int = WIDTH - 9) -> str:
    """Return a call, with an argument a line where one line is too short; ``width`` 0: one line."""
    one = f"{name}({', '.join(arguments)})"
    if not width or (len(one) <= width and "\n" not in one):
        return one
    return "\n".join([f"{name}(", *(f"    {each}," for each in arguments), ")"])
