"""How much memory does a model with experts in four bits take while LoRA is trained, beside one in bfloat16?

    python benchmarks/quantized_memory.py [--layers 4] [--experts 32]

A language model (``dmoe.models.MoEGPT``) is built layer by layer, quantised or not, adapted, and trained for three
steps, each way in a process of its own, whose resident memory is read once it is built, and at its peak. Before that
small ones are checked: what is quantised computes what its decoded weights do.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from parts.harness import (
    CheckError,
    arguments,
    checked,
    describe,
    environment,
    markdown_table,
    new_figure,
    publish,
    relative_error,
    require_close,
    run_benchmark,
    save_figure,
)

import dmoe
from dmoe.models import MoEGPT, MoEGPTConfig

# What experts are held as, and whether adapters alone are trained.
WAYS = {
    "bf16, all weights trained": (None, False),
    "bf16, LoRA": (None, True),
    "int8, LoRA": ("int8", True),
    "nf4, LoRA": ("nf4", True),
    "mxfp4, LoRA": ("mxfp4", True),
}
RANK, BATCH, LENGTH, STEPS = 16, 4, 128, 3


def main() -> None:
    """Check, run each way in a process of its own, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=1)
    for name, default in (("layers", 4), ("hidden", 512), ("ffn", 1024), ("experts", 32)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--way", choices=WAYS, help="run one, and print its figures as JSON")
    args = checked(parser)
    sizes = {name: getattr(args, name) for name in ("layers", "hidden", "ffn", "experts")}
    if args.way is not None:
        print(json.dumps(_train(args.way, sizes)))
        return
    _check()
    results = []
    for way in WAYS:
        line = [sys.executable, __file__, "--way", way, "--threads", str(args.threads)]
        line += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        results.append({"way": way, **json.loads(printed.splitlines()[-1])})
        print(f"{way}: {results[-1]['peak'] / 2**20:.0f} MiB at most")
    env = environment(args.threads)
    publish(
        "quantized_memory",
        env,
        args,
        results,
        report=lambda name: _report(results, env, sizes, name),
        plot=lambda path: _plot(results, env, path),
    )


def _model(way: str, sizes: dict[str, int]) -> tuple[MoEGPT, list[torch.nn.Parameter]]:
    form, adapted = WAYS[way]
    layer = dmoe.MoEConfig(sizes["hidden"], sizes["ffn"], sizes["experts"], top_k=2, load_balancing_coefficient=0.0)
    config = MoEGPTConfig(
        vocab_size=256,
        hidden_size=sizes["hidden"],
        num_layers=sizes["layers"],
        num_heads=8,
        ffn_hidden_size=sizes["ffn"],
        max_positions=LENGTH,
        activation="silu",
        gated=True,
        moe=dict.fromkeys(range(sizes["layers"]), layer),
    )
    torch.manual_seed(0)
    # Weights come one layer at a time, as from a file: the whole is never there in bfloat16 where it is quantised.
    model = MoEGPT(config, device="meta", dtype=torch.bfloat16)
    for module in [each for each in model.modules() if isinstance(each, dmoe.MoE)]:
        module.to_empty(device="cpu")
        for part in module.modules():
            getattr(part, "reset_parameters", lambda: None)()
        if form is not None:
            dmoe.quant.quantize(module, form)
    for tensor_owner in model.modules():
        for name, parameter in list(tensor_owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=0.02)
                tensor_owner._parameters[name] = torch.nn.Parameter(value)
        for name, buffer in list(tensor_owner._buffers.items()):
            if buffer is not None and buffer.is_meta:
                tensor_owner._buffers[name] = torch.zeros_like(buffer, device="cpu")
    if adapted:
        return model, list(dmoe.lora.add(model, rank=RANK).values())
    return model, list(model.parameters())


def _train(way: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Resident bytes beyond those of the imports: with the model, and at their peak; and its bytes by what for."""
    empty = _resident("VmRSS")
    model, trained = _model(way, sizes)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    loaded = _resident("VmRSS") - empty
    for step in range(STEPS):
        ids = torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    held = [*model.parameters(), *model.buffers()]
    return {
        "loaded": loaded,
        "peak": _resident("VmHWM") - empty,
        "weights": sum(tensor.nbytes for tensor in held),
        "trained": sum(parameter.numel() for parameter in trained),
    }


def _check() -> None:
    """A small quantised model computes what its decoded weights do."""
    sizes = {"layers": 1, "hidden": 64, "ffn": 64, "experts": 4}
    ids = torch.arange(24).view(1, -1)
    for way, (form, _) in WAYS.items():
        if form is None:
            continue
        model, _ = _model(way, sizes)
        mine = model(ids).detach()
        dmoe.quant.dequantize(model)
        require_close(way, {"logits": relative_error(mine, model(ids).detach())}, 2e-2)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise CheckError(f"/proc/self/status says nothing of {field}")
    return int(found[1]) * 1024


def _report(results: list[dict[str, Any]], env: dict[str, Any], sizes: dict[str, int], name: str) -> str:
    base = next(entry["peak"] for entry in results if entry["way"] == "bf16, LoRA")
    rows = [
        [
            entry["way"],
            *(f"{entry[field] / 2**20:.0f}" for field in ("weights", "loaded", "peak")),
            f"{entry['peak'] / base:.2f}",
            f"{entry['trained']:,}",
        ]
        for entry in results
    ]
    told = ", ".join(f"{value} {field}" for field, value in sizes.items())
    header = ["", "weights, MiB", "resident with the model, MiB", "peak of training, MiB", "over bf16's", "trained"]
    parts = [
        "# Memory of a model under LoRA, by what its experts are held as",
        describe(env),
        f"![peak memory]({name}.png)",
        f"A GPT of {told}, {BATCH} sequences of {LENGTH} tokens in a step, rank {RANK}, AdamW; resident memory of a "
        "process beyond that of its imports. Attention and embeddings are bfloat16 everywhere.",
        markdown_table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


def _plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    figure, (axis,) = new_figure(1, width=8.5, height=3.6)
    names = [entry["way"] for entry in results][::-1]
    peaks = [entry["peak"] / 2**20 for entry in results][::-1]
    axis.barh(names, peaks, color="#56B4E9", height=0.6, label="peak of training")
    axis.barh(names, [e["weights"] / 2**20 for e in results][::-1], color="#0072B2", height=0.6, label="weights")
    for row, peak in enumerate(peaks):
        axis.text(peak, row, f" {peak:.0f}", va="center")
    axis.set_xlim(0, 1.15 * max(peaks))
    axis.set_xlabel("resident memory, MiB")
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(f"LoRA on a mixture, {env['hardware']}")
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
