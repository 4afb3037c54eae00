#!/usr/bin/env python3
"""Trains a small language model with the layer of every preset of `dmoe.presets`, and draws how each one learned.

    python examples/all_presets.py                         # all, into presets.json and presets.png beside this file
    python examples/all_presets.py --only switch,gshard --steps 20

Two layers of 8 experts, with top-2 where the preset has more: sizes at which this takes some minutes on a laptop, and
no ranking of the systems. Ends with status 1 if a preset's loss does not fall.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm import panels
from lm.data import Corpus, load_corpus
from lm.layers import experts_of_a_token, moe_configs, sees_later_tokens
from lm.loads import Loads
from lm.model import count_parameters
from lm.report import environment
from lm.settings import Settings, UsageError
from lm.training import Run
from tqdm import tqdm

import dmoe

HERE = Path(__file__).resolve().parent
SIZES = Settings(
    layers=2, hidden=64, heads=2, ffn=96, experts=8, steps=200, batch=16, seq_len=128, warmup=20, eval_every=20,
    eval_bytes=32_768, data_bytes=4_000_000, dtype="float32",
)  # fmt: skip
MOST_CHOICES = 2  # of 8 experts; eight of them, as some presets have it of 64 and more, would be no mixture
END = 0.1  # loads at the end are those of the last tenth of the steps
ABOVE_BEST = 1.02  # a loss that ends higher than this times its lowest has not fallen but turned


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, 1 if a preset does not learn, 2 for what the user can put right."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except UsageError as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="all_presets.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME,NAME", help="these presets alone [all]")
    parser.add_argument("--data", action="append", default=[], metavar="PATH", help="text, as for train_lm.py")
    for name in ("steps", "batch", "seq_len", "hidden", "ffn", "experts", "eval_bytes", "seed"):
        value = getattr(SIZES, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help=f"[{value}]")
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="steps this small gain nothing from a second one [1]"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="[this folder; runs/presets with --only]")
    return parser


def _run(options: argparse.Namespace) -> int:
    names = _names(options.only)
    given = {name: getattr(options, name) for name in ("batch", "seq_len", "hidden", "ffn", "experts", "eval_bytes",
                                                       "seed")}  # fmt: skip
    every = max(1, options.steps // 10)
    sizes = dataclasses.replace(
        SIZES, data=tuple(options.data), steps=options.steps, warmup=every, eval_every=every, **given
    )
    torch.set_num_threads(options.threads)
    corpus = load_corpus(sizes.data, sizes.data_bytes, sizes.seq_len)
    out = options.out or (Path("runs/presets") if options.only else HERE)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=(len(names) + 1) * sizes.steps, unit="step", dynamic_ncols=True, mininterval=0.5) as bar:
        dense = _trained(Run("dense", sizes, corpus, torch.device("cpu")), bar)
        bar.write(f"{'dense FFN':>14}  {dense['curve'][-1]['held_out_bpb']:.4f} held-out bits per byte")
        for name in names:
            try:
                found[name] = _preset(name, sizes, corpus, bar)
            except (UsageError, ValueError) as error:
                found[name] = {"failure": str(error)}
            bar.write(f"{name:>14}  {_line(found[name])}")
    _write(out, sizes, corpus, found, dense)
    failed = [name for name, preset in found.items() if preset["failure"]]
    for name in failed:
        sys.stderr.write(f"all_presets.py: {name}: {found[name]['failure']}\n")
    return 1 if failed else 0


def settings_of(name: str, sizes: Settings) -> Settings:
    """A run with a preset's layer at these sizes; PR-MoE's with its dense FFN beside the experts."""
    published = dmoe.presets.NAMES[name]().top_k
    top_k = min(published, MOST_CHOICES, min(sizes.layer_experts))
    return dataclasses.replace(sizes, preset=name, top_k=top_k, residual=name == "pr_moe")


def failure(curve: Sequence[dict[str, float]]) -> str | None:
    """What is wrong with a curve that was to fall; None if it fell."""
    losses = [point["held_out_bpb"] for point in curve]
    if not all(map(math.isfinite, losses)):
        return f"the loss is not finite: {losses}"
    if losses[-1] >= losses[0] or losses[-1] > ABOVE_BEST * min(losses):
        return f"the loss does not fall: {losses[0]:.4f} bits per byte at first, {losses[-1]:.4f} at the end, " \
               f"{min(losses):.4f} at best"  # fmt: skip
    return None


def _names(only: str | None) -> list[str]:
    known = list(dmoe.presets.NAMES)
    names = known if only is None else only.split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"--only: expected names of {', '.join(known)}, got {name!r}")
    return names


def _preset(name: str, sizes: Settings, corpus: Corpus, bar: tqdm) -> dict[str, Any]:
    settings = settings_of(name, sizes)
    config = moe_configs(settings)[0]
    run = Run(name, settings, corpus, torch.device("cpu"))
    result = _trained(run, bar)
    last = [entry for entry in run.routing if entry["step"] > (1 - END) * settings.steps]
    in_training = torch.tensor([entry["load"] for entry in last], dtype=torch.float64).mean(dim=0)
    dropped = torch.tensor([entry["dropped"] for entry in last], dtype=torch.float64).mean(dim=0)
    held_out = Loads(run.model.moe_layers, run.device)
    run.evaluate(held_out)
    told = held_out.told(run.ranks)
    return {
        "failure": failure(run.curve),
        "experts_of_a_token": experts_of_a_token(config),
        "beside_them": "dense" if settings.residual else "shared" if config.shared_ffn_hidden_size else None,
        "router": repr(config.router),
        "held_out_sees_later_bytes": sees_later_tokens(config),
        **result,
        "training": _loads(in_training, dropped.tolist()),
        "held_out": _loads(torch.tensor(told["load"], dtype=torch.float64), told["dropped"]),
    }


def _loads(load: torch.Tensor, dropped: list[float]) -> dict[str, Any]:
    """Of each layer: the experts' loads relative to their mean, the largest, and the share that was dropped."""
    rounded = [[round(float(each), 4) for each in layer] for layer in load]
    return {"load": rounded, "busiest": [max(layer) for layer in rounded], "dropped": [round(x, 5) for x in dropped]}


def _trained(run: Run, bar: tqdm) -> dict[str, Any]:
    """Trains a run to its end, measuring at the beginning, too."""
    settings = run.settings
    run.warm_up()
    run.curve.append({"step": 0, "seconds": 0.0, "held_out_bpb": run.evaluate()})
    for target in range(settings.eval_every, settings.steps + 1, settings.eval_every):
        run.advance(target, bar, lambda: False, tell=False)
    run.advance(settings.steps, bar, lambda: False, tell=False)
    # Without the seconds: of one run after the other they tell of whatever else the machine had to do just then.
    curve = [{name: value for name, value in point.items() if name != "seconds"} for point in run.curve]
    return {"parameters": count_parameters(run.model), "curve": curve}


def _line(preset: dict[str, Any]) -> str:
    if "curve" not in preset:
        return str(preset["failure"])
    last = preset["curve"][-1]
    loads = ", ".join(
        f"{kind} {max(preset[key]['busiest']):.1f}x the mean ({100 * max(preset[key]['dropped']):.0f}% dropped)"
        for kind, key in (("training", "training"), ("held out", "held_out"))
    )
    return f"{last['held_out_bpb']:.4f} held-out bits per byte; busiest expert: {loads}"


def _write(out: Path, sizes: Settings, corpus: Corpus, found: dict[str, dict[str, Any]], dense: dict[str, Any]) -> None:
    summary = {
        "date": datetime.date.today().isoformat(),
        **environment(corpus, torch.device("cpu")),
        "settings": sizes.to_dict(),
        "dense": dense,
        "presets": found,
    }
    (out / "presets.json").write_text(json.dumps(summary, indent=1) + "\n")
    panels.draw(summary, out / "presets.png")
    print(f"{out / 'presets.png'}  {out / 'presets.json'}")


if __name__ == "__main__":
    sys.exit(main())
