"""Jobs on single layers of torchtitan: values, gradients, what is kept, names, published models, and bad input."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import torch
from spmd_types.checker import typecheck
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config import derive
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common import Linear
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts
from torchtitan.models.gpt_oss import model_registry as gpt_oss
from torchtitan_model import spec, trainer_config
from torchtitan_plain import plain_experts, plain_forward

import dmoe
from dmoe.integrations.torchtitan import (
    DmoeSelectiveAC,
    from_dmoe,
    moe_config,
    overrides,
    run_on_cpu,
    to_dmoe,
    use,
)

MIXTURES = ("qwen3", "deepseek_v3", "gpt_oss")
PUBLISHED = {
    "qwen3": ("debugmodel_moe", "30B-A3B", "235B-A22B"),
    "deepseek_v3": ("debugmodel", "16B", "236B", "671B"),
    "gpt_oss": ("debugmodel", "20b", "120b"),
    "kimi_k2_7": ("debugmodel", "moonlight-16B-A3B", "Kimi-VL-A3B", "Kimi-K2.5"),
}


def mixture_config(name):
    """The config of one small mixture."""
    if name != "gpt_oss":
        return spec(name).model.layers[1].moe
    config = gpt_oss("debugmodel").model.layers[0].moe
    inner, router = config.routed_experts.inner_experts, config.router
    config.num_experts = inner.num_experts = router.num_experts = config.routed_experts.token_dispatcher.num_experts = 8
    inner.dim, inner.hidden_dim, router.gate.in_features, router.gate.out_features = 32, 24, 32, 8
    return config


def mixture(config, dtype=torch.float64):
    """The layer with values that tell rows, columns and experts apart."""
    layer = config.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        layer._init_self_buffers()
        if layer.expert_bias_E is not None:
            layer.expert_bias_E.copy_(torch.randn(8, generator=generator) * 0.1)
    return layer.to(dtype)


def run(layer, x, weight):
    """Output and gradients of everything, by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * weight).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads, "counted": layer.tokens_per_expert_E.clone()}


def layers(folder):
    """dmoe's, the plain loop's and torchtitan's own results on the same weights."""
    found = {}
    x, weight = torch.randn(2, 3, 7, 32, generator=torch.Generator().manual_seed(1)).double().unbind()
    for name in MIXTURES:
        config = mixture_config(name)
        swapped = copy.copy(config)
        swapped.routed_experts = overrides.experts(config.routed_experts)
        plain = mixture(config)
        plain_forward(plain.routed_experts)
        found[name] = {"plain": run(plain, x, weight), "float64": run(mixture(swapped), x, weight)}
        for dtype in (torch.float32, torch.bfloat16):
            arguments = x.to(dtype), weight.to(dtype)
            key = str(dtype).removeprefix("torch.")
            found[name] |= {key: run(mixture(swapped, dtype), *arguments)}
            if name != "gpt_oss" or dtype == torch.bfloat16:  # torchtitan's own fails on GPT-OSS in float32
                found[name] |= {f"{key}, theirs": run(mixture(config, dtype), *arguments)}
    found["shares"], found["typechecked"] = _shares(), _typechecked()
    return found


def _shares():
    """GPT-OSS cut along F over two ranks, one after the other: what they return adds up to the whole layer's."""
    routed = mixture_config("gpt_oss").routed_experts
    whole = mixture_routed(routed)
    inner = whole.inner_experts
    x, scores, ids = torch.randn(1, 5, 32).double(), torch.rand(1, 5, 2).double(), torch.randint(0, 8, (1, 5, 2))
    expected = plain_experts(inner, x, scores, ids)
    wanted = torch.autograd.grad(expected.sum(), inner.mlp2_bias_ED)[0]
    total, grads = 0, []
    for rank in range(2):
        part = overrides.experts(routed).build().double()
        part.parallelize(SimpleNamespace(get_optional_mesh=lambda name: None, tp=2))
        half, mine = inner.mlp1_weight_EGD.shape[1] // 2, slice(rank * 12, rank * 12 + 12)
        pieces = {
            "mlp1_weight_EGD": inner.mlp1_weight_EGD[:, rank * half : rank * half + half],
            "mlp1_bias_EG": inner.mlp1_bias_EG[:, rank * half : rank * half + half],
            "mlp2_weight_EDF": inner.mlp2_weight_EDF[:, :, mine],
            "mlp2_bias_ED": inner.mlp2_bias_ED,
        }
        for name, value in pieces.items():
            setattr(part.inner_experts, name, torch.nn.Parameter(value.detach().clone()))
        y = part(x, scores, ids, torch.zeros(8))
        total = total + y.detach()
        grads.append(torch.autograd.grad(y.sum(), part.inner_experts.mlp2_bias_ED)[0])
    return {"expected": expected.detach(), "total": total, "wanted": wanted, "grads": grads}


def _typechecked():
    """torchtitan's checker of SPMD types, which knows no operation of dmoe's, looks away inside."""
    layer = overrides.experts(mixture_config("qwen3").routed_experts).build()
    x, ids = torch.randn(1, 5, 32), torch.randint(0, 8, (1, 5, 2))
    arguments = x, torch.rand(1, 5, 2), ids, torch.zeros(8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.1)
        with typecheck(local=False):
            checked = layer(*arguments)
        return checked, layer(*arguments)


def mixture_routed(config):
    layer = config.build().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def states(folder):
    """torchtitan's layer and :class:`dmoe.MoE` on what ``to_dmoe`` made of its state, and the way back."""
    found = {}
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2)).double()
    for name in MIXTURES:
        config = mixture_config(name)
        layer = mixture(config).eval()
        plain_forward(layer.routed_experts)
        state = {f"layers.1.moe.{key}": value for key, value in layer.state_dict().items()} | {"norm.weight": x[0, 0]}
        ours = to_dmoe(state)
        moe = dmoe.MoE(moe_config(config)).double().eval()
        moe.load_state_dict({key.removeprefix("layers.1.moe."): t for key, t in ours.items() if ".moe." in key})
        found[name] = {"theirs": layer(x), "ours": moe(x), "state": state, "back": from_dmoe(ours)}
    return found


def selective(folder):
    """How often the experts run forward under torchtitan's policy, and under dmoe's."""
    config = mixture_config("qwen3")
    config.routed_experts = overrides.experts(config.routed_experts)
    found = {}
    for name, policy in {"theirs": SelectiveAC, "ours": DmoeSelectiveAC}.items():
        wrapped = policy(policy.Config(force_recompute_mm_shapes_by_fqns=[]))._wrap_block(mixture(config))
        with Counter() as counter:
            x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
            (wrapped(x) ** 2).sum().backward()
        found[name] = counter.calls
        found[f"{name}, grads"] = {key: p.grad for key, p in wrapped.named_parameters()}
    return found


class Counter(TorchDispatchMode):
    """How often dmoe's experts run forward; a result that a checkpoint has kept is no run."""

    calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls += function is torch.ops.dmoe.moe_mlp.default
        return function(*arguments, **(options or {}))


def published(folder):
    """By model and flavor: its mixtures, those that the override claims, and how many a debug model is built with."""
    found = {}
    for module, flavors in PUBLISHED.items():
        registry = importlib.import_module(f"torchtitan.models.{module}").model_registry
        for flavor in flavors:
            model = registry(flavor)
            config = trainer_config("qwen3", folder)
            config.model_spec = model
            mixtures = sum(1 for _ in model.traverse(MoE.Config))
            target = "dmoe.integrations.torchtitan.overrides.experts"
            claimed = len(apply_overrides(OverrideConfig(imports=[target]), config))
            left = sum(type(c) is RoutedExperts.Config for _, c, _, _ in model.traverse(RoutedExperts.Config))
            found[f"{module} {flavor}"] = (mixtures, claimed, left)
    return found


def bad_input(folder):
    """What is said of each mistake."""
    config = mixture_config("qwen3").routed_experts

    class Fused(GroupedExperts):
        pass

    Fused.Config = type("Config", (GroupedExperts.Config,), {"_owner": Fused})
    fused = copy.copy(config)
    fused.inner_experts = derive(config.inner_experts, Fused.Config)
    six = copy.deepcopy(config)
    six.inner_experts.num_experts = 6
    dense = trainer_config("qwen3", folder)
    dense.model_spec.model.layers = dense.model_spec.model.layers[:0]
    mesh = SimpleNamespace(size=lambda: 4)
    four = SimpleNamespace(get_optional_mesh=lambda name: mesh, tp=1)
    half = {"layers.0.moe.routed_experts.inner_experts.w1_EFD": torch.zeros(1, 2, 3)}
    calls = {
        "an unknown option": lambda: overrides.experts(config, wire="fp8"),
        "fused experts": lambda: overrides.experts(fused),
        "an unknown exchange": lambda: overrides.experts(config, exchange="nccl").build(),
        "an unknown wire dtype": lambda: use(trainer_config("qwen3", folder), wire_dtype="fp4"),
        "a wire of torchtitan's": lambda: overrides.experts(config, exchange="torchtitan", wire_dtype="fp8").build(),
        "no truth value": lambda: use(trainer_config("qwen3", folder), recompute_pre_activation=1),
        "a wire in a graph": lambda: _in_graph(config),
        "six experts on four ranks": lambda: overrides.experts(six).build().parallelize(four),
        "no trainer's config": lambda: use(config),
        "no mixture": lambda: use(dense),
        "not a layer's config": lambda: moe_config(Linear.Config(in_features=2, out_features=2)),
        "no config": lambda: moe_config(None),
        "half a pair": lambda: to_dmoe(half),
        "an unknown name": lambda: to_dmoe({"layers.0.moe.routed_experts.w9": torch.zeros(1)}),
        "a name of dmoe alone": lambda: from_dmoe({"layers.0.moe.shared_expert.gate.weight": torch.zeros(1, 2)}),
        "late": _late,
    }
    said = {}
    for what, call in calls.items():
        try:
            call()
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"
    return said


def _in_graph(config):
    layer = overrides.experts(config, wire_dtype="fp8").build()
    layer._ep = 2  # as under torch.compile, where dmoe moves nothing
    layer(torch.zeros(1, 2, 32), torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(8))


def _late():
    import torchtitan.tools.utils as utils

    utils.device_type = "cuda"
    try:
        run_on_cpu()
    finally:
        utils.device_type = "cpu"
