"""A network of one's own is asked once before it is used: what no training could use is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_dit.attention import AttentionLayer
from sag_dit.checkpoints import from_denoiser
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional, checking
from sag_dit.models import Backbone
from sag_dit.process import DDPM
from sag_dit.training.module import DiffusionModule
from tests.models.own import SelfAttention


class Plain(Backbone):
    """A token for the time, then one for each pixel; ``answer`` is what is made of its output."""

    answer: Callable[[Tensor], Any] = staticmethod(lambda output: output)

    def __init__(self, layer: str = "attn", tokens: slice | None = slice(1, None)) -> None:
        super().__init__()
        self.input_size, self.in_channels, self.num_classes, self.null_label = (4, 4), 2, 3, 3
        self.first, self.last, self.attn = nn.Linear(2, 8), nn.Linear(8, 2), SelfAttention(8)
        self.label, self.norm = nn.Embedding(4, 8), nn.BatchNorm1d(17)
        self.layers = {layer: AttentionLayer(layer, (4, 4), tokens)}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        told = self.label(y)[:, None] + self.training * torch.rand(1, 1, 8, device=x.device)
        tokens = self.attn(self.norm(torch.cat([told, self.first(x.flatten(2).mT)], dim=1)))
        return type(self).answer(self.last(tokens[:, 1:]).mT.unflatten(2, (4, 4)))


def model_of(network: Any) -> Any:
    return from_denoiser(ClassConditional(network, DDPM()), "plain", codec=None)


@pytest.fixture(params=["as it is", "without memory"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without memory":
        monkeypatch.setattr(checking, "LARGE", 0)
    return str(request.param)


def asked(network: Any) -> None:
    checking.check_network(ClassConditional(network, DDPM()))


def test_a_network_is_left_as_it_was() -> None:
    network = Plain()
    network.attn.eval()
    before = {name: each.clone() for name, each in network.state_dict().items()}
    state = torch.get_rng_state()
    asked(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training and network.norm.training and not network.attn.training
    for name, each in network.state_dict().items():
        assert torch.equal(each, before[name]), name


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda out: out.mean((2, 3), keepdim=True), r"\(2, 2, 1, 1\) .* expected \(2, 2, 4, 4\)"),
        (lambda out: out[:1], r"returns \(1, 2, 4, 4\) .* expected \(2, 2, 4, 4\)"),
        (lambda out: out.repeat(1, 3, 1, 1), r"returns \(2, 6, 4, 4\) .* expected \(2, 2, 4, 4\)"),
        (lambda out: out.repeat(1, 2, 1, 1), "the variance, state learn_sigma = True"),
        (lambda out: (out,), "returns a tuple: expected one tensor"),
        (lambda out: out.double(), "returns float64 for x_t in float32: expected float32"),
        (lambda out: out.view(3, 3), r"fails with RuntimeError: .*test_checking.py, line \d+"),
    ],
)
def test_a_wrong_answer_is_refused(answer: Callable[[Tensor], Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"test_checking\.Wrong: its forward") as refused:
        asked(type("Wrong", (Plain,), {"answer": staticmethod(answer)})())
    assert refused.match(told)


def test_channels_of_the_variance() -> None:
    with pytest.raises(ValueError, match=r"expected \(2, 4, 4, 4\).* learn_sigma is true"):
        asked(type("Sigma", (Plain,), {"learn_sigma": True})())
    twice = {"learn_sigma": True, "answer": staticmethod(lambda out: out.repeat(1, 2, 1, 1))}
    asked(type("Sigma", (Plain,), twice)())


@pytest.mark.parametrize(
    ("layer", "tokens", "told"),
    [
        ("attn", None, r"layer 'attn': it attends to 17 tokens, and its grid=\(4, 4\) has 16: .*"),
        ("attn", slice(2, None), r".*17 tokens, of which tokens=slice\(2, None, None\) are 15"),
        ("blocks.9.attn", None, "layer 'blocks.9.attn' does not exist in Plain; .* are attn"),
        ("norm", None, "layer norm: no call of fused attention was seen there"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layer: str, tokens: slice | None, told: str) -> None:
    with pytest.raises(ValueError, match=r"test_checking\.Plain: " + told):
        asked(Plain(layer, tokens))


def test_models_are_asked_when_they_are_made() -> None:
    def wrong(made: Tensor) -> Tensor:
        return made[:1]

    network = type("Wrong", (Plain,), {"answer": staticmethod(wrong)})()
    network.in_channels = 1
    network.first, network.last = nn.Linear(1, 8), nn.Linear(8, 1)
    with pytest.raises(ValueError, match=r"Wrong: its forward returns \(1, 1, 4, 4\)"):
        model_of(network)


class Tabled(Plain):
    """``rows`` are those of its table, which ``look_up`` reads."""

    rows = 4
    look_up: Callable[[Any, Tensor], Tensor] = staticmethod(lambda own, y: own.label(y))

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(self.rows, 8)
        self.layers = {}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        told = type(self).look_up(self, y).mean(1)
        return type(self).answer(x + told[:, None, None, None])


def by_index(own: Any, y: Tensor) -> Tensor:
    return own.label.weight[y]


def one_hot(own: Any, y: Tensor) -> Tensor:
    return nn.functional.one_hot(y, own.rows).float() @ own.label.weight


def test_labels_that_all_have_a_row() -> None:
    asked(Tabled())
    bare = type("Bare", (Tabled,), {"rows": 3})()
    bare.null_label = None
    asked(bare)


@pytest.mark.parametrize(
    ("rows", "null", "told"),
    [
        (3, 3, r"3 classes and null_label=3, and no row for it.*; expected one row more, 4, to"),
        (3, 5, r"3 classes and null_label=5, and no row for it.*; expected one row more, 6, to"),
        (2, None, r"it has 3 classes, and no row for class 2.*; expected a row for each, and one"),
    ],
)
@pytest.mark.parametrize("look_up", [None, by_index, one_hot])
def test_a_label_without_a_row_is_refused(
    rows: int, null: int | None, told: str, look_up: Any, how: str
) -> None:
    if look_up is not None and how == "without memory":
        return  # Only an embedding tells its rows there.
    own = {} if look_up is None else {"look_up": staticmethod(look_up)}
    network = type("Wrong", (Tabled,), {"rows": rows, **own})()
    network.null_label = null
    with pytest.raises(ValueError, match=r"test_checking\.Wrong: .*" + told) as caught:
        asked(network)
    assert "\n" not in str(caught.value)
    if look_up is None:
        assert f"(label has {rows})" in str(caught.value)


def in_place(own: Any, y: Tensor) -> Tensor:
    return own.label(y.clamp_(max=2))


def stateful(own: Any, y: Tensor) -> Tensor:
    own.calls = getattr(own, "calls", 0) + 1
    return own.label(y) * own.calls


@pytest.mark.parametrize(
    ("look_up", "told"),
    [
        (in_place, "its forward changes y in place, which others still need: expected a copy"),
        (stateful, "its forward answers otherwise when it is asked the same again, so that an"),
    ],
)
def test_what_others_would_see_is_refused(
    look_up: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "LARGE", 1e9)
    with pytest.raises(ValueError, match=r"test_checking\.Wrong: " + told):
        asked(type("Wrong", (Tabled,), {"look_up": staticmethod(look_up)})())


@pytest.mark.parametrize(
    ("member", "value", "told"),
    [
        ("input_size", 4, r"its input_size is 4: expected height and width of x_t, such as"),
        ("input_size", (4, 4.0), r"its input_size is \(4, 4.0\): expected height and width"),
        ("in_channels", "2", "its in_channels is '2': expected a whole number, 1 or more"),
        ("num_classes", None, "its num_classes is None: expected a whole number, 0 or more"),
        ("num_classes", -1, "its num_classes is -1: expected a whole number, 0 or more"),
        ("null_label", 3.0, "its null_label is 3.0: expected a whole number, such as num_cl"),
        ("null_label", -1, "its null_label is -1: expected a whole number, such as num_clas"),
        ("null_label", 2, "its null_label is 2: expected a label beyond its 3 classes, such"),
        ("layers", ["attn"], r"its layers is \['attn'\]: expected a mapping of names"),
    ],
)
def test_members_that_are_not_what_they_should_be(member: str, value: Any, told: str) -> None:
    network = Plain()
    setattr(network, member, value)
    with pytest.raises(ValueError, match=f"network=Plain: {told}"):
        ClassConditional(network, DDPM())


def trained(network: Any) -> None:
    model = from_denoiser(ClassConditional(network, DDPM()), "own", codec=IdentityCodec())
    DiffusionModule(model, optimizer=torch.optim.AdamW)


class InTraining(Tabled):
    """``answer`` is what is made of its output while it trains."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        out = self.last(self.first(x.flatten(2).mT)).mT.unflatten(2, (4, 4)) + self.label(y).mean()
        return type(self).answer(out) if self.training else out


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda out: (out, 0.1), "returns a tuple in training: expected one tensor"),
        (lambda out: out[..., :1], r"returns \(3, 2, 4, 1\) for x_t \(3, 2, 4, 4\) in training"),
        (lambda out: out.detach(), "does not follow from its parameters, .*; leave out .detach"),
        (
            lambda out: out.view(2, 2, 4, 4),
            r"fails in training, at its first step, with RuntimeError: .*line \d+\)",
        ),
        (lambda out: out.double(), "returns float64 for x_t in float32 in training"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    answer: Callable[[Tensor], Any], told: str, how: str
) -> None:
    network = type("Wrong", (InTraining,), {"answer": staticmethod(answer)})()
    if how == "without memory" and told.startswith("fails"):
        return  # Not every network can be asked without memory.
    with pytest.raises(ValueError, match=r"test_checking\.Wrong: .*" + told):
        trained(network)


def test_a_network_without_parameters_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="InTraining: none of its parameters is to be trained"):
        trained(InTraining().requires_grad_(False))


def test_asking_in_training_leaves_a_network_as_it_was() -> None:
    class Normed(InTraining):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
            pixels = x.flatten(2).mT.repeat(1, 2, 1)[:, :17, :1].expand(-1, -1, 8)
            return super().forward(x, t, y) + self.norm(pixels).mean()

    network = Normed()
    before = {name: each.clone() for name, each in network.state_dict().items()}
    state = torch.get_rng_state()
    trained(network)
    assert torch.equal(torch.get_rng_state(), state)
    for name, each in network.state_dict().items():
        assert torch.equal(each, before[name]), name


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda out: out / 0, "returns NaN or infinite values, of zeros and of noise: expected"),
        (lambda out: out.to("meta"), "returns a tensor on meta for x_t on cpu: expected the dev"),
    ],
)
def test_an_answer_of_no_use_is_refused(
    answer: Callable[[Tensor], Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "LARGE", 1e9)
    with pytest.raises(ValueError, match=r"test_checking\.Wrong: its forward " + told):
        asked(type("Wrong", (Plain,), {"answer": staticmethod(answer)})())


def test_it_is_asked_without_memory(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, given = Plain(), []
    forward = Plain.forward

    def noted(self: Plain, x: Tensor, t: Tensor, y: Tensor) -> Any:
        given.append(x.device.type)
        return forward(self, x, t, y)

    monkeypatch.setattr(Plain, "forward", noted)
    asked(network)
    assert {*given} == {"meta" if how == "without memory" else "cpu"}


class Dropping(Plain):
    """Drops also when it is not training."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return super().forward(nn.functional.dropout(x, 0.5, True), t, y)


def test_random_numbers_outside_of_training_are_refused(how: str) -> None:
    if how == "without memory":
        pytest.skip("nothing is drawn without memory")
    with pytest.raises(ValueError, match=r"Dropping: its forward draws random numbers also when"):
        asked(Dropping())


class Pairs(Plain):
    """Takes its images two by two while it trains."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        if self.training:
            x = x.unflatten(0, (-1, 2)).flatten(0, 1)
        return super().forward(x, t, y)


def test_a_network_may_put_its_images_into_groups() -> None:
    checking.check_trainable(ClassConditional(Pairs(), DDPM()))
