"""The text files of a FasterTransformer folder: ``config.ini`` and ``args.txt``."""

from __future__ import annotations

import configparser
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint.formats.gpt_names import Sizes
from dmoe.checkpoint.formats.megatron_args import Texts

CONFIG, ARGS = "config.ini", "args.txt"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
END_OF_TEXT, END_ID = "<|endoftext|>", 50256


@dataclass(frozen=True)
class FTConfig:
    """What ``config.ini`` says.

    Attributes:
        sizes: of the model; every MoE layer has as many experts.
        norm_eps: LayerNorm's epsilon.
        start_id, end_id: tokens.
        dtype: of all numbers in the folder, float16 or float32.
        gpus: N.
    """

    sizes: Sizes
    norm_eps: float
    start_id: int
    end_id: int
    dtype: torch.dtype
    gpus: int

    @property
    def text(self) -> str:
        """The file, byte for byte as NVIDIA's converter has it."""
        sizes = self.sizes
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        gpt = {
            "model_name": "gpt",
            "head_num": sizes.heads,
            "size_per_head": sizes.hidden // sizes.heads,
            "inter_size": sizes.ffn,
            "num_layer": sizes.layers,
            "max_pos_seq_len": sizes.positions,
            "vocab_size": sizes.vocabulary,
            "has_adapters": False,
            "adapter_inter_size": 0,
            "layernorm_eps": self.norm_eps,
            "start_id": self.start_id,
            "end_id": self.end_id,
            "weight_data_type": dtype,
            "tensor_para_size": self.gpus,
        }
        structure = {
            "gpt_with_moe": int(bool(sizes.experts)),
            "expert_num": max(sizes.experts.values(), default=0),
            "moe_layers": list(sizes.experts),
        }
        sections = {"gpt": gpt, "structure": structure}
        return "".join(
            f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()) + "\n"
            for name, values in sections.items()
        )


def read_config(path: Path) -> FTConfig:
    """What a ``config.ini`` says; one of a dense GPT, without ``structure``, too.

    Raises:
        OSError: no such file.
        ValueError: a damaged one, or values that this layout has not: the message names the key.
    """
    parsed = configparser.ConfigParser(interpolation=None)
    try:
        parsed.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected sections and keys, got: {str(error).splitlines()[0]}") from error
    told = {section: dict(parsed[section]) for section in parsed.sections()}

    def get(section: str, key: str, kind: type, least: float, default: Any = None) -> Any:
        text = told.get(section, {}).get(key)
        if text is None and default is not None:
            return default
        try:
            value = kind(text)
        except (TypeError, ValueError):
            value = None
        if value is None or not value >= least:
            got = "none" if text is None else repr(text)
            raise ValueError(f"{path}: {key}: expected {kind.__name__} of at least {least}, got {got}")
        return value

    dtype = told.get("gpt", {}).get("weight_data_type", "")
    if dtype not in DTYPES:
        raise ValueError(f"{path}: weight_data_type: expected {' or '.join(DTYPES)}, got {dtype!r}")
    if told["gpt"].get("has_adapters", "False") != "False":
        raise ValueError(f"{path}: has_adapters: expected False, got {told['gpt']['has_adapters']!r}")
    heads, layers = get("gpt", "head_num", int, 1), get("gpt", "num_layer", int, 1)
    hidden = heads * get("gpt", "size_per_head", int, 1)
    moe = _moe_layers(told.get("structure", {}), layers, path)
    count = get("structure", "expert_num", int, 1) if moe else 0
    sizes = Sizes(
        get("gpt", "vocab_size", int, 1),
        hidden,
        layers,
        heads,
        get("gpt", "inter_size", int, 1),
        get("gpt", "max_pos_seq_len", int, 1),
        dict.fromkeys(moe, count),
    )
    gpus = get("gpt", "tensor_para_size", int, 1)
    check_gpus(sizes, gpus, f"{path}: tensor_para_size")
    start, end = (get("gpt", key, int, 0, END_ID) for key in ("start_id", "end_id"))
    return FTConfig(sizes, get("gpt", "layernorm_eps", float, 0.0), start, end, DTYPES[dtype], gpus)


def check_gpus(sizes: Sizes, gpus: int, where: str) -> None:
    """Whether N inference ranks can share a model: each has whole heads, and as much of F.

    Raises:
        ValueError: they cannot.
    """
    if gpus < 1 or sizes.heads % gpus or sizes.ffn % gpus:
        raise ValueError(f"{where}: expected a divisor of {sizes.heads} heads and of F = {sizes.ffn}, got {gpus}")


def end_of_text(vocab: Path) -> int | None:
    """The id of ``<|endoftext|>`` in a ``vocab.json``; None where it has none.

    Raises:
        OSError: no such file.
        ValueError: a file that holds something else.
    """
    try:
        words = json.loads(vocab.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{vocab}: expected a JSON object of words and ids, got: {error}") from error
    found = words.get(END_OF_TEXT) if isinstance(words, dict) else "no object"
    if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
        raise ValueError(f"{vocab}: expected a JSON object of words and ids, got {found!r:.80} for {END_OF_TEXT}")
    return found


def args_text(texts: Texts) -> str:
    """``args.txt``: a line for each argument."""
    return "".join(f"{name}:{text}\n" for name, text in texts)


def read_args(path: Path) -> list[list[str]]:
    """The inverse of :func:`args_text`. A line without a colon continues the value before it; no file is no arguments.

    Raises:
        OSError, ValueError: it cannot be read, or is no text.
    """
    if not path.is_file():
        return []
    found: list[list[str]] = []
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text, got: {error}") from error
    for line in lines[:-1] if lines[-1] == "" else lines:
        name, colon, text = line.partition(":")
        if colon or not found:
            found.append([name, text])
        else:
            found[-1][1] += "\n" + line
    return found


def _moe_layers(structure: dict[str, str], layers: int, path: Path) -> list[int]:
    try:
        moe = json.loads(structure.get("moe_layers", "[]"))
        on = int(structure.get("gpt_with_moe", "0"))
    except ValueError:
        moe, on = None, 0
    numbers = isinstance(moe, list) and all(isinstance(n, int) and 0 <= n < layers for n in moe)
    if not isinstance(moe, list) or not numbers or sorted(set(moe)) != moe or bool(moe) != bool(on):
        raise ValueError(
            f"{path}: moe_layers: expected numbers of {layers} layers in order, and gpt_with_moe to fit, got "
            f"{structure.get('moe_layers')!r:.80} and {structure.get('gpt_with_moe')!r:.80}"
        )
    return moe
