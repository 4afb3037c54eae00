"""Which launch shape, grid and path to memory the expert MLP's host code picks, for GPUs that are not here."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import expert_mlp

from dmoe.ops import moe_mlp_cuda

configs = pytest.importorskip("dmoe.kernels.configs")
import dmoe.kernels.moe_mlp as kernels  # noqa: E402  # needs Triton
import dmoe.kernels.moe_mlp_rows as row_kernels  # noqa: E402
import dmoe.kernels.operands as operands  # noqa: E402

BF16 = torch.bfloat16


def launches(monkeypatch, capability=90, **options):
    """Kernel name, grid and options of every launch of forward and backward."""
    recorded = []

    def record(kernel, grid, *_, **options):
        recorded.append((kernel.__name__, grid, options))

    for module in (kernels, row_kernels):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(operands, "capability", lambda device: capability)
    monkeypatch.setattr(operands, "multiprocessors", lambda device: 100)
    expert_mlp(**{"tokens": 4096, "hidden": 1024, "ffn": 512, "experts": 16, "top_k": 4, **options})
    return recorded


@pytest.mark.parametrize(
    ("dtype", "columns", "shift", "capability", "there"),
    [
        (BF16, 64, 0, 90, True),
        (torch.float16, 64, 0, 100, True),
        (BF16, 64, 8, 90, True),
        (BF16, 64, 1, 90, False),  # not 16-byte aligned
        (BF16, 68, 0, 90, False),  # nor are these rows
        (torch.float32, 64, 0, 90, False),
        (BF16, 64, 0, 80, False),  # no copy engine
        (BF16, 64, 0, 120, False),
    ],
)
def test_copy_engine_serves_what_it_can(monkeypatch, dtype, columns, shift, capability, there):
    monkeypatch.setattr(operands, "capability", lambda device: capability)
    matrix = torch.empty(3 * 32 * columns + 64, dtype=dtype)[shift : shift + 3 * 32 * columns].view(-1, columns)
    descriptor = operands.copy_descriptor(matrix, 16, 32)
    assert (descriptor is not None) == there
    if descriptor is not None:
        assert descriptor.block_shape == [16, 32]
        assert (descriptor.shape, descriptor.strides) == ([96, columns], [columns, 1])


def test_descriptors_of_each_launch(monkeypatch):
    """An overhang along the summed dimension would read the next expert's rows: no descriptor then."""

    def used(**options):
        names = ("DESCRIPTOR", "DESCRIPTOR_A", "DESCRIPTOR_B")
        return [
            (kernel, *(options[name] for name in names if name in options))
            for kernel, _, options in launches(monkeypatch, **options)
            if kernel in ("up_kernel", "rows_kernel", "hidden_grad_kernel")
        ]

    up, down, hidden_grad, row_grad = ("up_kernel",), ("rows_kernel",), ("hidden_grad_kernel",), ("rows_kernel",)
    assert used() == [(*up, True), (*down, True, True), (*hidden_grad, True), (*row_grad, True, True)]
    overhanging = used(hidden=1000, ffn=504)
    assert overhanging == [(*up, True), (*down, True, True), (*hidden_grad, False), (*row_grad, True, False)]
    for options in ({"capability": 80}, {"dtype": torch.float32}, {"hidden": 1001, "ffn": 777}):
        assert not any(flag for _, *flags in used(**options) for flag in flags)


def test_grids(monkeypatch):
    """Persistent programs fill the GPU and no more; weight gradients have one program for each tile of the result."""
    grids = [(name, grid) for name, grid, _ in launches(monkeypatch)]
    wide = {name: configs.choose(name, 90, 2, 128, 1024, 512) for name in configs._HOPPER}
    block_m, block_n = wide["weight_grad"].block_m, wide["weight_grad"].block_n
    weights = [16 * math.ceil(m / block_m) * math.ceil(n / block_n) for m, n in ((1024, 512), (1024, 1024))]
    assert grids == [
        ("up_kernel", (100,)),
        ("rows_kernel", (200,)),  # a short sum, and a long epilogue: two programs on each multiprocessor
        ("combine_kernel", (4096, 1)),
        ("hidden_grad_kernel", (200,)),
        ("weight_grad_kernel", (weights[0],)),
        ("rows_kernel", (100,)),
        ("combine_kernel", (4096, 1)),
        ("weight_grad_kernel", (weights[1],)),
    ]
    assert {o["BLOCK_M"] for n, _, o in launches(monkeypatch) if "weight" not in n and "BLOCK_M" in o} == {128}
    few = launches(monkeypatch, tokens=16, experts=2, top_k=1)  # 16-row tiles: at most 16 // 16 + 2
    assert {o["BLOCK_M"] for n, _, o in few if "weight" not in n and "BLOCK_M" in o} == {16}
    assert [grid for name, grid, _ in few if name == "rows_kernel"] == [(3 * 8,), (3 * 8,)]
    assert all(options["num_stages"] == wide["weight_grad"].num_stages for *_, options in few if "GATHER_B" in options)


def test_nothing_is_stored_that_nobody_reads(monkeypatch):
    """Inference stores no pre-activation, recomputation no activation, and frozen experts have no use for either."""
    forward = moe_mlp_cuda.moe_mlp_cuda

    def without_weights(*arguments):
        y, pre = forward(*arguments)
        moe_mlp_cuda.moe_mlp_inference_cuda(*arguments)
        moe_mlp_cuda.moe_mlp_pre_activation_cuda(*arguments)
        grads = moe_mlp_cuda.moe_mlp_backward_cuda(y, pre, False, *arguments)
        assert not any(grad.numel() for grad in grads[2:])
        return y, pre

    monkeypatch.setattr(moe_mlp_cuda, "moe_mlp_cuda", without_weights)
    stored = [
        (name, options.get("STORE_PRE"), options.get("STORE_HIDDEN"))
        for name, _, options in launches(monkeypatch, backward=False)
        if "STORE_HIDDEN" in options
    ]
    up, back = "up_kernel", "hidden_grad_kernel"
    assert stored == [(up, True, True), (up, False, True), (up, True, False), (back, None, False)]


def test_a_weight_gradient_that_gathers_nothing_needs_fewer_stages(monkeypatch):
    """Fetching row numbers ahead takes half of the stages; without it the same number of loads is in flight."""
    stages = [o["num_stages"] for n, _, o in launches(monkeypatch, dropout=0.1) if n == "weight_grad_kernel"]
    whole = configs.choose("weight_grad", 90, 2, 128, 1024, 512).num_stages
    assert stages == [whole // 2 + 1, whole]


def test_tf32_only_where_torch_allows_it(monkeypatch):
    wide, half, matmul = torch.empty(1), torch.empty(1, dtype=BF16), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            matmul.fp32_precision = setting
            assert operands.precision(wide) == setting
            assert operands.precision(half) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_a_mask_in_the_epilogue_has_a_tile_of_its_own(monkeypatch):
    longer = (
        {"activation": "clamped_swiglu(7.0,1.702,1.0)"},
        {"activation": "sigmoid"},
        {"activation": "relu_squared"},
        {"weights": "interleaved"},
        {"dropout": 0.1, "weights": "interleaved"},
    )
    for options, name in (
        ({}, "hidden_grad"),
        ({"dropout": 0.1}, "hidden_grad_dropout"),
        ({"activation": "sigmoid", "gated": False}, "hidden_grad_dropout"),
        *((options, "hidden_grad_long") for options in longer),
    ):
        found = [(o["BLOCK_N"], o["num_warps"]) for *_, o in launches(monkeypatch, **options) if "GATHER" in o]
        assert found == [(configs._HOPPER[name].block_n, configs._HOPPER[name].num_warps)], options


def test_families():
    named = {80: "portable", 86: "portable", 89: "portable", 90: "hopper", 100: "blackwell", 103: "blackwell"}
    assert {capability: configs.family(capability) for capability in named} == named
    assert configs.family(120) == configs.family(121) == "portable"
    assert configs.choose("hidden_grad", 90, 2, 128, 4096, 4096) == configs._HOPPER["hidden_grad"]
    assert configs.choose("hidden_grad", 100, 2, 128, 4096, 4096) == configs._BLACKWELL["hidden_grad"]
    assert configs.choose("hidden_grad", 89, 2, 128, 4096, 4096) == configs._PORTABLE["hidden_grad"]


@pytest.mark.parametrize("kernel", ["down", "row_grad"])
def test_short_sums_run_two_programs_on_hopper(kernel):
    short, long = (configs.choose(kernel, 90, 2, 128, k, 4096) for k in (512, 520))
    assert (short.programs, short.maxnreg, short.block_n) == (2, 128, 128)
    assert (long.programs, long.maxnreg) == (1, None)
    assert configs.choose(kernel, 100, 2, 128, 512, 4096) == configs.choose(kernel, 100, 2, 128, 520, 4096)
    assert configs.choose(kernel, 90, 2, 64, 512, 4096).maxnreg is None


def test_registers_are_limited_only_where_the_launch_shape_says_so(monkeypatch):
    """And then so that as many programs fit as are started."""
    for name, _, options in launches(monkeypatch, ffn=1024):
        assert ("maxnreg" in options) == (name == "hidden_grad_kernel"), name
        if "maxnreg" in options:
            assert options["maxnreg"] * 32 * options["num_warps"] * 2 <= 65536
    assert not any("maxnreg" in options for *_, options in launches(monkeypatch, capability=80))


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, True),
        ({"hidden": 1000, "ffn": 504}, True),  # behind the ends it reads zeros
        ({"weights": "megablocks"}, False),  # gate and up are two tensors
        ({"weights": "transposed"}, False),
        ({"gated": False}, False),
        ({"hidden": 1001}, False),  # not aligned
        ({"capability": 80}, False),
        ({"dtype": torch.float32}, False),
    ],
)
def test_gate_and_up_are_one_product_where_they_lie_in_one_tensor(monkeypatch, options, joined):
    """Only then may the loops be fused: two products a step would be waited for one by one."""
    (up,) = [o for name, _, o in launches(monkeypatch, backward=False, **options) if name == "up_kernel"]
    assert up["JOINED"] == joined
    assert up["FLATTEN"] == (options.get("capability", 90) == 90 and (joined or not up["GATED"])) or not joined


def test_the_descriptor_of_gate_and_up():
    weight, config = torch.empty(3, 2, 40, 64, dtype=BF16), configs.Config(32, 16, 8, 2)
    descriptor = operands.Operand.of(weight.flatten(1, 2)).joined(config, 40)
    assert (descriptor.shape, descriptor.strides) == ([6, 40, 64], [40 * 64, 64, 1])
    assert descriptor.block_shape == [2, 32, 16]
    spread = torch.empty(3, 100, 64, dtype=BF16)[:, :80]  # from one expert to the next are other rows
    assert operands.Operand.of(spread).joined(config, 40) is None


def test_what_a_weight_gradient_copies_by_the_engine(monkeypatch):
    """The operand that is not gathered, and never both: one of them says which rows count."""

    def flags(**options):
        return [
            (o["DESCRIPTOR_A"], o["DESCRIPTOR_B"], o["WEIGHED"])
            for name, _, o in launches(monkeypatch, **options)
            if name == "weight_grad_kernel"
        ]

    of_down, of_up = (False, True, False), (True, False, False)
    assert flags() == flags(dropout=0.1) == [of_down, of_up]
    assert flags(gate_weight_on="input") == [of_down, (False, False, True)]
    assert flags(weights="transposed") == [of_up, of_down]
    assert flags(capability=80) == flags(hidden=1001, ffn=777) == [(False, False, False)] * 2


@pytest.mark.parametrize("kernel", configs._SMALL)
def test_built_in_launch_shapes(kernel):
    """What is read number by number gets small tiles; no tile is twice as wide as the result; parts keep 16 columns."""
    small = configs._SMALL[kernel]
    for element_size, k, n in ((4, 4096, 4096), (2, 4097, 4096), (2, 4096, 4097), (2, 4100, 4096)):
        assert configs.choose(kernel, 90, element_size, 128, k, n) == small
    for capability in (80, 90, 100):
        for n in (8, 16, 24, 64, 128, 136, 4096):
            chosen = configs.choose(kernel, capability, 2, 128, 4096, n)
            assert chosen.block_n < max(2 * n, 17)
            assert chosen.block_n // chosen.parts >= 16
        few, many = (configs.choose(kernel, capability, 2, rows, 4096, 4096) for rows in (32, 128))
        assert kernel == "weight_grad" or (few.num_warps, few.block_n) == (4, min(many.block_n, 128))
        assert kernel != "weight_grad" or few == many


def test_a_table_replaces_what_was_chosen_before_and_the_environment_names_one(tmp_path, monkeypatch):
    asked = ("down", 90, 2, 128, 64, 32)
    built_in = configs.choose(*asked)
    path = tmp_path / "table.json"
    path.write_text('{"down/hopper/2/128/64/32": {"block_n": 32, "block_k": 128, "num_warps": 2, "num_stages": 2}}')
    measured = configs.Config(32, 128, 2, 2)
    assert measured != built_in
    try:
        configs.load(path)
        assert configs.choose(*asked) == measured
        for position, other in enumerate(("row_grad", 100, 4, 64, 32, 64)):
            assert configs.choose(*asked[:position], other, *asked[position + 1 :]) != measured
        configs._measured.clear()
        configs.choose.cache_clear()
        assert configs.choose(*asked) == built_in
        monkeypatch.setenv("DMOE_KERNEL_CONFIGS", str(path))
        configs._load_from_environment.cache_clear()
        configs.choose.cache_clear()
        assert configs.choose(*asked) == measured
    finally:
        configs._measured.clear()
        configs._load_from_environment.cache_clear()
        configs.choose.cache_clear()
        monkeypatch.delenv("DMOE_KERNEL_CONFIGS", raising=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got Expecting property name"),
        ("[1]", "expected a JSON object of launch shapes by name, got list"),
        ('{"down": {}}', "down: expected a name like kernel/family/bytes/tile_rows/K/N"),
        ('{"dwon/hopper/2/128/64/32": {}}', "dwon/hopper/2/128/64/32: expected one of the kernels down, "),
        ('{"down/ampere/2/128/64/32": {}}', "expected one of the families blackwell, hopper, portable"),
        ('{"down/hopper/2/x/64/32": {}}', "expected a name like"),
        ('{"down/hopper/2/128/64/32": [1]}', r"expected the fields of Config, got \[1\]"),
        ('{"down/hopper/2/128/64/32": {"block": 1}}', "expected the fields of Config, got"),
        (
            '{NAME: FIELDS, "block_n": 48}}',
            "block_n: expected a power of 2 of at least 16, got 48",
        ),
        (
            '{NAME: FIELDS, "block_k": "x"}}',
            "block_k: expected a power of 2 of at least 16, got 'x'",
        ),
        ('{NAME: FIELDS, "block_m": 8}}', "block_m: expected a power of 2 of at least 16, got 8"),
        ('{NAME: FIELDS, "num_warps": 3}}', "num_warps: expected 1, 2, 4, 8 or 16, got 3"),
        (
            '{NAME: FIELDS, "num_stages": 0}}',
            "num_stages: expected an integer of at least 1, got 0",
        ),
        ('{NAME: FIELDS, "group": 1.5}}', "group: expected an integer of at least 1, got 1.5"),
        (
            '{NAME: FIELDS, "programs": true}}',
            "programs: expected an integer of at least 1, got True",
        ),
        (
            '{NAME: FIELDS, "parts": 16}}',
            "parts: expected 1, 2, 4 or 8, of 8 columns each or more",
        ),
        ('{NAME: FIELDS, "maxnreg": 0}}', "maxnreg: expected an integer of at least 1, got 0"),
        ('{NAME: FIELDS, "maxnreg": 100}}', "maxnreg: expected null or a multiple of 8 from 32 to 248, got 100"),
        ('{NAME: FIELDS, "maxnreg": 256}}', "maxnreg: expected null or a multiple of 8 from 32 to 248, got 256"),
        ('{NAME: FIELDS, "maxnreg": true}}', "maxnreg: expected an integer of at least 1, got True"),
        ('{NAME: FIELDS, "flatten": 1}}', "flatten: expected true or false, got 1"),
        ('{NAME: FIELDS, "parts": 8}}', "parts: expected 1, 2, 4 or 8, of 8 columns each or more"),
    ],
)
def test_a_table_that_is_none_is_named(tmp_path, text, message):
    path = tmp_path / "table.json"
    fields = '{"block_n": 32, "block_k": 128, "num_warps": 2, "num_stages": 2'
    path.write_text(text.replace("NAME", '"down/hopper/2/128/64/32"').replace("FIELDS", fields))
    with pytest.raises(ValueError, match="^kernel configs: .*table.json: .*" + message):
        configs.load(path)
    assert not configs._measured


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^kernel configs: .*none.json: No such file"):
        configs.load(tmp_path / "none.json")
