"""Hugging Face's MoE families: the names of their tensors, in files and in memory, and which model is of which.

Transformers 5 stacks experts when it loads files that have them one by one, and takes them apart again when it saves,
so that most families have two forms of names: ``files``, of what is published, and ``memory``, of the modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmoe.checkpoint.layers import Found, Layout, Row
from dmoe.checkpoint.maps import FLAT_TRANSPOSED, PAIR, PAIR_FLAT, PAIR_OF_ONE, TRANSPOSED, TURNS, TURNS_TRANSPOSED
from dmoe.checkpoint.stored import Stored


@dataclass(frozen=True)
class Form:
    """One way to name a family's tensors.

    Attributes:
        layout: the table.
        block: the module that holds the layer, by which files without a config are known.
    """

    layout: Layout
    block: str


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        name: for ``--family``: Transformers' ``model_type``, with underscores.
        classes: what the names of its classes begin with, as ``Mixtral`` in ``MixtralForCausalLM``.
        forms: by name, the one of published files first.
        needs: fields of the bank that every layer has, besides the experts' projections.
        types: other values of ``model_type``.
    """

    name: str
    classes: str
    forms: Mapping[str, Form]
    needs: tuple[str, ...] = ("router.weight",)
    types: tuple[str, ...] = ()


def _form(family: str, block: str, *rows: Row) -> Form:
    # Nothing may lie behind a layer's prefix that the table does not know: it would be lost.
    return Form(Layout(f"{family} ({block})", rows, inside=("",)), block)


def _one_by_one(gate: str, up: str, down: str) -> tuple[Row, Row]:
    names = [f"experts.{{e}}.{name}.weight" for name in (gate, up, down)]
    return Row("up", (names[0], names[1]), PAIR, gated=True), Row("down", (names[2],))


def _shared(module: str) -> tuple[Row, Row]:
    pair = (f"{module}.gate_proj.weight", f"{module}.up_proj.weight")
    return Row("shared_up", pair, PAIR_OF_ONE), Row("shared_down", (f"{module}.down_proj.weight",))


def _modules(up: str, down: str, *, biased: bool) -> tuple[Row, ...]:
    """Experts that are modules of their own, without a gate."""
    rows = [
        Row(field + ending, (f"experts.expert_{{e}}.{name}.{kind}",), gated=False)
        for ending, kind in (("", "weight"), *([("_bias", "bias")] if biased else []))
        for field, name in (("up", up), ("down", down))
    ]
    linear = "router.classifier."
    return (Row("router.weight", (linear + "weight",)), Row("router.bias", (linear + "bias",)), *rows)


_GATE = Row("router.weight", ("gate.weight",))
_LINEAR = _one_by_one("gate_proj", "up_proj", "down_proj")
_STACKED = (Row("up", ("experts.gate_up_proj",), gated=True), Row("down", ("experts.down_proj",)))
_QWEN2 = (_GATE, *_shared("shared_expert"), Row("shared_gate", ("shared_expert_gate.weight",)))
_DEEPSEEK = (
    _GATE,
    Row("router.selection_bias", ("gate.e_score_correction_bias",)),
    *_shared("shared_experts"),
)
_ROUTER = Row("router.weight", ("router.weight",))
_INSIDE_ROUTER = Row("router.weight", ("router.layer.weight",))


def _both(name: str, rows: tuple[Row, ...]) -> dict[str, Form]:
    return {"files": _form(name, "mlp", *rows, *_LINEAR), "memory": _form(name, "mlp", *rows, *_STACKED)}


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "mixtral",
            "Mixtral",
            {
                "files": _form("mixtral", "block_sparse_moe", _GATE, *_one_by_one("w1", "w3", "w2")),
                "memory": _form("mixtral", "mlp", _GATE, *_STACKED),
            },
        ),
        Family("qwen2_moe", "Qwen2Moe", _both("qwen2_moe", _QWEN2), ("router.weight", "shared_up", "shared_gate")),
        Family("qwen3_moe", "Qwen3Moe", _both("qwen3_moe", (_GATE,))),
        Family("olmoe", "Olmoe", _both("olmoe", (_GATE,))),
        Family(
            "deepseek_v3", "DeepseekV3", _both("deepseek_v3", _DEEPSEEK), ("router.weight", "router.selection_bias")
        ),
        Family(
            "granitemoe",
            "GraniteMoe",
            {
                "files": _form(
                    "granitemoe",
                    "block_sparse_moe",
                    _INSIDE_ROUTER,
                    Row("up", ("input_linear.weight",), gated=True),
                    Row("down", ("output_linear.weight",)),
                ),
                "memory": _form("granitemoe", "block_sparse_moe", _ROUTER, *_STACKED),
            },
        ),
        Family(
            "switch_transformers",
            "SwitchTransformers",
            {"files": _form("switch_transformers", "mlp", *_modules("wi", "wo", biased=False))},
            types=("switch",),
        ),
        Family(
            "nllb_moe",
            "NllbMoe",
            {"files": _form("nllb_moe", "ffn", *_modules("fc1", "fc2", biased=True))},
            ("router.weight", "up_bias", "down_bias"),
            types=("nllb",),
        ),
        Family(
            "gpt_oss",
            "GptOss",
            {
                "files": _form(
                    "gpt_oss",
                    "mlp",
                    _ROUTER,
                    Row("router.bias", ("router.bias",)),
                    Row("up", ("experts.gate_up_proj",), TURNS_TRANSPOSED, gated=True),
                    Row("up_bias", ("experts.gate_up_proj_bias",), TURNS, gated=True),
                    Row("down", ("experts.down_proj",), TRANSPOSED),
                    Row("down_bias", ("experts.down_proj_bias",)),
                )
            },
            ("router.weight", "router.bias", "up_bias", "down_bias"),
        ),
        Family(
            "llama4",
            "Llama4",
            {
                "files": _form(
                    "llama4",
                    "feed_forward",
                    _ROUTER,
                    Row("up", ("experts.gate_up_proj",), TRANSPOSED, gated=True),
                    Row("down", ("experts.down_proj",), TRANSPOSED),
                    *_shared("shared_expert"),
                )
            },
            ("router.weight", "shared_up"),
            types=("llama4_text",),
        ),
        Family(
            "dbrx",
            "Dbrx",
            {
                "files": _form(
                    "dbrx",
                    "ffn",
                    _INSIDE_ROUTER,
                    Row("up", ("experts.mlp.w1", "experts.mlp.v1"), PAIR_FLAT, gated=True),
                    Row("down", ("experts.mlp.w2",), FLAT_TRANSPOSED),
                )
            },
        ),
    )
}


def named(name: str) -> Family:
    """The family of a ``--family``, or of a ``model_type``, however its words are joined.

    Raises:
        ValueError: there is none.
    """
    found = _of_type(name)
    if found is None:
        raise ValueError(f"hf: family: expected one of {', '.join(FAMILIES)}, got {name!r}")
    return found


def _of_type(name: object) -> Family | None:
    wanted = str(name).replace("-", "_")
    return next((family for family in FAMILIES.values() if wanted in (family.name, *family.types)), None)


def by_config(config: Mapping[str, Any]) -> Family | None:
    """The family that a ``config.json`` names, by ``model_type`` or else by ``architectures``; None for any other."""
    if (found := _of_type(config.get("model_type"))) is not None:
        return found
    classes = config.get("architectures")
    for family in FAMILIES.values():
        # GraniteMoeSharedForCausalLM is no GraniteMoe, so not everything that begins alike fits.
        pattern = rf"{family.classes}(For\w+|(Text|Encoder)?Model)"
        if any(re.fullmatch(pattern, str(each)) for each in (classes if isinstance(classes, list) else ())):
            return family
    return None


def by_names(tensors: Mapping[str, Stored]) -> list[Family]:
    """The families whose names some tensors have, each of its layers in full."""
    # One expert is like another, and a large model has ten thousands of them.
    first = re.compile(r"experts\.(expert_)?[1-9]\d*\.")
    some = {name: tensor for name, tensor in tensors.items() if not first.search(name)}
    return [family for family in FAMILIES.values() if any(_fits(family, form, some) for form in family.forms.values())]


def _fits(family: Family, form: Form, tensors: Mapping[str, Stored]) -> bool:
    found = form.layout.find(tensors)
    return bool(found) and all(_complete(family, form, layer, tensors) for layer in found.values())


def _complete(family: Family, form: Form, layer: Found, tensors: Mapping[str, Stored]) -> bool:
    if not f".{layer.prefix}".endswith(f".{form.block}."):
        return False
    there = {row.field for row in form.layout.rows if layer.has(row)}
    known = {name for of_row in layer.names.values() for name in of_row.values()}
    others = (name for name in tensors if name.startswith(layer.prefix) and name not in known)
    return there.issuperset((*family.needs, "up", "down")) and not any(others)
