#!/usr/bin/env python3
"""Trains a byte-level language model whose FFNs are `dmoe.MoE`, on real text, and reports how it went.

    python examples/train_lm.py                                  # on the Python standard library's own sources
    python examples/train_lm.py --data ~/notes --compare-dense   # on your text, next to a dense twin of equal FLOPs
    python examples/train_lm.py --resume                         # on from where Ctrl-C ended it
    torchrun --nproc-per-node 4 examples/train_lm.py --expert-parallel 2   # on 4 ranks, with the experts spread over 2
    python examples/train_lm.py --preset deepseek_v3             # with the layer of another system
    python examples/train_lm.py --teacher runs/lm --layers 2 --kd-stop 1500 --out runs/student  # distilled, in stages

Read `lm/model.py` for the model, `lm/layers.py` for its FFNs, `lm/training.py` for the loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm import checkpoint, ranks, report, teacher
from lm.data import Corpus, load_corpus
from lm.generate import generate
from lm.model import count_parameters
from lm.ranks import Ranks
from lm.settings import BALANCE, TOP_K, Settings, UsageError, experts_from, written
from lm.stopping import StopOnSignal
from lm.training import Run, train

import dmoe

CHECKPOINT_SECONDS = 60.0  # a crash costs at most about this much work


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, 2 for what the user can put right, 128 + n after signal n."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        with ranks.join(options.expert_parallel, _device(options.device), options.parallel) as (team, device):
            return _run(options, team, device)
    except UsageError as error:
        rank = os.environ.get("RANK", "0")  # torchrun's; most often all ranks say the same
        sys.stderr.write(f"{'' if rank == '0' else f'[rank {rank}] '}{parser.prog}: error: {error}\n")  # in one piece
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line. What decides a run's numbers has no default here but in `Settings`: see `_settings`."""
    parser = argparse.ArgumentParser(
        prog="train_lm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings()

    def setting(name: str, help: str, value: Any = None, **extra: Any) -> None:
        value = getattr(default, name) if value is None else value
        if not extra:
            extra = {"type": type(value), "metavar": "N" if isinstance(value, int) else "X"}
        shown = "" if value is None else f" [{value}]"
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=help + shown, **extra)

    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        action="append",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="a file, or a folder with all below it; may be repeated [the Python standard library's sources]",
    )
    setting("data_bytes", "the most text to use, in bytes")
    group = parser.add_argument_group("model")
    setting("layers", "blocks of attention and FFN")
    setting("hidden", "width of the residual stream")
    setting("heads", "attention heads")
    setting("experts", "experts in each FFN, or one number for each layer, as 4,4,8,8", type=experts_from, metavar="N")
    setting("top_k", "experts that each byte visits", TOP_K)
    setting("ffn", "width of one expert; the dense twin's FFN is --top-k times as wide")
    setting("balance", "coefficient of the load-balancing loss", BALANCE)
    gates = ["sum", "none"]
    setting("gate_normalization", "whether a byte's gate weights add up to 1 [sum]", choices=gates)
    setting("z_loss", "coefficient of the router's z-loss [0]", type=float, metavar="X")
    setting("shared", "width of an expert that every byte takes beside its --top-k")
    setting("router_init", "factor on the router's initial weights")
    setting("residual", "beside each mixture a dense FFN of an expert's width (PR-MoE)", action="store_true")
    names = ", ".join(dmoe.presets.NAMES)
    setting("preset", f"the FFNs are another system's layer, with its own --top-k and losses: {names}", metavar="NAME")
    group = parser.add_argument_group("distillation (MoS)")
    setting("teacher", "folder of a finished run, whose mixture teaches this one", metavar="DIR")
    setting("kd_temperature", "softens what teacher and student predict where they are compared")
    setting("kd_coefficient", "what the comparison weighs beside the task's loss")
    setting("kd_stop", "step from which the task's loss alone trains [none]", type=int, metavar="N")
    group = parser.add_argument_group("training")
    setting("steps", "optimizer steps")
    setting("batch", "sequences in a step")
    setting("seq_len", "bytes in a sequence")
    setting("lr", "peak learning rate")
    setting("dense_lr", "the dense twin's [--lr]", type=float, metavar="X")
    setting("expert_lr_power", "experts learn at (top-k / experts) to this power of the rate")
    setting("warmup", "steps to the peak; then a cosine down to a tenth")
    setting("weight_decay", "AdamW's")
    setting("clip", "largest norm of the gradient")
    setting("seed", "of weights and batches")
    setting("seeds", "train each model so many times, with this seed and those that follow")
    setting("dtype", "arithmetic; bfloat16 means autocast", choices=["auto", "float32", "bfloat16"])
    setting("expert_compute", "the experts' products, forward and backward to their input", choices=["fp8"])
    setting("saved_activations", "what experts keep for backward", choices=["fp8"])
    setting("compile", "torch.compile the model", action="store_true")
    setting("compare_dense", "also train the dense twin of equal active FLOPs", action="store_true")
    setting("eval_every", "steps between two measurements on held-out text")
    setting("eval_bytes", "held-out bytes in a measurement")
    group = parser.add_argument_group("running")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[auto]")
    group.add_argument(
        "--minutes", type=float, metavar="X", help="lower --steps so that training, all models together, takes at most "
        "about this long on this machine",
    )  # fmt: skip
    group.add_argument(
        "--expert-parallel", type=int, default=1, metavar="W", help="under torchrun: ranks that the experts are spread "
        "over; they divide the ranks there are, and all train on parts of one batch. Not part of a run: [1]",
    )  # fmt: skip
    group.add_argument("--parallel", choices=["ddp", "fsdp2"], default="ddp", help="under torchrun: what is whole on "
                       "every rank, or cut over them [ddp]")  # fmt: skip
    group.add_argument("--out", type=Path, default=Path("runs/lm"), metavar="DIR", help="[runs/lm]")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out, with the settings it has")
    group.add_argument("--overwrite", action="store_true", help="begin anew even where --out has an unfinished run")
    group.add_argument(
        "--generate", nargs="?", const="def ", metavar="PROMPT", help="print text that the trained mixture continues"
    )
    return parser


def _run(options: argparse.Namespace, team: Ranks, device: torch.device) -> int:
    given = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(Settings) if field.name in options
    }
    given["data"] = tuple(given.get("data", ()))
    if options.resume:
        saved = checkpoint.load(options.out)
        settings = _agreed(Settings.from_dict(saved["settings"]), given)
    else:
        saved = None
        own = {} if "preset" in given else {"top_k": TOP_K, "balance": BALANCE}
        settings = Settings(**(own | given))
        settings = dataclasses.replace(settings, dtype=team.agreed(_dtype(settings.dtype, device)))
        _refuse_to_lose_work(options)
    ranks.check(settings, team)
    corpus = load_corpus(settings.data, settings.data_bytes, settings.seq_len)
    team.say(f"text: {corpus.name}, {corpus.files} files, {len(corpus.train):,} bytes to train on, "
             f"{len(corpus.held_out):,} held out")  # fmt: skip
    if team.count > 1:
        team.say(f"ranks: {team.count}, the experts of each layer over {team.expert_parallel} of them")
    taught_by = _teacher(settings, options.out, saved, corpus, device, team)
    runs = [Run(name, own, corpus, device, team, taught_by) for name, own in settings.each_run().items()]
    seconds = team.agreed(sum(run.warm_up(8 if options.minutes else 1) for run in runs))
    if saved is not None:
        checkpoint.restore(saved, corpus, runs)
    elif options.minutes is not None:
        settings = _fit_steps(settings, options.minutes, seconds, team)
        for run, shortened in zip(runs, settings.each_run().values(), strict=True):
            run.settings = shortened
    for run in runs[: 1 + settings.compare_dense]:
        sizes = count_parameters(run.model)
        team.say(f"{run.name:>5}: {sizes['total']:,} parameters, {sizes['active']:,} active for a byte")
    options.out.mkdir(parents=True, exist_ok=True)
    with StopOnSignal() as stop:
        last_saved = time.monotonic()

        def signalled() -> int:
            return team.highest(stop.signal or 0)  # one rank's wish is that of all, in the same step

        def on_turn() -> None:
            nonlocal last_saved
            if team.agreed(time.monotonic() - last_saved >= CHECKPOINT_SECONDS):
                checkpoint.save(options.out, settings, corpus, runs)
                last_saved = time.monotonic()

        train(runs, on_turn, lambda: signalled() > 0)
        path = checkpoint.save(options.out, settings, corpus, runs)
        number = signalled()
    if number and any(run.step < settings.steps for run in runs):
        steps = ", ".join(f"{run.name} at step {run.step} of {settings.steps}" for run in runs)
        again = shlex.join(team.command([sys.executable, sys.argv[0], "--out", str(options.out), "--resume"]))
        # Attention's backward on a GPU adds in any order.
        same = ", to the same bits," if device.type == "cpu" and team.count == 1 else ""
        team.say(f"\n{signal.Signals(number).name}: saved {path} ({steps}).\nGo on{same} with:\n  {again}")
        return 128 + number
    if team.first:
        _finish(options, report.summarise(settings, corpus, runs))
    if options.generate is not None:
        _speak(options, runs[0])
    return 0


def _finish(options: argparse.Namespace, summary: dict[str, Any]) -> None:
    json_path, png_path = report.write(options.out, summary)
    print()
    for name, model in summary["models"].items():
        final = model["final"]
        print(f"{name:>5}: {final['held_out_bpb']:.4f} held-out bits per byte after {final['step']} steps, "
              f"{final['seconds']:.1f} s, {final['bytes_per_second']:,.0f} bytes/s")  # fmt: skip
    if "comparison" in summary:
        print("\n".join(report.compared(summary["comparison"])))
    print(f"report: {png_path}  {json_path}")


def _speak(options: argparse.Namespace, run: Run) -> None:
    """All ranks run the model, as its experts may be anywhere; rank 0 prints."""
    first = run.ranks.first
    if first:
        print(f"\n{options.generate}", end="")
    for piece in generate(run, options.generate):
        if first:
            print(piece, end="", flush=True)
    if first:
        print()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device. Use --device cpu")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> str:
    """Settles ``auto``: on a CPU by a stopwatch, since which instructions are fast differs more than their names."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.bfloat16] * 1.3 < seconds[torch.float32] else "float32"


def _agreed(saved: Settings, given: dict[str, Any]) -> Settings:
    """The checkpoint's settings; a flag that says otherwise is an error, not a silent change of the run."""
    for name, value in given.items():
        was = getattr(saved, name)
        if value != was and not (name == "data" and not value) and not (name == "dtype" and value == "auto"):
            raise UsageError(
                f"--resume: the checkpoint was made with --{name.replace('_', '-')} {written(was)}, not "
                f"{written(value)}. "
                "Leave the flag out to go on, or start a new run in another --out"
            )
    return saved


def _teacher(
    settings: Settings, out: Path, saved: dict[str, Any] | None, corpus: Corpus, device: torch.device, team: Ranks
) -> teacher.Teacher | None:
    """The run's teacher, if it has one; where the run goes on without it, only what is known of it."""
    if settings.teacher is None:
        return None
    if saved is not None:
        step = min(run["step"] for run in saved["runs"].values())
        needed = step < settings.steps and settings.taught(step)
        return teacher.again(saved["teacher"], settings, device, needed=needed)
    if Path(settings.teacher).resolve() == out.resolve():
        raise UsageError(f"--teacher: {settings.teacher} is --out, where the student is to go. Choose another --out")
    found = teacher.load(settings.teacher, settings, device)
    team.say(f"teacher: {found.facts['parameters']['total']:,} parameters, "
             f"{found.facts['held_out_bpb']:.4f} held-out bits per byte")  # fmt: skip
    if found.facts["text"] != corpus.fingerprint:
        team.say("note: the teacher learned another text, or split of it, and may have seen what is held out here")
    return found


def _refuse_to_lose_work(options: argparse.Namespace) -> None:
    progress = None if options.overwrite else checkpoint.progress(options.out)
    if progress is not None and progress[0] < progress[1]:
        raise UsageError(
            f"--out {options.out} holds a run that is at step {progress[0]} of {progress[1]}. "
            "Go on with it (--resume), replace it (--overwrite), or choose another --out"
        )


def _fit_steps(settings: Settings, minutes: float, seconds_per_step: float, team: Ranks = ranks.ALONE) -> Settings:
    """Fewer steps if the wanted ones would take longer than ``minutes``."""
    if not minutes > 0:
        raise UsageError(f"--minutes must be positive, got {minutes}")
    fitting = max(1, int(60 * minutes / seconds_per_step))
    if fitting >= settings.steps:
        return settings
    team.say(
        f"--minutes {minutes:g}: {fitting} steps instead of {settings.steps}, at {seconds_per_step:.2f} s for a step"
    )
    shrink = fitting / settings.steps
    return dataclasses.replace(
        settings,
        steps=fitting,
        warmup=int(settings.warmup * shrink),
        kd_stop=None if settings.kd_stop is None else int(settings.kd_stop * shrink),
        eval_every=max(1, int(settings.eval_every * shrink)),
    )


if __name__ == "__main__":
    sys.exit(main())
