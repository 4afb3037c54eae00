"""How many bytes and milliseconds does expert parallelism cost on 8 to 4,096 GPUs? A model, no measurement.

    python benchmarks/ep_model.py [--gpus 8,64,4096] [--tokens 4096,128] [--routings uniform,zipf:0.5]
    python benchmarks/ep_model.py --recorded ids.pt --experts 64   # torch.save([ids of rank 0, ...], "ids.pt")
    python benchmarks/ep_model.py --links mine.json                # a copy of parts/ep_links.json with other figures

**Rows.** A token goes once to each rank that holds any of its experts (deduplicated), or once for each of its K choices
(naive). With E experts on W ranks and uniform choices that is ``W * (1 - C(E - E/W, K) / C(E, K))`` ranks, its own
included; if W > E each expert is cut over W/E ranks and a token goes to all of them. Where the rows come from:

- uniform: the expectation, in this closed form; every rank sends T/W of it to every rank;
- zipf:s : shares of 16,384 sampled tokens (seeded), the same for all ranks: the r-th popular expert ~ ``r ** -s``, the
  experts shuffled once so that popular ones are spread; random differences between ranks are left out;
- recorded: counted exactly if the file has as many ranks as there are GPUs; else the shares of all its tokens.

**Bytes** of one rank in forward (``parts.ep_bytes.Wire``; equal to what ``AllToAllDispatcher`` sends, byte for byte,
where rows are counted)::

    rows sent * (row + choices) + rows received * result + (W - 1) * counts

with ``row = 2 H`` in bfloat16, ``H + 4`` in fp8 (a float32 scale for each row), ``choices = 2 K * 4`` (K gate weights,
K expert numbers), ``result = 2 H``, ``counts = 48``. The naive all-to-all sends no choices and ``8 E/W`` counts.

**Seconds** (``parts/ep_links.py``): on each kind of link ``messages * latency + max(sent, received) / bandwidth``; the
kinds work at the same time, the slowest rank counts. Four exchanges follow each other: counts, choices, rows; then
results. From 63 messages on choices travel with the rows, in three exchanges. Flat: W - 1 messages in each. Two-level:
L - 1 inside a node of L, then N - 1 between N nodes.

**Overlap**: the experts' share is ``6 H F`` operations for each choice (gated, forward), at the rate in the link table.
C chunks of a rank's experts are dispatched one after the other while another computes, and a shared expert runs beside
the first. Chunks cost: a token then travels once per (rank, chunk), and every chunk pays its messages. The best C of
1, 2, 4, 8 that divides E/W is reported, with the milliseconds that stay visible. Experts in chunks are taken as equal.

**Copies** of the hottest experts on ranks with less to do (``balance_ranks="replicate"``): ``parts/ep_copies.py``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from parts.ep_bytes import (
    Wire,
    copies_closed_form,
    draw_choices,
    experts_per_rank,
    load_choices,
    naive_rows_to_ranks,
    rows_to_ranks,
)
from parts.ep_copies import compare, limits_of
from parts.ep_copies import plot as plot_copies
from parts.ep_copies import table as table_of_copies
from parts.ep_links import DEFAULT_LINKS, Machine, Phase, by_node, flat, load_machine, overlapped, seconds, two_level
from parts.harness import COLOURS, RESULTS, label_lines, markdown_table, new_figure, save_figure
from torch import Tensor
from tqdm import tqdm

import dmoe
from dmoe.parallel.dispatch import JOIN_FROM

SAMPLED = 16384  # tokens
WAYS: dict[str, Callable[[Tensor, int], list[Phase]]] = {"flat": flat, "two-level": two_level}
COPIES = 2, 0.05  # that a rank hosts at most, and how much more than the mean it may compute
# What travels: (naive, narrow).
FORMS = {
    "naive bf16": (True, False),
    "naive fp8": (True, True),
    "dedup bf16": (False, False),
    "dedup fp8": (False, True),
}


@dataclass(frozen=True)
class Setting:
    """One layer on one number of GPUs: T tokens on each."""

    gpus: int
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    shared: int
    routing: str


@dataclass(frozen=True)
class Routing:
    """A name, and choices: none for uniform, else those of one or more ranks."""

    name: str
    choices: tuple[Tensor, ...] = ()

    def counted(self, setting: Setting) -> bool:
        """Whether rows are counted token by token rather than expected."""
        return len(self.choices) == setting.gpus

    def rows(self, setting: Setting, *, naive: bool, chunks: int = 1) -> Tensor:
        """The ``(W, W)`` matrix of rows; with a rank's experts in chunks, a row for each chunk that needs the token."""
        ranks, experts = setting.gpus, setting.experts
        count = naive_rows_to_ranks if naive else rows_to_ranks

        def of_choices(choices: Tensor) -> Tensor:
            return count(choices, experts, ranks * chunks).view(ranks, chunks).sum(1)

        if self.counted(setting):
            return torch.stack([of_choices(choices) for choices in self.choices])
        if self.choices:
            pooled = torch.cat(self.choices)
            shares = of_choices(pooled) / max(len(pooled), 1)
        else:
            pieces = experts_per_rank(experts, ranks)[1]
            copies = setting.top_k * pieces if naive else copies_closed_form(ranks * chunks, experts, setting.top_k)
            shares = torch.full((ranks,), copies / ranks, dtype=torch.float64)
        return (setting.tokens * shares).expand(ranks, ranks)

    def rows_to_nodes(self, setting: Setting, node: int) -> Tensor:
        """The ``(W, N)`` matrix of rows with each token once to each node of its experts."""
        ranks, nodes = setting.gpus, setting.gpus // min(node, setting.gpus)
        if self.counted(setting):
            return torch.stack([rows_to_ranks(choices, setting.experts, nodes) for choices in self.choices])
        if self.choices:
            pooled = torch.cat(self.choices)
            shares = rows_to_ranks(pooled, setting.experts, nodes) / max(len(pooled), 1)
        else:
            copies = copies_closed_form(nodes, setting.experts, setting.top_k)
            shares = torch.full((nodes,), copies / nodes, dtype=torch.float64)
        return (setting.tokens * shares).expand(ranks, nodes)


def make_routing(name: str, setting: Setting, seed: int = 0) -> Routing:
    """``uniform``, or ``zipf:s`` sampled for the setting's E and K.

    Raises:
        ValueError: another name.
    """
    kind, _, exponent = name.partition(":")
    if name == "uniform":
        return Routing(name)
    try:
        zipf = float(exponent)
    except ValueError:
        zipf = -1.0
    if kind != "zipf" or not 0 <= zipf < float("inf"):
        raise ValueError(f"routing: expected 'uniform' or 'zipf:s' with s >= 0, got {name!r}")
    return Routing(name, (draw_choices(SAMPLED, setting.experts, setting.top_k, zipf=zipf, seed=seed),))


# ------------------------------------------------------------------------------------------------------------ model


def evaluate(setting: Setting, routing: Routing, machine: Machine) -> dict[str, Any]:
    """Bytes, messages and seconds of one layer's forward, for every form and way."""
    pieces = experts_per_rank(setting.experts, setting.gpus)[1]
    tokens = sum(len(c) for c in routing.choices) / setting.gpus if routing.counted(setting) else setting.tokens
    naive_rows = routing.rows(setting, naive=True)
    busiest = float(naive_rows.sum(0).max())
    compute = 6 * setting.hidden * setting.ffn / pieces * busiest / machine.flops
    beside = 6 * setting.hidden * setting.ffn * setting.shared * tokens / machine.flops
    found: dict[str, Any] = {
        "setting": asdict(setting),
        "rows": "counted" if routing.counted(setting) else "expected",
        "copies": {},
        "bytes_sent": {},
        "link_bytes": {},
        "messages": {},
        "seconds": {},
        "compute_seconds": compute,
        "shared_seconds": beside,
        "load_over_mean": busiest / max(float(naive_rows.sum(0).double().mean()), 1e-30),
        "overlap": {},
    }
    for form, (naive, narrow) in FORMS.items():
        rows = naive_rows if naive else routing.rows(setting, naive=False)
        wire = wire_of(setting, naive=naive, narrow=narrow)
        sent = wire.forward(rows).double()
        found["copies"][form] = float(rows.sum()) / max(tokens * setting.gpus, 1e-30)
        found["bytes_sent"][form] = {"mean": float(sent.mean()), "busiest": float(sent.max())}
        for way in WAYS:
            key = f"{form}, {way}"
            phases = WAYS[way](rows, machine.node)
            found["link_bytes"][key] = link_bytes(phases, wire)
            found["messages"][way] = sum(p.inside_messages + p.between_messages for p in phases)
            found["seconds"][key] = sum(parts_seconds(rows, wire, way, machine))
            if not naive:
                found["overlap"][key] = best_overlap(setting, routing, wire, way, machine, compute, beside)
        if not naive:
            phases = by_node(rows, routing.rows_to_nodes(setting, machine.node), machine.node)
            found["link_bytes"][f"{form}, by node"] = link_bytes(phases, wire)
            found["seconds"][f"{form}, by node"] = by_node_seconds(phases, wire, machine)
        if form == "dedup bf16":
            limits = limits_of(setting, machine, *COPIES)
            found["level"] = compare(setting, routing.choices, machine, wire, rows.double(), limits)
    return found


def wire_of(setting: Setting, *, naive: bool, narrow: bool, dtype: str = "bf16") -> Wire:
    """The bytes of a row and what goes with it."""
    if naive:
        return Wire.naive(setting.hidden, experts_per_rank(setting.experts, setting.gpus)[0], dtype, narrow=narrow)
    return Wire.deduplicated(setting.hidden, setting.top_k, dtype, narrow=narrow)


def link_bytes(phases: list[Phase], wire: Wire) -> dict[str, float]:
    """Bytes of rows, choices and results that the busiest rank sends in a forward, by kind of link; counts are not in.

    The rank that sends most is meant: rows there and results back.
    """
    there, back = wire.row + wire.choices, wire.result
    inside = sum(p.inside_sent * there + p.inside_received * back for p in phases)
    between = sum(p.between_sent * there + p.between_received * back for p in phases)
    return {name: float(torch.as_tensor(total).max()) for name, total in (("inside", inside), ("between", between))}


def parts_seconds(rows: Tensor, wire: Wire, way: str, machine: Machine) -> tuple[float, float, float]:
    """Seconds of the counts, of rows and choices there, and of results back."""
    phases = WAYS[way](rows, machine.node)
    everyone = WAYS[way](torch.ones(1, 1, dtype=rows.dtype).expand(len(rows), len(rows)), machine.node)
    back = [phase.back() for phase in reversed(phases)]
    if joins(phases):
        there = seconds(phases, wire.row + wire.choices, machine)
    else:
        there = seconds(phases, wire.row, machine) + (seconds(phases, wire.choices, machine) if wire.choices else 0.0)
    return seconds(everyone, wire.counts, machine), there, seconds(back, wire.result, machine)


def by_node_seconds(phases: list[Phase], wire: Wire, machine: Machine) -> float:
    """Seconds of two dispatches one after the other, each with counts of its own, and of the way back."""
    total = seconds([phase.back() for phase in reversed(phases)], wire.result, machine)
    for phase in phases:
        messages = phase.inside_messages + phase.between_messages
        link = machine.inside if phase.inside_messages else machine.between
        total += messages * (link.latency + wire.counts / link.bandwidth)
        if joins([phase]):
            total += seconds([phase], wire.row + wire.choices, machine)
        else:
            total += seconds([phase], wire.row, machine) + seconds([phase], wire.choices, machine)
    return total


def joins(phases: list[Phase]) -> bool:
    """Whether choices travel with the rows, as the dispatcher decides it: where messages are many."""
    return sum(phase.inside_messages + phase.between_messages for phase in phases) >= JOIN_FROM


def best_overlap(
    setting: Setting, routing: Routing, wire: Wire, way: str, machine: Machine, compute: float, beside: float
) -> dict[str, float]:
    """The number of chunks that leaves least of the exchanges visible, and how much that is."""
    each = experts_per_rank(setting.experts, setting.gpus)[0]
    best: dict[str, float] = {}
    alone = 0.0
    for chunks in (1, 2, 4, 8):
        if each % chunks:
            continue
        rows = routing.rows(setting, naive=False, chunks=chunks) / chunks
        counts, there, back = parts_seconds(rows, wire, way, machine)
        if chunks == 1:
            alone = counts + there + back
        total = overlapped(counts, [there] * chunks, [compute / chunks] * chunks, [back] * chunks, beside)
        visible = total - compute - beside
        if not best or visible < best["visible_seconds"]:
            hidden = 1 - visible / alone if alone else 0.0
            best = {"chunks": chunks, "visible_seconds": visible, "hidden_share": hidden}
    return best


# ------------------------------------------------------------------------------------------------------------ report


def main() -> None:
    """Evaluate, print, write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--gpus", default="8,16,32,64,128,256,512,1024,2048,4096", help="separated by commas")
    parser.add_argument("--tokens", default="4096,128", help="on each GPU, separated by commas")
    parser.add_argument("--hidden", type=int, default=7168, help="H")
    parser.add_argument("--ffn", type=int, default=2048, help="F of each expert")
    parser.add_argument("--experts", type=int, default=256, help="E; more where there are more GPUs, one on each")
    parser.add_argument("--keep-experts", action="store_true", help="never more than E: cut along F over spare GPUs")
    parser.add_argument("--top-k", type=int, default=8, help="K")
    parser.add_argument("--shared", type=int, default=1, help="shared experts of width F, computed beside the dispatch")
    parser.add_argument("--routings", default="uniform,zipf:0.5", help="uniform or zipf:s, separated by commas")
    parser.add_argument("--skews", default="0,0.25,0.5,0.75,1,1.25,1.5", help="of Zipf's law, for the plot of copies")
    parser.add_argument("--skew-gpus", default="8,64,512,4096", help="for the plot of copies; with the first --tokens")
    parser.add_argument("--recorded", type=Path, help="expert_indices by torch.save, one (T, K) or a list by rank")
    parser.add_argument("--links", type=Path, default=DEFAULT_LINKS, help="JSON of nodes and links")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON, the table and the plot")
    parser.add_argument("--seed", type=int, default=0, help="of sampled tokens")
    args = parser.parse_args()
    try:
        results, machine = model(args)
        skewed = [] if args.recorded else skews(args, machine)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    versions = {"dmoe": dmoe.__version__, "torch": torch.__version__}
    about = {"date": datetime.date.today().isoformat(), "versions": versions, "machine": asdict(machine)}
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "links", "recorded")}
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"ep_model_{machine.name.lower().replace(' ', '-')}_{about['date']}"
    written = {**about, "settings": kept, "results": results, "skews": skewed}
    base.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    text = report(results, skewed, machine, about, base.name)
    base.with_suffix(".md").write_text(text)
    plot(results, machine, base.with_suffix(".png"))
    if skewed:
        title = (
            f"A model of copies of the hottest experts: {machine.name}, {skewed[0]['setting']['tokens']} tokens a GPU"
        )
        plot_copies(skewed, title, base.with_name(f"{base.name}_copies.png"))
    print(text)
    print(f"written: {base.name}.json, .md, .png{', _copies.png' if skewed else ''}")


def model(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Machine]:
    """Every routing, number of tokens and number of GPUs that was asked for.

    Raises:
        ValueError, TypeError, OSError: an option, a link table or a recorded file that cannot be; it is named.
    """
    machine = load_machine(args.links)
    gpus, tokens = (integers(name, getattr(args, name)) for name in ("gpus", "tokens"))
    for name in ("hidden", "ffn", "experts", "top_k"):
        integers(name, str(getattr(args, name)))
    if args.shared < 0:
        raise ValueError(f"--shared: expected at least 0, got {args.shared}")
    recorded = Routing("recorded", tuple(load_choices(args.recorded, args.experts))) if args.recorded else None
    names = [name for name in args.routings.split(",") if name] if recorded is None else ["recorded"]
    results = []
    for name in names:
        made: dict[int, Routing] = {}
        for ranks in tqdm(gpus, desc=name, unit="size"):
            fixed = args.keep_experts or recorded is not None
            experts = args.experts if fixed else max(args.experts, ranks)
            top_k = recorded.choices[0].shape[1] if recorded else args.top_k
            setting = Setting(ranks, 0, args.hidden, args.ffn, experts, top_k, args.shared, name)
            if experts not in made:
                made[experts] = recorded or make_routing(name, setting, args.seed)
            exact = made[experts].counted(setting)
            for count in tokens[:1] if exact else tokens:
                found = evaluate(replace(setting, tokens=count), made[experts], machine)
                results.append(found)
    return results, machine


def skews(args: argparse.Namespace, machine: Machine) -> list[dict[str, Any]]:
    """Steps with copies and without for routings from even to skewed, with the first of the numbers of tokens.

    Raises:
        ValueError: an option that cannot be; it is named.
    """
    tokens, found = integers("tokens", args.tokens)[0], []
    for ranks in tqdm(integers("skew_gpus", args.skew_gpus), desc="skews", unit="size"):
        experts = args.experts if args.keep_experts else max(args.experts, ranks)
        for skew in args.skews.split(","):
            setting = Setting(ranks, tokens, args.hidden, args.ffn, experts, args.top_k, args.shared, f"zipf:{skew}")
            routing = make_routing(setting.routing, setting, args.seed)
            wire, rows = wire_of(setting, naive=False, narrow=False), routing.rows(setting, naive=False).double()
            level = compare(setting, routing.choices, machine, wire, rows, limits_of(setting, machine, *COPIES))
            found.append({"setting": asdict(setting), "level": level})
    return found


def integers(name: str, text: str) -> list[int]:
    """Positive integers, separated by commas.

    Raises:
        ValueError: anything else; the message has the option's name.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        option = name.replace("_", "-")
        raise ValueError(f"--{option}: expected integers of at least 1, separated by commas, got {text!r}")
    return numbers


def report(
    results: Sequence[dict[str, Any]],
    skewed: Sequence[dict[str, Any]],
    machine: Machine,
    about: dict[str, Any],
    name: str,
) -> str:
    """All tables as Markdown."""
    first = results[0]["setting"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    parts = [
        "# What expert parallelism costs on more GPUs than one has",
        f"A model, not a measurement: `ep_model.py`, whose docstring has the formulas; {versions}; {about['date']}. "
        "Its rows and bytes are what the dispatcher sends, checked byte for byte on 2 and 4 gloo ranks; its seconds "
        "follow from the link table and nothing else.",
        f"![milliseconds over GPUs]({name}.png)",
        f"One layer's forward: H = {first['hidden']}, F = {first['ffn']}, K = {first['top_k']}, {first['shared']} "
        f"shared experts. Nodes of {machine.node}; "
        + "; ".join(
            f"{link.name} {link.bandwidth / 1e9:g} GB/s each way, {link.latency * 1e6:g} us a message"
            for link in (machine.inside, machine.between)
        )
        + f"; {machine.flops / 1e12:.0f} TFLOP/s. MB (10^6 bytes) are those that the busiest rank sends in a forward, "
        "counts and results included; *between nodes* those of them that cross InfiniBand. Milliseconds are counts, "
        "dispatch and combine in bf16 unless fp8 is said (which narrows the way to the experts only). *Visible* is "
        "what overlap leaves of the faster way in bf16, deduplicated, with so many chunks of experts.",
    ]
    for routing in dict.fromkeys(found["setting"]["routing"] for found in results):
        for tokens in dict.fromkeys(found["setting"]["tokens"] for found in results):
            chosen = [f for f in results if f["setting"]["routing"] == routing and f["setting"]["tokens"] == tokens]
            if chosen:
                how = " and ".join(sorted({f["rows"] for f in chosen}))
                parts += [f"## {routing}, {tokens} tokens on each GPU (rows {how})", _table(chosen), reading(chosen)]
    copied = [found for found in [*results, *skewed] if found["level"] is not None]
    if copied:
        parts += [
            "## With copies of the hottest experts",
            f"At most {COPIES[0]} copies on a rank, at most {1 + COPIES[1]:g} means where these allow it. Rows are "
            "those that the busiest rank's experts compute; a copy is made for no fewer rows than pay for its "
            "weights. A step is forward and backward of one layer in bf16, flat, deduplicated.",
            *([f"![step time over skew]({name}_copies.png)"] if skewed else []),
            table_of_copies(copied),
        ]
    return "\n\n".join(parts) + "\n"


def reading(results: Sequence[dict[str, Any]]) -> str:
    """In words: what deduplication saves, and from where two levels are the faster way."""
    share = ", ".join(
        f"{f['bytes_sent']['dedup bf16']['mean'] / f['bytes_sent']['naive bf16']['mean']:.0%} on {f['setting']['gpus']}"
        for f in results
        if f["setting"]["gpus"] in (8, 16, 32, 64, 256)
    )
    lines = [f"- Deduplicated bytes over naive ones: {share} GPUs."] if share else []
    for form in ("dedup bf16", "dedup fp8"):
        faster = [
            (f["setting"]["gpus"], f["seconds"][f"{form}, flat"] / f["seconds"][f"{form}, two-level"]) for f in results
        ]
        wins = [f"{ratio:.2f} times on {gpus}" for gpus, ratio in faster if ratio > 1]
        lines.append(f"- Two levels against the flat exchange, {form}: " + (", ".join(wins) or "never faster") + ".")
        took = [(f["setting"]["gpus"], f["seconds"]) for f in results]
        saved = [(gpus, each[f"{form}, two-level"] / each[f"{form}, by node"]) for gpus, each in took]
        wins = [f"{ratio:.2f} times on {gpus}" for gpus, ratio in saved if ratio > 1]
        lines.append(f"- Once per node against two levels, {form}: " + (", ".join(wins) or "never faster") + ".")
    return "\n".join(lines)


HEADER = (
    "GPUs",
    "E",
    "copies, naive",
    "dedup",
    "MB, naive",
    "dedup",
    "dedup fp8",
    "between nodes, dedup",
    "once per node",
    "messages, flat",
    "two-level",
    "ms flat, naive",
    "dedup",
    "dedup fp8",
    "ms two-level, dedup",
    "dedup fp8",
    "ms once per node, dedup",
    "ms of experts",
    "ms visible (chunks)",
    "hidden",
    "load / mean",
)


def _table(results: list[dict[str, Any]]) -> str:
    rows = []
    for found in results:
        sent, took, link = found["bytes_sent"], found["seconds"], found["link_bytes"]
        faster = min(WAYS, key=lambda way: took[f"dedup bf16, {way}"])
        overlap = found["overlap"][f"dedup bf16, {faster}"]
        cells = [
            str(found["setting"]["gpus"]),
            str(found["setting"]["experts"]),
            *(f"{found['copies'][form]:.2f}" for form in ("naive bf16", "dedup bf16")),
            *(significant(sent[form]["busiest"] / 1e6) for form in ("naive bf16", "dedup bf16", "dedup fp8")),
            *(significant(link[f"dedup bf16, {way}"]["between"] / 1e6) for way in ("flat", "by node")),
            *(str(found["messages"][way]) for way in WAYS),
            *(significant(1e3 * took[f"{form}, flat"]) for form in ("naive bf16", "dedup bf16", "dedup fp8")),
            *(significant(1e3 * took[f"{form}, two-level"]) for form in ("dedup bf16", "dedup fp8")),
            significant(1e3 * took["dedup bf16, by node"]),
            significant(1e3 * (found["compute_seconds"] + found["shared_seconds"])),
            f"{significant(1e3 * overlap['visible_seconds'])} ({overlap['chunks']:.0f})",
            f"{overlap['hidden_share']:.0%}",
            f"{found['load_over_mean']:.2f}",
        ]
        rows.append(cells)
    return markdown_table(HEADER, rows)


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"


def plot(results: Sequence[dict[str, Any]], machine: Machine, path: Path) -> None:
    """Milliseconds over GPUs, a panel for each routing and number of tokens."""
    keys = list(dict.fromkeys((f["setting"]["routing"], f["setting"]["tokens"]) for f in results))
    figure, axes = new_figure(len(keys), width=5.6 * len(keys), height=4.8)
    lines = {
        "naive bf16, flat": "-",
        "dedup bf16, flat": "-",
        "dedup fp8, flat": "-",
        "dedup bf16, two-level": "--",
        "dedup fp8, two-level": "--",
    }
    ends_of: list[list[tuple[float, float, str, str]]] = []
    for axis, (routing, tokens) in zip(axes, keys, strict=True):
        chosen = [f for f in results if (f["setting"]["routing"], f["setting"]["tokens"]) == (routing, tokens)]
        xs = [f["setting"]["gpus"] for f in chosen]
        ends = []
        curves = {key: [1e3 * f["seconds"][key] for f in chosen] for key in lines}
        curves["experts' products"] = [1e3 * (f["compute_seconds"] + f["shared_seconds"]) for f in chosen]
        for n, (key, ys) in enumerate(curves.items()):
            axis.plot(xs, ys, lines.get(key, ":"), color=COLOURS[n], marker="o", ms=3.5, lw=1.6)
            ends.append((xs[-1], ys[-1], key, COLOURS[n]))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(xs, [str(x) for x in xs], fontsize=8, rotation=45)
        axis.minorticks_off()
        axis.set_xlabel("GPUs")
        axis.set_title(f"{routing}, {tokens} tokens on each GPU")
        ends_of.append(ends)
    axes[0].set_ylabel("ms of one layer's forward: counts, dispatch, combine")
    figure.suptitle(f"A model of expert parallelism: {machine.name}, nodes of {machine.node}", x=0.07, ha="left")
    figure.subplots_adjust(wspace=0.6, top=0.86)
    figure.canvas.draw()
    for axis, ends in zip(axes, ends_of, strict=True):
        label_lines(axis, ends, gap=0.05)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
