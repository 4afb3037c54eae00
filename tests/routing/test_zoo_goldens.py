"""What other systems compute, against dmoe with their settings: recorded cases of V-MoE to Megatron.

``tests/support/zoo_goldens.json`` was made by running their own code; ``ZOO_GOLDENS=file`` reads another one like it.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import zoo_base_hash
import zoo_deepspeed
import zoo_hf
import zoo_megatron
import zoo_tutel
import zoo_vmoe
from zoo import case_of, run_case

SUPPORT = Path(__file__).resolve().parents[1] / "support"
GOLDENS = json.loads(Path(os.environ.get("ZOO_GOLDENS", SUPPORT / "zoo_goldens.json")).read_text())
SYSTEMS = {
    "V-MoE": zoo_vmoe.run,
    "V-MoE (expert choice)": zoo_vmoe.run_expert_choice,
    "Tutel": zoo_tutel.run,
    "GMoE (= SF-MoE)": zoo_tutel.run_gmoe,
    "BASE layer": zoo_base_hash.run_base,
    "Hash layers (random)": zoo_base_hash.run_random_hash,
    "Hash layers (balanced)": zoo_base_hash.run_balanced_hash,
    "DeepSpeed": zoo_deepspeed.run,
    "DeepSpeed (PR-MoE residual layer)": zoo_deepspeed.run,
    "Megatron-DeepSpeed MoS": zoo_deepspeed.run_mos,
    "Switch Transformer (HF)": zoo_hf.run_switch,
    "NLLB-MoE (HF)": zoo_hf.run_nllb,
    "Switch / Expert Choice (flaxformer)": zoo_hf.run_flaxformer,
    "Megatron-Core 0.16.1": zoo_megatron.run,
}


@pytest.mark.parametrize("number", range(len(GOLDENS["cases"])), ids=[case["id"] for case in GOLDENS["cases"]])
def test_case(number, monkeypatch):
    run_case(case_of(GOLDENS, number), SYSTEMS[GOLDENS["cases"][number]["system"]], monkeypatch)


LOGITS = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [1.5, 1.0, 0.0], [2.0, 0.0, 1.0]]
ROUTED = {
    "settings": {"second_expert_policy": "all", "normalize_router_prob_before_dropping": True, "training": True}
    | {"expert_capacity": 2, "router_ignore_padding_tokens": False},
    "inputs": {"logits": LOGITS},
    "outputs": {"kept": [[0, 2], [0, 1], [3]], "capacity_used": 2},
}


@pytest.mark.parametrize(
    ("part", "name", "value", "error"),
    [
        ("outputs", "kept", [[0, 2], [0, 1], [3]], None),
        ("outputs", "kept", [[0, 2], [0, 1], [1, 3]], "outputs.kept: expected"),
        ("outputs", "combine_weights", [[1.0, 0.0, 0.0]] * 4, "outputs.combine_weights: Tensor-likes are not close"),
        ("outputs", "unheard_of", 1, "nothing here looks at outputs.unheard_of"),
        ("settings", "unheard_of", 1, "nothing here looks at settings.unheard_of"),
        ("inputs", "unheard_of", {"inner": 1}, "nothing here looks at inputs.unheard_of"),
        ("inputs", "gumbel", LOGITS, "given, and not drawn: {'gumbel'}"),
        ("settings", "second_expert_policy", "sampling", "gumbel numbers were drawn, and the case gives none"),
    ],
)
def test_nothing_of_a_case_is_passed_over(monkeypatch, part, name, value, error):
    case = copy.deepcopy(ROUTED)
    case[part][name] = value
    case = case_of({"cases": [case]}, 0)
    if error is None:
        run_case(case, zoo_hf.run_nllb, monkeypatch)
        return
    with pytest.raises(AssertionError) as raised:
        run_case(case, zoo_hf.run_nllb, monkeypatch)
    assert error in str(raised.value)


def test_a_part_of_a_case_is_passed_over_neither(monkeypatch):
    case = {"settings": {}, "inputs": {}, "outputs": {"of_layers": [{"read": 1}, {"read": 1, "unread": [1]}]}}

    def run(case):
        for layer in case.outputs["of_layers"]:
            layer.matches("read", torch.tensor(1))

    with pytest.raises(AssertionError, match=r"nothing here looks at outputs.of_layers\[1\].unread$"):
        run_case(case_of({"cases": [case]}, 0), run, monkeypatch)
