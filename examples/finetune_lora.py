#!/usr/bin/env python3
"""Fine-tunes a mixture of experts on other text, with its experts in four bits and LoRA beside them.

    python examples/finetune_lora.py                              # of `make demo`'s model; a few minutes on two cores
    python examples/finetune_lora.py --data ~/notes --steps 300   # on text of your own
    python examples/finetune_lora.py --base runs/lm --experts int4 --rank 8 --only

The two lines that are about dmoe stand in `lm/finetune.py`: ``dmoe.quant.quantize(model, "nf4")`` and ``dmoe.lora.add(
model, rank=16)``. Beside it the same model is fine-tuned with LoRA on experts that are not quantised, and as a whole
(``--only`` leaves both out). It ends with ``OUT/adapter.pt``, the picture ``OUT/finetune_lora.png`` of the loss on
text that was held out, and a table of the memory that each way needs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train_lm
from lm import checkpoint
from lm.data import Corpus, help_topics, load_corpus
from lm.finetune import FineTuning, Way, settings_of
from lm.finetune_picture import draw, processor, table
from lm.report import environment
from lm.settings import UsageError
from lm.stopping import StopOnSignal
from lm.training import train

import dmoe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns its exit status: 0, 2 for what the user can put right, 128 + n after signal n."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (UsageError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="finetune_lora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, default=Path("runs/demo"), metavar="DIR",
        help="folder of a run of train_lm.py; a smaller one is trained where there is none [runs/demo]")  # fmt: skip
    add("--base-steps", type=int, default=400, metavar="N", help="of that smaller one [400]")
    add("--data", nargs="*", default=[], metavar="PATH", help="text to fine-tune on [Python's help topics]")
    add("--out", type=Path, default=Path("runs/finetune_lora"), metavar="DIR", help="[runs/finetune_lora]")
    add(
        "--experts", default="nf4", metavar="FORMAT", help="what experts are held as: int8, fp8, int4, nf4, mxfp4 [nf4]"
    )
    add("--rank", type=int, default=16, metavar="N", help="of LoRA's factors [16]")
    add("--steps", type=int, default=200, metavar="N", help="of fine-tuning [200]")
    add("--batch", type=int, metavar="N", help="sequences in a step [the base's]")
    add("--lr", type=float, default=3e-3, metavar="X", help="peak learning rate of the adapters [0.003]")
    add("--whole-lr", type=float, default=1e-3, metavar="X", help="and of all weights, where these are trained [0.001]")
    add("--only", action="store_true", help="leave out what it is compared with")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {options.steps}")
    content = _base(options)
    settings = settings_of(
        content["settings"],
        steps=options.steps,
        warmup=max(1, options.steps // 10),
        lr=options.lr,
        eval_every=max(1, options.steps // 8),
        data=tuple(options.data),
        **({} if options.batch is None else {"batch": options.batch}),
    )
    corpus: Corpus = load_corpus(options.data, settings.data_bytes, settings.seq_len) if options.data else help_topics()
    ways = [Way(options.experts, options.rank), Way(None, options.rank), Way(None, None)]
    whole = settings_of(settings.to_dict(), lr=options.whole_lr)
    weights, device = content["runs"]["moe"]["model"], torch.device("cpu")
    runs = [
        FineTuning(way, weights, settings if way.rank else whole, corpus, device)
        for way in (ways[:1] if options.only else ways)
    ]
    before = {run.name: run.evaluate() for run in runs}
    memory = {run.name: run.memory() for run in runs}
    trained = {run.name: sum(p.numel() for p in run.model.parameters() if p.requires_grad) for run in runs}
    print(
        f"fine-tuning {options.base} on {corpus.name}: {len(corpus.train):,} bytes, {len(corpus.held_out):,} held out"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with StopOnSignal() as stop:
        train(runs, lambda: None, stop)
    if stop.signal is not None and any(run.step < settings.steps for run in runs):
        print(f"\n{signal.Signals(stop.signal).name}: nothing was written", file=sys.stderr)
        return 128 + stop.signal
    dmoe.checkpoint.write_together(
        options.out / "adapter.pt", {options.out / "adapter.pt": dmoe.lora.state_dict(runs[0].model)}, overwrite=True
    )
    return _report(options, corpus, runs, before, memory, trained)


def _base(options: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint to begin with; trained first where there is none at the default place."""
    if not (options.base / checkpoint.FILE).exists():
        if options.base != build_parser().get_default("base"):
            raise UsageError(
                f"--base {options.base}: expected a folder of train_lm.py with {checkpoint.FILE}, found none"
            )
        options.base = options.out / "base"
    if checkpoint.progress(options.base) is None:
        command = ["--out", str(options.base), "--steps", str(options.base_steps)]
        print(f"no model to begin with yet: train_lm.py {shlex.join(command)}")
        status = train_lm.main(command)
        if status:
            raise UsageError(f"the base was not trained to its end: train_lm.py ended with status {status}")
    return checkpoint.load(options.base, "--base")


def _report(
    options: argparse.Namespace,
    corpus: Corpus,
    runs: Sequence[FineTuning],
    before: dict[str, float],
    memory: dict[str, dict[str, int]],
    trained: dict[str, int],
) -> int:
    """Picture, table and numbers, in the folder and on the screen."""
    curves = {
        run.name: [(0, before[run.name]), *((int(p["step"]), p["held_out_bpb"]) for p in run.curve)] for run in runs
    }
    picture, numbers = options.out / "finetune_lora.png", options.out / "finetune_lora.json"
    where = environment(corpus, runs[0].device)
    draw(picture, curves, memory, f"Base: {options.base}. Text: {corpus.name}. {processor(where)}")
    seconds = {run.name: run.seconds for run in runs}
    written = {"curves": curves, "memory": memory, "trained": trained, "seconds": seconds, **where}
    numbers.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(table(curves, memory, trained, seconds))
    print(f"{picture}  {numbers}  {options.out / 'adapter.pt'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
