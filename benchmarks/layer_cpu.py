"""How fast is ``dmoe.MoE`` on the CPU, a training step and inference, beside other ways to write the same layer?

    python benchmarks/layer_cpu.py [--quick] [--cases "T=512 H=512"] [--contestants "floor,HF eager"] [--threads 2]

One Qwen3-MoE-style layer on the same weights, outputs and gradients checked against a float64 loop over experts before
anything is timed. *Training* is forward and backward; *inference* is forward under ``torch.inference_mode()`` of a
module that evaluates. Each contestant has a process of its own, and they take turns. Two regimes:

- changing: every step has new tokens, so the rows per expert change from step to step, as in training;
- fixed: the same tokens again and again, which flatters whoever pays for each new shape.

``ONEDNN_MAX_CPU_ISA=AVX512_CORE``, or ``AVX2`` with ``ATEN_CPU_CAPABILITY=avx2`` and ``MKL_ENABLE_INSTRUCTIONS=AVX2``,
imitate other processors; the report and its files' name say so.
"""

from __future__ import annotations

from parts.harness import add_clock, arguments, checked, environment, publish, run_benchmark
from parts.layer_case import Case
from parts.layer_picture import plot
from parts.layer_report import REGIMES, report
from parts.layer_run import add_layer_options, chosen_cases, chosen_contestants, run_case, workers_of
from parts.processor import multiply_add_limits
from tqdm import tqdm

SHAPES = (  # T, H, F, E, K
    (512, 256, 128, 8, 2),
    (2048, 512, 256, 16, 4),
    (2048, 512, 128, 64, 8),
    (512, 512, 1024, 8, 2),
    (2048, 512, 1024, 8, 2),
    (512, 512, 128, 64, 8),
)
QUICK_SHAPES = (SHAPES[0], SHAPES[5])
PASSES = ("training", "inference")


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=25)
    parser.add_argument("--passes", default=",".join(PASSES), help="separated by commas")
    add_layer_options(parser)
    add_clock(parser)
    args = checked(parser)
    passes = args.passes.split(",")
    if not set(passes) <= set(PASSES):
        parser.error(f"--passes: expected some of {', '.join(PASSES)}, got {args.passes!r}")
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 3), min(args.seconds, 2.0)
    shapes = QUICK_SHAPES if args.quick else SHAPES
    every = [Case(*shape, dtype, one) for one in passes for dtype in args.dtypes.split(",") for shape in shapes]
    cases, names = chosen_cases(parser, args, every), chosen_contestants(parser, args)

    env = environment(args.threads, args.clock)
    env["limits"] = multiply_add_limits(args.threads)
    results = []
    with (
        workers_of(names, args) as workers,
        tqdm(total=len(cases) * len(REGIMES) * args.rounds, unit="round", mininterval=1) as bar,
    ):
        for case in cases:
            bar.set_postfix_str(case.label)
            results.append(run_case("layer_cpu", case, workers, args, tuple(REGIMES), lambda: bar.update()))
    publish(
        "layer_cpu",
        env,
        args,
        results,
        report=lambda name: report(results, env, name),
        plot=lambda path: plot(results, env, path),
    )


if __name__ == "__main__":
    run_benchmark(main)
