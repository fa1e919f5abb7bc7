"""Family: what is known of one kind of network beyond its arithmetic: its files and its config.

A family is one folder beside this file: ``network.py`` holds a :class:`Network`, ``adapter.py`` a
:class:`Family` under :func:`register`. :func:`families` finds every such folder by itself. A
family that lies outside of the package is known once its module is imported.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, get_origin, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sag_dit.bounds import fit, parts, wanted
from sag_dit.identity import plain
from sag_dit.models.network import Network
from sag_dit.models.unfilled import unfilled
from sag_dit.process import Process
from sag_dit.raised import failure
from sag_dit.untrusted import TARGET, own_class

State = dict[str, Tensor]

FAMILY = "family"
"""The argument of a config's ``model`` that names the family."""
FIRST = "dit"
"""The family of what tells of none: at first there was no other."""


@dataclass(frozen=True)
class WeightsFile:
    """The weights that a file holds, and what it says of them.

    Attributes:
        path: the file.
        state: its tensors by name, without the prefixes of what was wrapped around the network.
        stated: the config that comes with it, perhaps empty.
        args: the arguments of the training script or of the network's class, as far as the file or
            a config.json beside it tells them.

    Example:
        >>> WeightsFile(Path("DiT-XL-2.pt"), state={}, args={"model": "DiT-XL/2"}).args["model"]
        'DiT-XL/2'
    """

    path: Path
    state: State
    stated: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A model that is exported, as a layout sees it.

    Attributes:
        network: the network.
        process: the process it was trained on.
        config: what builds the model anew, as plain values; see :mod:`sag_dit.checkpoints.config`.
        autoencoder: the settings of a latent model's autoencoder, empty for a pixel model.

    Example::

        source = Source(network, process, config, autoencoder={})
        print(len(source.state))
    """

    network: Any
    process: Process
    config: Mapping[str, Any]
    autoencoder: Mapping[str, Any]

    @property
    def state(self) -> State:
        """The network's weights as contiguous tensors on the CPU."""
        state: Mapping[str, Tensor] = self.network.state_dict()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


class Layout(ABC):
    """The files of another program, as a model is exported for it.

    Attributes:
        program: whose files they are.
        weights: what ``load`` reads within the export's folder; the folder itself if empty.
        has_autoencoder: whether the autoencoder is stored beside the network, in ``vae/``.

    Example::

        class NumpyFile(Layout):
            program, weights = "numpy", "weights.npz"

            def write(self, folder: Path, source: Source) -> None:
                np.savez(folder / self.weights, **source.state)

            def usage(self, source: Source) -> list[str]:
                return [f'weights = numpy.load("{self.weights}")']
    """

    program: ClassVar[str]
    weights: ClassVar[str] = ""
    has_autoencoder: ClassVar[bool] = False

    def obstacles(self, source: Source) -> list[str]:
        """Return why the program could not hold this model; nothing if it can."""
        return []

    def notes(self, source: Source) -> list[str]:
        """Return what somebody has to know who uses the export in that program."""
        return []

    @abstractmethod
    def write(self, folder: Path, source: Source) -> None:
        """Write a model that has no obstacles into an empty folder, without its autoencoder."""

    @abstractmethod
    def usage(self, source: Source) -> list[str]:
        """Return the lines of the model card that show how to use the export."""

    def size(self, source: Source) -> int:
        """Return how many bytes the network's weights take."""
        return sum(tensor.nbytes for tensor in source.network.state_dict().values())


@dataclass(frozen=True)
class Refitted:
    """A network's weights, made to fit other classes and another size of images.

    Attributes:
        state: the weights; what fits as it is shares its memory with the network's.
        kept: the classes that the network knew by the same name.
        remade: the parameters that were computed or composed anew, and how, in words.

    Example::

        refitted = families()["dit"].refit(before, after, ["cat", "dog"], ["dog", "fox"])
        after.load_state_dict(refitted.state)
        print(refitted.kept, refitted.remade)
    """

    state: State
    kept: tuple[str, ...]
    remade: Mapping[str, str]


class Family(ABC):
    """One kind of network: how its files are recognised and read, and what its config says.

    A network whose parameters are stored under their own names, with a config beside them, needs
    no more than a key, a few words and its class. The other methods are for files of other
    programs.

    Attributes:
        key: the network's ``key``.
        title: what a model card calls the network.
        noun: what a message calls the network, with its article.
        source: whose parameter names the network has.
        layouts: the layouts of other programs that it is exported in, by the name that
            ``export.py format=...`` takes.
        pipeline: diffusers' name of the pipeline whose folders are read, empty if none is.
        diffusers: diffusers' name of the network within it.
        told_by: the argument that tells a config of this family which names none, as those of
            DiT and UNet do, which are older than the word.
        label_table: the parameter with a row for each class, empty if it is not fine-tuned.
        fixed: parameters that are never trained.
        weights_alone: whether weights are all that its network holds, so that it can be built
            without memory to be given them. One that computes tensors of its own cannot.

    Example:
        >>> from sag_dit.models.dit.network import DiT
        >>> class Mine(Family):
        ...     key, title, noun, source = "mine", "network of mine", "a Mine", "my own code"
        ...
        ...     def network(self):
        ...         return DiT
        >>> Mine().required()
        []
    """

    key: ClassVar[str]
    title: ClassVar[str]
    noun: ClassVar[str]
    source: ClassVar[str]
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType({})
    pipeline: ClassVar[str] = ""
    diffusers: ClassVar[str] = ""
    told_by: ClassVar[str] = ""
    label_table: ClassVar[str] = ""
    fixed: ClassVar[tuple[str, ...]] = ()
    weights_alone: ClassVar[bool] = False

    @abstractmethod
    def network(self) -> type[Any]:
        """Return the class of the network, whose module may be imported here and not before."""

    # --- config ----------------------------------------------------------------------------------

    def describes(self, model: Mapping[str, Any]) -> bool:
        """Whether these arguments, a config's ``model``, are those of this family."""
        return bool(model.get(FAMILY, self.key if self.told_by in model else None) == self.key)

    def arguments(self, network: Network) -> dict[str, Any]:
        """Return a config's ``model``: what builds a network anew."""
        return {**({} if self.told_by else {FAMILY: self.key}), **network.arguments}

    def required(self) -> list[str]:
        """Return the arguments that a config has to state."""
        return [
            name
            for name, each in self._parameters().items()
            if each.default is each.empty
            and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        ]

    def build(self, model: Mapping[str, Any]) -> Network:
        """Build the network of a config's ``model``, with fresh weights.

        Raises:
            ValueError: an argument is missing or unknown, or a value is impossible.
        """
        arguments = {n: value for n, value in model.items() if n not in (FAMILY, TARGET)}
        check_keys("the config's model", arguments, self.required(), self._known())
        network: Network = self.network()(**checked_arguments(self.network(), arguments))
        return network

    def build_to_fill(self, model: Mapping[str, Any]) -> Network:
        """Build the network of a config's ``model`` to be given its weights: no random number.

        Raises:
            ValueError: as :meth:`build`.
        """
        if self.weights_alone:
            with unfilled():
                return self.build(model)
        with torch.random.fork_rng(devices=[]):
            return self.build(model)

    def _parameters(self) -> dict[str, inspect.Parameter]:
        _, *parameters = inspect.signature(self.network().__init__).parameters.items()
        return dict(parameters)

    def _known(self) -> tuple[str, ...] | None:
        """Return the names of the arguments that the constructor takes, None where it takes any."""
        parameters = self._parameters()
        anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        return None if anything else tuple(parameters)

    # --- files -----------------------------------------------------------------------------------

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether names of parameters are those of this family, ours or a published program's."""
        return False

    def read(self, file: WeightsFile) -> tuple[State, Mapping[str, Any]]:
        """Return a file's weights under our names, and what is known of their config.

        Raises:
            ValueError: the weights are those of another program, and are not understood.
        """
        return file.state, file.stated

    def infer(
        self, state: State, path: Path, stated: Mapping[str, Any], num_heads: int | None
    ) -> dict[str, Any]:
        """Return all arguments of the network whose weights these are.

        ``stated`` are those that the checkpoint gives, ``num_heads`` what the user says.

        Raises:
            ValueError: the weights leave an argument open, or are another network's.
        """
        told = {} if num_heads is None else {"num_heads": num_heads}
        return {FAMILY: self.key, **stated, **told}

    def reads_diffusers(self, config: Mapping[str, Any]) -> bool:
        """Whether the config.json of one of diffusers' networks is that of this family."""
        return bool(self.diffusers and config.get("_class_name") == self.diffusers)

    def from_diffusers(
        self, state: State, config: Mapping[str, Any], path: Path
    ) -> tuple[State, dict[str, Any]]:
        """Return the weights of diffusers' network under our names, and our arguments.

        Raises:
            ValueError: it has what no network of this family has.
        """
        raise NotImplementedError

    # --- fine-tuning -----------------------------------------------------------------------------

    @property
    def tunable(self) -> bool:
        """Whether it can be fine-tuned."""
        return bool(self.label_table)

    def label_tables(self, network: Network) -> Mapping[str, int]:
        """Return what of a network grows with its classes: names, and the dimension of classes."""
        return {self.label_table: 0} if self.label_table in network.state_dict() else {}

    def resized(self, model: Mapping[str, Any], side: int, classes: int) -> dict[str, Any]:
        """Return a config's ``model`` for inputs of another side and another number of classes."""
        return {**model, "input_size": side, "num_classes": classes}

    def refit(
        self, before: Network, after: Network, names: Sequence[str], now: Sequence[str]
    ) -> Refitted:
        """Return the weights of ``before``, made to fit the sizes and classes of ``after``.

        ``names`` are the classes before, and ``now`` those to train.

        Raises:
            ValueError: the weights cannot be made to fit.
        """
        raise NotImplementedError


_KNOWN: dict[str, Family] = {}


def register(family: type[Family]) -> type[Family]:
    """Make a family known to all that loads, trains and exports.

    Raises:
        ValueError: another family has the same key.

    Example::

        @register
        class MyFamily(Family):
            key, title, noun = "mine", "MyNet", "a MyNet"

            def network(self) -> type[MyNet]:
                return MyNet
    """
    there = type(_KNOWN[family.key]) if family.key in _KNOWN else family
    # A class that is made anew in the same place, as notebooks do, takes the place of the old one.
    if (there.__module__, there.__qualname__) != (family.__module__, family.__qualname__):
        raise ValueError(f"{family.__qualname__}: {there.__qualname__} has the key {family.key!r}")
    _KNOWN[family.key] = family()
    return family


def families() -> Mapping[str, Family]:
    """Return all families by their keys: one for each folder beside this file, and further ones.

    Example:
        >>> [families()[key].noun for key in ("dit", "unet")]
        ['a DiT', 'a UNet']
    """
    here = __name__.rpartition(".")[0]
    for each in iter_modules([str(Path(__file__).parent)]):
        if each.ispkg:
            import_module(f"{here}.{each.name}.adapter")
    return dict(sorted(_KNOWN.items()))


class _Own(Family):
    """A network that is known by the path of its class alone, as ``model._target_`` names it."""

    source = "its own class"
    of: ClassVar[type[Any]]

    def network(self) -> type[Any]:
        return self.of

    def arguments(self, network: Network) -> dict[str, Any]:
        for name, value in network.arguments.items():
            if plain(value) != (list(value) if isinstance(value, tuple) else value):
                raise ValueError(
                    f"model.{name}={value!r:.60}: expected a number, a word, or a list or mapping "
                    f"of them, which a checkpoint can record and {self.title} be built from anew"
                )
        return {TARGET: _path(self.of), **network.arguments}

    def build(self, model: Mapping[str, Any]) -> Network:
        try:
            network = super().build(model)
        except ValueError:
            raise
        except TypeError as error:
            raise ValueError(
                f"model.{TARGET}={_path(self.of)}: cannot be built ({error})"
            ) from error
        except Exception as error:  # Whatever a constructor of one's own raises.
            raise ValueError(
                f"model.{TARGET}={_path(self.of)}: cannot be built: {failure(error)}"
            ) from error
        recorded = {TARGET, FAMILY, *getattr(network, "arguments", model)}
        lost = [name for name in model if name not in recorded]
        if lost:
            raise ValueError(
                f"model.{lost[0]}: {self.title} was built with it, and its arguments lack it, "
                f"from which a checkpoint builds it anew; expected arguments={{{lost[0]!r}: ...}}"
            )
        # A subclass of a network that records its own arguments, with another constructor.
        known = self._known()
        foreign = [] if known is None else recorded - {TARGET, FAMILY, *known}
        if foreign:
            raise ValueError(
                f"model.{TARGET}={_path(self.of)}: its arguments hold {min(foreign)}, which its "
                f"constructor does not take, so that no checkpoint could build it anew: have it "
                f"take what its base class takes, or state arguments of its own"
            )
        return network

    def infer(
        self, state: State, path: Path, stated: Mapping[str, Any], num_heads: int | None
    ) -> dict[str, Any]:
        return {**stated, **({} if num_heads is None else {"num_heads": num_heads})}

    @property
    def tunable(self) -> bool:
        return True

    def _takes(self, argument: str) -> bool:
        known = self._known()
        return known is None or argument in known

    def label_tables(self, network: Network) -> Mapping[str, int]:
        """Return what would be one larger, in one dimension, were there one class more."""
        if not (network.num_classes and self._takes("num_classes")):
            return {}
        more = {**self.arguments(network), "num_classes": network.num_classes + 1}
        there, tables = self.build_to_fill(more).state_dict(), {}
        for name, each in network.state_dict().items():
            larger = there[name].shape if name in there else each.shape
            grown = [after - before for before, after in zip(each.shape, larger, strict=True)]
            if each.is_floating_point() and sorted(grown, reverse=True)[:2] in ([1], [1, 0]):
                tables[name] = grown.index(1)
        return tables

    def resized(self, model: Mapping[str, Any], side: int, classes: int) -> dict[str, Any]:
        parameters = self._parameters()
        default = parameters["num_classes"].default if "num_classes" in parameters else None
        sizes = {"input_size": side}
        # One without classes stays so.
        if model.get("num_classes", default) != 0:
            sizes["num_classes"] = classes
        return {**model, **{name: each for name, each in sizes.items() if self._takes(name)}}

    def refit(
        self, before: Network, after: Network, names: Sequence[str], now: Sequence[str]
    ) -> Refitted:
        """Give new classes their rows; what is not trained is as the constructor computes it.

        Raises:
            ValueError: the classes are others and no table of labels grows with them, or a
                parameter that is trained has another shape at the other resolution.
        """
        # Its classes: the same, or those of a table that grows.
        tables = {} if tuple(names) == tuple(now) else self.label_tables(before)
        if tuple(names) != tuple(now) and not tables and (before.num_classes or len(now) > 1):
            why = (
                f"nothing in {self.title} grows with its argument num_classes"
                if before.num_classes and self._takes("num_classes")
                else f"{self.title} has no argument num_classes"
                if before.num_classes
                else f"{self.title} was trained without classes"
            )
            raise ValueError(
                f"model.{TARGET}={_path(self.of)}: {why}, so that it cannot learn others than "
                f"{', '.join(names[:5])}{', ...' * (len(names) > 5)}: expected data of these "
                f"classes, or a network with a row for each class, as nn.Embedding has them"
            )
        # Its weights: kept, relabelled, or computed for the other grid.
        old, fresh = before.state_dict(), after.state_dict()
        trained = {name for name, each in after.named_parameters() if each.requires_grad}
        state, kept, remade = {}, tuple(now), {}
        for name, each in fresh.items():
            found = old.get(name)
            if name in tables and found is not None:
                turned, kept = relabelled(found.movedim(tables[name], 0), names, now)
                state[name] = turned.movedim(0, tables[name]).contiguous()
                remade[name] = f"{name}, a label table of {len(names)} classes: now {len(now)}"
                found = state[name]
            elif name not in trained and (found is None or found.shape != each.shape):
                found, remade[name] = each, f"{name}: computed for {_sides(after)}"
            if found is None or found.shape != each.shape:
                raise ValueError(
                    f"resolution: {name} of {self.title} is trained, and is "
                    f"{'missing' if found is None else tuple(found.shape)} at {_sides(before)} and "
                    f"{tuple(each.shape)} at {_sides(after)}: expected the checkpoint's "
                    f"resolution, or a network whose trained parameters do not depend on it"
                )
            state[name] = found
        return Refitted(state, kept, remade)


def _sides(network: Network) -> str:
    return " x ".join(map(str, network.input_size))


def _path(network: type[Any]) -> str:
    return f"{network.__module__}.{network.__qualname__}"


def _own_family(network: type[Any]) -> Family:
    key = getattr(network, "key", None)
    if not (issubclass(network, nn.Module) and isinstance(key, str)):
        raise ValueError(
            f"model.{TARGET}={_path(network)}: expected a torch module that has the members of "
            f"sag_dit.models.Network, such as a subclass of sag_dit.models.Backbone"
        )
    name = network.__name__
    told = {"key": key, "title": name, "noun": f"a {name}", "of": network}
    made: Family = type(name, (_Own,), told)()
    return made


def family_for(network: Network) -> Family:
    """Return a network's family: the registered one of its class, or one of that class alone.

    Example:
        >>> from sag_dit.models import DiT
        >>> family_for(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)).noun
        'a DiT'
    """
    # Sharded, a network is of a class that torch has made of its own.
    mro = type(network).__mro__
    own = next(each for each in mro if each.__module__.partition(".")[0] != "torch")
    registered = families().get(network.key)
    known = registered is not None and registered.network() is own
    return registered if registered is not None and known else _own_family(own)


def family_of(
    model: Mapping[str, Any], state: Mapping[str, Tensor] = MappingProxyType({})
) -> Family:
    """Return the family that a config's ``model`` describes, or else names of parameters.

    Raises:
        ValueError: the config names a family that there is not, or a class that is not imported.

    Example:
        >>> family_of({"input_size": 32, "depth": 12}).key
        'dit'
    """
    if TARGET in model:
        return _own_family(own_class(model[TARGET], f"model.{TARGET}"))
    known = families()
    name = model.get(FAMILY, FIRST)
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"model.{FAMILY}={name!r}: expected one of {', '.join(known)}; a family from outside "
            f"of sag_dit is known once the module that registers it is imported"
        )
    described = (each for each in known.values() if each.describes(model))
    recognised = (each for each in known.values() if each.recognises(state))
    return next(described, None) or next(recognised, known[FIRST])


def checked_arguments(
    network: type[Any], arguments: Mapping[str, Any], path: Path | None = None
) -> dict[str, Any]:
    """Return a network's arguments as it takes them, those that its hints bound held against them.

    A network that states bounds, see :mod:`sag_dit.bounds`, is held to all its hints; of another
    they may be wrong, and are not looked at.

    Raises:
        ValueError: a value is of another type or out of bounds.
    """
    used = dict(arguments)
    hints = _hints(network)  # type: ignore[arg-type]
    for name in arguments.keys() & hints.keys():
        fits, used[name] = fit(arguments[name], hints[name])
        if not fits:
            raise ValueError(
                f"{f'{path}: ' if path else ''}model.{name}={arguments[name]!r:.60}: expected "
                f"{wanted(hints[name])}"
            )
    return used


@cache
def _hints(network: type[Any]) -> dict[str, Any]:
    try:
        hints = get_type_hints(network.__init__, include_extras=True)
    except Exception:  # names that are there for type checkers alone
        return {}
    bounded = any(get_origin(part) is Annotated for hint in hints.values() for part in parts(hint))
    return hints if bounded else {}


def agreeing(path: Path, *sizes: tuple[str, object, object]) -> None:
    """Check that sizes which a config states are those of the weights, before a network is built.

    Each is what is stated, in words, its value there, and its value by the weights.

    Raises:
        ValueError: one is another.
    """
    for what, stated, found in sizes:
        if stated != found:
            raise ValueError(
                f"{path}: its config says {what}={stated!r:.60}, and its weights are of "
                f"{what}={found}; if a config comes with the file, see that it is this file's"
            )


def relabelled(
    table: Float[Tensor, "rows d"], before: Sequence[str], now: Sequence[str]
) -> tuple[Float[Tensor, "new_rows d"], tuple[str, ...]]:
    """Return the label table (len(now) rows, and the null row if there is one) and the names kept.

    A class whose name exactly one class had before keeps its row. A new class starts from the null
    row, which the network was trained to draw any class for; without one, from the mean row.

    Example:
        >>> table, kept = relabelled(torch.tensor([[1.0], [3.0]]), ["cat", "dog"], ["dog", "fox"])
        >>> table.tolist(), kept
        ([[3.0], [2.0]], ('dog',))
    """
    null = table[len(before) :]
    start = null[0] if len(null) else table.mean(dim=0)
    kept = tuple(name for name in now if list(before).count(name) == 1)
    rows = [table[list(before).index(name)] if name in kept else start for name in now]
    return torch.cat([torch.stack(rows), null]), kept


def check_keys(
    where: str, values: Any, required: Iterable[str], known: Sequence[str] | None = None
) -> None:
    """Refuse what is no mapping, or one that lacks keys or has others than the known ones."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping, found a {type(values).__name__}")
    missing = [key for key in required if key not in values]
    unknown = [] if known is None else [str(key) for key in values if key not in known]
    if missing or unknown:
        raise ValueError(
            f"{where}: missing {', '.join(missing) or 'nothing'}, unknown "
            f"{', '.join(unknown) or 'nothing'}; expected {', '.join(known or required)}"
        )
