"""AttentionTap: the one mechanism that reads and edits named modules of a network.

While a tapped module runs, every call of ``torch.nn.functional.scaled_dot_product_attention`` is
seen by a function mode that hooks on that module switch on and off. No module is replaced, no
attention processor exists, and untapped modules run as they are, compiled or not. A tapped module
whose ancestors are compiled runs uncompiled for that call, because hooks added after compilation
are silently ignored inside a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import signature
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sag_dit.attention.edits import (
    Attend,
    AttentionEdit,
    Capture,
    Edit,
    InputEdit,
    OutputEdit,
    attending,
    both,
)
from sag_dit.attention.saliency import attention_map, regrouped, saliency
from sag_dit.profiling import part

Rows = slice


IMAGE = "hidden_states"
"""What diffusers' blocks call their first input where they are called by keywords alone."""

TEXT_FIRST = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
"""Blocks of diffusers that return the text before the image."""


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any], module: str) -> Tensor:
    """Return the tensor a module was called with."""
    found = args[0] if args else kwargs.get(IMAGE)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"module {module!r} was not called with a tensor as its first argument, so its input "
            f"cannot be edited; choose a module within it"
        )
    return found


def paired(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, module: str
) -> list[tuple[Tensor, Tensor | None]]:
    """Return pairs (input, output) of a module that returns several tensors.

    A block of two streams, text and image, returns both, in an order of its own. Where that order
    is not known, an output belongs to the input that has its shape.

    Raises:
        ValueError: no input has its shape, or more than one has.
    """
    # Known blocks return the text first.
    if type(block).__name__ in TEXT_FIRST and isinstance(output, tuple):
        given = signature(block.forward).bind(*args, **kwargs).arguments
        text, image = output
        return [(given["encoder_hidden_states"], text), (given[IMAGE], image)]
    # Of others, look for the input of the same shape. None stands for a stream that ends here.
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for out in output if isinstance(output, tuple) else (output,):
        if out is None and inputs:
            pairs.append((inputs[0], None))
            continue
        fitting = [x for x in inputs if isinstance(out, Tensor) and x.shape == out.shape]
        if len(fitting) != 1:
            raise ValueError(
                f"module {module!r} returns {type(output).__name__}: only modules that return a "
                f"tensor can be edited, or a tensor for each of their inputs, of its shape"
            )
        pairs.append((fitting[0], out))
    return pairs


def with_rows(x: Tensor, rows: Rows, changed: Tensor, module: str) -> Tensor:
    """Return a copy of ``x`` whose ``rows`` are ``changed``, in its own type; gradients flow."""
    start, stop, _ = rows.indices(x.shape[0])
    if changed.shape != x[rows].shape:
        raise ValueError(
            f"an edit of {module!r} returned {tuple(changed.shape)}: expected the shape of the "
            f"rows it was given, {tuple(x[rows].shape)}"
        )
    return torch.cat([x[:start], changed.to(x.dtype), x[stop:]])


def rows_of(mask: Tensor | None, rows: Rows, batch: int) -> Tensor | None:
    """Return the mask of the chosen rows; a mask shared by all rows stays as it is."""
    return mask if mask is None or mask.ndim < 4 or mask.shape[0] != batch else mask[rows]


class _SeeAttention(TorchFunctionMode):
    """Passes everything through but fused attention, which goes to ``on_attention``."""

    def __init__(self, on_attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.on_attention = on_attention

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.on_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class AttentionTap:
    """Context manager that reads and edits named modules of ``network`` for chosen rows.

    After a forward within the context, :attr:`captured` maps each capture's key to the layer's
    saliency (rows, n) or map (rows, k, n, n), float32. Hooks, modes and compilation are as before
    when the context ends, also after an exception.

    Raises:
        ValueError: a module does not exist (those that attend are listed), or the context ended
            without a captured or edited attention layer having called fused attention.

    Example::

        layer = AttentionLayer("blocks.5.attn", grid=(16, 16))
        with AttentionTap(network, [Capture(layer)]) as tap:
            network(x_t, t, labels)
        saliency = tap.captured["blocks.5.attn"]
    """

    def __init__(
        self,
        network: nn.Module,
        captures: Sequence[Capture] = (),
        edits: Sequence[tuple[Edit, Rows]] = (),
    ) -> None:
        self._network = network
        self._captures = tuple(captures)
        self._edits = tuple(edits)
        self._seen: set[str] = set()
        self._ran: set[str] = set()
        self._calls: dict[str, int] = {}
        self._modes: dict[str, _SeeAttention] = {}
        self._undo = ExitStack()
        self.captured: dict[str, Tensor] = {}
        self._captured_names = {capture.layer.name for capture in self._captures}
        names = {*self._captured_names, *(edit.module for edit, _ in self._edits)}
        # Found by their names alone: a table of all modules would cost more than the rest of this.
        self._paths = {name: self._path(name) for name in names}

    def _path(self, name: str) -> list[nn.Module]:
        """Return the modules from the network down to the one of that name."""
        path = [self._network]
        for each in name.split(".") if name else ():
            found = dict(path[-1].named_children()).get(each)
            if found is None:
                raise ValueError(
                    f"layer {name!r} does not exist in {type(self._network).__name__}; "
                    f"its attention layers are {', '.join(self._attention_names()) or 'none'}"
                )
            path.append(found)
        return path

    def _attention_names(self) -> list[str]:
        def attends(module: nn.Module) -> bool:
            named = type(module).__name__.lower()
            return "attention" in named or "attn" in named

        return [
            name
            for name, module in self._network.named_modules()
            if attends(module) and not any(attends(child) for child in module.children())
        ]

    def __enter__(self) -> Self:
        try:
            attending = {edit.module for edit, _ in self._edits if isinstance(edit, AttentionEdit)}
            for name in {*self._captured_names, *attending}:
                self._watch(name)
            for edit, rows in self._edits:
                if isinstance(edit, InputEdit):
                    self._hook_input(edit, rows)
                elif isinstance(edit, OutputEdit):
                    self._hook_output(edit, rows)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._undo.close()
        unused = {edit.module for edit, _ in self._edits} - set(self._modes) - self._ran
        if kind is None and unused:
            raise ValueError(
                f"module {', '.join(sorted(unused))} did not run, so editing it changed nothing; "
                f"choose the module around it or one within it"
            )
        unseen = set(self._modes) - self._seen
        if kind is None and unseen:
            raise ValueError(
                f"layer {', '.join(sorted(unseen))}: no call of fused attention was seen there; "
                f"seen in {', '.join(sorted(self._seen)) or 'no requested layer'}. Expected a "
                f"module that calls torch.nn.functional.scaled_dot_product_attention "
                f"(timm: set_fused_attn(True); diffusers: the native attention backend)"
            )

    def _eager(self, name: str) -> None:
        """Run the module and its ancestors uncompiled until the context ends."""
        for module in self._paths[name]:
            compiled = module._compiled_call_impl
            if compiled is not None:
                self._undo.callback(setattr, module, "_compiled_call_impl", compiled)
                module._compiled_call_impl = None

    def _watch(self, name: str) -> None:
        """Switch a mode on while the module runs, so that its attention is seen."""
        mode = _SeeAttention(partial(self._attend, name))
        self._modes[name] = mode
        active: list[_SeeAttention] = []

        def enter(*_: object) -> None:
            self._calls[name] = 0
            mode.__enter__()  # type: ignore[no-untyped-call]
            active.append(mode)

        def leave(*_: object) -> None:
            while active:
                active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

        self._eager(name)
        self._undo.callback(leave)
        module = self._paths[name][-1]
        self._undo.callback(module.register_forward_pre_hook(enter).remove)
        # always_call: also when the module raises, or the mode would outlive the context.
        self._undo.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _attend(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_causal or enable_gqa:
            raise ValueError(
                f"layer {name!r} attends causally or with grouped heads; only plain "
                f"self-attention can be captured or edited, choose another layer"
            )
        self._seen.add(name)
        self._calls[name] += 1
        if self._calls[name] > 1:
            raise ValueError(
                f"layer {name!r} attends more than once, so it is not known which attention is "
                f"meant; choose the attention module within it"
            )

        # Fused attention as it was called, restricted further where an edit asks for it.
        def attend(
            q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, *, mask: Tensor | None
        ) -> Tensor:
            mask = both(mask, allowed)
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)

        # Read what is to be captured of this layer.
        for capture in self._captures:
            if capture.layer.name == name:
                capture.layer.check(key.shape[-2])
                read = saliency if capture.kind == "saliency" else attention_map
                q, k, by = query[capture.rows], key[capture.rows], scale
                if capture.heads is not None:
                    q, k = regrouped(q, k, value[capture.rows], capture.heads)
                    by = None
                with torch.no_grad(), part("capture"):
                    self.captured[capture.key] = read(
                        q,
                        k,
                        scale=by,
                        mask=rows_of(attn_mask, capture.rows, query.shape[0]),
                        tokens=capture.layer.tokens,
                    )
        # Attend as the network would, then once more for the edited rows.
        output = attend(query, key, value, mask=attn_mask)
        edited: dict[tuple[int, int], Attend] = {}
        for edit, rows in self._edits:
            if isinstance(edit, AttentionEdit) and edit.module == name:
                start, stop, _ = rows.indices(query.shape[0])
                mask = rows_of(attn_mask, rows, query.shape[0])
                # An edit calls the edit before it in place of attention, so that both act.
                before = edited.get((start, stop), partial(attend, mask=mask))
                edited[start, stop] = attending(edit, before)
        for (start, stop), attend_edited in edited.items():
            rows = slice(start, stop)
            changed = attend_edited(query[rows], key[rows], value[rows])
            output = with_rows(output, rows, changed, name)
        return output

    def _hook_input(self, edit: InputEdit, rows: Rows) -> None:
        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            self._ran.add(edit.module)
            x = first_input(args, kwargs, edit.module)
            changed = with_rows(x, rows, edit.edit_input(x[rows]), edit.module)
            if args:
                return (changed, *args[1:]), kwargs
            return args, {**kwargs, IMAGE: changed}

        self._eager(edit.module)
        handle = self._paths[edit.module][-1].register_forward_pre_hook(hook, with_kwargs=True)
        self._undo.callback(handle.remove)

    def _hook_output(self, edit: OutputEdit, rows: Rows) -> None:
        def hook(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            self._ran.add(edit.module)

            def edited(x: Tensor, out: Tensor) -> Tensor:
                return with_rows(out, rows, edit.edit_output(x[rows], out[rows]), edit.module)

            if isinstance(output, Tensor):
                return edited(first_input(args, kwargs, edit.module), output)
            return tuple(
                out if out is None else edited(x, out)
                for x, out in paired(block, args, kwargs, output, edit.module)
            )

        self._eager(edit.module)
        handle = self._paths[edit.module][-1].register_forward_hook(hook, with_kwargs=True)
        self._undo.callback(handle.remove)
