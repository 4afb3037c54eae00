#!/usr/bin/env python3
"""PR-MoE and its Mixture-of-Students: a pyramid of experts beside dense FFNs teaches a model with fewer layers.

    python examples/pr_moe_and_mos.py             # a teacher and three students by train_lm.py: some minutes
    python examples/pr_moe_and_mos.py --seeds 3   # three students of each kind, which shows how much of it is chance

The teacher has one expert at work on each byte, twice as many experts in its last layers, and in each layer a dense FFN
beside them; the student the same with fewer layers (DeepSpeed-MoE: Rajbhandari et al. 2022, sections 4.1 and 4.2). It
is trained on the text alone; with the teacher to the end; and in stages, with the teacher at first and then on the text
alone. Interrupted, the same command goes on where it was. Writes pr_moe_and_mos.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_lm
from lm import checkpoint

HERE = Path(__file__).resolve().parent
SIZES = {"hidden": 96, "heads": 2, "ffn": 192, "top-k": 1, "batch": 12, "seq-len": 128, "dtype": "float32"}
TEACHER = {"layers": 4, "experts": "8,8,16,16"}
STUDENT = {"layers": 3, "experts": "8,8,16"}
STEPS = 800
TAUGHT = 0.7  # the paper's 400K steps, of the 572K that 300B tokens are in batches of 256 x 2048
KINDS = {"alone": "on the text alone", "taught": "with the teacher to the end", "staged": "in stages"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns its exit status: that of train_lm.py where this is not 0."""
    parser = argparse.ArgumentParser(
        prog="pr_moe_and_mos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"of each model [{STEPS}]")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="students of each kind [1]")
    parser.add_argument("--runs", type=Path, default=Path("runs/pr_moe_and_mos"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="of the result [beside this file]")
    parser.add_argument("--more", default="", metavar="'...'", help="flags of train_lm.py for all models")
    options = parser.parse_args(arguments)
    common = {**SIZES, "steps": options.steps, "warmup": options.steps // 20, "eval-every": max(1, options.steps // 8)}
    school = options.runs / "teacher"
    stages = {"alone": {}, "taught": {"teacher": school},
              "staged": {"teacher": school, "kd-stop": round(TAUGHT * options.steps)}}  # fmt: skip
    models: dict[str, dict[str, Any]] = {"teacher": {**common, **TEACHER, "seed": 0}}
    for seed in range(1, options.seeds + 1):
        for kind, flags in stages.items():
            models[f"{kind}-{seed}"] = {**common, **STUDENT, **flags, "seed": seed}
    for name, flags in models.items():
        print(f"\n== {name}", flush=True)
        status = _train(options.runs / name, flags, options.more.split())
        if status:
            return status
    result = summarise({name: json.loads((options.runs / name / "report.json").read_text()) for name in models})
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "pr_moe_and_mos.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n{options.out / 'pr_moe_and_mos.json'}")
    return 0


def summarise(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the models' reports say, in short."""

    def of_model(report: dict[str, Any]) -> dict[str, Any]:
        model, settings = report["models"]["moe"], report["settings"]
        kept = ("layers", "experts", "seed", "steps", "kd_temperature", "kd_coefficient", "kd_stop")
        return {
            **{name: settings[name] for name in kept},
            "parameters": model["parameters"],
            "held_out_bpb": [[point["step"], round(point["held_out_bpb"], 5)] for point in model["curve"]],
        }

    first = reports["teacher"]
    return {
        "date": datetime.date.today().isoformat(),
        **{name: first[name] for name in ("text", "versions", "hardware")},
        "settings": {name: value for name, value in first["settings"].items() if name not in ("layers", "experts")},
        "teacher": of_model(first),
        "students": {
            kind: [of_model(report) for name, report in reports.items() if name.startswith(f"{kind}-")]
            for kind in KINDS
        },
    }


def table(result: dict[str, Any]) -> str:
    """The held-out figures as lines of Markdown: means over seeds, the spread of students, pairs of one seed."""

    def ends(kind: str) -> list[float]:
        return [student["held_out_bpb"][-1][1] for student in result["students"][kind]]

    def spread(values: list[float]) -> str:
        return f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""

    def line(name: str, model: dict[str, Any], figure: str, gain: str) -> str:
        numbers = model["parameters"]
        experts = "/".join(map(str, model["experts"]))
        return f"| {name} | {experts} | {numbers['total']:,} | {numbers['active']:,} | {figure} | {gain} |"

    lines = [
        "| model | experts of its layers | parameters | active | held-out bits per byte | against alone, same seed |",
        "|---|---|---:|---:|---:|---:|",
        line("teacher", result["teacher"], f"{result['teacher']['held_out_bpb'][-1][1]:.4f}", ""),
    ]
    for kind, text in KINDS.items():
        values = ends(kind)
        gains = [value - alone for value, alone in zip(values, ends("alone"), strict=True)]
        gain = "" if kind == "alone" else f"{statistics.mean(gains):+.4f}{spread(gains)}"
        figure = f"{statistics.mean(values):.4f}{spread(values)}"
        lines.append(line(f"student, {text}", result["students"][kind][0], figure, gain))
    return "\n".join(lines)


def _train(folder: Path, flags: dict[str, Any], more: list[str]) -> int:
    """One model, from its beginning or from where it was left."""
    line = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    begun = ["--resume"] if (folder / checkpoint.FILE).exists() else []
    return train_lm.main([*line, "--residual", *more, "--out", str(folder), *begun])


if __name__ == "__main__":
    sys.exit(main())
