"""How fast is dmoe's layer inside Megatron-Core on the CPU, beside Megatron's own?

    python benchmarks/megatron_cpu.py [--quick] [--cases "E=64"] [--contestants SequentialMLP] [--threads 2]

Forward and backward of one MoE layer as Megatron's specs build it, with its balance loss, on the same weights. Output
and all gradients are checked against a float64 loop over experts before anything is timed. Each contestant has a
process of its own, and they take turns. Every step has new tokens, so the rows per expert change, as in training.

Needs ``pip install megatron-core``; without Transformer Engine its own experts on a CPU are ``SequentialMLP``.
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parts.harness import (
    COLOURS,
    arguments,
    checked,
    describe,
    environment,
    interleave,
    markdown_table,
    milliseconds,
    new_figure,
    publish,
    relative_error,
    run_benchmark,
    save_figure,
    stopwatch,
    time_cells,
)
from parts.layer_case import Case, make_step, make_weights
from parts.workers import Worker, worst_errors
from torch import Tensor
from torch.nn.functional import linear, silu
from tqdm import tqdm

SHAPES = (  # T, H, F, E, K
    (512, 512, 256, 16, 4),
    (2048, 512, 256, 16, 4),
    (512, 512, 128, 64, 8),
    (2048, 512, 128, 64, 8),
)
QUICK_SHAPES = ((256, 128, 64, 16, 4),)
CONTESTANTS = {
    "dmoe": "dmoe's layer",
    "dmoe's experts": "Megatron's router and dispatcher, dmoe's experts",
    "SequentialMLP": "Megatron's layer",
}
BALANCE = 0.01  # coefficient of the balance loss
SEQUENCES = 4  # of a batch
# Relative norms against float64. Half of bfloat16's last place is 2e-3 of a value; a gradient passes four roundings.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=25)
    parser.add_argument("--dtypes", default="fp32,bf16", help="separated by commas")
    args = checked(parser)
    shapes = QUICK_SHAPES if args.quick else SHAPES
    cases = [Case(*shape, dtype) for dtype in args.dtypes.split(",") for shape in shapes]
    cases = [case for case in cases if args.cases in case.label]
    wanted = ["dmoe", *args.contestants.split(",")] if args.contestants else list(CONTESTANTS)
    if not cases or not set(args.dtypes.split(",")) <= set(TOLERANCE) or set(wanted) - set(CONTESTANTS):
        parser.error(
            f"--cases {args.cases!r}, --dtypes {args.dtypes!r}, --contestants {args.contestants!r}: labels are like "
            f"{Case(*SHAPES[0], 'fp32').label!r}, dtypes {list(TOLERANCE)}, contestants {list(CONTESTANTS)}"
        )
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 3), min(args.seconds, 2.0)
    workers = {name: Worker(Bench, name, threads=args.threads) for name in CONTESTANTS if name in wanted}
    results: list[dict[str, Any]] = []
    try:
        release = workers["dmoe"].call("megatron")
        with tqdm(total=len(cases) * args.rounds, unit="round", mininterval=1, disable=None) as bar:
            for case in cases:
                bar.set_postfix_str(case.label)
                results.append(run_case(case, workers, args, lambda: bar.update()))
    finally:
        for worker in workers.values():
            worker.close()
    env = environment(args.threads)
    env["versions"]["megatron-core"] = release
    publish(
        "megatron_cpu",
        env,
        args,
        results,
        report=lambda name: report(results, env, name),
        plot=lambda path: plot(results, env, path),
    )


def run_case(case: Case, workers: dict[str, Worker], args: Any, tick: Callable[[], None]) -> dict[str, Any]:
    """Build, check and time one case."""
    for worker in workers.values():
        worker.call("build", case)
    errors = worst_errors(
        f"megatron_cpu, {case.label}", workers, lambda seed: reference(case, seed), TOLERANCE[case.dtype]
    )

    def turn(name: str) -> Callable[[int], float]:
        def seconds(i: int) -> float:  # two steps, of which the second counts; no seed comes twice
            first = 100 + 2 * (args.warmup + i)
            return float(workers[name].call("time", [first, first + 1]))

        return seconds

    timings = interleave(
        {name: turn(name) for name in workers},
        rounds=args.rounds,
        warmup=args.warmup,
        seconds_each=args.seconds,
        seed=args.seed,
        tick=tick,
    )
    return {"case": {**vars(case), "label": case.label}, "timings": timings, "errors": errors}


def reference(case: Case, seed: int) -> dict[str, Tensor]:
    """Output and gradients in float64: Megatron's layer as its formulas say, expert by expert."""
    weights = {name: w.double().requires_grad_() for name, w in make_weights(case).items()}
    x, grad = make_step(case, weights["router"].detach(), seed)
    x = x.double().requires_grad_()
    logits = linear(x, weights["router"])
    best, indices = logits.topk(case.top_k)
    gates = best.softmax(-1)
    y = torch.zeros_like(x)
    for expert in range(case.experts):
        tokens, slots = (indices == expert).nonzero(as_tuple=True)
        gate, up = linear(x[tokens], weights["gate_up"][expert]).chunk(2, -1)
        hidden = silu(gate) * up * gates[tokens, slots, None]
        y = y.index_add(0, tokens, linear(hidden, weights["down"][expert]))
    counts = torch.bincount(indices.flatten(), minlength=case.experts)
    scale = BALANCE * case.experts / (case.top_k * case.tokens**2)
    balance = scale * (logits.softmax(-1).sum(0) * counts).sum()
    torch.autograd.backward((y, balance), (grad.double(), torch.ones_like(balance)))
    grads = {name: w.grad for name, w in weights.items() if w.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


class Bench:
    """One contestant in its process."""

    def __init__(self, name: str) -> None:
        self.name = name
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        dist.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        from megatron.core import parallel_state, tensor_parallel

        _let_megatron_run_here()
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1, inference_rng_tracker=True)

    def megatron(self) -> str:
        """The release of megatron-core."""
        from megatron.core import __version__

        return str(__version__)

    def build(self, case: Case) -> None:
        """The layer of Megatron's spec, with the case's weights."""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
        from megatron.core.transformer.spec_utils import ModuleSpec, build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        from dmoe.integrations.megatron import convert_state, dmoe_block_spec, dmoe_experts_spec

        config = TransformerConfig(
            num_layers=1,
            hidden_size=case.hidden,
            num_attention_heads=1,
            num_moe_experts=case.experts,
            moe_ffn_hidden_size=case.ffn,
            moe_router_topk=case.top_k,
            moe_router_dtype="fp32",
            moe_aux_loss_coeff=BALANCE,
            moe_token_dispatcher_type="alltoall",
            gated_linear_unit=True,
            activation_func=silu,
            add_bias_linear=False,
            bias_activation_fusion=False,
            gradient_accumulation_fusion=False,
            use_cpu_initialization=True,
            params_dtype=case.torch_dtype,
        )
        makers = {"dmoe": dmoe_block_spec, "dmoe's experts": dmoe_experts_spec}
        block = makers.get(self.name, get_gpt_decoder_block_spec)(config, use_transformer_engine=False)
        mlp = block.layer_specs[0].submodules.mlp
        groups: dict[str, Any] = {"pg_collection": get_default_pg_collection()}
        self.layer = build_module(mlp, config=config) if isinstance(mlp, ModuleSpec) else mlp(config=config, **groups)
        self.layer.set_layer_number(1)
        self.layout = {"dmoe": "dmoe", "dmoe's experts": "dmoe_experts"}.get(self.name, "sequential")
        weights = make_weights(case)
        state = {"router.weight": weights["router"]}
        for expert in range(case.experts):
            prefix = f"experts.local_experts.{expert}.linear_fc"
            state |= {f"{prefix}1.weight": weights["gate_up"][expert], f"{prefix}2.weight": weights["down"][expert]}
        self.case, self.router = case, weights["router"]
        self.layer.load_state_dict(convert_state(state, self.layout))
        self.layer.train()

    def _step(self, seed: int) -> tuple[Tensor, Callable[[], Tensor]]:
        """The input, and what is timed."""
        x, grad = make_step(self.case, self.router, seed)
        shape = (self.case.tokens // SEQUENCES, SEQUENCES, self.case.hidden)
        x, grad = x.view(shape).requires_grad_(), grad.view(shape)
        self.layer.zero_grad(set_to_none=True)

        def run() -> Tensor:
            y = self.layer(x)[0]
            y.backward(grad)
            return y

        return x, run

    def errors(self, seed: int, path: str) -> dict[str, float]:
        """How far output and gradients are from the reference."""
        from dmoe.integrations.megatron import convert_state

        expected = torch.load(path)
        x, run = self._step(seed)
        y = run()
        grads = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.layer.named_parameters()
        }
        native = convert_state(grads, "sequential", num_experts=self.case.experts)
        prefix = "experts.local_experts.{}.linear_fc{}.weight"
        both = {
            name: torch.stack([native[prefix.format(expert, fc)] for expert in range(self.case.experts)])
            for name, fc in (("gate_up", 1), ("down", 2))
        }
        assert x.grad is not None
        found = {"y": y.flatten(0, 1), "x": x.grad.flatten(0, 1), "router": native["router.weight"], **both}
        return {name: relative_error(found[name], expected[name]) for name in expected}

    def time(self, seeds: list[int]) -> float:
        """Seconds of the last of some steps."""
        return [stopwatch(self._step(seed)[1]) for seed in seeds][-1]


def _let_megatron_run_here() -> None:
    """What its layer takes from CUDA without asking. Nothing here stands between a contestant and PyTorch."""
    if torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 asks for it where Transformer Engine is absent

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    done = types.SimpleNamespace(synchronize=lambda: None)  # copies to the host are done when they are asked for
    stream: Any = types.SimpleNamespace(record_event=lambda: done, synchronize=lambda: None)
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = stream
    torch.cuda.current_stream = lambda device=None: stream


# ------------------------------------------------------------------------------------------------------------- report


def report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    """The tables as Markdown."""
    names = list(results[0]["timings"])
    parts = [
        "# One training step of a MoE layer in Megatron-Core on the CPU",
        describe(env),
        f"![times of all contestants over dmoe's]({name}.png)",
        "Forward + backward with the balance loss, median milliseconds; in brackets, how many times dmoe's. Bold: the "
        "fastest. dmoe: `dmoe_block_spec`; dmoe's experts: `dmoe_experts_spec`, which keeps Megatron's router and "
        "all-to-all dispatcher; SequentialMLP: Megatron's own layer. One rank; every step has new tokens. Before "
        "timing, output and gradients of input, router and experts of each agreed with a float64 loop over experts, "
        "within a relative norm of "
        + " and ".join(f"{tolerance:.0e} ({dtype})" for dtype, tolerance in TOLERANCE.items())
        + ".",
    ]
    for dtype in dict.fromkeys(entry["case"]["dtype"] for entry in results):
        rows = []
        for entry in (entry for entry in results if entry["case"]["dtype"] == dtype):
            mine, cells = entry["timings"]["dmoe"], time_cells(entry["timings"], names, "dmoe", names)
            spread = f"{milliseconds(mine.p10)} to {milliseconds(mine.p90)}"
            rows.append([_shape(entry), *cells, spread])
        parts += [f"## {dtype}", markdown_table(["T, H, F, E, K", *names, "dmoe, p10 to p90"], rows)]
    lost = [
        f"- {entry['case']['label']}: dmoe is behind {name}"
        for entry in results
        for name, timing in entry["timings"].items()
        if name == "SequentialMLP" and timing.median < entry["timings"]["dmoe"].median
    ]
    parts.append("\n".join(lost) if lost else "dmoe's layer is faster than Megatron's own on every line.")
    return "\n\n".join(parts) + "\n"


def _shape(entry: dict[str, Any]) -> str:
    return ", ".join(str(entry["case"][key]) for key in ("tokens", "hidden", "ffn", "experts", "top_k"))


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """Times over dmoe's, a panel for each dtype."""
    dtypes = list(dict.fromkeys(entry["case"]["dtype"] for entry in results))
    names = list(results[0]["timings"])
    figure, axes = new_figure(len(dtypes), width=5.2 * len(dtypes), height=4.2)
    for axis, dtype in zip(axes, dtypes, strict=True):
        entries = [entry for entry in results if entry["case"]["dtype"] == dtype]
        for number, name in enumerate(names):
            places = [x + 0.8 * (number - (len(names) - 1) / 2) / len(names) for x in range(len(entries))]
            ratios = [entry["timings"][name].median / entry["timings"]["dmoe"].median for entry in entries]
            axis.bar(places, ratios, 0.76 / len(names), color=COLOURS[number], label=name, zorder=2)
            if name == "dmoe":
                for x, entry in zip(places, entries, strict=True):
                    shown = milliseconds(entry["timings"][name].median)
                    axis.annotate(f"{shown} ms", (x, 0.03), rotation=90, ha="center", va="bottom", color="white")
        axis.set_xticks(range(len(entries)), [_shape(entry).replace(", ", "\n") for entry in entries], fontsize=9)
        axis.grid(False, axis="x")
        axis.set_xlabel("T, H, F, E, K (downwards)")
        axis.set_title(dtype)
    axes[0].set_ylabel("training step, times dmoe's")
    axes[0].legend(frameon=False, loc="upper left")
    title = f"MoE layer in Megatron-Core {env['versions']['megatron-core']}, forward + backward"
    where = f"{env['hardware']}, {env['threads']} thread{'s' if env['threads'] > 1 else ''}"
    figure.suptitle(f"{title}; {where} (lower is better)", x=0.07, ha="left", fontsize=11)
    figure.subplots_adjust(top=0.86)
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
