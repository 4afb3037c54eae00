"""One file of a Megatron-DeepSpeed checkpoint, taken apart: a rank's dense state, or an expert."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmoe.checkpoint.formats.gpt_names import EXPERTS, GATE
from dmoe.checkpoint.stored import Stored
from dmoe.checkpoint.torch_reader import read_lazily

VERSION = 3.0  # before it, rows of query_key_value lay in another order
KEYS = ("module", "model")
ATTENTIONS = ("self_attention.", "attention.")
MOES = ("deepspeed_moe", "megatron_moe")
HEAD = "word_embeddings_for_head"
EMBEDDINGS = {"wte": "word_embeddings", "wpe": "position_embeddings"}
EXPERT_KEYS = ("dense_h_to_4h.weight", "dense_h_to_4h.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_GATE = re.compile(rf"mlp\.({'|'.join(MOES)})\.gate\.wg\.weight")
_EXPERT = re.compile(
    rf"(?P<prefix>(?:.+\.)?)layers\.(?P<layer>\d+)\.mlp\.(?P<moe>{'|'.join(MOES)})\.experts\.(?:deepspeed|megatron)_experts\."
    rf"(?P<expert>\d+)\.(?P<name>{'|'.join(map(re.escape, EXPERT_KEYS))})"
)


@dataclass
class State:
    """The dense state of a rank.

    Attributes:
        path: of its file.
        key: under which the model is.
        tensors: by the names of :class:`dmoe.checkpoint.formats.gpt_names.Part`, with the stage's own layer numbers.
        layers: how many the stage has.
        head: the embedding again, as the last of several stages has it.
        args: of the training.
        rest: all that is beside the model, in order; the model's place holds None.
        attention, moe: what attention and MoE are called; None without any.
    """

    path: Path
    key: str
    args: Namespace
    rest: dict[str, Any]
    tensors: dict[str, Stored] = field(default_factory=dict)
    layers: int = 0
    head: Stored | None = None
    attention: str | None = None
    moe: str | None = None

    def take(self, name: str) -> Stored:
        """A tensor that has to be there.

        Raises:
            ValueError: it is not.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: expected a tensor {self.shown(name)}, got none of that name")
        return self.tensors[name]

    def shown(self, name: str) -> str:
        """A tensor's name as the file has it."""
        name = name.replace("mlp.moe.", f"mlp.{self.moe or MOES[0]}.")
        return EMBEDDINGS.get(name, name.replace("." + ATTENTIONS[1], "." + (self.attention or ATTENTIONS[0])))


def model_of(content: Any) -> tuple[str, Mapping[str, Any]] | None:
    """The key of the model in a file, and its ``language_model``; None where the file is of another kind."""
    if not isinstance(content, Mapping):
        return None
    for key in KEYS:
        model = content.get(key)
        if isinstance(model, Mapping) and isinstance(model.get("language_model"), Mapping):
            language_model = model["language_model"]
            if isinstance(language_model.get("encoder"), Mapping):
                return key, language_model
    return None


def read_state(path: Path) -> State:
    """A rank's file.

    Raises:
        OSError, ValueError: it is missing, damaged, or of another kind or version.
    """
    content = read_lazily(path)
    found = model_of(content)
    if found is None:
        raise ValueError(
            f"{path}: expected a Megatron GPT, module or model -> language_model -> encoder, got something else"
        )
    key, language_model = found
    version = content.get("checkpoint_version")
    if version != VERSION:
        got = "none" if version is None else f"{version!r:.80}"
        raise ValueError(
            f"{path}: checkpoint_version: expected {VERSION}, got {got}: rows of query_key_value lie in another order"
        )
    args = content.get("args")
    if not isinstance(args, Namespace):
        raise ValueError(f"{path}: args: expected a Namespace, got {type(args).__name__}")
    rest = {name: None if name == key else value for name, value in content.items()}
    state = State(path, key, args, rest)
    for name, value in content[key].items():
        if name == HEAD:
            state.head = _tensor(value.get("weight") if isinstance(value, Mapping) else value, name, path)
        elif name != "language_model":
            raise ValueError(f"{path}: expected a GPT's tensors in {key}, got {name}")
    for name, value in language_model.items():
        if name == "embedding":
            _add_embedding(state, value)
        elif name != "encoder":
            raise ValueError(f"{path}: expected embedding and encoder in language_model, got {name}")
    for name, value in language_model["encoder"].items():
        state.tensors[_known(state, str(name))] = _tensor(value, name, path)
    return state


def _add_embedding(state: State, embedding: Any) -> None:
    names = {theirs: ours for ours, theirs in EMBEDDINGS.items()}
    for name, value in embedding.items() if isinstance(embedding, Mapping) else [("no dict", None)]:
        if name not in names or not isinstance(value, Mapping) or set(value) != {"weight"}:
            raise ValueError(
                f"{state.path}: expected {' and '.join(names)} in embedding, each with a weight, got {name}"
            )
        state.tensors[names[name]] = _tensor(value["weight"], name, state.path)


def _known(state: State, name: str) -> str:
    """The name of an encoder's tensor in :class:`Part`'s spelling."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    layer, rest = int(match[1]), match[2]
    state.layers = max(state.layers, layer + 1)
    for attention in ATTENTIONS:
        if rest.startswith(attention):
            state.attention = attention
            rest = ATTENTIONS[1] + rest.removeprefix(attention)
            break
    if (gate := _GATE.fullmatch(rest)) is not None:
        state.moe, rest = gate[1], GATE
    return f"layers.{layer}.{rest}"


def read_expert(path: Path, layer: int, expert: int) -> tuple[str, dict[str, Stored]]:
    """An expert's file.

    Args:
        path: of the file.
        layer: its layer's number in the model.
        expert: e.

    Returns:
        What its names begin with, and its tensors by the names of :class:`Part`, each without E.

    Raises:
        OSError, ValueError: the file is missing or damaged, or holds another layer or expert, or something else.
    """
    content = read_lazily(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dict of an expert's tensors, got {type(content).__name__}")
    prefix, found = "", {}
    for key, value in content.items():
        match = _EXPERT.fullmatch(str(key))
        if match is None:
            raise ValueError(f"{path}: expected the two linear layers of an expert, got {key}")
        if (int(match["layer"]), int(match["expert"])) != (layer, expert):
            raise ValueError(f"{path}: expected expert {expert} of layer {layer}, as its name says, got {key}")
        prefix = match["prefix"]
        found[EXPERTS + match["name"]] = _tensor(value, key, path)
    for name in EXPERT_KEYS:
        if EXPERTS + name not in found:
            raise ValueError(f"{path}: expected {name} of expert {expert} of layer {layer}, got none of that name")
    return prefix, found


def _tensor(value: Any, name: Any, path: Path) -> Stored:
    if not isinstance(value, Stored):
        raise ValueError(f"{path}: {name}: expected a tensor, got {type(value).__name__}")
    return value
