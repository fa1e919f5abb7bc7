"""Rules put exactly the parameters that are meant into groups, over a DiT and a UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from sag_dit.denoiser import ClassConditional
from sag_dit.models.unet.network import UNet
from sag_dit.process import DDPM
from sag_dit.training.module import DiffusionModule
from sag_dit.training.optimizers import Muon, parameters_of
from sag_dit.training.param_groups import Trained, describe_groups, grouped, trained_parameters
from tests.training.making import fresh_model

ADAMW = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3, weight_decay=0.1).defaults


def dit() -> ClassConditional:
    return fresh_model().class_conditional


def unet() -> ClassConditional:
    network = UNet(8, 1, 32, 1, [1, 2], [8, 4], num_head_channels=32, num_classes=10)
    return ClassConditional(network, DDPM("cosine"))


def names(groups: Any, **settings: Any) -> set[str]:
    """The parameters of the groups that have these settings."""
    return {
        each.name
        for own, members in groups
        if all({**ADAMW, **own}.get(name) == value for name, value in settings.items())
        for each in members
    }


def all_names(denoiser: ClassConditional) -> set[str]:
    return {name for name, p in denoiser.network.named_parameters() if p.requires_grad}


# What is meant, said apart from the code: in these networks by how parameters are called.
SPARED = {
    dit: r".*\.bias|y_embedder\.embedding_table\.weight",
    unet: r".*\.bias|.*norm\d?\.weight|conv_norm_out\.weight|class_embedding\.weight",
}
MATRICES = {
    dit: r"blocks\.\d\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)\.weight",
    unet: r"(down|up|mid)_block.*\.(to_[qkv]|to_out\.0|time_emb_proj)\.weight",
}


@pytest.mark.parametrize("make", [dit, unet])
def test_biases_norms_and_embeddings_do_not_decay(make: Any) -> None:
    denoiser = make()
    groups = grouped(trained_parameters(denoiser), ["no_decay"], ADAMW)
    assert len(groups) == 2
    spared = names(groups, weight_decay=0.0)
    assert spared == {n for n in all_names(denoiser) if re.fullmatch(SPARED[make], n)}
    assert names(groups, weight_decay=0.1) == all_names(denoiser) - spared


@pytest.mark.parametrize("make", [dit, unet])
def test_muon_takes_the_matrices_of_the_blocks(make: Any) -> None:
    denoiser = make()
    muon = Muon([torch.nn.Parameter(torch.zeros(1))], adamw_lr=0.5)
    groups = grouped(trained_parameters(denoiser), (), muon.defaults, muon.group_rule)
    matrices = {n for n in all_names(denoiser) if re.fullmatch(MATRICES[make], n)}
    assert names(groups, use_muon=True) == matrices
    assert names(groups, lr=0.5) == all_names(denoiser) - matrices
    # A rule of the user's has the last word.
    mine = [{"match": "t_embedder.mlp.*.weight", "use_muon": True}]
    if make is dit:
        more = grouped(trained_parameters(denoiser), mine, muon.defaults, muon.group_rule)
        assert names(more, use_muon=True) - matrices == {
            "t_embedder.mlp.0.weight",
            "t_embedder.mlp.2.weight",
        }


def test_layers_have_their_share_of_the_rate() -> None:
    (depth_of, expected) = ({}, {0: 0.125, 1: 0.25, 2: 0.5, 3: 1.0})
    for settings, members in grouped(trained_parameters(dit()), [{"layer_decay": 0.5}], ADAMW):
        depths = {each.depth for each in members}
        assert len(depths) == 1
        depth_of[depths.pop()] = settings["lr"] / ADAMW["lr"]
    assert depth_of == expected
    where = {each.name.split(".")[0]: each.depth for each in trained_parameters(dit())}
    assert (where["x_embedder"], where["y_embedder"], where["final_layer"]) == (0, 0, 3)
    # A UNet's blocks count in the order of their evaluation, not of their names.
    depths = {each.name.rsplit(".", 1)[0]: each.depth for each in trained_parameters(unet())}
    path = ("conv_in", "down_blocks.1.resnets.0.conv1", "mid_block.resnets.0.conv1")
    path += ("up_blocks.1.resnets.0.conv1", "conv_out")
    assert [depths[name] for name in path] == [0, 2, 3, 5, 6]


def slow_output(each: Trained) -> Mapping[str, Any]:
    """A rule of one's own."""
    return {"lr_scale": 0.1} if each.depth == each.last else {}


def test_rules_act_in_order_and_every_parameter_is_in_one_group() -> None:
    denoiser = dit()
    denoiser.network.get_parameter("t_embedder.mlp.0.weight").requires_grad_(False)
    rules = [
        "no_decay",
        {"layer_decay": 0.5},
        {"match": ["blocks.1", "y_embedder"], "lr": 7e-3, "betas": [0.5, 0.6]},
        {"match": "blocks.1.attn.*.weight", "lr_scale": 2.0},
        slow_output,
    ]
    groups = grouped(trained_parameters(denoiser), rules, ADAMW)
    found = {each.name: {**ADAMW, **own} for own, members in groups for each in members}
    assert sum(len(members) for _, members in groups) == len(found)
    assert found.keys() == all_names(denoiser)
    told = {name: (own["lr"], own["weight_decay"]) for name, own in found.items()}
    assert told["blocks.1.mlp.fc1.weight"] == (7e-3, 0.1)
    assert told["blocks.1.attn.qkv.weight"] == (14e-3, 0.1)
    assert told["blocks.1.attn.qkv.bias"] == (7e-3, 0.0)
    assert told["blocks.0.attn.qkv.weight"] == (0.25e-3, 0.1)
    assert told["final_layer.linear.weight"] == pytest.approx((0.1e-3, 0.1))
    assert found["blocks.1.mlp.fc1.weight"]["betas"] == [0.5, 0.6]
    assert found["blocks.0.mlp.fc1.weight"]["betas"] == (0.9, 0.999)
    # torch takes them so, and they are told.
    optimizer = torch.optim.AdamW(parameters_of(groups), lr=1e-3, weight_decay=0.1)
    assert len(optimizer.param_groups) == len(groups)
    assert "lr 0.014, weight_decay 0.1" in describe_groups(groups, ADAMW)


def test_without_rules_there_is_one_plain_list() -> None:
    parameters = parameters_of(grouped(trained_parameters(dit()), (), ADAMW))
    assert all(isinstance(each, torch.nn.Parameter) for each in parameters)
    assert len(parameters) == len(all_names(dit()))


def nonsense(each: Trained) -> Any:
    return {"momentun": 0.9}


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        (["no_dekay"], ("param_groups[0]: no_dekay: expected no_decay",)),
        ([{"layer_decay": 1.5}], ("layer_decay: 1.5: expected a number above 0 and below 1",)),
        ([{"layer_decay": 0.5, "lr": 1}], ("expected no_decay, {layer_decay: 0.8}",)),
        ([{"match": "blocks"}], ("match: [blocks]: expected a setting beside it",)),
        ([{"match": 3, "lr": 1e-3}], ("match: 3: expected names of parameters",)),
        ([{"match": "bl0cks", "lr": 1.0}], ("changes nothing", "x_embedder.proj.weight")),
        ([{"match": "blocks", "lr": -1.0}], ("lr=-1.0: expected a number, 0 or more",)),
        ([{"match": "blocks", "lr": float("nan")}], ("lr=nan: expected a number",)),
        ([{"match": "blocks", "ratio": 2}], ("ratio: the optimiser has no such setting", "betas")),
        (["no_decay", nonsense], ("param_groups[1]: momentun", "no such setting")),
        (["no_decay", "no_decay"], ("param_groups[1]=no_decay changes nothing",)),
        ([lambda each: 3], ("a rule returned 3: expected a mapping",)),
        ([lambda each: None], ("changes nothing",)),
    ],
)
def test_rules_that_are_none_are_refused(rules: list[Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refused:
        grouped(trained_parameters(dit()), rules, ADAMW)
    for part in parts:
        assert part in str(refused.value)


def test_no_decay_beside_no_decay_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"changes nothing.*optimizer\.weight_decay is 0"):
        grouped(trained_parameters(dit()), ["no_decay"], {**ADAMW, "weight_decay": 0.0})


def test_an_optimiser_that_finds_its_rate_has_no_share_of_it() -> None:
    with pytest.raises(ValueError, match=r"finds its own rate.*set optimizer\.lr"):
        grouped(trained_parameters(dit()), [{"layer_decay": 0.5}], {**ADAMW, "lr": None})


def test_a_rule_may_return_nothing() -> None:
    trained = trained_parameters(dit())

    def rule(each: Trained) -> Mapping[str, Any] | None:
        return {"lr": 0.5} if each.in_block else None

    groups = grouped(trained, [rule], ADAMW)
    assert names(groups, lr=0.5) == {each.name for each in trained if each.in_block}


def test_a_network_without_blocks() -> None:
    """Nothing there has a depth, and nothing is a block's matrix."""
    denoiser = dit()
    denoiser.network.blocks = torch.nn.ModuleList()
    trained = trained_parameters(denoiser)
    with pytest.raises(ValueError, match=r"layer_decay: 0.5: the network has no blocks"):
        grouped(trained, [{"layer_decay": 0.5}], ADAMW)
    model = replace(fresh_model(), denoiser=denoiser)
    with pytest.raises(ValueError, match="optimizer=muon: no matrix that is trained is in a block"):
        DiffusionModule(model, optimizer=partial(Muon, lr=1e-3))
