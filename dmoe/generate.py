"""``python -m dmoe.generate``: continue prompts, ids or text, with a model from a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dmoe import models
from dmoe.checkpoint import progress_bar, run_command
from dmoe.checkpoint.formats.base import DTYPES
from dmoe.checkpoint.formats.ft_config import END_OF_TEXT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, or 2 for what the user can put right."""
    return run_command(build_parser(), run, arguments)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.generate",
        description="Continue prompts with a GPT of dense and MoE layers. Without --top-k and --top-p: greedy search.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder: dmoe's, Megatron-DeepSpeed's or FasterTransformer's")
    prompts = parser.add_argument_group("prompts, any number of each; a sequence's draws go by its place among them")
    prompts.add_argument("--ids", action="append", default=[], type=_ids, metavar="ID,ID,...")
    prompts.add_argument("--text", action="append", default=[])
    prompts.add_argument(
        "--file", action="append", default=[], type=Path, help="a text in each line; empty ones count not"
    )
    prompts.add_argument("--vocab", type=Path, help="vocab.json of a GPT-2 BPE [the model's own]")
    prompts.add_argument("--merges", type=Path, help="merges.txt of it [the model's own]")
    search = parser.add_argument_group("search")
    search.add_argument("--output-len", type=int, default=32, metavar="N", help="the most tokens for each prompt [32]")
    search.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens; 1 is greedy")
    search.add_argument("--top-p", type=float, metavar="P", help="draw from the most likely that hold this share")
    search.add_argument("--temperature", type=float, default=1.0)
    search.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="divides logits of what is there"
    )
    search.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="R", help="is subtracted there; not both"
    )
    search.add_argument("--min-length", type=int, default=0, metavar="N", help="tokens before the end may come [0]")
    search.add_argument(
        "--end-id", type=int, help=f"ends a sequence [the model's, else {END_OF_TEXT} of the vocabulary]"
    )
    search.add_argument("--seed", type=int, default=0)
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", choices=DTYPES, default="fp32", help="[fp32]")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--batch-size", type=int, metavar="N", help="sequences at once; changes no result [all]")
    how.add_argument("--log-probs", action="store_true", help="also each token's log-probability")
    how.add_argument("--json", action="store_true", help="an object in each line, one for each prompt")
    return parser


def run(options: argparse.Namespace) -> None:
    """Reads, generates and prints.

    Raises:
        OSError, ValueError: what the user can put right.
    """
    device = _device(options.device)
    texts = [*options.text, *(line for file in options.file for line in _lines(file))]
    if not options.ids and not texts:
        raise ValueError("expected a prompt: --ids, --text or --file, got none")
    model, extras = models.load_with_extras(options.model, dtype=DTYPES[options.dtype], device=device)
    vocab, merges = (getattr(options, name) or extras.get(name) for name in ("vocab", "merges"))
    if texts and not (vocab and merges):
        raise ValueError(
            f"--text, --file: expected --vocab and --merges with {options.model}, which does not have both, got "
            f"{vocab or 'no vocab'} and {merges or 'no merges'}"
        )
    bpe: Any = None
    # Of ids alone the text is an extra, which a package that is missing does not stand in the way of.
    if vocab and merges and (texts or options.vocab or find_spec("tokenizers")):
        bpe = _tokenizer(vocab, merges)
    prompts: list[list[int]] = [*options.ids, *(bpe.encode(text).ids for text in texts)]
    end_id = options.end_id
    if end_id is None:
        end_id = extras.get("end_id")
    if end_id is None and bpe is not None:
        end_id = bpe.token_to_id(END_OF_TEXT)
    names = (
        "output_len",
        "top_k",
        "top_p",
        "temperature",
        "repetition_penalty",
        "presence_penalty",
        "min_length",
        "seed",
    )
    chosen = models.GenerationOptions(end_id=end_id, **{name: getattr(options, name) for name in names})
    batches = -(-len(prompts) // max(1, options.batch_size or len(prompts)))
    with progress_bar("generating", batches * chosen.output_len, "step") as progress:
        found = models.generate(
            model, prompts, chosen, batch_size=options.batch_size, log_probs=options.log_probs, progress=progress
        )
    for number, ids in enumerate(found.continuations()):
        logs = None if found.log_probs is None else found.log_probs[number, : len(ids)].tolist()
        _show(prompts[number], ids, logs, bpe, end_id, as_json=options.json)


def _show(prompt: list[int], ids: list[int], logs: list[float] | None, bpe: Any, end_id: Any, *, as_json: bool) -> None:
    said: dict[str, Any] = {"prompt_ids": prompt, "ids": ids}
    if logs is not None:
        said["log_probs"] = logs
    if bpe is not None:
        said["text"] = bpe.decode(ids[:-1] if ids[-1] == end_id else ids, skip_special_tokens=False)
    if as_json:
        print(json.dumps(said))
        return
    print(f"{','.join(map(str, prompt))} -> {','.join(map(str, ids))}")
    if logs is not None:
        print("  log-probabilities " + ", ".join(f"{number:.4f}" for number in logs))
    if bpe is not None:
        print(f"  {said['text']}")


def _ids(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ids as 16,33,76, got {text!r}") from None


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {file}: expected UTF-8, got: {error}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.zeros(1, device=name)
        device.item()  # which a device without numbers, as meta, cannot tell
        return device.device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise ValueError(f"--device {name}: expected one that torch can use: {str(error).splitlines()[0]}") from error


def _tokenizer(vocab: str | Path, merges: str | Path) -> Any:
    """GPT-2's byte-level BPE."""
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "expected the tokenizers package for text, which is missing: pip install tokenizers"
        ) from error
    for file in (vocab, merges):
        Path(file).open("rb").close()
    try:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"--vocab {vocab}, --merges {merges}: expected a GPT-2 BPE, got: {error}") from error
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if bpe.token_to_id(END_OF_TEXT) is not None:
        bpe.add_special_tokens([END_OF_TEXT])
    return bpe


if __name__ == "__main__":
    sys.exit(main())
