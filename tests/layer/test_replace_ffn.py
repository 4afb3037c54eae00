"""replace_ffn: what it recognises, upcycled models compute what dense ones did, and errors change nothing."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dmoe
from dmoe.dense_ffn import read_ffn

F = nn.functional

H, WIDTH = 12, 20


class Gpt(nn.Module):
    """A GPT block's MLP by hand, the activation called inline."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu, bias: bool = True, width: int = WIDTH):
        super().__init__()
        self.fc = nn.Linear(H, width, bias=bias)
        self.proj = nn.Linear(width, H, bias=bias)
        self.dropout = nn.Dropout(0.3)
        self.act = act

    def forward(self, x):
        return self.dropout(self.proj(self.act(self.fc(x))))


class SwiGlu(nn.Module):
    """The last linear declared in the middle, and the gate second in the product."""

    def __init__(self, bias: bool = False):
        super().__init__()
        self.w1 = nn.Linear(H, WIDTH, bias=bias)
        self.w2 = nn.Linear(WIDTH, H, bias=bias)
        self.w3 = nn.Linear(H, WIDTH, bias=bias)

    def forward(self, x):
        return self.w2(self.w3(x) * F.silu(self.w1(x)))


class Fused(nn.Module):
    """Gate and up in one product; the gate first, or second."""

    def __init__(self, gate_first: bool):
        super().__init__()
        self.wi, self.wo = nn.Linear(H, 2 * WIDTH), nn.Linear(WIDTH, H)
        self.gate_first = gate_first

    def forward(self, x):
        a, b = self.wi(x).chunk(2, dim=-1)
        return self.wo(F.gelu(a) * b if self.gate_first else a * F.gelu(b))


class DownDeclaredFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(WIDTH, H)
        self.up = nn.Linear(H, WIDTH, bias=False)

    def forward(self, x):
        flat = x.reshape(-1, H)
        return self.down(F.relu(self.up(flat), inplace=True).to(self.down.weight.dtype)).view(x.shape)


def _zero_init() -> nn.Module:
    block = Gpt()
    for linear in (block.fc, block.proj):
        nn.init.zeros_(linear.weight)
    return block


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "sequential relu": lambda: nn.Sequential(nn.Linear(H, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, H)),
    "sequential dropouts": lambda: nn.Sequential(
        nn.Linear(H, WIDTH), nn.SiLU(), nn.Dropout(0.1), nn.Linear(WIDTH, H), nn.Dropout(0.2)
    ),
    "sequential tanh gelu": lambda: nn.Sequential(
        nn.Linear(H, WIDTH, bias=False), nn.GELU(approximate="tanh"), nn.Linear(WIDTH, H, bias=False)
    ),
    "gpt": Gpt,
    "gpt without bias": lambda: Gpt(bias=False),
    "gpt of equal widths": lambda: Gpt(width=H),
    "gpt, tanh gelu by hand": lambda: Gpt(
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "gpt, zeros": _zero_init,
    "swiglu": SwiGlu,
    "swiglu with bias": lambda: SwiGlu(bias=True),
    "fused, gate first": lambda: Fused(True),
    "fused, gate second": lambda: Fused(False),
    "one bias, in place, flattened": DownDeclaredFirst,
}


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(H), "ffn": block}) for block in blocks)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["ffn"](layer["norm"](x))
        return x


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _close(a: Tensor, b: Tensor) -> None:
    scale = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 3e-2}[a.dtype]
    assert a.dtype == b.dtype
    error, size = (a.detach().double() - b.detach().double()).abs().max(), b.detach().double().abs().max()
    assert float(error) <= scale * max(1.0, float(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_an_upcycled_model_computes_what_the_dense_one_did(name, dtype):
    net = Net(BLOCKS[name](), BLOCKS[name]()).to(dtype).eval()
    x = torch.randn(3, 7, H, dtype=dtype)
    before = net(x)
    for parameter in net.parameters():  # gradients too: the experts' add up to the dense one's
        parameter.grad = None
    norm_grad = torch.autograd.grad(before.float().square().sum(), net.layers[0]["norm"].weight)[0]
    names = dmoe.replace_ffn(net, "layers.*.ffn", num_experts=5, top_k=3, upcycle=True)
    assert names == ["layers.0.ffn", "layers.1.ffn"]
    assert len(dmoe.moe_layers(net)) == 2
    assert not any(module.training for module in net.modules())
    after = net(x)
    _close(after, before)
    again = torch.autograd.grad(after.float().square().sum(), net.layers[0]["norm"].weight)[0]
    if dtype != torch.bfloat16:
        torch.testing.assert_close(again, norm_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"top_k": 1},
    {"top_k": 4},
    {"softmax_order": "after_topk"},
    {"score_function": "sigmoid", "selection_bias": True},
    {"router": "uniform"},
    {"capacity": 1000},
    {"num_groups": 2, "top_k_groups": 1, "top_k": 2},
])  # fmt: skip
def test_upcycling_holds_under_routing_options(options):
    net = Net(SwiGlu(bias=True)).eval()
    x = torch.randn(5, H)
    before = net(x)
    dmoe.replace_ffn(net, "*.ffn", num_experts=4, upcycle=True, **options)
    _close(net(x), before)


def test_upcycling_with_one_output_bias():
    net = Net(DownDeclaredFirst()).eval()  # a bias behind the last linear only
    x = torch.randn(5, H)
    before = net(x)
    dmoe.replace_ffn(net, "*.ffn", num_experts=4, upcycle=True, bias="output")
    assert net.layers[0]["ffn"].experts.down_bias is None
    _close(net(x), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_normalization": None}, "gate_normalization: with upcycle=True expected 1.0"),
        ({"gate_normalization": 2.0}, "gate_normalization: with upcycle=True expected 1.0"),
        ({"gate_scale": 2.5}, "gate_scale"),
        ({"gate_weight_on": "input"}, "gate_weight_on"),
        ({"gate_weight_on": "activation"}, "gate_weight_on"),
        ({"activation": "relu"}, "activation: with upcycle=True expected the dense block's 'gelu'; got 'relu'"),
        ({"gated": True}, "gated"),
        ({"bias": "none"}, "bias"),
        ({"bias": "output"}, "bias"),
        ({"ffn_hidden_size": 8}, "ffn_hidden_size: with upcycle=True expected the dense block's 20; got 8"),
        ({"shared_ffn_hidden_size": 8}, "shared_ffn_hidden_size"),
        ({"router": "expert_choice", "causal": False, "gate_normalization": None}, "router"),
    ],
)
def test_options_that_contradict_upcycling_are_refused(options, message):
    net = Net(Gpt())
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=message):
        dmoe.replace_ffn(net, "*.ffn", num_experts=4, upcycle=True, **options)
    assert dict(net.named_modules()) == before


def test_perturbed_experts_differ_by_the_given_noise_and_by_the_seed_alone():
    def upcycled(seed: int) -> dmoe.MoE:
        net = Net(dense_block)
        torch.manual_seed(seed)
        dmoe.replace_ffn(net, "*.ffn", num_experts=4, upcycle=True, perturb=0.1)
        return net.layers[0]["ffn"]

    dense_block = nn.Sequential(nn.Linear(H, 500), nn.ReLU(), nn.Linear(500, H))
    first, again, other = upcycled(1), upcycled(1), upcycled(2)
    up = first.experts.up_proj
    assert torch.equal(up, again.experts.up_proj)
    assert not torch.equal(up, other.experts.up_proj)
    noise = (up / dense_block[0].weight - 1).detach()
    assert abs(float(noise.std()) - 0.1) < 0.005
    assert abs(float(noise.mean())) < 0.005
    correlation = torch.corrcoef(noise.reshape(4, -1)) - torch.eye(4)
    assert correlation.abs().max() < 0.1
    assert torch.equal(first.experts.down_bias, dense_block[2].bias.expand(4, H))
    assert not torch.equal(first.experts.down_proj[0], first.experts.down_proj[1])


def test_what_a_new_layer_takes_from_the_block():
    net = Net(*(BLOCKS["sequential dropouts"]() for _ in range(3))).double()
    net.layers[1].eval()
    frozen, half = net.layers[0]["ffn"].requires_grad_(False), net.layers[2]["ffn"]
    half[0].weight.requires_grad_(False)
    dmoe.replace_ffn(net, re.compile(r"ffn$"), num_experts=4, load_balancing_coefficient=0.3)
    layers = list(dmoe.moe_layers(net).values())
    assert [layer.training for layer in layers] == [True, False, True]
    assert [layer["ffn"].training for layer in net.layers] == [True, False, True]
    assert all(parameter.dtype == torch.float64 for layer in layers for parameter in layer.parameters())
    assert not any(parameter.requires_grad for parameter in layers[0].parameters())
    assert all(parameter.requires_grad for parameter in layers[1].parameters())
    flags = {name: parameter.requires_grad for name, parameter in layers[2].named_parameters()}
    assert flags == {
        "router.weight": True,
        "experts.up_proj": False,
        "experts.up_bias": True,
        "experts.down_proj": True,
        "experts.down_bias": True,
    }
    config = layers[0].config
    assert (config.hidden_size, config.ffn_hidden_size, config.activation, config.gated) == (H, WIDTH, "silu", False)
    assert (config.bias, config.num_moe_layers, config.load_balancing_coefficient) == ("expert", 3, 0.3)
    assert config.gate_normalization is None
    assert config.activation_dropout == pytest.approx(0.1)
    assert net.layers[0]["ffn"].dropout.p == pytest.approx(0.2)
    assert frozen is not net.layers[0]["ffn"]


def test_dropouts_keep_their_meaning():
    def zeros(drop_activation: float, drop_output: float) -> Tensor:
        torch.manual_seed(3)
        up, down = nn.Linear(64, 1000, bias=False), nn.Linear(1000, 64, bias=False)
        nn.init.ones_(up.weight), nn.init.constant_(down.weight, 1 / 1000)
        net = nn.ModuleDict(
            {"f": nn.Sequential(up, nn.ReLU(), nn.Dropout(drop_activation), down, nn.Dropout(drop_output))}
        )
        dmoe.replace_ffn(net, "f", num_experts=2, top_k=1, upcycle=True)
        return net["f"](torch.ones(200, 64) / 64).detach()

    y = zeros(0.0, 0.25)
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.02
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 4 / 3))
    y = zeros(0.5, 0.0)  # the mean of 1000 activations, each 0 or 2: standard deviation 1 / sqrt(1000)
    assert abs(float(y[:, 0].std()) - 1000**-0.5) < 0.005
    torch.testing.assert_close(y, y[:, :1].expand_as(y))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_layers(norm_first, activation):
    layer = nn.TransformerEncoderLayer(H, 2, WIDTH, 0.1, activation, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()
    x, padding = torch.randn(2, 6, H), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        before, before_padded = net(x), net(x, src_key_padding_mask=padding)
    replaced = copy.deepcopy(net)
    assert dmoe.replace_ffn(replaced, "layers.*", num_experts=4, upcycle=True) == ["layers.0", "layers.1", "layers.2"]
    for grad in (True, False):  # without gradients PyTorch would take its fused kernels, and nested tensors for padding
        with torch.set_grad_enabled(grad):
            _close(replaced(x), before)
            _close(replaced(x, src_key_padding_mask=padding)[~padding], before_padded[~padding])
    with torch.inference_mode():
        _close(replaced(x), before)

    one = copy.deepcopy(net)  # only the second: the encoder asks the first layer whether to pack the batch
    dmoe.replace_ffn(one, "layers.1", num_experts=4, upcycle=True)
    with torch.no_grad():
        _close(one(x, src_key_padding_mask=padding)[~padding], before_padded[~padding])

    replaced.train()
    moe = replaced.layers[0].linear1
    assert moe.training
    assert moe.config.activation_dropout == pytest.approx(0.1)
    (replaced(x).square().mean() + dmoe.aux_loss(replaced)).backward()
    assert all(parameter.grad is not None for parameter in replaced.parameters())
    assert replaced.layers[0].dropout2.p == pytest.approx(0.1)  # the layer's own, behind its feed-forward part


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_decoder_layers(norm_first):
    layer = nn.TransformerDecoderLayer(H, 2, WIDTH, 0.1, F.gelu, batch_first=True, norm_first=norm_first)
    net = nn.TransformerDecoder(layer, 2).eval()
    x, memory = torch.randn(2, 6, H), torch.randn(2, 5, H)
    before = net(x, memory)
    assert dmoe.replace_ffn(net, "layers.*", num_experts=4, upcycle=True) == ["layers.0", "layers.1"]
    _close(net(x, memory), before)
    _close(copy.deepcopy(net)(x, memory), before)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_a_layer_whose_activation_is_a_module(kind):
    layer = kind(H, 2, WIDTH, activation=nn.GELU(), batch_first=True).eval()
    inputs = [torch.randn(2, 6, H) for _ in range(2 if kind is nn.TransformerDecoderLayer else 1)]
    before = layer(*inputs)
    dmoe.replace_ffn(layer, "", num_experts=4, upcycle=True)
    _close(layer(*inputs), before)
    _close(copy.deepcopy(layer)(*inputs), before)


def test_a_transformer_layer_can_be_the_whole_model():
    layer = nn.TransformerEncoderLayer(H, 2, WIDTH, batch_first=True).eval()
    x = torch.randn(2, 6, H)
    before = layer(x)
    assert dmoe.replace_ffn(layer, "", num_experts=4, upcycle=True) == [""]
    with torch.no_grad():
        _close(layer(x), before)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("layers.1.ffn", [1]),
        ("*ffn*", [0, 1, 2]),  # also matches what is inside: the outermost counts
        ("layers.[02].ffn", [0, 2]),
        (["*.0.ffn", re.compile(r"\.1\.ffn")], [0, 1]),
        (re.compile(r"layers\.\d+\.ffn$"), [0, 1, 2]),
        (lambda name, module: isinstance(module, Gpt), [0, 2]),
        (lambda name, module: name.endswith("1.ffn"), [1]),
    ],
)
def test_ways_to_select(select, expected):
    net = Net(Gpt(), SwiGlu(), Gpt())
    names = dmoe.replace_ffn(net, select, num_experts=4)
    assert names == [f"layers.{index}.ffn" for index in expected]
    for index, layer in enumerate(net.layers):
        assert bool(dmoe.moe_layers(layer)) == (index in expected)
    assert {layer.config.num_moe_layers for layer in dmoe.moe_layers(net).values()} == {len(expected)}


def test_a_shared_module_is_replaced_once_and_stays_shared():
    shared = SwiGlu()
    net = Net(shared, SwiGlu(), shared)
    assert dmoe.replace_ffn(net, "*.ffn", num_experts=4) == [f"layers.{index}.ffn" for index in range(3)]
    assert net.layers[0]["ffn"] is net.layers[2]["ffn"]
    assert net.layers[0]["ffn"] is not net.layers[1]["ffn"]
    assert net.layers[0]["ffn"].config.num_moe_layers == 2


class Calls(nn.Module):
    """Two linears and whatever is done with them."""

    def __init__(self, forward: Callable[[Calls, Tensor], object], **modules: nn.Module):
        super().__init__()
        self.up, self.down = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)
        for name, module in modules.items():
            self.add_module(name, module)
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


UNRECOGNISED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "residual": (lambda: Calls(lambda m, x: x + m.down(F.relu(m.up(x)))), "does not return the output of its last"),
    "scale": (lambda: Calls(lambda m, x: 0.5 * m.down(F.relu(m.up(x)))), "does not return the output of its last"),
    "norm": (
        lambda: Calls(lambda m, x: m.down(F.relu(m.up(F.layer_norm(x, (H,)))))),
        "does not hand its input as it is",
    ),
    "norm module": (
        lambda: nn.Sequential(nn.LayerNorm(H), nn.Linear(H, WIDTH), nn.ReLU(), nn.Linear(WIDTH, H)),
        r"holds 2 linears, and besides them 0\.weight, 0\.bias",
    ),
    "functional dropout": (
        lambda: Calls(lambda m, x: m.down(F.dropout(F.relu(m.up(x)), 0.1, m.training))),
        "does more in training than its nn.Dropout modules",
    ),
    "dropout too early": (
        lambda: Calls(lambda m, x: m.down(F.relu(m.drop(m.up(x)))), drop=nn.Dropout(0.1)),
        "nn.Dropout that is neither right before nor right after",
    ),
    "other activation": (lambda: Gpt(lambda x: x * torch.sigmoid(1.702 * x)), "expected the activation silu, gelu"),
    "no activation": (lambda: nn.Sequential(nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)), "expected the activation silu"),
    "called twice": (lambda: Calls(lambda m, x: m.down(m.up(m.down(m.up(x))))), "its forward calls"),
    "not called": (lambda: Calls(lambda m, x: F.linear(F.relu(m.up(x)), m.down.weight)), r"its forward calls \['up'\]"),
    "tuple": (lambda: Calls(lambda m, x: (m.down(F.relu(m.up(x))), None)), "returns tuple"),
    "second argument": (lambda: Calls(lambda m, x: m.nothing), "does not run on one .* AttributeError"),
    "linear": (lambda: nn.Linear(H, H), "is a single linear"),
    "attention": (
        lambda: nn.MultiheadAttention(H, 2),
        "holds 1 linears, and besides them in_proj_weight, in_proj_bias",
    ),
    "three in a row": (
        lambda: nn.Sequential(nn.Linear(H, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, H)),
        "does not hand its input as it is to its linear '2'",
    ),
    "no way back": (
        lambda: nn.Sequential(nn.Linear(H, 7), nn.ReLU(), nn.Linear(7, 5)),
        "linear '0' takes 12 features and got 7",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(WIDTH), nn.ReLU(), nn.Linear(WIDTH, H)), "quantised or lazy"),
    "mixed dtypes": (
        lambda: nn.Sequential(nn.Linear(H, WIDTH), nn.ReLU(), nn.Linear(WIDTH, H).double()),
        "linears of several devices or dtypes",
    ),
    "a MoE": (lambda: dmoe.MoE(hidden_size=H, ffn_hidden_size=WIDTH, num_experts=2), "dmoe.MoE already"),
}


@pytest.mark.parametrize("name", UNRECOGNISED)
def test_an_error_names_the_module_and_changes_nothing(name):
    build, message = UNRECOGNISED[name]
    net = Net(Gpt(), build())
    net.layers[1].eval()
    net.layers[0]["ffn"].proj.eval()  # a mixture of flags to find again
    before = dict(net.named_modules())
    flags = {key: module.training for key, module in before.items()}
    keys = {key: set(vars(module)) for key, module in before.items()}
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=message) as caught:
        dmoe.replace_ffn(net, "layers.*.ffn", num_experts=4)
    assert "'layers.1.ffn'" in str(caught.value)
    if "Recognised:" in str(caught.value):
        assert "Feed-forward blocks in this model: layers.0.ffn" in str(caught.value)
    assert dict(net.named_modules()) == before
    assert {key: module.training for key, module in before.items()} == flags
    assert {key: set(vars(module)) for key, module in before.items()} == keys
    assert torch.equal(torch.get_rng_state(), rng)


def test_reading_a_block_leaves_no_trace():
    block = Gpt()
    handled = []
    block.fc.__dict__["forward"] = own = lambda x: handled.append(x)  # as offloading wrappers do
    block.fc.register_forward_hook(lambda *_: None)
    before, rng = dict(vars(block.fc)), torch.get_rng_state()
    assert read_ffn(block).activation == "gelu"
    assert block.fc.__dict__["forward"] is own
    assert not handled
    assert dict(vars(block.fc)) == before
    assert "forward" not in vars(block.proj)
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_unknown_activation_or_dropout_can_be_named_instead():
    net = Net(Gpt(torch.tanh), Calls(lambda m, x: m.down(F.dropout(F.relu(m.up(x)), 0.1, m.training))))
    dmoe.replace_ffn(net, "*.ffn", num_experts=4, activation="gelu_tanh", gated=True, activation_dropout=0.2)
    for layer in dmoe.moe_layers(net).values():
        assert (layer.config.activation, layer.config.gated) == ("gelu_tanh", True)
        assert layer.config.activation_dropout == 0.2
    with pytest.raises(ValueError, match="expected the activation"):
        dmoe.replace_ffn(Net(Gpt(torch.tanh)), "*.ffn", num_experts=4, activation="gelu", upcycle=True)


def test_other_widths():
    net = Net(SwiGlu())
    dmoe.replace_ffn(net, "*.ffn", num_experts=3, ffn_hidden_size=[4, 8, 16], top_k=2)
    assert net.layers[0]["ffn"].config.ffn_sizes == (4, 8, 16)
    assert net(torch.randn(5, H)).shape == (5, H)


def test_on_the_meta_device():
    with torch.device("meta"):
        net = Net(Gpt(), SwiGlu())
    dmoe.replace_ffn(net, "*.ffn", num_experts=4)
    assert all(parameter.is_meta for parameter in net.parameters())
    assert [layer.config.activation for layer in dmoe.moe_layers(net).values()] == ["gelu", "silu"]
    with torch.device("meta"):
        net = Net(Gpt())
    with pytest.raises(
        ValueError, match=r"'layers.0.ffn': expected weights to copy .* got a module on the meta device"
    ):
        dmoe.replace_ffn(net, "*.ffn", num_experts=4, upcycle=True)


def test_arguments_that_make_no_sense():
    net = Net(Gpt(), SwiGlu())
    with pytest.raises(ValueError, match=r"select: no module matches 'mlp'\. .*: layers\.0\.ffn, layers\.1\.ffn"):
        dmoe.replace_ffn(net, "mlp", num_experts=4)
    with pytest.raises(ValueError, match="This Linear holds no feed-forward block"):
        dmoe.replace_ffn(nn.Linear(2, 2), "x", num_experts=4)
    with pytest.raises(ValueError, match="the model itself, which cannot be exchanged"):
        dmoe.replace_ffn(SwiGlu(), "", num_experts=4)
    with pytest.raises(ValueError, match=r"'layers.0.ffn.fc' .* is a single linear.*: layers.0.ffn, layers.1.ffn"):
        dmoe.replace_ffn(net, "*.fc", num_experts=4)
    with pytest.raises(TypeError, match=r"select: expected a glob.*got int"):
        dmoe.replace_ffn(net, 3, num_experts=4)
    with pytest.raises(TypeError, match=r"expected fields of dmoe.MoEConfig.*got hidden_size, topk"):
        dmoe.replace_ffn(net, "*.ffn", num_experts=4, topk=2, hidden_size=3)
    with pytest.raises(ValueError, match=r"perturb: .* got 0\.1"):
        dmoe.replace_ffn(net, "*.ffn", num_experts=4, perturb=0.1)
    with pytest.raises(ValueError, match="top_k: expected at most num_experts = 4, got 5"):
        dmoe.replace_ffn(net, "*.ffn", num_experts=4, top_k=5)
    assert not dmoe.moe_layers(net)


transformers = pytest.importorskip("transformers", reason="Hugging Face models need transformers")
_SIZES = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _decoder(name: str, **fields) -> nn.Module:
    config = getattr(transformers, name + "Config")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, name + "ForCausalLM")(config(**{**_SIZES, **sizes, **fields}))


HUGGING_FACE: dict[str, tuple[Callable[[], nn.Module], str, dict]] = {
    "Llama": (
        lambda: _decoder("Llama", mlp_bias=True),
        "*.mlp",
        {"activation": "silu", "gated": True, "bias": "expert"},
    ),
    "Mistral": (lambda: _decoder("Mistral", num_key_value_heads=2), "*.mlp", {"activation": "silu", "bias": "none"}),
    "Qwen3": (
        lambda: _decoder("Qwen3", head_dim=8, num_key_value_heads=2),
        "model.layers.*.mlp",
        {"activation": "silu", "gated": True},
    ),
    "Gemma": (
        lambda: _decoder("Gemma", head_dim=8, num_key_value_heads=4),
        "*.mlp",
        {"activation": "gelu_tanh", "gated": True},
    ),
    "Phi3": (lambda: _decoder("Phi3"), "*.mlp", {"activation": "silu", "gated": True}),
    "GPT-NeoX": (lambda: _decoder("GPTNeoX"), "*.mlp", {"activation": "gelu", "gated": False, "bias": "expert"}),
    "GPT-2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_SIZES, n_embd=32, n_layer=2, n_head=4)),
        "transformer.h.*.mlp",
        {"activation": "gelu_tanh", "gated": False, "bias": "expert", "ffn_hidden_size": 128},
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models(name):
    build, select, expected = HUGGING_FACE[name]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero there, which would hide a lost one
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(3, 64, (2, 9))
    before = model(ids).logits
    assert len(dmoe.replace_ffn(model, select, num_experts=4, top_k=2, upcycle=True)) == 2
    _close(model(ids).logits, before)
    for layer in dmoe.moe_layers(model).values():
        assert {key: getattr(layer.config, key) for key in expected} == expected

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        (loss + dmoe.aux_loss(model)).backward()
        assert all(layer.router.weight.grad.abs().sum() > 0 for layer in dmoe.moe_layers(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build()
    dmoe.replace_ffn(other, select, num_experts=4, top_k=2, gate_normalization=1.0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.eval()(ids).logits, model.eval()(ids).logits)


def test_a_hugging_face_t5_feed_forward_part():
    for kind in ("relu", "gated-gelu"):
        config = transformers.T5Config(d_model=H, d_ff=WIDTH, feed_forward_proj=kind, num_layers=1, **_SIZES)
        net = nn.ModuleDict({"ff": transformers.models.t5.modeling_t5.T5LayerFF(config)}).eval()
        x = torch.randn(2, 5, H)
        before = net["ff"](x)
        dmoe.replace_ffn(net, "ff.DenseReluDense", num_experts=4, upcycle=True)
        _close(net["ff"](x), before)
        moe = net["ff"].DenseReluDense
        assert moe.config.activation_dropout == pytest.approx(0.1)
        assert moe.config.activation == {"relu": "relu", "gated-gelu": "gelu_tanh"}[kind]
