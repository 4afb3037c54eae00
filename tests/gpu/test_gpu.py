"""The expert computation and the layer on CUDA: right, deterministic, never waiting, capturable, lean.

Small cases are held to the float64 oracle; large ones to a float64 loop over experts on the device. Written against
the public functions only.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings

import oracle
import pytest
import torch
from gpu_helpers import DEVICE, assert_equal_bits, cuda_only, here, leaf_there, there
from helpers import assert_as_accurate, nudged, saved_bytes
from layer_cases import Reference, formula, routing_of, run_layer
from torch import nn

from dmoe import ExpertWeights, MoE, MoEConfig, aux_loss
from dmoe.functional import moe_mlp

pytestmark = pytest.mark.gpu

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
# <a, W^T dy> sums F rounded terms where plain PyTorch's <o, dy> sums H: the price of not keeping o.
GATES_FACTOR = 6
KINDS = {  # gated, activation, bias
    "swiglu": (True, "silu", False),
    "geglu-bias": (True, "gelu_tanh", True),
    "gelu-bias": (False, "gelu", True),
    "relu": (False, "relu", False),
    "gpt-oss": (True, "clamped_swiglu(1.0,1.702,1.0)", True),  # and interleaved
}
SIZES = {  # T, H, F, E, K
    "even": (64, 64, 48, 8, 2),
    "odd": (33, 17, 13, 5, 2),
    "one": (1, 8, 8, 1, 1),
    "wide": (70, 136, 72, 8, 3),
    "no tokens": (0, 16, 16, 4, 2),
    "all chosen": (40, 24, 40, 3, 3),
    "many experts": (30, 32, 16, 512, 4),
    "tall": (140, 40, 24, 2, 1),
}


@dataclasses.dataclass
class Case:
    """Leaves on the CPU, choices, and a gradient of y."""

    x: torch.Tensor
    gates: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    indices: torch.Tensor
    grad: torch.Tensor
    gated: bool
    activation: str
    gate_on: str = "output"

    NAMES = ("x", "gates", "up", "down", "up_bias", "down_bias")

    def leaves(self):
        return [getattr(self, name) for name in self.NAMES]

    def moved(self):
        """All numbers a little different: other roundings."""
        return dataclasses.replace(self, **{n: nudged(getattr(self, n)) for n in (*self.NAMES, "grad")})


def make_case(size, kind, dtype, *, gate_on="output", load="any", seed=0):
    T, H, F, E, K = size
    gated, activation, bias = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    scores = torch.rand(T, E, generator=generator)
    if load == "hot":
        scores[:, E // 2] += 1
    elif load == "few":  # most experts stay empty, the first and the last among them
        scores[:, : E // 3] -= 1
        scores[:, -max(E // 3, 1) :] -= 1
    indices = scores.argsort(1, descending=True)[:, :K]
    if load == "dropped":
        indices = indices.masked_fill(torch.rand(T, K, generator=generator) < 0.3, E)
    halves = (2,) if gated else ()
    up, up_bias = normal(E, *halves, F, H, scale=H**-0.5), normal(E, *halves, F) if bias else None
    if kind == "gpt-oss":
        up, up_bias = (half.transpose(1, 2).contiguous().transpose(1, 2) for half in (up, up_bias))
    return Case(
        x=normal(T, H),
        gates=torch.rand(T, K, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
        up=up,
        down=normal(E, H, F, scale=F**-0.5),
        up_bias=up_bias,
        down_bias=normal(E, H) if bias else None,
        indices=indices,
        grad=normal(T, H),
        gated=gated,
        activation=activation,
        gate_on=gate_on,
    )


def call(case, leaves, indices=None):
    x, gates, up, down, up_bias, down_bias = leaves
    return moe_mlp(
        x,
        there(case.indices) if indices is None else indices,
        gates,
        ExpertWeights(up, down, up_bias, down_bias, gated=case.gated),
        activation=case.activation,
        gate_weight_on=case.gate_on,
    )


def on_device(case):
    return [None if leaf is None else leaf_there(leaf) for leaf in case.leaves()]


def ours(case):
    """y and the gradients of all leaves, on the CPU; None for a leaf that does not exist."""
    leaves = on_device(case)
    y = call(case, leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, given, there(case.grad)))
    return [here(y), *(None if leaf is None else here(next(grads)) for leaf in leaves)]


def by_oracle(case, dtype, wide):
    kinds = [dtype, wide, dtype, dtype, dtype, dtype]
    leaves = [
        None if t is None else t.detach().to(k, copy=True).requires_grad_()
        for t, k in zip(case.leaves(), kinds, strict=True)
    ]
    x, gates, *weights = leaves
    kept = (case.indices < case.down.shape[0]).tolist()
    y = oracle.moe(
        x, case.indices.tolist(), gates, kept, weights, activation=case.activation, gated=case.gated,
        gate_on=case.gate_on,
    )  # fmt: skip
    unused = sum(0 * t.sum() for t in leaves if t is not None)
    ((y * case.grad.to(dtype)).sum() + unused).backward()
    return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def assert_matches_oracle(case, dtype):
    torch.manual_seed(0)  # of the moved copies
    results = ours(case)
    exact = by_oracle(case, torch.float64, torch.float64)
    pairs = [(by_oracle(case, dtype, torch.float32), exact)]
    for _ in range(2 if case.x.numel() >= 64 else 6):
        other = case.moved()
        pairs.append((by_oracle(other, dtype, torch.float32), by_oracle(other, torch.float64, torch.float64)))
    for i, name in enumerate(("y", *Case.NAMES)):
        if exact[i] is None:
            continue
        assert results[i].dtype == (torch.float32 if name == "gates" else dtype), name
        factor = GATES_FACTOR if name == "gates" else 2
        assert_as_accurate(name, results[i], exact[i], [(plain[i], true[i]) for plain, true in pairs], factor=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_on", ["output", "activation", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_expert_equals_the_oracle(kind, gate_on, dtype):
    assert_matches_oracle(make_case(SIZES["even"], kind, dtype, gate_on=gate_on), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [name for name in SIZES if name != "even"])
def test_awkward_sizes_equal_the_oracle(size, dtype):
    assert_matches_oracle(make_case(SIZES[size], "swiglu", dtype), dtype)
    if size in ("odd", "no tokens", "one"):
        assert_matches_oracle(make_case(SIZES[size], "gelu-bias", dtype, gate_on="activation"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("load", ["hot", "few", "dropped"])
def test_uneven_loads_equal_the_oracle(load, dtype):
    assert_matches_oracle(make_case((90, 32, 24, 9, 2), "swiglu", dtype, load=load), dtype)


def test_float64_is_float64():
    for size in ("even", "odd", "no tokens"):
        for gate_on in ("output", "activation", "input"):
            case = make_case(SIZES[size], "geglu-bias", torch.float64, gate_on=gate_on)
            exact = by_oracle(case, torch.float64, torch.float64)
            for got, expected in zip(ours(case), exact, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def per_expert(leaves, indices, grad, dtype):
    """y and gradients by one product per expert in ``dtype`` (gate weights at least float32), where the leaves are."""
    wide = torch.promote_types(dtype, torch.float32)
    kinds = [dtype, wide, dtype, dtype]
    x, gates, up, down = [leaf.detach().to(k).requires_grad_() for leaf, k in zip(leaves, kinds, strict=True)]
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for e in range(down.shape[0]):
        token, choice = torch.where(indices == e)
        hidden = nn.functional.silu(x[token] @ up[e, 0].t()) * (x[token] @ up[e, 1].t())
        y = y.index_add(0, token, (hidden @ down[e].t()).to(wide) * gates[token, choice, None])
    y = y.to(dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, gates, up, down), grad.to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("load", ["any", "hot"])
@pytest.mark.parametrize("size", [(2048, 512, 384, 16, 4), (1000, 200, 328, 6, 2), (3000, 768, 64, 64, 8)], ids=str)
def test_many_blocks_equal_float64(size, load, dtype):
    """Several blocks of rows, columns and depth in each expert, with ends that fit no block."""
    case = make_case(size, "swiglu", dtype, load=load)
    leaves, indices, grad = on_device(case)[:4], there(case.indices), there(case.grad)
    y = call(case, [*leaves, None, None])
    got = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    exact = per_expert(leaves, indices, grad, torch.float64)
    plain = per_expert(leaves, indices, grad, dtype)
    for name, one, true, own in zip(("y", *Case.NAMES[:4]), got, exact, plain, strict=True):
        assert one.dtype == own.dtype
        assert_as_accurate(name, one, true, [(own, true)], factor=GATES_FACTOR if name == "gates" else 2)


def test_inference_is_as_right_as_training():
    for dtype in DTYPES:
        case = make_case((500, 64, 48, 8, 2), "swiglu", dtype)
        leaves = on_device(case)[:4]
        with torch.no_grad():
            y = call(case, [*leaves, None, None])
        assert not y.requires_grad
        exact, plain = (per_expert(leaves, there(case.indices), there(case.grad), k)[0] for k in (torch.float64, dtype))
        assert_as_accurate("y", y, exact, [(plain, exact)])


def test_views_that_are_not_aligned():
    """x, weights and gradient begin in the middle of 16 bytes and have wide rows: as right as their copies."""
    case = make_case((65, 40, 24, 4, 2), "swiglu", torch.bfloat16)

    def shifted(tensor):
        room = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 9, dtype=tensor.dtype, device=DEVICE)
        view = room[..., 3 : 3 + tensor.shape[-1]]
        view.copy_(tensor)
        return view

    straight = ours(case)
    leaves = [shifted(t).requires_grad_() for t in case.leaves()[:4]]
    y = call(case, [*leaves, None, None])
    grads = torch.autograd.grad(y, leaves, shifted(case.grad))
    exact = by_oracle(case, torch.float64, torch.float64)
    for name, got, other, true in zip(("y", *Case.NAMES[:4]), [y, *grads], straight, exact, strict=False):
        assert_as_accurate(name, here(got), true, [(other, true)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("activation_dropout", "expert_dropout"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_dropout_masks_are_the_cpus(activation_dropout, expert_dropout, dtype, monkeypatch):
    """On small integers every number is exact, so one other bit of a mask shows; in backward as in forward."""
    T, width, E, K = 60, 37, 3, 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 4, (T, width), generator=generator).to(dtype)
    eye = torch.eye(width).to(dtype).expand(E, width, width).contiguous()
    indices = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    grad = torch.randint(1, 3, (T, width), generator=generator).to(dtype)
    grad[T // 2 :] = 0  # sums over rows stay exact
    monkeypatch.setattr("dmoe.functional.draw_seed", lambda device: torch.tensor(-123456789012345, device=device))

    def run(device):
        leaves = [t.to(device).clone().requires_grad_() for t in (x, torch.ones(T, K), eye, eye)]
        y = moe_mlp(
            leaves[0], indices.to(device), leaves[1], ExpertWeights(leaves[2], leaves[3], gated=False),
            activation="relu", activation_dropout=activation_dropout, expert_dropout=expert_dropout,
        )  # fmt: skip
        return here([y, *torch.autograd.grad(y, leaves, grad.to(device))])

    got, expected = run(DEVICE), run("cpu")
    for name, one, other in zip(("y", "x", "gates", "up", "down"), got, expected, strict=True):
        assert_equal_bits(name, one, other)
    dropped = float((expected[0] == 0).float().mean())
    assert dropped > 0.1, "the masks of this test drop nothing"


def test_dropout_draws_anew_and_repeats_under_a_seed():
    case = make_case((64, 32, 24, 4, 2), "swiglu", torch.bfloat16)
    leaves = [there(t) for t in case.leaves()[:4]]

    def run():
        x, gates, up, down = leaves
        return moe_mlp(x, there(case.indices), gates, ExpertWeights(up, down), activation_dropout=0.3)

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


CONFIGS = {
    "default": {},
    "sigmoid": {"score_function": "sigmoid", "gate_normalization": 1.0, "router_z_loss_coefficient": 0.1},
    "after_topk": {"softmax_order": "after_topk", "top_k": 3, "router_bias": True},
    "capacity": {
        "capacity": 9,
        "drop_order": "choice_major",
        "gate_normalization": 2.0,
        "normalize_when": "after_drop",
    },
    "prioritized": {"capacity": 7, "drop_order": "batch_prioritized"},
    "mlp": {"gated": False, "activation": "gelu", "bias": "expert", "gate_weight_on": "activation"},
    "shared": {"shared_ffn_hidden_size": 20, "shared_expert_gate": True, "bias": "output"},
    "widths": {"ffn_hidden_size": [8, 24, 16, 40, 8, 8], "gate_weight_on": "input"},
    "first": {"load_balancing_choices": "first", "num_moe_layers": 3, "gate_scale": 2.5, "activation": "gelu_tanh"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_equals_the_oracle(name, dtype):
    torch.manual_seed(0)
    config = MoEConfig(**{"hidden_size": 33, "ffn_hidden_size": 24, "num_experts": 6, "top_k": 2, **CONFIGS[name]})
    layer = MoE(config, dtype=dtype)
    x, grad = (torch.randn(40, 33).to(dtype) for _ in range(2))
    mask = torch.rand(40) < 0.8
    device_layer = copy.deepcopy(layer).to(DEVICE)
    indices, kept = routing_of(device_layer, there(x), there(mask))

    def reference(layer, x, grad, dtype, router_dtype):
        return Reference(layer, x, grad, mask, dtype, router_dtype).run(indices, kept)

    exact = reference(layer, x, grad, torch.float64, torch.float64)
    pairs = [(reference(layer, x, grad, dtype, torch.float32), exact)]
    for _ in range(2):
        moved = MoE(config, dtype=dtype)
        moved.load_state_dict({key: nudged(p.detach()) for key, p in layer.named_parameters()})
        other = moved, nudged(x), nudged(grad)
        pairs.append((reference(*other, dtype, torch.float32), reference(*other, torch.float64, torch.float64)))
    actual = run_layer(device_layer, there(x), there(grad), there(mask))
    assert actual.keys() == exact.keys()
    noise = 16 * torch.finfo(torch.float32).eps * max(t.abs().max().item() for t in exact.values())
    for key, value in actual.items():
        own = [(plain[key], true[key]) for plain, true in pairs]
        assert_as_accurate(key, here(value), exact[key], own, noise=noise if key.startswith("grad router") else 0.0)


@pytest.mark.parametrize("router", ["expert_choice", "uniform"])
def test_other_routers_agree_with_the_cpu_in_float64(router):
    torch.manual_seed(0)
    layer = MoE(hidden_size=24, ffn_hidden_size=16, num_experts=5, router=router, causal=False, dtype=torch.float64)
    x, grad = (torch.randn(40, 24, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(40, dtype=torch.bool)
    expected = run_layer(layer, x, grad, mask)
    got = run_layer(copy.deepcopy(layer).to(DEVICE), there(x), there(grad), there(mask))
    for name, value in got.items():
        torch.testing.assert_close(here(value), expected[name], rtol=1e-9, atol=1e-11, check_dtype=name != "aux_loss")


def test_autocast_computes_what_converted_weights_do():
    torch.manual_seed(0)
    layer = MoE(hidden_size=64, ffn_hidden_size=48, num_experts=8, gate_normalization=1.0, device=DEVICE)
    half = copy.deepcopy(layer)
    half.experts.to(torch.bfloat16)
    x = torch.randn(100, 64, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    with torch.no_grad():
        routing = layer.router(x)
        expected = half.experts(x.bfloat16(), routing.plan, routing.gate_weights)
    assert_as_accurate("y", y, expected.double(), [(expected.float(), expected.double())], slack_ulp=4)


def training_step(layer, x, grad):
    """y and the gradients of x and of every parameter; the graph is the caller's, nothing is accumulated."""
    y = layer(x)
    layer.take_aux_loss()
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def big_layer(dtype=torch.bfloat16, **fields):
    torch.manual_seed(0)
    options = {"hidden_size": 256, "ffn_hidden_size": 192, "num_experts": 32, "top_k": 4, "gate_normalization": 1.0}
    layer = MoE(**{**options, **fields}, device=DEVICE, dtype=dtype)
    x = torch.randn(3000, 256, device=DEVICE, dtype=dtype).requires_grad_()
    return layer, x, torch.randn(3000, 256, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_twenty_times(dtype):
    layer, x, grad = big_layer(dtype)
    first = [t.clone() for t in training_step(layer, x, grad)]
    for _ in range(20):
        noise = torch.randn(1 << 22, device=DEVICE)  # other work, other timing, other addresses
        noise.sort()
        for i, (one, other) in enumerate(zip(training_step(layer, x, grad), first, strict=True)):
            assert torch.equal(one, other), f"result {i}"


def test_backward_twice_gives_the_same():
    layer, x, grad = big_layer()
    y = layer(x)
    leaves = [x, *layer.parameters()]
    first = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, leaves, grad), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def no_waiting():
    """Any wait for the device is an error: reading a number, a boolean mask, a copy from pageable memory."""

    class Switch:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")

    return Switch()


@cuda_only
def test_the_switch_that_forbids_waiting_works(no_waiting):
    with pytest.raises(RuntimeError), no_waiting:
        torch.ones(3, device=DEVICE).sum().item()


@cuda_only
@pytest.mark.parametrize("kind", KINDS)
def test_the_experts_never_wait(kind, no_waiting):
    case = make_case((100, 64, 48, 8, 2), kind, torch.bfloat16)
    leaves, indices, grad = on_device(case), there(case.indices), there(case.grad)
    given = [leaf for leaf in leaves if leaf is not None]
    torch.autograd.grad(call(case, leaves, indices), given, grad)  # compiles
    with no_waiting:
        torch.autograd.grad(call(case, leaves, indices), given, grad)
        with torch.no_grad():
            call(case, leaves, indices)


@cuda_only
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"score_function": "sigmoid", "selection_bias": True, "num_groups": 4, "top_k_groups": 2},
        {"capacity_factor": 1.25, "drop_order": "batch_prioritized", "router_z_loss_coefficient": 0.1},
        {"activation_dropout": 0.1, "expert_dropout": 0.1, "input_jitter": 0.1, "bias": "expert"},
        {"shared_ffn_hidden_size": 64, "shared_expert_gate": True},
        {"router": "expert_choice", "causal": False},
        {"router": "uniform"},
        {"aux_loss": "attached"},
    ],
    ids=lambda fields: "-".join(fields) or "default",
)
def test_the_layer_never_waits(fields, no_waiting):
    layer, x, grad = big_layer(**fields)
    mask = torch.rand(3000, device=DEVICE) < 0.9

    def step():
        y = layer(x, token_mask=mask)
        loss = (y * grad).float().sum() + aux_loss(layer)
        loss.backward()
        layer.update_selection_bias()

    step()
    with no_waiting:
        step()
        layer.eval()
        with torch.no_grad():
            layer(x)


def capture(run):
    """A CUDA graph of ``run`` and what it returned while being captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@cuda_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_training_step_follows_the_routing(dtype):
    layer, x, grad = big_layer(dtype)
    graph, results = capture(lambda: training_step(layer, x, grad))
    for seed in range(3):
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x) + 0.5 * seed * torch.randn(256, device=DEVICE, dtype=dtype))
            grad.copy_(torch.randn_like(grad))
        graph.replay()
        for i, (one, other) in enumerate(zip(results, training_step(layer, x, grad), strict=True)):
            assert torch.equal(one, other), f"result {i} of replay {seed}"


@cuda_only
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_captured_inference_follows_the_routing(tokens):
    case = make_case((tokens, 128, 96, 16, 2), "swiglu", torch.bfloat16)
    leaves, indices = on_device(case), there(case.indices)
    with torch.no_grad():
        graph, y = capture(lambda: call(case, leaves, indices))
        for favourite in (None, 3, 15):
            fresh = torch.rand(tokens, 16, device=DEVICE)
            if favourite is not None:
                fresh[:, favourite] += 1
            indices.copy_(fresh.argsort(1, descending=True)[:, :2])
            graph.replay()
            assert torch.equal(y, call(case, leaves, indices))


@cuda_only
def test_a_captured_step_draws_new_dropout_masks():
    layer, x, grad = big_layer(activation_dropout=0.5)
    graph, results = capture(lambda: training_step(layer, x, grad))
    graph.replay()
    first = results[0].clone()
    graph.replay()
    assert torch.isfinite(results[0]).all()
    assert not torch.equal(first, results[0])


@cuda_only
def test_compiles_as_one_graph_and_not_again():
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, x, grad = big_layer(load_balancing_coefficient=0.0)
    expected = training_step(layer, x, grad)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for shift in (0.0, 1.0, -1.0):
        moved = (x.detach() + shift).requires_grad_()
        y = compiled(moved)
        got = [y, *torch.autograd.grad(y, [moved, *layer.parameters()], grad)]
        if shift == 0.0:
            for i, (one, other) in enumerate(zip(got, expected, strict=True)):
                error = (one.double() - other.double()).norm() / other.double().norm()
                assert error < 1e-2, f"result {i} is off by {float(error):.1e}"
    assert counter.frame_count == 1


@pytest.mark.slow
@cuda_only
@pytest.mark.parametrize(
    ("what", "size"),
    [
        ("rows x hidden", (2**17, 4104, 16, 8, 4)),  # 524288 x 4104 = 2**31 + 4.2e6
        ("rows x pre-activation", (2**17, 64, 2056, 8, 4)),
        ("weights", (512, 4104, 512, 512, 4)),  # 512 x 1024 x 4104
    ],
)
def test_more_than_two_to_the_31_elements(what, size):
    """The last tokens, rows and experts, which a 32-bit index does not reach, against float64."""
    T, H, F, E, K = size
    assert max(T * K * H, T * K * 2 * F, E * 2 * F * H) > 2**31
    needed = 2 * (3 * T * K * H + 6 * T * K * F + 8 * E * F * H + 4 * T * H) * 1.5
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x = torch.randn(T, H, device=DEVICE, dtype=dtype).requires_grad_()
    up = torch.empty(E, 2, F, H, device=DEVICE, dtype=dtype).uniform_(-(H**-0.5), H**-0.5).requires_grad_()
    down = torch.empty(E, H, F, device=DEVICE, dtype=dtype).uniform_(-(F**-0.5), F**-0.5).requires_grad_()
    gates = torch.rand(T, K, device=DEVICE).requires_grad_()
    indices = torch.rand(T, E, device=DEVICE).argsort(1)[:, :K]
    indices[-1] = torch.arange(E - K, E, device=DEVICE)  # the last token, in the last experts
    grad = torch.randn(T, H, device=DEVICE, dtype=dtype)
    y = moe_mlp(x, indices, gates, ExpertWeights(up, down))
    grads = torch.autograd.grad(y, (x, gates, up, down), grad)

    def close(name, got, exact):
        error = (got.double() - exact).norm() / exact.norm()
        assert error < 1e-2, f"{name} is off by {float(error):.1e}"

    for t in (0, T // 2, T - 1):
        leaf, weight = x[t].detach().double().requires_grad_(), gates[t].detach().double().requires_grad_()
        out = sum(
            weight[k] * (down[e].double() @ (nn.functional.silu(up[e, 0].double() @ leaf) * (up[e, 1].double() @ leaf)))
            for k, e in enumerate(indices[t].tolist())
        )
        exact = torch.autograd.grad(out, (leaf, weight), grad[t].double())
        close(f"y[{t}]", y[t].detach(), out.detach())
        close(f"x.grad[{t}]", grads[0][t], exact[0])
        close(f"gates.grad[{t}]", grads[1][t], exact[1])
    for e in (0, E - 1):
        token, choice = torch.where(indices == e)
        rows, one = x[token].detach().double(), [w.detach().double().requires_grad_() for w in (up[e], down[e])]
        out = (nn.functional.silu(rows @ one[0][0].t()) * (rows @ one[0][1].t())) @ one[1].t()
        exact = torch.autograd.grad(out * gates[token, choice, None].double(), one, grad[token].double())
        close(f"up.grad[{e}]", grads[2][e], exact[0])
        close(f"down.grad[{e}]", grads[3][e], exact[1])


@pytest.mark.parametrize("fields", [{}, {"gated": False, "activation": "gelu", "bias": "expert"}], ids=["gated", "mlp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_saves_little_more_than_the_formula(fields, dtype):
    """x, the pre-activation, probabilities, gate weights and the plan; a table of tiles may come on top."""
    layer, x, grad = big_layer(dtype, **fields)
    with saved_bytes(exclude=list(layer.parameters())) as saved:
        y = layer(x)
    least = formula(layer.config, 3000, dtype)
    assert least <= saved.total <= 1.01 * least + 64 * 1024
    y.backward(grad)


@cuda_only
def test_holds_no_memory_after_the_step():
    layer, x, grad = big_layer()
    training_step(layer, x, grad)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        training_step(layer, x, grad)
    layer.last_metrics = None
    assert torch.cuda.memory_allocated() <= before + 4096


def test_nothing_is_warned_about():
    """By dmoe; what Triton or PyTorch warn about is theirs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer, x, grad = big_layer()
        training_step(layer, x, grad)
    assert not [str(w.message) for w in caught if "dmoe" in f"{w.filename} {w.message}"]
