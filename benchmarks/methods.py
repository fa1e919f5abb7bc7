"""Write what follows from the methods: ``python -m benchmarks.methods``.

That is the tables of keys, methods and backbones, the classes for type checkers and, for a method
that is new, what its identity tells.

The tables stand in docs/guidance.md and, without links, in README.md. Each cell names the test that
proves it, of a dash the one that proves the refusal; tests/guidance/test_table.py sees that they
exist, that they run what the cell says, and that the pages are as this script writes them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeAlias

from sag_dit import guidance
from sag_dit.guidance import Term
from sag_dit.identity import later
from sag_dit.methods import methods
from sag_dit.study.contenders import setting as setting

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guidance.md"
BEGIN = "<!-- python -m benchmarks.methods -->"
BEGIN_KEYS = "<!-- python -m benchmarks.methods: keys -->"
END = "<!-- end -->"


def classes() -> list[type[Term]]:
    """Return the methods' classes: SAG's file first, the others by title."""
    found = [getattr(guidance, method.name) for method in methods()]
    return sorted(found, key=lambda each: (not issubclass(each, guidance.BlurGuidance), each.title))


def _rows() -> Iterator[tuple[str, str, type[Term]]]:
    for each in classes():
        yield each.title, f"`{each.__name__}`", each
        yield from ((name, f"`{made}`", each) for name, made in each.variants.items())


ROWS: Mapping[str, type[Term]] = {title: kind for title, _, kind in _rows()}
METHODS: Mapping[str, str] = {title: made for title, made, _ in _rows()}

Proofs: TypeAlias = Mapping[str, Mapping[str, str]]
"""For each backbone and method the test that proves it: file::function, below tests/."""

EVERY = "properties/test_guidance.py::test_every_method_changes_v_and_stays_finite"
EVERY_UNET = "guidance/test_unet_methods.py::test_every_method_guides_a_unet"
EVERY_PIPELINE = "pipelines/test_every_method.py::test_every_method_guides_every_family"
PERTURBED = "guidance/test_perturbed.py::"
NULL = "guidance/test_null.py::"
CFGPP = "guidance/test_cfgpp.py::"
EDITED = PERTURBED + "test_it_is_guidance_away_from_the_perturbed_network"
S2_DRAWS = "guidance/test_s2.py::test_each_image_is_led_away_from_what_its_own_blocks_leave"
CROPS = "guidance/test_swg.py::test_it_is_that_of_the_authors"
NAG_TEXTS = "pipelines/test_text_attention.py::test_nag_keeps_the_two_texts_apart"
NO_TEXT = "pipelines/test_text_attention.py::test_a_model_without_a_text_is_refused"
SCORE = "guidance/test_classifier.py::test_score_form_shifts_eps_against_the_gradient"
AUTO = "guidance/test_auto.py::test_it_extrapolates_from_the_worse_model"
UNET_PARITY = "parity/test_unet.py::test_agrees_with_the_original"
SAG_PARITY = "pipelines/test_parity.py::test_sag_is_that_of_diffusers"
PAG_PARITY = "pipelines/test_parity.py::test_pag_is_that_of_diffusers"
OWN_CFG = "pipelines/test_guide.py::test_a_cfg_term_takes_the_place_of_the_pipelines_own"
NO_FLOW = NULL + "test_cfg_zero_is_for_flows_and_icg_for_classes"
NO_UNET = "guidance/test_unet_methods.py::test_what_cannot_guide_a_unet_is_refused"
NO_PIPELINE = "pipelines/test_every_method.py::test_what_cannot_guide_a_family_is_refused"

# What a method has in common on all kinds of output: it acts, is finite at both ends of the
# process, and is the same in one batch or one by one. A formula is proven where one is named.
OF_TEXT = tuple(title for title, kind in ROWS.items() if kind.needs & {"text", "cross"})
COMMON = {
    title: EVERY
    for title, kind in ROWS.items()
    if "flow" not in kind.needs and title not in OF_TEXT
}

NETWORKS: Proofs = {
    "DiT, eps": {
        **COMMON,
        "SAG": "guidance/test_sag.py::test_sag_is_the_paper_s_form_in_eps",
        "SAG's other masks": "guidance/test_masks.py::"
        "test_other_masks_have_as_many_tokens_as_the_attention_s",
        "blur guidance": "guidance/test_sag.py::test_blur_guidance_is_sag_whose_mask_is_1",
        "CFG": "guidance/test_cfg.py::test_cfg_is_null_plus_w_times_the_difference",
        "CFG, rescaled": NULL + "test_rescale_is_of_what_the_network_puts_out",
        "CFG++": CFGPP + "test_a_run_of_ddim_is_algorithm_2",
        "APG": NULL + "test_apg_is_the_paper_s_in_x_0",
        "ICG": NULL + "test_icg_draws_each_image_and_step_a_class_of_its_own",
        **dict.fromkeys(("PAG", "PAG, soft", "PAG, heads", "SEG", "SLG"), EDITED),
        "S^2-Guidance": S2_DRAWS,
        "SWG": CROPS,
        "M-SWG": CROPS,
        "TPG": PERTURBED + "test_tpg_shuffles_what_enters_each_block",
        "TSG": PERTURBED + "test_tsg_perturbs_the_time_embedding_of_the_first_blocks",
        "autoguidance": AUTO,
        "classifier guidance": SCORE,
    },
    "DiT, v": {
        **COMMON,
        "CFG, rescaled": NULL + "test_rescale_is_of_what_the_network_puts_out",
        "APG": NULL + "test_apg_is_the_paper_s_in_x_0",
        "classifier guidance": SCORE,
    },
    "DiT, x_0": {
        **COMMON,
        "CFG, rescaled": NULL + "test_rescale_is_of_what_the_network_puts_out",
    },
    "DiT, flow": {
        **COMMON,
        "SAG": "guidance/test_sag.py::test_sag_of_a_flow_model_combines_in_eps_too",
        "blur guidance": "guidance/test_sag.py::test_guided_x_0_is_the_blurred_image_s_form",
        "CFG, rescaled": NULL + "test_rescale_is_of_what_the_network_puts_out",
        "APG": NULL + "test_apg_is_the_paper_s_in_x_0",
        **{title: EVERY for title, kind in ROWS.items() if "flow" in kind.needs},
        "CFG++": CFGPP + "test_a_run_of_a_flow_is_the_authors_later_form",
        "CFG-Zero*": NULL + "test_cfg_zero_scales_the_null_velocity_and_zeroes_the_first_steps",
        "Rectified-CFG++": "guidance/test_rectified.py::test_a_run_is_the_paper_s_algorithm",
        **dict.fromkeys(("PAG", "PAG, soft", "PAG, heads", "SEG", "SLG"), EDITED),
        "TSG": PERTURBED + "test_tsg_perturbs_the_time_embedding_of_the_first_blocks",
        "autoguidance": AUTO,
        "classifier guidance": SCORE,
    },
    "UNet, eps": {
        **{
            title: EVERY_UNET
            for title, kind in ROWS.items()
            if not kind.needs & {"flow", "blocks", "dit"} and title not in OF_TEXT
        },
        "SAG": UNET_PARITY,
        "classifier guidance": UNET_PARITY,
    },
}

IN_EVERY = tuple(
    title
    for title, kind in ROWS.items()
    if not kind.from_null and not kind.needs & {"flow", "dit", "classes", "cross"}
)
WITH_NULL = tuple(title for title, kind in ROWS.items() if kind.from_null and not kind.needs)
OF_CROSS = dict.fromkeys(
    (title for title, kind in ROWS.items() if "cross" in kind.needs), EVERY_PIPELINE
)
OF_FLOWS = tuple(title for title, kind in ROWS.items() if "flow" in kind.needs)
RENOISING = tuple(title for title, kind in ROWS.items() if kind.renoises)

PIPELINES: Proofs = {
    "SD 1, 2": {
        **dict.fromkeys((*IN_EVERY, *WITH_NULL), EVERY_PIPELINE),
        **OF_CROSS,
        "NAG": NAG_TEXTS,
        "SAG": SAG_PARITY,
        "CFG": OWN_CFG,
        "PAG": PAG_PARITY,
    },
    "SDXL": {
        **dict.fromkeys((*IN_EVERY, *WITH_NULL), EVERY_PIPELINE),
        **OF_CROSS,
        "NAG": NAG_TEXTS,
    },
    "PixArt": {
        **{
            title: EVERY_PIPELINE
            for title in (*IN_EVERY, *WITH_NULL)
            if title not in RENOISING  # For its own scheduler, as it comes.
        },
        **OF_CROSS,
        "NAG": NAG_TEXTS,
        "CFG": OWN_CFG,
        "PAG": PAG_PARITY,
    },
    "SD3": {
        **dict.fromkeys((*IN_EVERY, *WITH_NULL, *OF_FLOWS), EVERY_PIPELINE),
        "NAG": NAG_TEXTS,
        "CFG": OWN_CFG,
        "PAG": PAG_PARITY,
    },
    "FLUX": dict.fromkeys(IN_EVERY, EVERY_PIPELINE),
    "DiT": {**dict.fromkeys((*IN_EVERY, *WITH_NULL), EVERY_PIPELINE), "CFG": OWN_CFG},
}

REASONS = (
    "The method is for flows.",
    "Tokens are shuffled at the entrance of transformer blocks, and this UNet has none.",
    "TSG perturbs the time embedding of this package's own DiT, as `sag_dit.load` reads it.",
    "FLUX's pipelines ask for the null prompt after the prompt; their `true_cfg_scale` is CFG.",
    "The method needs classes; `sag_dit.load` reads a `DiTPipeline`'s folder as a DiT with them.",
    "CFG++ takes steps of DDIM or Euler, and PixArt comes with another scheduler; with "
    "`DDIMScheduler` it is guided too.",
    "NAG acts where attention sees a text; here the condition enters by modulation.",
    "PLADIS acts in cross-attention, where the image's tokens attend to a text alone.",
)
FLOWS, BLOCKS, OWN_DIT, APART, CLASSES, SCHEDULER, TEXT, CROSS = range(1, len(REASONS) + 1)
WHY = {
    "flow": FLOWS,
    "blocks": BLOCKS,
    "dit": OWN_DIT,
    "classes": CLASSES,
    "text": TEXT,
    "cross": CROSS,
}


def refused(backbone: str, method: str) -> tuple[str, int]:
    """Return the test that a method without proof is refused, and the number of the reason."""
    kind = ROWS[method]
    if backbone == "FLUX" and kind.from_null:
        return NO_PIPELINE, APART
    if backbone == "PixArt" and kind.renoises:
        return NO_PIPELINE, SCHEDULER
    reason = next(number for need, number in WHY.items() if need in kind.needs)
    if backbone.startswith("DiT, "):
        return NO_TEXT if reason in (TEXT, CROSS) else NO_FLOW, reason
    return NO_UNET if backbone in NETWORKS else NO_PIPELINE, reason


def link(mark: str, proof: str) -> str:
    """Return a mark that links to the test and names it when pointed at."""
    file, _, name = proof.partition("::")
    return f'[{mark}](../tests/{file} "{name}")'


def cell(backbone: str, method: str, proof: str | None) -> str:
    """Return a tick, or a dash with the number of the reason."""
    if proof is not None:
        return link("✓", proof)
    test, reason = refused(backbone, method)
    return link(f"–{'¹²³⁴⁵⁶⁷⁸⁹'[reason - 1]}", test)


def table(backbones: Proofs) -> str:
    """Return one table in Markdown."""
    lines = [
        f"| method | class | {' | '.join(backbones)} |",
        f"|---|---|{'---|' * len(backbones)}",
    ]
    for method, name in METHODS.items():
        cells = (cell(each, method, proofs.get(method)) for each, proofs in backbones.items())
        lines.append(f"| {method} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> str:
    """Return both tables and the reasons of the dashes."""
    reasons = "\n".join(f"{i}. {reason}" for i, reason in enumerate(REASONS, start=1))
    return (
        f"The package's own networks:\n\n{table(NETWORKS)}\n\n"
        f"diffusers' pipelines within `sag_dit.guide`:\n\n{table(PIPELINES)}\n\n{reasons}"
    )


def overview() -> str:
    """Return both tables in one, without links; DiT is ticked if any kind of output is."""
    columns = {"DiT": [proofs for name, proofs in NETWORKS.items() if name.startswith("DiT, ")]}
    columns |= {"UNet": [NETWORKS["UNet, eps"]]}
    columns |= {
        {"DiT": "DiTPipeline"}.get(name, name): [proofs] for name, proofs in PIPELINES.items()
    }
    lines = [f"| | {' | '.join(columns)} |", f"|---|{':-:|' * len(columns)}"]
    for method in METHODS:
        cells = ("✓" if any(method in each for each in own) else "–" for own in columns.values())
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def keys() -> str:
    """Return the table of the keys at the command line."""
    lines = [
        "| key at the command line | class | prediction | off | source |",
        "|---|---|---|---|---|",
    ]
    for each in classes():
        off = f"{each.neutral:g}"
        lines.append(
            f"| `{each.key}_scale` | `{each.__name__}` | {each.does} | {off} | {each.source} |"
        )
    return "\n".join(lines)


def typed() -> str:
    """Return the module that tells type checkers the methods' classes."""
    order = sorted(methods(), key=lambda each: (each.module, not each.name.isupper(), each.name))
    lines = [f"from {each.module} import {each.name} as {each.name}" for each in order]
    head = "The methods' classes by name, for type checkers: written by"
    return "\n".join([f'"""{head} ``python -m benchmarks.methods``."""', "", *lines, ""])


def record(text: str) -> str:
    """Return the record of identities with the methods that it lacks; what stands there stays."""
    start = '  "guidance": {\n'
    for each in classes():
        if each.key in json.loads(text)["guidance"]:
            continue
        came_later = later(each)
        names = [field.name for field in fields(each) if field.name not in came_later]
        entry = json.dumps({"options": names, "later": came_later})
        text = text.replace(start, f'{start}    "{each.key}": {entry},\n', 1)
    return text


def page(text: str, content: str, begin: str = BEGIN) -> str:
    """Return a page with what stands between the marks written anew."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n\n{content}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """Return the files that follow from the methods, as they should be."""
    readme, identities = ROOT / "README.md", ROOT / "tests" / "identity" / "identities.json"
    text = page(readme.read_text(encoding="utf-8"), overview())
    return {
        PAGE: page(PAGE.read_text(encoding="utf-8"), tables()),
        readme: page(text, keys(), BEGIN_KEYS),
        ROOT / "sag_dit" / "guidance" / "typed.py": typed(),
        identities: record(identities.read_text(encoding="utf-8")),
    }


def missing() -> list[str]:
    """Return the proofs that name no test."""
    backbones = {**NETWORKS, **PIPELINES}
    proofs = {
        proofs.get(method) or refused(backbone, method)[0]
        for backbone, proofs in backbones.items()
        for method in METHODS
    }
    lost = []
    for proof in sorted(proofs):
        file, _, name = proof.partition("::")
        path = ROOT / "tests" / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
            lost.append(proof)
    return lost


def main() -> None:
    """Write the pages."""
    if missing():
        raise SystemExit(f"no such test: {', '.join(missing())}")
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
