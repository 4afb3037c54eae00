"""The recorded logits, routes and continuations again, of models that come from files: whichever, and however cut."""

from __future__ import annotations

import json

import make_deepspeed_ckpt
import pytest
import torch
from gpt_cases import FORWARD, options_of

from dmoe import models
from dmoe.checkpoint.__main__ import main as checkpoint
from dmoe.generate import main as generate

TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 2e-5)]
CASES = [pytest.param(case, id=str(number)) for number, case in enumerate(FORWARD)]
FOUND = ("ids", "lengths", "least_logit_margin", "least_route_margin")
# how it was trained, and the conversions on its way to us
WAYS = {
    "as it is": ([], []),
    "TP 2": (["--train-tp", "2"], []),
    "PP": (["--pattern", "mp_file_pp"], []),
    "TP 2, PP, other names": (["--train-tp", "2", "--pattern", "rng_tp_pp_dir", "--key", "model", "--views"], []),
    "a dmoe folder": ([], ["dmoe"]),
    "a dmoe file": ([], ["dmoe file"]),
    "FasterTransformer for 1": ([], ["fastertransformer 1"]),
    "FasterTransformer for 2": (["--pattern", "mp_dir_pp"], ["fastertransformer 2"]),
    "FasterTransformer for as many as heads": ([], ["fastertransformer 0"]),
    "around": (["--train-tp", "2"], ["fastertransformer 2", "dmoe", "deepspeed", "dmoe file", "fastertransformer 1"]),
}


def arrived(case, way, folder):
    """The checkpoint at the end of the way."""
    o, (trained, steps) = options_of(case["make"]), WAYS[way]
    stages = (
        ["--train-pp", str(next(n for n in range(2, 99) if o.layers % n == 0))] if "_pp" in "".join(trained) else []
    )
    make_deepspeed_ckpt.main([str(folder / "0"), *case["make"], *trained, *stages])
    path = folder / "0"
    for number, step in enumerate(steps, 1):
        to, _, more = step.partition(" ")
        target = folder / (f"{number}.pt" if more == "file" else str(number))
        gpus = ["--gpus", str(int(more) or o.heads), "--dtype", "fp32"] if to == "fastertransformer" else []
        assert checkpoint(["convert", str(path), str(target), "--to", to, *gpus]) == 0
        path = target
    return path


def watched(model):
    """The last routing of each MoE layer, by its number."""
    seen = {}
    for number in model.config.moe:
        router = model.blocks[number].ffn.router
        router.register_forward_hook(lambda _m, _x, routing, n=number: seen.__setitem__(str(n), routing))
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_model_arrives(case, way, tmp_path, capsys):
    path = arrived(case, way, tmp_path)
    for dtype, tolerance in TOLERANCES:
        model = models.load(path, dtype=dtype)
        seen = watched(model)
        for prompt, logits, routes in zip(case["prompts"], case["logits"], case["routes"], strict=True):
            with torch.no_grad():
                found = model(torch.tensor([prompt]))[0].double()
            assert (found - torch.tensor(logits, dtype=torch.float64)).abs().max() <= tolerance
            assert sorted(seen) == sorted(routes)
            for number, expected in routes.items():
                assert seen[number].expert_indices.flatten().tolist() == [expert for expert, _ in expected]
    capsys.readouterr()
    prompts = [flag for prompt in case["prompts"] for flag in ("--ids", ",".join(map(str, prompt)))]
    for wanted in case["generate"]:
        how = {name: value for name, value in wanted.items() if name not in FOUND}
        flags = [text for name, value in how.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        assert generate([str(path), *prompts, *flags, "--json"]) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for said, ids, length in zip(told, wanted["ids"], wanted["lengths"], strict=True):
            assert said["prompt_ids"] + said["ids"] == ids[:length]
