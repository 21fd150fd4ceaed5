"""Param groups of models: who is decayed, who is a matrix to Muon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from examples.train_gpt import GPT


def named(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[str]]]:
    return [
        (
            {key: value for key, value in group.items() if key != "params"},
            [name for name, _ in group["params"]],
        )
        for group in groups
    ]


def by_muon(model: nn.Module, **kwargs: Any) -> list[str]:
    groups = named(fusedopt.muon_groups(model, **kwargs))
    return [name for options, names in groups if options["use_muon"] for name in names]


class Tied(nn.Module):
    """A model with a head that is its embedding, given as a function of a parameter."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        if head_first:
            self.output = nn.Linear(8, 50, bias=False)
        self.words = nn.Embedding(50, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
        if not head_first:
            self.output = nn.Linear(8, 50, bias=False)
        self.output.weight = self.words.weight


class Others(nn.Module):
    """Parameters that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 8))
        self.experts = nn.Parameter(torch.zeros(4, 8, 16))
        self.mixing = nn.Parameter(torch.zeros(8, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)


def test_a_transformers_hidden_matrices_are_muons() -> None:
    model = GPT(16, 2)
    found = by_muon(model)
    layers = ("qkv", "out", "up", "down")
    assert found == [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers]
    groups = named(fusedopt.muon_groups(model))
    assert [options for options, _ in groups] == [
        {"use_muon": True},
        {"use_muon": False},
        {"use_muon": False, "weight_decay": 0.0},
    ]
    assert groups[1][1] == ["token.weight", "position.weight", "head.weight"]
    assert all(name.endswith("bias") or "norm" in name for name in groups[2][1])


@pytest.mark.parametrize("model", [GPT(16, 2), Tied(True), Tied(False), Others()], ids=str)
def test_every_parameter_is_in_one_group(model: nn.Module) -> None:
    for groups in (fusedopt.muon_groups(model), fusedopt.decay_groups(model)):
        found = [p for group in groups for _, p in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == set(model.parameters())


@pytest.mark.parametrize("head_first", [True, False])
def test_what_is_tied_to_an_embedding_is_adamws(head_first: bool) -> None:
    assert by_muon(Tied(head_first)) == ["body.0.weight", "body.2.weight"]


def test_the_last_of_equal_layers_is_no_head() -> None:
    """Where the embedding is the head without a module, that would be a hidden matrix."""
    model = nn.ModuleDict(
        {
            "token": nn.Embedding(50, 8),
            "blocks": nn.ModuleList(
                nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)) for _ in range(2)
            ),
        }
    )
    assert len(by_muon(model)) == 4


def test_a_perceptrons_last_layer_is_adamws() -> None:
    assert by_muon(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))) == [
        "0.weight",
        "2.weight",
    ]


def test_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.ConvTranspose2d(16, 8, 2),
        nn.Linear(8, 10),
    )
    assert by_muon(model) == ["3.weight", "4.weight"]
    in_one_dimension = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 10))
    (first, *_) = named(fusedopt.muon_groups(in_one_dimension))
    assert first == ({"use_muon": True, "batch_dims": 0}, ["1.weight"])


def test_tables_and_what_nobody_can_tell_are_adamws() -> None:
    assert by_muon(Others()) == ["mixing", "attention.in_proj_weight", "attention.out_proj.weight"]


def test_norms_with_matrices_are_not_decayed() -> None:
    class RowNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.ones(4, 4))

    model = nn.Sequential(nn.Linear(4, 4, bias=False), RowNorm())
    assert by_muon(model) == ["0.weight"] or by_muon(model) == []
    groups = named(fusedopt.decay_groups(model))
    assert groups == [({}, ["0.weight"]), ({"weight_decay": 0.0}, ["1.scales"])]


def test_choose_comes_first() -> None:
    def choose(name: str, p: Tensor) -> bool | None:
        assert isinstance(p, nn.Parameter)
        return {"experts": True, "mixing": False}.get(name)

    model = Others()
    groups = named(
        fusedopt.muon_groups(model, choose=choose, muon={"lr": 0.02}, adamw={"lr": 1e-3})
    )
    assert groups[0][0] == {"use_muon": True, "batch_dims": 1, "lr": 0.02}
    assert groups[0][1] == ["experts"]
    assert "mixing" not in by_muon(model, choose=choose)
    assert {options["lr"] for options, _ in groups if not options["use_muon"]} == {1e-3}
    with pytest.raises(ValueError, match=r"choose wants Muon for .*\(8,\)|\(24,\)"):
        fusedopt.muon_groups(model, choose=lambda name, p: True)


@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.SGD, fusedopt.Lion, torch.optim.AdamW])
def test_any_optimizer_takes_groups_without_decay_of_biases(cls: Any) -> None:
    model = GPT(16, 1)
    optimizer = cls(fusedopt.decay_groups(model), lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert "blocks.0.up.bias" in optimizer.param_groups[1]["param_names"]


def test_the_optimizer_takes_the_groups_and_trains() -> None:
    model = GPT(16, 2)
    optimizer = fusedopt.MuonWithAuxAdam(fusedopt.muon_groups(model), lr=0.01, max_grad_norm=1.0)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
