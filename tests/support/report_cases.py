"""A run's folder as dmoe.monitor writes it, without training anything."""

from __future__ import annotations

import json
import math

EVIL = "<img src=x onerror=\"document.title='taken'\">"


def line(step, layers, **more):
    return {
        "kind": "step",
        "step": step,
        "seconds": 0.5,
        "parts": {},
        "tokens": 64,
        "layers": layers,
        "warnings": [],
        **more,
    }


def layer(tokens, **more):
    return {"tokens_per_expert": tokens, "entropy": 0.5 * math.log(len(tokens)), "seconds": {}, "forwards": 1, **more}


def write(folder, lines, names=("a",), experts=4, ranks=1, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    about = {"kind": "run", "ranks": ranks, "layers": {name: {"num_experts": experts, "top_k": 2} for name in names}}
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(each) for each in (about, *lines)) + end)
    return folder


def run_with_everything(folder, steps=30, names=("blocks.0", EVIL, "blocks.2")):
    """Three layers of four experts over steps 0, 10, 20 ...; of the last layer expert 3 is never given a token."""
    lines = []
    for step in range(steps):
        layers = {}
        for place, name in enumerate(names):
            tokens = [40 - step, 24 + step, 30, 34] if place < 2 else [60, 40, 28, 0]
            layers[name] = layer(
                tokens,
                entropy=math.log(4) * (1 - 0.02 * step),
                kept_per_expert=[min(each, 50) for each in tokens],
                router_logits_rms=0.5 + place,
                router_logits_max=3.0,
                bytes_sent=2048 * (place + 1),
                seconds={"router": 0.01, "dispatch": 0.02, "experts": 0.05, "combine": 0.02},
                **({"expert_similarity": 0.25} if step % 10 == 0 else {}),
            )
        said = [f"step {10 * step}, layer {names[1]}: the load has collapsed"] if step == 12 else []
        lines.append(line(10 * step, layers, parts={"forward": 0.2, "backward": 0.25}, warnings=said))
    write(folder, lines, names, ranks=2)
    counts = [[90, 1, 10], [4, 80, 10], [3, 5, 10], [3, 14, 10]]
    table = {"kind": "tokens", "step": 290, "ids": [5, 7, 11], "layers": dict.fromkeys(names, counts)}
    (folder / "tokens.json").write_text(json.dumps(table))
    return folder
