#!/usr/bin/env python3
"""Which options of a mixture earn their place: the demo's model, one option changed at a time, three seeds of each.

    python examples/ablation.py            # into ablation.json and ablation.png beside this file: an hour of one core
    python examples/ablation.py --only base,balance-0 --seeds 5
    python examples/ablation.py --quick    # all of it at toy sizes, in a minute, into runs/ablation

Finished runs are kept in ablation.json and not made again: interrupted, the same command goes on. `lm/variants.py` has
the list.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm.ablation_picture import draw
from lm.ablation_table import rows, table
from lm.data import Corpus, load_corpus
from lm.report import environment
from lm.settings import Settings, UsageError
from lm.training import Run
from lm.upcycling import upcycled_run
from lm.variants import Variant, variants
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
SIZES = Settings(experts=32, batch=12, lr=6e-3, steps=300, warmup=15, eval_every=150, dtype="bfloat16")
QUICK = dataclasses.replace(
    SIZES, layers=2, hidden=32, ffn=32, experts=4, batch=4, seq_len=64, steps=20, warmup=2, eval_every=10,
    eval_bytes=4096, data_bytes=500_000, dtype="float32",
)  # fmt: skip
END = 0.1  # loads at the end are those of the last tenth of the steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, or 2 for what the user can put right."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except UsageError as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ablation.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME,NAME", help="these variants alone [all]")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="[3]")
    parser.add_argument("--steps", type=int, metavar="N", help=f"[{SIZES.steps}]")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="text, as for train_lm.py")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="seconds are processor time [1]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="[this folder; runs/ablation with --quick]")
    return parser


def _run(options: argparse.Namespace) -> None:
    base = QUICK if options.quick else SIZES
    if options.steps is not None:
        shrink = options.steps / base.steps
        base = dataclasses.replace(base, steps=options.steps, warmup=int(base.warmup * shrink),
                                   eval_every=max(1, options.steps // 2))  # fmt: skip
    base = dataclasses.replace(base, data=tuple(options.data))
    if options.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {options.seeds}")
    chosen = _chosen(variants(base), options.only)
    torch.set_num_threads(options.threads)
    corpus = load_corpus(base.data, base.data_bytes, base.seq_len)
    out: Path = options.out or (Path("runs/ablation") if options.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    result = _begun(out / "ablation.json", base, corpus)
    jobs = [(f"{variant.name}/{seed}", variant, seed) for seed in range(options.seeds) for variant in chosen]
    jobs = [job for job in jobs if job[0] not in result["runs"]]
    with tqdm(total=len(jobs) * base.steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
        for number, (key, variant, seed) in enumerate(jobs):
            result["runs"][key] = measured(variant, variant.settings(base, seed), corpus, bar)
            result["date"] = datetime.date.today().isoformat()
            _write(out / "ablation.json", result)
            bar.n = (number + 1) * base.steps
            bar.write(f"{key:>18}  {result['runs'][key]['held_out_bpb']:.4f} held-out bits per byte")
    found = rows(result, variants(base))
    if found:
        draw(result, found, out / "ablation.png")
        print(f"\n{table(found)}\n\n{out / 'ablation.json'}  {out / 'ablation.png'}")


def _chosen(every: list[Variant], only: str | None) -> list[Variant]:
    if only is None:
        return every
    names = only.split(",")
    known = {variant.name: variant for variant in every}
    for name in names:
        if name not in known:
            raise UsageError(f"--only must be of {', '.join(known)}, got {name}")
    return [known[name] for name in names]


def _begun(path: Path, base: Settings, corpus: Corpus) -> dict[str, Any]:
    """What is there already, of the same base on the same text; or nothing yet."""
    fresh = {"base": base.to_dict(), **environment(corpus, CPU), "runs": {}}
    if not path.exists():
        return fresh
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"--out: {path} cannot be read: {error}") from error
    same = found.get("base") == fresh["base"] and found.get("text") == fresh["text"]
    if not same:
        raise UsageError(f"--out: {path} holds runs of other settings, or of another text. Choose another --out")
    return found


def measured(variant: Variant, settings: Settings, corpus: Corpus, bar: tqdm) -> dict[str, Any]:
    """One run to its end, and what is kept of it."""

    def make(name: str, own: Settings) -> Run:
        return Run(name, own, corpus, CPU, clock=time.process_time)

    before = []
    if variant.upcycled is None:
        run = make("moe", settings)
    else:
        parent, run = upcycled_run(settings, variant.upcycled, make, bar)
        before = [parent]
    run.warm_up()
    s = run.settings
    while run.step < s.steps:
        run.advance(min(s.steps, run.step + s.eval_every), bar, lambda: False, tell=False)
    end = [entry["load"] for entry in run.routing if entry["step"] > (1 - END) * s.steps] or [run.routing[-1]["load"]]
    mean = torch.tensor(end).mean(0)  # (layers, E)
    return {
        "settings": {name: value for name, value in s.to_dict().items() if value != getattr(SIZES, name)},
        "steps": s.steps,
        "held_out_bpb": round(run.curve[-1]["held_out_bpb"], 5),
        "curve": [[point["step"], round(point["held_out_bpb"], 5)] for point in run.curve],
        "seconds": round(sum(each.seconds for each in (*before, run)), 2),
        "busiest": round(float(mean.max()), 3),
        "entropy": [round(value, 3) for value in run.routing[-1]["entropy"]],
    }


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    text = json.dumps(result, indent=1)
    beside = path.with_suffix(".part")
    beside.write_text(text + "\n")
    os.replace(beside, path)


if __name__ == "__main__":
    sys.exit(main())
