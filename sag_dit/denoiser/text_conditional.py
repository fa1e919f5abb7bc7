"""Denoisers of diffusers' networks, whose condition is what the network is given beside x_t and t.

One subclass per token layout follows the base; :func:`layout_of` finds it.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionEdit, AttentionLayer, Capture, Edit
from sag_dit.denoiser.base import Denoiser
from sag_dit.models.network import Fork, Outputs
from sag_dit.process import NoiseLevel, Prediction, Process
from sag_dit.process.base import OutputKind
from sag_dit.tensors import Images


@dataclass(frozen=True, eq=False)
class PerImage:
    """A tensor whose first dimension is images; what is not wrapped so is shared by all images.

    Example:
        >>> PerImage(torch.zeros(2, 77, 768)).rows.shape
        torch.Size([2, 77, 768])
    """

    rows: Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """A condition: the network's further arguments by name, in any nesting.

    ``channels`` is concatenated behind x_t: the mask and the masked image of an inpainting model.

    Example:
        >>> text = Inputs.of({"encoder_hidden_states": torch.zeros(2, 77, 768)}, count=2)
        >>> text.take(slice(1)).join([text]).count
        3
    """

    arguments: Mapping[str, Any]
    channels: PerImage | None = None

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        count: int,
        shared: Sequence[str] = (),
        channels: Tensor | None = None,
    ) -> Inputs:
        """Take every tensor of ``count`` rows as one row per image, but those named ``shared``."""
        wrapped = {
            name: value if name in shared else _wrapped(value, count)
            for name, value in arguments.items()
        }
        return cls(wrapped, None if channels is None else PerImage(channels))

    @property
    def count(self) -> int:
        """The number of images."""
        return len(next(_per_image(self.arguments)).rows)

    def take(self, rows: slice | Tensor) -> Inputs:
        """Return the condition of some images."""
        return self._with(lambda value: value[rows], self)

    def join(self, others: Sequence[Inputs]) -> Inputs:
        """Return the condition of all images; what is shared is taken from the first condition."""
        return self._with(lambda *values: torch.cat(values), self, *others)

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Return the condition on a device, its floating-point tensors in a type."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        return self._with(moved, self)

    def plain(self) -> dict[str, Any]:
        """Return the arguments in fresh containers, as some networks change what they are given."""
        return {name: _unwrapped(value) for name, value in self.arguments.items()}

    @property
    def text_tokens(self) -> int:
        """The number of its text's tokens, padding included."""
        text: PerImage = self.arguments[TEXT[0]]
        return text.rows.shape[1]

    def followed_by(self, other: Inputs) -> Inputs:
        """Return the condition with another one's text behind its own, in one sequence."""
        longer = {
            name: PerImage(torch.cat([value.rows, other.arguments[name].rows], dim=1))
            for name in TEXT
            if isinstance(value := self.arguments.get(name), PerImage)
        }
        return Inputs({**self.arguments, **longer}, self.channels)

    def layout(self) -> Hashable:
        """Return the shapes of one image's row, the same for conditions that can be joined."""
        return tuple(each.rows.shape[1:] for each in _per_image(self.arguments))

    def _with(self, function: Callable[..., Tensor], *all_inputs: Inputs) -> Inputs:
        return Inputs(
            _mapped(function, *(inputs.arguments for inputs in all_inputs)),
            _mapped(function, *(inputs.channels for inputs in all_inputs)),
        )


def _mapped(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Apply a function to the rows at each place of trees of one shape."""
    first = trees[0]
    if isinstance(first, PerImage):
        return PerImage(function(*(tree.rows for tree in trees)))
    if isinstance(first, Mapping):
        return {key: _mapped(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (list, tuple)):
        return [_mapped(function, *values) for values in zip(*trees, strict=True)]
    return first


def _wrapped(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return PerImage(value) if value.ndim > 0 and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: _wrapped(each, count) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_wrapped(each, count) for each in value]
    return value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, PerImage):
        return value.rows
    if isinstance(value, Mapping):
        return {key: _unwrapped(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unwrapped(each) for each in value]
    return value


def _per_image(tree: Any) -> Iterator[PerImage]:
    if isinstance(tree, PerImage):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for each in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _per_image(each)


TEXT = ("encoder_hidden_states", "encoder_attention_mask")
"""Arguments of diffusers' networks that hold one entry for each token of the text."""

KEPT = 16
"""How many prompts' encodings are kept; images of one prompt mostly follow one another."""


@dataclass(frozen=True)
class TokenGrid:
    """What a call tells of its sequence: the size of x_t and the number of text tokens.

    Example:
        >>> TokenGrid((128, 128), text_tokens=77).size
        (128, 128)
    """

    size: tuple[int, int]
    text_tokens: int = 0


Encoder = Callable[[str | None, torch.device], Inputs]
"""(prompt, device) -> one row of what the network is given; without prompt, for the null one."""


class TextConditional(Denoiser):
    """A diffusers network at one size of x_t, asked with :class:`Inputs`.

    It is used in two ways. Within a pipeline the calls bring the conditions; ``empty`` is that of
    the null prompt, or None where it is not known. On its own the denoiser has ``prompts``, which
    are its classes, and ``encoder`` makes their conditions when they are asked for. The network is
    asked in the precision ``dtype``, by default that of its parameters, and predictions are
    float32.

    Attributes:
        network_class: diffusers' name of the network.
        x_name: its argument for x_t.
        time_unit: its unit of time in the scheduler's, whose whole is 1000.
        shared: its arguments that are never one row per image.

    Example::

        denoiser = sag_dit.load_text("FOLDER", ["a corgi"], size=(512, 512)).denoiser
        prediction = denoiser(x_t, level, denoiser.conditions([0]))
    """

    network_class: ClassVar[str]
    x_name: ClassVar[str] = "hidden_states"
    time_unit: ClassVar[float] = 1.0
    shared: ClassVar[tuple[str, ...]] = ("cross_attention_kwargs",)

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        kind: OutputKind,
        grid: TokenGrid,
        dtype: torch.dtype | None = None,
        empty: Inputs | None = None,
        prompts: Sequence[str] = (),
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.kind = kind
        self.grid = grid
        self.x_0_range = None
        self.empty = empty
        self.class_names = tuple(prompts)
        self._encoder = None if encoder is None else lru_cache(maxsize=KEPT)(encoder)
        self._dtype = dtype
        self.latent_shape = (self.own_channels(network), *grid.size)
        self.layers = {layer.name: layer for layer in self.find_layers(network, grid)}
        middle = self.middle_layer()
        self.aliases = {} if middle is None else {"auto": middle}

    def of(self, network: nn.Module) -> Self:
        """Return the denoiser of another network, to be asked with the conditions of this one.

        Raises:
            ValueError: the network is of another layout.
        """
        if self.network_class not in [each.__name__ for each in type(network).__mro__]:
            raise ValueError(
                f"{type(network).__name__}: expected a network of the same kind, "
                f"{self.network_class}"
            )
        return type(self)(network, self.process, self.kind, self.grid, empty=self.empty)

    @classmethod
    def own_channels(cls, network: nn.Module) -> int:
        """Return the channels of x_t: those that the network takes in and puts out."""
        config: Any = network.config
        return int(min(config.in_channels, config.out_channels or config.in_channels))

    @classmethod
    def split(cls, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split what the network is given into x_t, in its form, and channels behind it."""
        config: Any = network.config
        own = min(config.in_channels, config.out_channels or config.in_channels)
        axis = 1 if x.ndim == 4 else 2
        behind = x.narrow(axis, own, x.shape[axis] - own)
        return x.narrow(axis, 0, own), behind if behind.shape[axis] else None

    @classmethod
    def grid_of(cls, x: Tensor, arguments: Mapping[str, Any]) -> TokenGrid:
        """Read from a call of the network the size of its x_t and the length of its text."""
        return TokenGrid((x.shape[-2], x.shape[-1]))

    @classmethod
    def corrected(
        cls, network: nn.Module, arguments: Mapping[str, Any], cfg: bool
    ) -> Mapping[str, Any]:
        """Return a call's arguments as this network needs them, which a pipeline may not know.

        ``cfg`` says whether the second half of the rows is the null condition's, or the first.
        """
        return arguments

    @classmethod
    @abstractmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield the network's self-attention layers in the order of depth."""

    def middle_layer(self) -> str | None:
        """Return the layer that ``auto`` means; None is the middle of the depth."""
        return None

    @property
    def cross_layers(self) -> tuple[str, ...]:
        """Layers in which the image's tokens attend to the text alone."""
        beside = (name.removesuffix("1") + "2" for name in self.layers if name.endswith(".attn1"))
        return tuple(name for name in beside if _exists(self.network, name))

    @property
    def joint_layers(self) -> tuple[str, ...]:
        """Layers in which the text follows the image's tokens in one sequence."""
        return ()

    @property
    def size_multiple(self) -> int | None:
        """A patch's side, or for a UNet that of a cell in the middle."""
        config: Any = self.network.config
        blocks = config.get("down_block_types")
        return 2 ** (len(blocks) - 1) if blocks else int(config.patch_size)

    @staticmethod
    def kin(cond: Inputs | None) -> Hashable:
        """Return the shapes of its arguments: a longer text is asked by itself."""
        return None if cond is None else cond.layout()

    @staticmethod
    def unpacked(x: Tensor, grid: TokenGrid) -> Images:
        """Turn the network's form of x_t into (b, c, h, w)."""
        return x

    @staticmethod
    def packed(x_t: Images) -> Tensor:
        """Turn (b, c, h, w) into the network's form of x_t."""
        return x_t

    def time(self, t: Tensor) -> Tensor:
        """Turn the scheduler's time into the network's, in its precision as its pipeline does."""
        return t if self.time_unit == 1 else t.to(self.dtype) / self.time_unit

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the network is asked."""
        return self._dtype or next(self.network.parameters()).dtype

    def evaluate(self, x_t: Images, t: Tensor, cond: Inputs) -> Images:
        """Call the network once, with the arguments that its pipeline would give it."""
        x = self.packed(x_t.to(self.dtype))
        if cond.channels is not None:
            if x_t.shape[2:] != self.grid.size:
                raise ValueError(
                    f"x_t of {tuple(x_t.shape[2:])} beside a mask of {self.grid.size}: crops of an "
                    f"image whose mask comes with the call cannot be asked; guide without SWG"
                )
            x = torch.cat([x, cond.channels.rows], dim=1 if x.ndim == 4 else -1)
        inputs = {self.x_name: x, "timestep": self.time(t.to(x.device)), "return_dict": False}
        output: Tensor = self.network(**cond.plain(), **inputs)[0]
        size = (x_t.shape[-2], x_t.shape[-1])
        return self.unpacked(output, TokenGrid(size))

    def forward(
        self,
        x_t: Images,
        level: NoiseLevel,
        cond: Inputs,
        captures: Sequence[Capture] = (),
        edits: Sequence[tuple[Edit, slice]] = (),
        forks: Sequence[Fork] = (),
        outputs: Outputs | None = None,
    ) -> Prediction:
        """Evaluate one batch in float32; see :meth:`Denoiser.forward`."""
        tapped = {capture.layer.name for capture in captures}
        tapped |= {edit.module for edit, _ in edits if isinstance(edit, AttentionEdit)}
        with native_attention(self.network, tapped):
            return super().forward(x_t.float(), level, cond, captures, edits, forks, outputs)

    def _compile(self) -> None:
        # diffusers names the classes of blocks; of some networks as what no device may split alone.
        told = ("_repeated_blocks", "_no_split_modules")
        names = next(filter(None, (getattr(self.network, each, None) for each in told)), ())
        blocks = [each for each in self.network.modules() if type(each).__name__ in names]
        if not blocks:
            super()._compile()
        for block in blocks:
            block.compile()

    def _encoded(self, prompt: str | None) -> Inputs:
        if self._encoder is None:
            raise ValueError("this denoiser has no encoder of prompts; its pipeline asks it")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._encoder(prompt, self.device).to(self.device, self.dtype)

    def conditions(self, labels: Sequence[int]) -> Inputs:
        """Return the condition of images by the numbers of their prompts."""
        return self.join([self._encoded(self.class_names[label]) for label in labels])

    def null(self, count: int) -> Inputs | None:
        """Return the null prompt's condition for ``count`` images, or None if it is not known."""
        empty = self.empty if self._encoder is None else self._encoded(None)
        if empty is None or empty.count == count:
            return empty
        return empty.take(torch.arange(count, device=self.device) % empty.count)

    def join(self, conditions: Sequence[Inputs]) -> Inputs:
        """Concatenate conditions."""
        return conditions[0].join(conditions[1:])

    def layer(self, name: str) -> AttentionLayer:
        """Return a layer by its name or that of its block; see :meth:`Denoiser.layer`."""
        return self.layers.get(f"{name}.attn1") or super().layer(name)


SPLIT = ("SlicedAttnProcessor", "XFormersAttnProcessor", "XLAFlashAttnProcessor2_0")
"""Processors of diffusers that compute the same as AttnProcessor2_0 in another way."""

FUSED = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Backends of diffusers that call PyTorch's fused attention."""


@contextmanager
def native_attention(network: nn.Module, names: set[str]) -> Iterator[None]:
    """Have the named layers call PyTorch's fused attention, whatever was chosen for the network.

    An :class:`AttentionTap` does not see attention slicing or other backends. All other layers keep
    their processors, and these get theirs back when the context ends.
    """
    with ExitStack() as undo:
        for name in names:
            layer = network.get_submodule(name)
            processor = getattr(layer, "processor", None)
            native = None if processor is None else _native(processor)
            if native is not None:
                undo.callback(setattr, layer, "processor", processor)
                layer.processor = native
        yield


def _native(processor: Any) -> Any:
    """Return the same processor on PyTorch's fused attention; None if it already calls that."""
    from diffusers.models import attention_processor

    name = type(processor).__name__
    if name in (*SPLIT, "AttnProcessor"):
        return attention_processor.AttnProcessor2_0()
    if name == "XFormersJointAttnProcessor":
        return attention_processor.JointAttnProcessor2_0()
    if hasattr(processor, "_attention_backend"):
        from diffusers.models.attention_dispatch import AttentionBackendName

        if processor._attention_backend in [AttentionBackendName(name) for name in FUSED]:
            return None
        native = copy.copy(processor)
        native._attention_backend = AttentionBackendName.NATIVE
        return native
    return None


class UNetText(TextConditional):
    """Stable Diffusion 1, 2 and XL: convolutions with transformers between, at several sizes.

    The grid halves, rounding up, with each downsampling. ``auto`` is the first self-attention of
    the middle block, SAG's published choice.

    Example::

        layers = list(UNetText.find_layers(pipe.unet, TokenGrid((64, 64))))
    """

    network_class = "UNet2DConditionModel"
    x_name = "sample"

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn1`` of every transformer block, downwards, in the middle, upwards."""
        unet: Any = network
        grids = [grid.size]
        for i, block in enumerate(unet.down_blocks):
            yield from _attn1(block, f"down_blocks.{i}", grids[-1])
            if block.downsamplers is not None:
                height, width = grids[-1]
                grids.append(((height + 1) // 2, (width + 1) // 2))
        if unet.mid_block is not None:
            yield from _attn1(unet.mid_block, "mid_block", grids[-1])
        for i, block in enumerate(unet.up_blocks):
            yield from _attn1(block, f"up_blocks.{i}", grids[-1])
            if block.upsamplers is not None:
                grids.pop()

    def middle_layer(self) -> str | None:
        """Return the first self-attention of the middle block."""
        return next((name for name in self.layers if name.startswith("mid_block.")), None)


def _attn1(block: Any, name: str, grid: tuple[int, int]) -> Iterator[AttentionLayer]:
    for i, attention in enumerate(getattr(block, "attentions", ())):
        for j, transformer in enumerate(getattr(attention, "transformer_blocks", ())):
            if not transformer.only_cross_attention:
                path = f"{name}.attentions.{i}.transformer_blocks.{j}.attn1"
                yield AttentionLayer(path, grid)


def _exists(network: nn.Module, name: str) -> bool:
    around, _, last = name.rpartition(".")
    return getattr(network.get_submodule(around), last, None) is not None


def _patches(network: Any, grid: TokenGrid) -> tuple[int, int]:
    patch = network.config.patch_size
    return grid.size[0] // patch, grid.size[1] // patch


class PixArtText(TextConditional):
    """PixArt-alpha and Sigma: patches of the image alone attend to each other, text by itself.

    Example::

        layers = list(PixArtText.find_layers(pipe.transformer, TokenGrid((128, 128))))
    """

    network_class = "PixArtTransformer2DModel"

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn1`` of every block."""
        transformer: Any = network
        for i in range(len(transformer.transformer_blocks)):
            name = f"transformer_blocks.{i}.attn1"
            yield AttentionLayer(name, _patches(network, grid))


class DiTLabels(PixArtText):
    """DiT as diffusers computes it, with class labels in the place of text.

    Example::

        layers = list(DiTLabels.find_layers(pipe.transformer, TokenGrid((32, 32))))
    """

    network_class = "DiTTransformer2DModel"

    @classmethod
    def corrected(
        cls, network: nn.Module, arguments: Mapping[str, Any], cfg: bool
    ) -> Mapping[str, Any]:
        """Return the arguments with the network's own null class, which follows its classes.

        ``DiTPipeline`` asks for class 1000 in the second half of the rows, as ImageNet's models
        want it.

        Raises:
            ValueError: a class that the network does not have.
        """
        transformer: Any = network
        classes = int(transformer.config.num_embeds_ada_norm)
        labels: Tensor = arguments["class_labels"].clone()
        if cfg:
            labels[len(labels) // 2 :] = classes
        wrong = labels[(labels < 0) | (labels > classes)].tolist()
        if wrong:
            raise ValueError(f"class {wrong[0]} does not exist: expected 0 to {classes - 1}")
        return {**arguments, "class_labels": labels}


class JointText(TextConditional):
    """Stable Diffusion 3: image and text in one sequence, the image's tokens first.

    Some blocks have a second attention, ``attn2``, of the image alone.

    Example::

        layers = list(JointText.find_layers(pipe.transformer, TokenGrid((128, 128))))
    """

    network_class = "SD3Transformer2DModel"
    shared = ("skip_layers",)

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn`` of every block, and ``attn2`` where there is one."""
        transformer: Any = network
        patches = _patches(network, grid)
        image = slice(0, patches[0] * patches[1])
        for i, block in enumerate(transformer.transformer_blocks):
            yield AttentionLayer(f"transformer_blocks.{i}.attn", patches, image)
            if block.attn2 is not None:
                yield AttentionLayer(f"transformer_blocks.{i}.attn2", patches)

    @property
    def joint_layers(self) -> tuple[str, ...]:
        """``attn`` of every block."""
        return tuple(name for name in self.layers if name.endswith(".attn"))

    def middle_layer(self) -> str | None:
        """Return the joint attention in the middle of the depth."""
        joint = [name for name in self.layers if name.endswith(".attn")]
        return joint[(len(joint) - 1) // 2]


class PackedText(TextConditional):
    """FLUX: text first, then the image's tokens of 2 x 2 latent cells; later blocks join both.

    Example:
        >>> import torch
        >>> tokens = PackedText.packed(torch.zeros(1, 16, 64, 64))
        >>> tokens.shape, PackedText.unpacked(tokens, TokenGrid((64, 64))).shape
        (torch.Size([1, 1024, 64]), torch.Size([1, 16, 64, 64]))
    """

    network_class = "FluxTransformer2DModel"
    time_unit = 1000.0
    shared = ("img_ids", "txt_ids")

    @classmethod
    def own_channels(cls, network: nn.Module) -> int:
        """Return the channels of a latent cell, of which a token holds four."""
        return super().own_channels(network) // 4

    @classmethod
    def grid_of(cls, x: Tensor, arguments: Mapping[str, Any]) -> TokenGrid:
        """Read the grid from the positions that the tokens are given.

        Raises:
            ValueError: some tokens are not of the image that is drawn.
        """
        ids: Tensor = arguments["img_ids"]
        ids = ids if ids.ndim == 2 else ids[0]
        height, width = int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1
        if height * width != x.shape[1]:
            raise ValueError(
                f"{x.shape[1]} image tokens at positions of {height} x {width}: expected one "
                f"token each; sequences that also hold a reference image cannot be guided"
            )
        return TokenGrid((2 * height, 2 * width), arguments["encoder_hidden_states"].shape[1])

    @classmethod
    def find_layers(cls, network: nn.Module, grid: TokenGrid) -> Iterator[AttentionLayer]:
        """Yield ``attn`` of every block of two streams, then of one."""
        transformer: Any = network
        patches = (grid.size[0] // 2, grid.size[1] // 2)
        image = slice(grid.text_tokens, grid.text_tokens + patches[0] * patches[1])
        for blocks in ("transformer_blocks", "single_transformer_blocks"):
            for i in range(len(getattr(transformer, blocks))):
                yield AttentionLayer(f"{blocks}.{i}.attn", patches, image)

    @property
    def size_multiple(self) -> int | None:
        """A token's side."""
        return 2

    def evaluate(self, x_t: Images, t: Tensor, cond: Inputs) -> Images:
        """Call the network, with the positions of x_t's own size."""
        if x_t.shape[2:] != self.grid.size:
            height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
            # Those of the upper left corner of the whole image, which are what a small one has.
            ids: Tensor = cond.arguments["img_ids"]
            ids = ids.unflatten(-2, (self.grid.size[0] // 2, -1))[..., :height, :width, :]
            cond = replace(cond, arguments={**cond.arguments, "img_ids": ids.flatten(-3, -2)})
        return super().evaluate(x_t, t, cond)

    @staticmethod
    def unpacked(x: Tensor, grid: TokenGrid) -> Images:
        """Turn tokens (b, h/2 w/2, 4 c), ordered (c, row, column), into (b, c, h, w)."""
        # (b, i, j, c, row, column) -> (b, c, i, row, j, column)
        cells = x.unflatten(1, (grid.size[0] // 2, grid.size[1] // 2)).unflatten(-1, (-1, 2, 2))
        images: Tensor = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return images

    @staticmethod
    def packed(x_t: Images) -> Tensor:
        """Turn (b, c, h, w) into tokens of 2 x 2 cells."""
        # (b, c, i, row, j, column) -> (b, i, j, c, row, column)
        cells = x_t.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        tokens: Tensor = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return tokens


LAYOUTS: tuple[type[TextConditional], ...] = (
    UNetText,
    PixArtText,
    DiTLabels,
    JointText,
    PackedText,
)


def layout_of(network: nn.Module) -> type[TextConditional]:
    """Return the denoiser of a network's token layout.

    Raises:
        ValueError: the layout is not known; the message lists the known ones.
    """
    names = [each.__name__ for each in type(network).__mro__]
    for layout in LAYOUTS:
        if layout.network_class in names:
            return layout
    known = ", ".join(layout.network_class for layout in LAYOUTS)
    raise ValueError(
        f"{names[0]}: where the image's tokens attend in this network is not known, or it has no "
        f"softmax attention to read (Sana's is linear); known are {known}"
    )
