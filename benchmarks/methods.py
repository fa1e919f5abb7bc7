"""Write the table of methods and backbones into docs/guidance.md: ``python -m benchmarks.methods``.

Each cell names the test that proves it; tests/guidance/test_table.py sees that they exist and that
the page is as this script writes it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guidance.md"
BEGIN = "<!-- python -m benchmarks.methods -->"
END = "<!-- end -->"

METHODS: Mapping[str, str] = {
    "SAG": "`SAG`",
    "SAG's other masks": "`SAG(mask=...)`",
    "blur guidance": "`BlurGuidance`",
    "CFG": "`CFG`",
    "CFG, rescaled": "`CFG(rescale=...)`",
    "APG": "`APG`",
    "CFG-Zero*": "`CFGZero`",
    "ICG": "`ICG`",
    "PAG": "`PAG`",
    "SEG": "`SEG`",
    "SLG": "`SLG`",
    "TPG": "`TPG`",
    "TSG": "`TSG`",
    "autoguidance": "`Autoguidance`",
    "classifier guidance": "`ClassifierGuidance`",
}

EVERY = "properties/test_guidance.py::test_every_method_changes_v_and_stays_finite"
PERTURBED = "guidance/test_perturbed.py::"
NULL = "guidance/test_null.py::"
EDITED = PERTURBED + "test_it_is_guidance_away_from_the_perturbed_network"
SCORE = "guidance/test_classifier.py::test_score_form_shifts_eps_against_the_gradient"
AUTO = "guidance/test_auto.py::test_it_extrapolates_from_the_worse_model"

# What a method has in common on all kinds of output: it acts, is finite at both ends of the
# process, and is the same in one batch or one by one. A formula is proven where one is named.
COMMON = {method: EVERY for method in METHODS if method != "CFG-Zero*"}

PROOFS: Mapping[str, Mapping[str, str]] = {
    "DiT, eps": {
        **COMMON,
        "SAG": "guidance/test_sag.py::test_sag_is_the_paper_s_form_in_eps",
        "SAG's other masks": "guidance/test_masks.py::"
        "test_other_masks_have_as_many_tokens_as_the_attention_s",
        "blur guidance": "guidance/test_sag.py::test_blur_guidance_is_sag_whose_mask_is_1",
        "CFG": "guidance/test_cfg.py::test_cfg_is_null_plus_w_times_the_difference",
        "CFG, rescaled": NULL + "test_rescale_is_of_what_the_network_puts_out",
        "APG": NULL + "test_apg_is_the_paper_s_in_x_0",
        "ICG": NULL + "test_icg_draws_each_image_and_step_a_class_of_its_own",
        **dict.fromkeys(("PAG", "SEG", "SLG"), EDITED),
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
        "CFG-Zero*": NULL + "test_cfg_zero_scales_the_null_velocity_and_zeroes_the_first_steps",
        **dict.fromkeys(("PAG", "SEG", "SLG"), EDITED),
        "TSG": PERTURBED + "test_tsg_perturbs_the_time_embedding_of_the_first_blocks",
        "autoguidance": AUTO,
        "classifier guidance": SCORE,
    },
}
"""For each backbone and method, the test that proves it: file::function, below tests/."""


def cell(proof: str | None) -> str:
    """Return a tick that links to the test."""
    if proof is None:
        return "–"
    file, _, name = proof.partition("::")
    return f'[✓](../tests/{file} "{name}")'


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        f"| method | class | {' | '.join(PROOFS)} |",
        f"|---|---|{'---|' * len(PROOFS)}",
    ]
    for method, name in METHODS.items():
        cells = (cell(proofs.get(method)) for proofs in PROOFS.values())
        lines.append(f"| {method} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """Return the page with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def missing() -> list[str]:
    """Return the proofs that name no test."""
    proofs = {proof for backbone in PROOFS.values() for proof in backbone.values()}
    lost = []
    for proof in sorted(proofs):
        file, _, name = proof.partition("::")
        path = ROOT / "tests" / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
            lost.append(proof)
    return lost


def main() -> None:
    """Write the page."""
    if missing():
        raise SystemExit(f"no such test: {', '.join(missing())}")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
