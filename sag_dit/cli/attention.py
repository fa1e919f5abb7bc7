"""``attention.py``: the saliency of every layer over the steps on one sheet, to choose SAG's by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sag_dit.cli.app import launch
from sag_dit.cli.composing import make
from sag_dit.cli.keys import AttentionSheet
from sag_dit.cli.models import load_model
from sag_dit.cli.values import make_maps, own_sampler

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sag_dit.denoiser import Denoiser


@contextmanager
def gate_norms(denoiser: Denoiser) -> Iterator[Mapping[str, list[float]]]:
    """Collect, for each layer that has one, the norm of its gate at every call of the network.

    adaLN-Zero multiplies what a layer attends to by a gate before it is added to the tokens. The
    norm is the root of the mean square over channels, averaged over the batch: a layer near 0 says
    little to the image, whatever its map looks like.
    """
    norms: dict[str, list[float]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            gate = output.chunk(6, dim=1)[2].float()
            norms.setdefault(name, []).append(float(gate.square().mean(1).sqrt().mean()))

        return hook

    with ExitStack() as undo:
        for name in denoiser.layers:
            block = denoiser.network.get_submodule(name.rpartition(".")[0])
            modulation = getattr(block, "adaLN_modulation", None)
            if modulation is not None:
                undo.callback(modulation.register_forward_hook(keep(name)).remove)
        yield norms


def run_attention(config: AttentionSheet) -> None:
    """Draw an image of each class, or of a prompt, unguided, and a sheet of what each layer saw.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    import torch

    # Where to compute, and what to draw there.
    device = str(config.device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={device}: it cannot be used here: {reason}") from error
    from sag_dit.data.requests import make_requests
    from sag_dit.guidance import cost_of
    from sag_dit.output.folder import pixels, write_arrays
    from sag_dit.output.sheet import SheetText, outline, write_sheet
    from sag_dit.output.telling import Recipe, how
    from sag_dit.sampler import Sampler
    from sag_dit.sampling import Settings, draw_batch

    if config.prompt is not None and config.classes is not None:
        raise ValueError("classes: a text model draws its prompt; leave out either")
    model = load_model(config)
    sampler = make(own_sampler(config.sampler, model.denoiser.process), "sampler", Sampler)
    classes = 0 if config.classes is None else config.classes
    count = len(classes) if isinstance(classes, list) else 1
    requests = make_requests(count, config.seed, classes, model.class_names)
    settings = Settings(sampler, config.steps, batch_size=1)
    settings.check(model)
    cost = cost_of(model.denoiser, (), sampler, config.steps)
    maps = make_maps(config.attention, model, len(cost.rounds))
    model.denoiser.to(device)
    model.codec.to(device)
    out = Path(config.out or f"outputs/attention/{model.name}")
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(config.ckpt, sampler, steps=config.steps, seed=config.seed)
    words = how(recipe, model.denoiser)
    # A sheet for each image, with the norm of every layer's gate beside its maps.
    for place, request in enumerate(requests):
        with gate_norms(model.denoiser) as norms:
            drawn = draw_batch(model, [request], settings, traced=[place], maps=maps)
        view = drawn.traces[place].maps
        assert view is not None
        gates = {name: sum(of) / len(of) for name, of in norms.items()}
        notes = {name: f"gate {gate:.3f}" for name, gate in gates.items()}
        file = out / f"{place:03d}-{'prompt' if config.prompt else f'class-{request.label}'}"
        write_arrays(file.with_suffix(".npz"), view)
        title = f"{model.name}: {model.class_names[request.label]}"
        text = SheetText(title, words, outline(maps.limit), notes)
        write_sheet(file.with_suffix(".png"), view, pixels(drawn.images[0]), text)
        print(f"sheet: {file.with_suffix('.png')}")
        print(f"{'layer':24} {'gate norm':>9} {'mask area':>9}")
        for layer in view.layers:
            gate = f"{gates[layer.name]:9.3f}" if layer.name in gates else f"{'none':>9}"
            print(f"{layer.name:24} {gate} {layer.mask.mean():9.2f}")


main = partial(launch, "attention", run_attention)
"""Run ``attention.py``, with the arguments of the command line unless others are given."""
