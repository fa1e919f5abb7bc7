"""Network: what a backbone must have, so that all else can train it, guide it, save and load it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from numbers import Integral
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    Self,
    TypeAlias,
    runtime_checkable,
)

import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer
from sag_dit.tensors import Images, Labels

if TYPE_CHECKING:
    _Module = nn.Module
else:

    class _Module(Protocol):
        pass


# Every network is a torch module, which type checkers have to know and a protocol cannot say.
class Network(_Module, Protocol):  # type: ignore[misc]
    """A class-conditional backbone: a torch module (x_t, t, y) -> its output, with what follows.

    A network need not inherit from this. One that lacks a member is refused by
    :class:`sag_dit.denoiser.ClassConditional`, which names it. :class:`Backbone` has most of them.

    Example:
        >>> from sag_dit.models import DiT
        >>> lacking(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2))
        []
    """

    @property
    def key(self) -> str:
        """What its family and the identity of a run call it, such as ``dit``."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What builds it anew, as plain values by the names of its constructor's arguments."""

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of x_t."""

    @property
    def in_channels(self) -> int:
        """Channels of x_t."""

    @property
    def patch_size(self) -> int:
        """What height and width have to be multiples of."""

    @property
    def learn_sigma(self) -> bool:
        """Whether it puts out the variance too, in ``in_channels`` channels behind the first."""

    @property
    def num_classes(self) -> int:
        """Classes it knows, labels 0 to ``num_classes`` - 1; 0 if it does not look at y."""

    @property
    def null_label(self) -> int | None:
        """The label that means 'no class', None if it was trained without."""

    @property
    def layers(self) -> Mapping[str, AttentionLayer]:
        """Its self-attention layers by the names of their modules, in the order of depth."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of layers; ``auto`` is the layer to guide with, else the middle one."""

    @property
    def blocks(self) -> nn.ModuleList:
        """Its blocks in the order of their evaluation, each of which is sharded by itself."""

    checkpoint_blocks: bool
    """Whether the backward pass computes each block anew instead of keeping activations."""

    def compile_blocks(self) -> None:
        """Compile every block by itself, in place; names of parameters stay as they are."""

    def __call__(self, x: Images, t: Tensor, y: Labels) -> Images:
        """Return the output (b, c or 2 c, h, w) for x_t (b, c, h, w), times and labels (b,)."""


class Backbone(nn.Module):
    """A network of one's own: has what :class:`Network` asks for and a simple one does without.

    A subclass sets ``input_size``, ``in_channels`` and ``num_classes``, and has a ``forward``
    (x_t, t, y) -> its output. All else it states where it has it: ``null_label`` for guidance
    away from no class, ``layers`` for guidance that reads attention, ``blocks`` to be compiled and
    sharded one by one. A method that needs what it does not state refuses it by name. A network
    with a ``null_label`` has to be trained on it: :meth:`drop_labels` does that.

    ``arguments`` are what the constructor was called with, and so have to be plain values.
    ``key`` is the class's path unless the class states one, with which its file can be moved.

    Example:
        >>> class Constant(Backbone):
        ...     def __init__(self, input_size: int, in_channels: int, num_classes: int):
        ...         super().__init__()
        ...         self.input_size = (input_size, input_size)
        ...         self.in_channels, self.num_classes = in_channels, num_classes
        ...         self.level = nn.Parameter(torch.zeros(in_channels, 1, 1))
        ...
        ...     def forward(self, x, t, y):
        ...         return self.level.expand_as(x)
        >>> lacking(Constant(8, 3, num_classes=10)), Constant(8, 3, num_classes=10).arguments
        ([], {'input_size': 8, 'in_channels': 3, 'num_classes': 10})
    """

    key: ClassVar[str]
    input_size: tuple[int, int]
    in_channels: int
    num_classes: int
    patch_size: int = 1
    learn_sigma: bool = False
    null_label: int | None = None
    layers: Mapping[str, AttentionLayer]
    aliases: Mapping[str, str]
    arguments: Mapping[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "key" not in vars(cls):
            cls.key = f"{cls.__module__}.{cls.__qualname__}"

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Note what the constructor is called with."""
        made = super().__new__(cls)
        takes = signature(cls.__init__)
        try:
            told = takes.bind_partial(made, *args, **options).arguments
        except TypeError:  # The constructor says what is wrong with them.
            told = {}
        further = (each for each in told if takes.parameters[each].kind is Parameter.VAR_KEYWORD)
        told |= told.pop(next(further, ""), {})
        object.__setattr__(made, "arguments", dict([*told.items()][1:]))
        return made

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.layers, self.aliases = {}, {}

    def drop_labels(self, y: Labels, share: float = 0.1) -> Labels:
        """Return labels, a share of which is ``null_label`` while the network trains.

        Raises:
            ValueError: there is no ``null_label``.
        """
        if self.null_label is None:
            raise ValueError(
                f"{type(self).__name__}: null_label=None, and its forward drops labels: expected "
                f"the label that means 'no class', such as num_classes"
            )
        return drop_labels(y, self.null_label, share) if self.training else y

    @property
    def checkpoint_blocks(self) -> bool:
        """Whether the backward pass computes blocks anew; a subclass that can states an attribute.

        Raises:
            ValueError: it is asked for.
        """
        return False

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, value: bool) -> None:
        if value:
            raise ValueError(
                f"checkpoint_blocks=true: {type(self).__name__} does not recompute its blocks; "
                f"expected false, or a class with an attribute checkpoint_blocks that its forward "
                f"follows"
            )

    def compile_blocks(self) -> None:
        """Compile every block by itself, in place.

        Raises:
            ValueError: there are no blocks.
        """
        if not len(self.blocks):
            raise ValueError(
                f"compile=true: {type(self).__name__} has no blocks to compile; expected false, "
                f"or a class that lists them in self.blocks"
            )
        for block in self.blocks:
            block.compile()


def drop_labels(labels: Labels, null: int, share: float) -> Labels:
    """Return labels, each replaced by ``null`` with probability ``share``, from torch's generator.

    So a network learns what images are like whatever their class, for classifier-free guidance
    (Ho & Salimans 2022, arXiv 2207.12598).

    Example:
        >>> drop_labels(torch.tensor([3, 7]), null=10, share=1.0)
        tensor([10, 10])
    """
    dropped = torch.rand(labels.shape, device=labels.device) < share
    return torch.where(dropped, null, labels)


@runtime_checkable
class TimeEmbedded(Protocol):
    """A network whose embedding of the time can be computed and disturbed, as TSG does.

    Example:
        >>> from sag_dit.models import DiT
        >>> isinstance(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2), TimeEmbedded)
        True
    """

    @property
    def time_inputs(self) -> tuple[str, ...]:
        """The modules that the embedding enters, in the order of depth."""

    def embed_time(self, t: Tensor) -> Tensor:
        """Return the embeddings (b, d) of times (b,)."""


@runtime_checkable
class ClassEmbedded(Protocol):
    """A network whose embedding of the classes can be disturbed, as CADS does.

    Example:
        >>> from sag_dit.models import DiT
        >>> DiT(input_size=8, hidden_size=32, depth=1, num_heads=2).class_embedder
        'y_embedder'
    """

    @property
    def class_embedder(self) -> str:
        """The module that turns labels (b,) into embeddings (b, d)."""


@runtime_checkable
class Resizable(Protocol):
    """A network that can be made one of images of another size.

    Example:
        >>> from sag_dit.models import DiT
        >>> isinstance(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2), Resizable)
        True
    """

    patch_size: int

    def resize(self, input_size: tuple[int, int]) -> None:
        """Be a network of x_t of that height and width from now on."""


class Fork(NamedTuple):
    """Rows of a batch that join it before a block, as copies of rows that are there already.

    A network can do this if its ``forward`` takes ``forks`` beside x, t and y, in the order of
    their blocks. Its ``blocks`` are then a list of modules that run one after the other.

    Example:
        >>> Fork(block=5, rows=slice(0, 1)).joined(torch.tensor([[1.0], [2.0]]))
        tensor([[1.],
                [2.],
                [1.]])
    """

    block: int
    rows: slice

    def joined(self, batch: Tensor) -> Tensor:
        """Return a batch with the copies behind its own rows."""
        return torch.cat([batch, batch[self.rows]])


Outputs: TypeAlias = Iterable[list[Tensor]]
"""For each block a list of what its attention and its MLP put out, before their gates: a block that
is given an empty list runs and fills it, and one that is given a full list uses what is in it.

A network can do this if its ``forward`` takes ``outputs`` beside x, t and y.
"""


def takes(call: Callable[..., Any], argument: str) -> bool:
    """Whether a function has an argument of that name, such as ``forks`` or ``outputs``.

    Example:
        >>> takes(lambda x, forks=(): x, "forks")
        True
    """
    return argument in signature(call).parameters


MEMBERS = tuple(
    name
    for name in (*vars(Network), *Network.__annotations__)
    if not name.startswith("_") or name == "__call__"
)
"""What :class:`Network` asks for, by name."""


def lacking(network: object) -> list[str]:
    """Return the members of a network's contract that it does not have."""
    # A property is not computed, which may need what a network of no blocks does not have.
    return [n for n in MEMBERS if not hasattr(type(network), n) and not hasattr(network, n)]


def check_members(network: Network) -> None:
    """Refuse a network whose sizes and labels are not what :class:`Network` says.

    Raises:
        ValueError: the member, what it is and what is expected.

    Example:
        >>> from sag_dit.models import DiT
        >>> check_members(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2))
    """
    name = type(network).__name__

    def whole(value: Any, least: int) -> bool:
        return type(value) is not bool and isinstance(value, Integral) and int(value) >= least

    def refuse(member: str, expected: str) -> None:
        value = getattr(network, member)
        raise ValueError(f"network={name}: its {member} is {value!r:.60}: expected {expected}")

    size: Any = network.input_size
    classes, null = network.num_classes, network.null_label
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(whole(side, 1) for side in size):
        refuse("input_size", "height and width of x_t, such as (8, 8)")
    for member, least in (("in_channels", 1), ("patch_size", 1), ("num_classes", 0)):
        if not whole(getattr(network, member), least):
            refuse(member, f"a whole number, {least} or more")
    for member in ("layers", "aliases"):
        if not isinstance(getattr(network, member), Mapping):
            refuse(member, "a mapping of names, such as {}")
    if null is not None and not whole(null, 0):
        refuse("null_label", "a whole number, such as num_classes, or None")
    if null is not None and null < classes and classes > 1:
        refuse(
            "null_label",
            f"a label beyond its {classes} classes, such as num_classes, or None: class {null} "
            f"is one that it draws",
        )
