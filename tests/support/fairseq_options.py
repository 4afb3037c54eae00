"""Jobs of the fairseq tests that look at what options of training and evaluation do; see :mod:`fairseq_jobs`."""

from __future__ import annotations

import json
import os

from fairseq_jobs import fairseq_moe, flags_of, run_cli, stats_of
from fairseq_tools import EXPERTS, LINES, write_lines

BRANCH = ["--no-best-checkpoints", "--symlink-best-and-last-checkpoints", "--log-nvidia-smi"]
BRANCH += flags_of(max_source_positions=64, num_workers_valid=0)
TIGHT = {"moe_eval_capacity_token_fraction": 0.02}


def trained(folder):
    """Text, and three models on it: mixtures without and with capacity, and a dense one; what training said."""
    data = write_lines(folder)
    capacity = [word for word in EXPERTS if word != "--moe-dropless"]
    short = ["--cpu", "--no-epoch-checkpoints", *flags_of(batch_size_valid=2, max_valid_steps=1)]
    runs = {
        "dropless": [*EXPERTS, *BRANCH],
        "capacity": [*capacity, *flags_of(moe_eval_capacity_token_fraction=0.05)],
        "dense": flags_of(criterion="cross_entropy"),
    }
    done = {}
    for name, kind in runs.items():
        _forget_the_best()
        done[name] = run_cli("train", data, *LINES, *kind, *short, "--save-dir", f"{folder}/{name}")
    files = {name: sorted(os.listdir(f"{folder}/{name}")) for name in runs}
    _forget_what_the_branch_lacks(f"{folder}/capacity/checkpoint_last.pt", f"{folder}/branch.pt")
    return done, files


def _forget_the_best():
    """fairseq keeps the best loss as long as the process lives, and takes one run's for another's."""
    fairseq_moe()
    from fairseq import checkpoint_utils

    vars(checkpoint_utils.save_checkpoint).pop("best", None)


def _forget_what_the_branch_lacks(path, to):
    import torch

    state = torch.load(path, weights_only=False)
    for name in ("moe_dropless", "moe_random_second_expert_in_eval"):
        del state["cfg"]["model"][name]
    torch.save(state, to)


def evaluated(folder, path, *flags, tool="eval_lm"):
    """A tool on the valid text: its status, last words, and loss in bits."""
    sizes = ["--cpu", *flags_of(path=f"{folder}/{path}", batch_size=2, num_workers=0)]
    sizes += flags_of(task="language_modeling", tokens_per_sample=64)
    sizes += flags_of(log_format="json") if tool == "validate" else flags_of(gen_subset="valid")
    done = run_cli(tool, f"{folder}/bin", *sizes, *flags)
    last = (done.err.strip().splitlines() or [""])[-1]
    if done.status:
        return done.status, last, None
    if tool == "validate":
        return 0, last, stats_of(done, "valid")[-1]["valid_inner_loss"]
    if tool == "generate":
        lines = [line.split("\t")[1].split() for line in done.out.splitlines() if line.startswith("P-")]
        scores = [float(score) for line in lines for score in line]
        return 0, last, -sum(scores) / len(scores)
    return 0, last, float(next(line for _, line in done.log if "Loss (base 2)" in line).split()[3].rstrip(","))


def losses(folder, cases):
    """The losses of several evaluations of one folder, by their order; a sentence for one that was refused."""
    return [loss if loss is not None else last for _, last, loss in (evaluated(folder, *case) for case in cases)]


def losses_of(folder, cases):
    """The same of other tools, whose names come first."""
    return [evaluated(folder, *case, tool=tool)[2] for tool, *case in cases]


def figures(folder, *flags):
    """What `--stats-path` wrote, and the loss that was told."""
    told = losses(folder, [("dropless/checkpoint_last.pt", *flags, "--sp", f"{folder}/new/figures")])
    with open(f"{folder}/new/figures.json") as file:
        return json.load(file), told[0]


def refusals(folder, cases):
    """The last words of tools that should refuse their options."""
    return [evaluated(folder, *case[1:], tool=case[0])[:2] for case in cases]
