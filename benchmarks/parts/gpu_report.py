"""The tables and the picture of ``layer_gpu.py``, from its results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts.gpu_contestants import CEILING, CONTESTANTS, OWN
from parts.gpu_kernels import kernel_table
from parts.gpu_shapes import H200, Shape
from parts.harness import COLOURS, markdown_table, milliseconds, new_figure, save_figure

Entry = dict[str, Any]
MARKERS = "osD^vP*Xph<>"


def shape_of(entry: Entry) -> Shape:
    """The size of a case."""
    case = entry["case"]
    return Shape(*(case[key] for key in ("name", "tokens", "hidden", "ffn", "experts", "top_k", "sonic_h100")))


def timing_of(entry: Entry, name: str) -> dict[str, Any]:
    """A contestant's figures: those of its CUDA graphs, or of single launches where it has none."""
    found: dict[str, Any] = entry.get("graphs", {}).get(name) or entry["timings"][name]
    return found


def teraflops(entry: Entry, name: str) -> tuple[float, float]:
    """TFLOP/s of forward and backward, counting the products only."""
    timing, flops = timing_of(entry, name), shape_of(entry).flops
    return flops[0] / timing["forward"].median / 1e12, flops[1] / timing["backward"].median / 1e12


def describe(env: dict[str, Any]) -> str:
    """What ran where."""
    gpu = env.get("gpu")
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    if gpu is None:
        return f"No GPU; {versions}; {env['date']}."
    rates = env.get("ceilings")
    measured = (
        f" Measured in this run: {rates['flops'] / 1e12:.0f} TFLOP/s (8192^3 bf16 product), "
        f"{rates['bytes'] / 1e12:.2f} TB/s (copy, read plus written)."
        if rates
        else ""
    )
    return (
        f"{gpu['name']}, CUDA {gpu['cuda']}, driver {gpu['driver_version']}; {versions}; "
        f"host {env['hardware']}, {env['cores']} cores; {env['date']}.{measured}"
    )


def report(results: list[Entry], env: dict[str, Any], name: str) -> str:
    """Everything as Markdown."""
    training = [entry for entry in results if "timings" in entry]
    decode = [entry for entry in results if "decode" in entry]
    dummy = "**DUMMY: every figure on this page is invented, to show what the report looks like.**"
    parts = ["# Experts and layer on a GPU", *([dummy] if env.get("dummy") else []), describe(env)]
    if training:
        parts += [
            f"![TFLOP/s of all contestants]({name}.png)",
            "bfloat16, SiLU-gated experts; every contestant has the same weights, tokens and routing, and agreed with "
            "float64 in output and all gradients before it was timed. Forward keeps what backward needs; each is a "
            "CUDA graph, replayed (with *, launched one by one: it cannot be captured). Medians of CUDA events over "
            "two passes, contestants in turns, before every run the L2 cache flushed and the device kept waiting "
            "while the host runs ahead.",
            "## dmoe",
            _own_table(training),
            f"*floor*: the least time on a chip of {H200.flops / 1e12:.0f} TFLOP/s and {H200.bytes / 1e12:.1f} TB/s, "
            "summed over the kernels that a good implementation launches; *share* is floor over time, in brackets with "
            "the rates measured in this run. *SonicMoE*: dmoe's TFLOP/s over those that SonicMoE's authors report on "
            "an **H100**, whose memory is slower; the contestant of that name, where it ran, is the fair comparison. "
            "*eager*: both passes launched one by one. *held*: memory between forward and backward beside x, y and the "
            "weights, over the least possible (the pre-activation). *spread*: between the two passes.",
            "## Milliseconds, forward + backward",
            _times_table(training),
            "## Memory, MiB: held between forward and backward / peak of the step",
            _memory_table(training),
        ]
        measured = [
            (_label(entry), shape_of(entry), passes)
            for entry in training
            for name, passes in entry.get("kernels", {}).items()
            if name == "dmoe layer" and isinstance(passes, dict)
        ]
        if measured:
            parts += [
                "## Kernels of the layer beside what was predicted",
                kernel_table(measured),
                "Seconds by PyTorch's profiler, which adds a little; predictions and where they come from: "
                "`parts/gpu_predictions.py`.",
            ]
    if decode:
        parts += [
            "## Decode: a forward of few tokens, microseconds, launched one by one / as a CUDA graph",
            _decode_table(decode),
            "*floor*: the weights of the experts in use, read once.",
        ]
    return "\n\n".join([*parts, *_remarks(results)]) + "\n"


def _names(entries: list[Entry], key: str) -> list[str]:
    return [name for name in CONTESTANTS if any(name in entry.get(key, {}) for entry in entries)]


def _label(entry: Entry) -> str:
    shape = shape_of(entry)
    skew = "" if entry["case"]["routing"] == "uniform" else f", {entry['case']['routing']}"
    return f"{shape.name} ({', '.join(map(str, shape.dims))}{skew})"


def _own_table(entries: list[Entry]) -> str:
    header = ["model (T, H, F, E, K)", "", "fwd ms", "bwd ms", "floor ms", "share", "TFLOP/s", "SonicMoE", "eager ms"]
    header += ["launches", "held", "peak MiB", "spread"]
    rows = []
    for entry in entries:
        for name in OWN:
            if name not in entry["timings"]:
                why = entry["refused"].get(name) or entry["not_run"].get(name)
                if why:
                    rows.append([_label(entry), name, "-", "-", *[""] * 8, why])
                continue
            rows.append(_own_row(entry, name))
    return markdown_table(header, rows)


def _own_row(entry: Entry, name: str) -> list[str]:
    timing, shape = timing_of(entry, name), shape_of(entry)
    eager = entry["timings"][name]
    passes = [timing["forward"].median, timing["backward"].median]
    chip, measured = entry["floor"]["chip"], entry["floor"]["measured"]
    share = " / ".join(f"{a / t:.0%} ({b / t:.0%})" for t, a, b in zip(passes, chip, measured, strict=True))
    speed = teraflops(entry, name)
    ratio = "-"
    if shape.sonic_h100 and name == "dmoe":
        ratio = " / ".join(f"{mine / theirs:.2f}" for mine, theirs in zip(speed, shape.sonic_h100, strict=True))
    used = entry["memory"][name]
    return [
        _label(entry),
        name if name in entry.get("graphs", {}) else f"{name} *",
        *map(milliseconds, passes),
        " / ".join(map(milliseconds, chip)),
        share,
        " / ".join(f"{value:.0f}" for value in speed),
        ratio,
        " + ".join(milliseconds(eager[part].median) for part in ("forward", "backward")),
        str(entry.get("launches", {}).get(name, "-")),
        f"{used['held'] / shape.least_saved:.2f}",
        f"{used['peak'] / 2**20:.0f}",
        f"{timing['spread']:.1%}",
    ]


def _times_table(entries: list[Entry]) -> str:
    names = _names(entries, "timings")
    rows = []
    for entry in entries:
        rivals = [name for name in names if name in entry["timings"] and name not in (*OWN[1:], CEILING)]
        best = min(rivals, key=lambda name: timing_of(entry, name)["step"].median, default=None)
        cells = []
        for name in names:
            if name not in entry["timings"]:
                cells.append("refused" if name in entry["refused"] else "not run")
                continue
            timing = timing_of(entry, name)
            shown = f"{milliseconds(timing['forward'].median)} + {milliseconds(timing['backward'].median)}"
            shown += "" if name in entry.get("graphs", {}) else " *"
            cells.append(f"**{shown}**" if name == best else shown)
        rows.append([_label(entry), *cells])
    return markdown_table(["model (T, H, F, E, K)", *names], rows)


def _memory_table(entries: list[Entry]) -> str:
    names = [name for name in _names(entries, "memory") if any(entry["memory"].get(name) for entry in entries)]
    rows = []
    for entry in entries:
        cells = []
        for name in names:
            used = entry["memory"].get(name)
            cells.append(f"{used['held'] / 2**20:.0f} / {used['peak'] / 2**20:.0f}" if used else "-")
        rows.append([_label(entry), f"{shape_of(entry).least_saved / 2**20:.0f}", *cells])
    return markdown_table(["model (T, H, F, E, K)", "least held", *names], rows)


def _decode_table(entries: list[Entry]) -> str:
    names = _names(entries, "decode")
    rows = []
    for entry in entries:
        cells = []
        for name in names:
            found = entry["decode"].get(name)
            if found is None:
                cells.append("refused" if name in entry["refused"] else "not run")
                continue
            graph = found.get("graph")
            shown = f"{graph * 1e6:.1f}" if isinstance(graph, float) else "-"
            cells.append(f"{found['eager'] * 1e6:.0f} / {shown}")
        rows.append([_label(entry), f"{entry['floor']['chip'] * 1e6:.1f}", *cells])
    return markdown_table(["model (T, H, F, E, K)", "floor", *names], rows)


def _remarks(results: list[Entry]) -> list[str]:
    """What did not run, and why: once for all cases of the same reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in results:
        for key in ("left_out", "broken"):
            if key in entry:
                what = "everything" if key == "left_out" or "errors" not in entry else "what is missing"
                reasons.setdefault((what, entry[key]), []).append(_label(entry))
        for name, why in (*entry.get("not_run", {}).items(), *entry.get("refused", {}).items()):
            reasons.setdefault((name, why), []).append(_label(entry))
        for name, why in entry.get("no_graph", {}).items():
            reasons.setdefault((f"{name} as a graph", why), []).append(_label(entry))
    if not reasons:
        return []
    ran = sum("left_out" not in entry for entry in results)
    lines = []
    for (name, why), labels in sorted(reasons.items()):
        some = "; ".join(labels) if len(labels) < 5 else f"{len(labels)} sizes"
        where = "" if len(labels) >= ran else f" [{some}]"
        lines.append(f"- {name}: {why}{where}")
    return ["## Not run, or refused by the check", "\n".join(lines)]


def plot(results: list[Entry], env: dict[str, Any], path: Path) -> None:
    """TFLOP/s of forward and backward, the sizes side by side, under the floor's."""
    entries = [entry for entry in results if "timings" in entry]
    figure, axes = new_figure(2, width=15, height=5)
    labels = []
    for entry in entries:
        shape, routing = shape_of(entry), entry["case"]["routing"]
        labels.append("\n".join([shape.name.split("-")[0], *map(str, shape.dims), routing[:4]]))
    for number, (axis, title) in enumerate(zip(axes, ("forward", "backward"), strict=True)):
        bounds = [shape_of(e).flops[number] / e["floor"]["chip"][number] / 1e12 for e in entries]
        for x, bound in enumerate(bounds):
            axis.hlines(bound, x - 0.4, x + 0.4, color="#666666", lw=2, label="floor" if x == 0 else None)
        for i, name in enumerate(_names(entries, "timings")):
            points = [(x, teraflops(e, name)[number]) for x, e in enumerate(entries) if name in e["timings"]]
            style = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "ls": "none"}
            axis.plot(*zip(*points, strict=True), ms=9 if name == "dmoe" else 6, label=name, **style)
        axis.set_xticks(range(len(entries)), labels, fontsize=7)
        axis.set_xlim(-0.6, max(len(entries), 1) - 0.4)
        axis.set_ylim(0)
        axis.set_title(title)
    axes[0].set_ylabel("TFLOP/s of the products")
    handles, names = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="lower center", ncol=8, frameon=False, bbox_to_anchor=(0.5, -0.16))
    where = env["gpu"]["name"] if "gpu" in env else "no GPU"
    dummy = "DUMMY, invented figures: " if env.get("dummy") else ""
    figure.suptitle(f"{dummy}MoE experts in bfloat16 on {where} (higher is better)", x=0.07, ha="left")
    save_figure(figure, path)
