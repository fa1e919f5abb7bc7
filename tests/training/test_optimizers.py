"""Optimisers in Lightning's Trainer: they learn, go on bit by bit, and agree with their sources."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader

import sag_dit
from sag_dit.data.digits import Digits, digits
from sag_dit.training.module import DiffusionModule
from sag_dit.training.optimizers import Muon, averages_itself, missing, stand_in
from sag_dit.training.resume import LastCheckpoints, newest_checkpoint
from tests.training.making import assert_same, fresh_model, make_trainer, state

# Lightning's advice on what these short runs leave out on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to"),
    # bitsandbytes and its parts.
    pytest.mark.filterwarnings("ignore:.*swigvarlink|.*torch.jit"),
]


def timm(name: str, **options: Any) -> Callable[[Iterable[Any]], Optimizer]:
    from timm.optim import create_optimizer_v2

    return partial(create_optimizer_v2, opt=name, **options)


def installed(path: str, **options: Any) -> Callable[[Iterable[Any]], Optimizer]:
    """An optimiser of a package that need not be there, imported when it is asked for."""
    module, _, name = path.rpartition(".")
    return partial(getattr(pytest.importorskip(module), name), **options)


class ScheduleFreeSGD(Optimizer):
    """SGD without a schedule: z <- z - lr g at y, x <- mean of z, y = 0.9 x + 0.1 z.

    Weights are y while training and x in between. Source: Defazio et al. 2024, algorithm 1.
    """

    beta = 0.9

    def __init__(self, params: Iterable[Any], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "train_mode": False})

    def _move(self, weight: float, train: bool) -> None:
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] is not train else ():
                if "z" in self.state[p]:
                    p.data.lerp_(self.state[p]["z"], weight)
            group["train_mode"] = train

    def train(self) -> None:
        self._move(1 - self.beta, train=True)

    def eval(self) -> None:
        self._move(1 - 1 / self.beta, train=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                x = p.lerp(z, 1 - 1 / self.beta)
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - self.beta))
        return loss


KINDS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": lambda: partial(torch.optim.Adam, lr=3e-3),
    "adafactor": lambda: partial(torch.optim.Adafactor, lr=0.3),
    "muon": lambda: partial(Muon, lr=3e-3),
    "lion": lambda: timm("lion", lr=1e-3),
    "lookahead": lambda: timm("lookahead_lamb", lr=1e-2),
    "own": lambda: partial(ScheduleFreeSGD, lr=0.5),
    "schedule_free": lambda: installed("schedulefree.AdamWScheduleFree", lr=1e-2),
    "8bit": lambda: installed("bitsandbytes.optim.AdamW8bit", lr=3e-3),
}


def one_batch() -> tuple[Tensor, Tensor]:
    """Four images, each at eight times and with eight noises a step."""
    images, labels = digits("train")
    return images[:4].repeat(8, 1, 1, 1), labels[:4].repeat(8)


def loss_of(module: DiffusionModule, batch: tuple[Tensor, Tensor]) -> float:
    """The loss of what is drawn with, over four draws of times and noise, always the same."""
    losses = []
    denoiser = module.evaluated
    was_training = denoiser.training
    denoiser.eval()
    with torch.no_grad():
        for draw in range(4):
            torch.manual_seed(draw)
            losses.append(float(module.losses(denoiser, batch).per_image.mean()))
    denoiser.train(was_training)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_each_learns(kind: str, tmp_path: Path) -> None:
    module, batch = DiffusionModule(fresh_model(), optimizer=KINDS[kind]()), one_batch()
    before = loss_of(module, batch)
    make_trainer(tmp_path, 60).fit(module, DataLoader([batch], batch_size=None))
    assert loss_of(module, batch) < 0.9 * before


def train(out: Path, steps: int, optimizer: Any, **options: Any) -> dict[str, Any]:
    """Train to a step, from the newest checkpoint if there is one, and return the last one."""
    module = DiffusionModule(fresh_model(), optimizer=optimizer, **options)
    checkpoint, _ = newest_checkpoint(out, module)
    trainer = make_trainer(out, steps, [LastCheckpoints(out, 100)])
    trainer.fit(module, datamodule=Digits(8), ckpt_path=checkpoint, weights_only=True)
    found, step = newest_checkpoint(out, module)
    assert found is not None and step == steps
    saved: dict[str, Any] = torch.load(found, weights_only=True)
    return saved


def assert_equal(left: Any, right: Any) -> None:
    """Both are the same, bit for bit, however deep."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_equal(left[name], right[name])
    elif isinstance(left, (list, tuple)):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


RULES = ("no_decay", {"layer_decay": 0.7}, {"match": "y_embedder", "lr": 1e-2})
GOING_ON: dict[str, Any] = {
    "muon": {
        "optimizer": lambda: partial(Muon, lr=3e-3, weight_decay=0.1),
        "param_groups": RULES,
        "schedule": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "ema_decay": 0.5,
    },
    "adafactor": {"optimizer": KINDS["adafactor"], "ema_decay": 0.5},
    "own": {"optimizer": KINDS["own"]},
    "schedule_free": {"optimizer": KINDS["schedule_free"]},
    "8bit": {"optimizer": KINDS["8bit"], "ema_decay": 0.5},
}


@pytest.mark.parametrize("kind", GOING_ON)
def test_a_run_that_was_stopped_ends_where_another_does(kind: str, tmp_path: Path) -> None:
    options = dict(GOING_ON[kind])
    make = options.pop("optimizer")
    whole = train(tmp_path / "whole", 5, make(), **options)
    train(tmp_path / "parts", 2, make(), **options)
    parts = train(tmp_path / "parts", 5, make(), **options)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(parts[part], whole[part])
    trained = [p for p in fresh_model().denoiser.parameters() if p.requires_grad]
    assert len(whole["optimizer_states"][0]["state"]) == len(trained)


# --- Muon -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_is_torchs_own_on_matrices_and_adamw_on_the_rest(adjust: str) -> None:
    """30 steps with gradients of their own, to the bit, also after a state was loaded."""
    random = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (5, 9), (7,), (3, 2, 2)]
    start = [torch.randn(shape, generator=random) for shape in shapes]
    mine, others = ([Parameter(each.clone()) for each in start] for _ in range(2))
    shared = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-8}

    def both() -> Muon:
        groups = [{"params": mine[:2], "use_muon": True}, {"params": mine[2:], "lr": 3e-3}]
        return Muon(groups, adjust_lr_fn=adjust, **shared)

    muon = torch.optim.Muon(others[:2], adjust_lr_fn=adjust, **shared)
    adamw = torch.optim.AdamW(others[2:], **{**shared, "lr": 3e-3})
    optimizer = both()
    schedules = [LambdaLR(each, lambda step: 0.95**step) for each in (optimizer, muon, adamw)]
    for step in range(30):
        gradients = [torch.randn(shape, generator=random) for shape in shapes]
        for one, other, gradient in zip(mine, others, gradients, strict=True):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        for each in (optimizer, muon, adamw):
            each.step()
        for each in schedules:
            each.step()
        for one, other in zip(mine, others, strict=True):
            assert torch.equal(one, other), step
        if step == 10:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = both()
            optimizer.load_state_dict(saved)
            schedules[0] = LambdaLR(optimizer, lambda step: 0.95**step, last_epoch=step)
            for group, rate in zip(optimizer.param_groups, (0.02, 3e-3), strict=True):
                group["lr"] = rate * 0.95**11
    assert not torch.equal(mine[0], start[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "-1"), ({"adjust_lr_fn": "none"}, "none"), ({"betas": (2, 0.9)}, "beta")],
)
def test_values_that_muon_cannot_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"optimizer: .*{message}"):
        stand_in(partial(Muon, **options))


def test_a_group_that_is_added_is_trained() -> None:
    first, second = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    optimizer = Muon([first])
    optimizer.add_param_group({"params": [second], "use_muon": True})
    first.grad, second.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer.step()
    assert (first != 1).all() and (second != 1).all()
    assert "momentum_buffer" in optimizer.state[second] and "exp_avg" in optimizer.state[first]


# --- averages of an optimiser's own ---------------------------------------------------------------


class Gradients(Callback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.kept: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        trained = [p for p in pl_module.denoiser.parameters() if p.requires_grad]
        self.kept.append([p.grad.clone() for p in trained])


@pytest.mark.parametrize("kind", ["own", "schedule_free"])
def test_weights_and_average_are_those_of_the_reference(kind: str, tmp_path: Path) -> None:
    """30 steps that are validated, drawn with and saved in between, against a plain loop."""
    make, model, seen = KINDS[kind](), fresh_model(), Gradients()
    module = DiffusionModule(model, optimizer=make)
    reference = [
        Parameter(p.detach().clone()) for p in module.denoiser.parameters() if p.requires_grad
    ]

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step % 7 == 0:
                with module.model_to_draw_with() as drawn_with:
                    assert drawn_with.denoiser is module.evaluated

    trainer = make_trainer(
        tmp_path,
        30,
        [seen, Looks(), LastCheckpoints(tmp_path, 10)],
        limit_val_batches=1,
        val_check_interval=5,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=Digits(8))
    optimizer: Any = make(reference)
    optimizer.train()
    for gradients in seen.kept:
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    def trained(denoiser: Any) -> list[Tensor]:
        names = [n for n, p in module.denoiser.named_parameters() if p.requires_grad]
        return [denoiser.get_parameter(name).detach() for name in names]

    assert len(seen.kept) == 30
    assert_equal(trained(module.denoiser), [each.detach() for each in reference])
    optimizer.eval()
    assert_equal(trained(module.evaluated), [each.detach() for each in reference])
    assert not torch.equal(trained(module.evaluated)[0], trained(module.denoiser)[0])
    # What is saved is drawn with as the average, and raw as the weights that train.
    checkpoint = tmp_path / "checkpoints" / "step-00000030.ckpt"
    average, raw = (sag_dit.load(checkpoint, ema=ema) for ema in (True, False))
    name = "network.blocks.1.attn.qkv.weight"
    for model, denoiser in ((average, module.evaluated), (raw, module.denoiser)):
        assert torch.equal(model.denoiser.get_parameter(name), denoiser.get_parameter(name))


def test_looking_more_often_changes_no_bit(tmp_path: Path) -> None:
    """The reference's own switching rounds weights; checkpoints and validation must not."""

    def run(**options: Any) -> dict[str, Tensor]:
        module = DiffusionModule(fresh_model(), optimizer=KINDS["own"]())
        make_trainer(tmp_path, 6, **options).fit(module, datamodule=Digits(8))
        return {**state(module), **dict(module.state_dict())}

    often = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    assert_same(run(), run(**often))


def test_what_cannot_stand_beside_is_refused() -> None:
    make = KINDS["own"]()
    assert averages_itself(stand_in(make)) and not averages_itself(stand_in(KINDS["muon"]()))
    with pytest.raises(ValueError, match=r"ema\.decay=0\.5: beside .*expected ema\.decay=null"):
        DiffusionModule(fresh_model(), optimizer=make, ema_decay=0.5)
    with pytest.raises(ValueError, match=r"schedule: beside .*expected schedule=constant"):
        DiffusionModule(fresh_model(), optimizer=make, schedule=partial(CosineAnnealingLR, T_max=5))


# --- groups and schedules -------------------------------------------------------------------------


def test_a_schedule_acts_on_all_groups_in_proportion(tmp_path: Path) -> None:
    module = DiffusionModule(
        fresh_model(),
        optimizer=partial(Muon, lr=1e-3, weight_decay=0.1),
        param_groups=RULES,
        schedule=partial(CosineAnnealingLR, T_max=8),
    )
    first = [group["lr"] for group in module.configure_optimizers()["optimizer"].param_groups]
    make_trainer(tmp_path, 4).fit(module, datamodule=Digits(8))
    (groups,) = [each.param_groups for each in module.trainer.optimizers]
    assert [group["lr"] for group in groups] == pytest.approx([rate / 2 for rate in first])
    assert len({round(rate, 9) for rate in first}) == 5
    assert "parameter groups:" in module.groups_report()


def test_a_schedule_of_its_own_rates_is_refused(tmp_path: Path) -> None:
    schedule = partial(OneCycleLR, max_lr=0.1, total_steps=9)
    adam = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    rules = [{"match": "blocks", "lr_scale": 2.0}]
    module = DiffusionModule(fresh_model(), optimizer=adam, param_groups=rules, schedule=schedule)
    with pytest.raises(ValueError, match="schedule: it gives all groups of parameters rates"):
        make_trainer(tmp_path, 1).fit(module, datamodule=Digits(8))
    # Where all have one rate it may set it.
    module = DiffusionModule(
        fresh_model(), optimizer=adam, param_groups=["no_decay"], schedule=schedule
    )
    make_trainer(tmp_path, 1).fit(module, datamodule=Digits(8))


def test_the_default_is_one_group_of_all_that_is_trained() -> None:
    module = DiffusionModule(fresh_model(), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    (group,) = module.configure_optimizers().param_groups
    trained = [p for p in module.denoiser.parameters() if p.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in trained]
    assert module.groups_report() == ""


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.SparseAdam, "SparseAdam takes sparse gradients"),
        (lambda: torch.optim.LBFGS, "LBFGS needs more than a gradient"),
        (lambda: timm("adahessian"), "Adahessian needs more than a gradient"),
        (lambda: timm("lambb"), r"optimizer\.opt=lambb: timm has no such .*did you mean lamb"),
        (lambda: timm("lamb", foo=1), "unexpected keyword argument 'foo'"),
        (lambda: timm("adam", momentum=0.5), r"optimizer\.momentum=0\.5: Adam makes no use"),
        (lambda: timm("sgd", betas=[0.9, 0.99]), r"optimizer\.betas=\[0\.9,0\.99\]: SGD makes"),
        (lambda: timm("adamw", layer_decay=0.5), "layer_decay=0.5: AdamW makes no use"),
        (lambda: partial(torch.optim.SGD, lr=-1.0), "Invalid learning rate"),
        (lambda: lambda parameters: list(parameters), "makes a list; expected a subclass"),
    ],
)
def test_what_cannot_train_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stand_in(make())


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sag_dit.training.optimizers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; pip install schedulefree$"):
        missing("schedulefree.AdamWScheduleFree")
    with pytest.raises(ValueError, match=r"not installed; pip install bitsandbytes$"):
        stand_in(timm("bnbadamw8bit"))
    missing("torch.optim.SGD")
