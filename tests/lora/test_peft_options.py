"""What PEFT's files say of an adapter's options: dropout and targets come back, as far as a layout can hold them."""

from __future__ import annotations

import json

import pytest
import torch
from lora_cases import randomise
from torch import nn

import dmoe
from dmoe.lora.peft_write import LAYOUTS

SIZES = {"hidden_size": 6, "ffn_hidden_size": 4, "num_experts": 3, "top_k": 2, "shared_ffn_hidden_size": 5}


def made():
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": dmoe.MoE(**SIZES)})


def said(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def options_after(folder):
    """The options of each module that the files have led to."""
    model = made()
    dmoe.lora.load_peft(model, folder)
    return dmoe.lora.state_dict(model)["config"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_written_where_peft_takes_it(layout, tmp_path):
    model = made()
    dmoe.lora.add(model, rank=2, dropout=0.25, targets=("*",))
    dmoe.lora.save_peft(model, tmp_path / "all", layout=layout)
    expected = 0.0 if layout == "peft" else 0.25  # which has target_parameters
    assert said(tmp_path / "all")["lora_dropout"] == expected
    assert {options["dropout"] for options in options_after(tmp_path / "all").values()} == {expected}
    dmoe.lora.remove(model)
    dmoe.lora.add(model, rank=2, dropout=0.25, targets=("shared_expert",))
    dmoe.lora.save_peft(model, tmp_path / "linear", layout=layout)
    assert said(tmp_path / "linear")["lora_dropout"] == 0.25


def test_of_dropouts_that_differ_none_is_written(tmp_path):
    model = made()
    dmoe.lora.add(model, rank=2, dropout=0.25)
    state = dmoe.lora.state_dict(model)
    dmoe.lora.add(model, rank=2, dropout=0.5, targets=("shared_expert",), name="other")
    other = dmoe.lora.state_dict(model, "other")
    both = made()
    dmoe.lora.load_state_dict(both, {part: {**state[part], **other[part]} for part in state})
    dmoe.lora.save_peft(both, tmp_path / "adapter", layout="vllm")
    assert said(tmp_path / "adapter")["lora_dropout"] == 0.0


@pytest.mark.parametrize(
    "targets",
    [
        ["router"],
        ["experts.up"],
        ["experts.down"],
        ["shared_expert.up", "shared_expert.down"],
        ["experts.up", "experts.down", "shared_expert.down", "router"],
    ],
    ids=str,
)
def test_targets_are_what_the_files_adapt(targets, tmp_path):
    model, x = made(), torch.randn(7, 6)
    randomise(dmoe.lora.add(model, rank=2, targets=targets).values())
    dmoe.lora.save_peft(model, tmp_path / "adapter")
    again = made()
    dmoe.lora.load_peft(again, tmp_path / "adapter")
    torch.testing.assert_close(again["mlp"](x), model["mlp"](x))
    assert all(options["targets"] == targets for options in options_after(tmp_path / "adapter").values())


@pytest.mark.parametrize("dropout", [1.0, -0.5, "much"])
def test_a_dropout_that_is_none_is_told(dropout, tmp_path):
    model = made()
    dmoe.lora.add(model, rank=2)
    dmoe.lora.save_peft(model, tmp_path / "adapter")
    config = said(tmp_path / "adapter") | {"lora_dropout": dropout}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"adapter_config.json: lora_dropout: expected 0 <= p < 1, got"):
        dmoe.lora.load_peft(made(), tmp_path / "adapter")


def test_errors_name_what_was_called(tmp_path):
    model = made()
    dmoe.lora.add(model, rank=2)
    dmoe.lora.save_peft(model, tmp_path / "adapter")
    other = dmoe.MoE(**SIZES | {"num_experts": 4})
    with pytest.raises(ValueError, match=r"^dmoe\.lora\.load_peft: expected the tensors of the adapter 'default', but"):
        dmoe.lora.load_peft(nn.ModuleDict({"mlp": other}), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^dmoe\.lora\.load_peft: name: expected a word without dots"):
        dmoe.lora.load_peft(made(), tmp_path / "adapter", name="a.b")
