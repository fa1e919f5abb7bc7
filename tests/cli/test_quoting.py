"""Free-text values reach the program as they were typed, whatever Hydra's grammar makes of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sag_dit.cli.composing import quoted
from sag_dit.cli.schema import free_text


@pytest.fixture(scope="module", autouse=True)
def composing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hydra with a configuration that holds nothing but free text."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "free.yaml").write_text("ckpt: null\nout: null\nnested: {ckpt: '${ckpt}'}\n")
    with initialize_config_dir(str(folder), version_base="1.3"):
        yield


# Dense in what means something to a shell, to Hydra or to OmegaConf; a process's arguments cannot
# hold a null character, nor half of a surrogate pair.
AWKWARD = st.text(st.sampled_from("='\"\\$ {}[](),:;?~+-#%&|<>*`!@^./é日ab1\t"), max_size=12)
ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def quoted_by_the_user(value: str) -> bool:
    return re.fullmatch(r"""(['"])(\\.|(?!\1|\\).)*\1""", value, re.DOTALL) is not None


def sayable(value: str) -> bool:
    """Whether a value means itself: null is null, and OmegaConf takes ??? for a missing value."""
    return value not in ("", "null", "???") and not quoted_by_the_user(value)


@settings(max_examples=50)
@example("runs/epoch=3,step=1 (best).ckpt", "it's")
@example('say "x"', "ends with a backslash\\")
@example("C:\\new\\'quoted'\\", "${oc.env:HOME}")
@example("\\${ckpt}", "\\\\${ckpt}")
@example("a\nb", "null and void")
@example("true", "1e3")
@given(ckpt=(AWKWARD | ANY).filter(sayable), out=(AWKWARD | ANY).filter(sayable))
def test_values_arrive_as_they_were_typed(ckpt: str, out: str) -> None:
    config = compose("free", [quoted(f"ckpt={ckpt}"), quoted(f"out={out}")])
    assert (config.ckpt, config.out) == (ckpt, out)


def test_a_value_that_was_quoted_for_hydra_stays_as_it_is() -> None:
    assert quoted("ckpt='a=b'") == "ckpt='a=b'"
    assert quoted('out="a=b"') == 'out="a=b"'
    assert compose("free", [quoted("ckpt='a=b'")]).ckpt == "a=b"


@pytest.mark.parametrize("value", ["'a' and 'b'", "'it's'", '"a"b"', "'\\'", "''''"])
def test_quotes_at_both_ends_that_are_no_quotation_are_part_of_the_value(value: str) -> None:
    assert compose("free", [quoted(f"ckpt={value}")]).ckpt == value


def test_names_may_look_like_interpolations() -> None:
    assert quoted("classes=[${HOME},3]") == "classes=['\\${HOME}',3]"
    assert quoted("name=${HOME}") == "name='\\${HOME}'"
    composed = compose("free", [quoted("freeze=[${HOME}]").replace("freeze", "+a")])
    assert list(composed.a) == ["${HOME}"]


def test_null_stays_null() -> None:
    assert compose("free", [quoted("ckpt=null")]).ckpt is None


@pytest.mark.parametrize("key", sorted(free_text()))
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_every_free_text_key_is_quoted(key: str, prefix: str) -> None:
    assert quoted(f"{prefix}{key}=a=b") == f"{prefix}{key}='a=b'"


@pytest.mark.parametrize(
    "argument",
    [
        *("sag_scale=1.0", "guidance.sag.interval=[0.2,0.8]", "~logger", "--help", "+a={b:1}"),
        *("ckpt", "guidance.classifier.classifier={_target_: mine.Classifier}"),
    ],
)
def test_other_arguments_are_left_alone(argument: str) -> None:
    assert quoted(argument) == argument
