"""Other libraries' experts, where they import; each knows how its package wants routing and weights."""

from __future__ import annotations

import importlib
import os
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parts.gpu_contestants import CONTESTANTS, AbsentError, Contestant, _Stacked


def add_peers(folder: Path | None) -> list[str]:
    """Make wheels and source folders of ``folder`` importable, behind what is installed; returns their names.

    Wheels, and unpacked ones in a ``.tar.xz`` (which is smaller), are unpacked into a temporary folder. A source folder
    must be ready to import: built, where it has compiled parts. A ``python_packages`` folder inside a package (as
    ``nvidia-cutlass-dsl`` has it) is added as well.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise ValueError(f"--peers: expected a folder, got {folder}")
    names, unpacked = [], Path(tempfile.mkdtemp(prefix="dmoe-peers-"))
    places = []
    for entry in sorted(folder.iterdir()):
        if entry.suffix == ".whl":
            with zipfile.ZipFile(entry) as wheel:
                wheel.extractall(unpacked)
        elif entry.name.endswith(".tar.xz"):
            with tarfile.open(entry) as archive:
                archive.extractall(unpacked, filter="data")
        elif entry.is_dir():
            places.append(entry)
        else:
            continue
        names.append(entry.name)
    added = [str(path) for place in (unpacked, *places) for path in (place, *sorted(place.glob("*/python_packages")))]
    sys.path += added
    # Triton and inductor compile in processes of their own.
    os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *added])
    importlib.invalidate_caches()
    return names


def _need(module: str, *names: str) -> Any:
    """A module that has these names, or an :class:`AbsentError` that says what the import said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
    except Exception as error:  # a package of another time may fail in any way
        raise AbsentError(f"{module} does not import: {type(error).__name__}: {error}") from error
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        raise AbsentError(f"{module} {getattr(found, '__version__', '')} has no {', '.join(missing)}")
    return found


class Liger(_Stacked):
    """Liger's fused MoE: Triton kernels, one number read back in each forward."""

    synchronises = True

    def prepare(self) -> None:
        super().prepare()
        if self.x.device.type != "cuda":
            raise AbsentError("liger_kernel needs a CUDA device")
        self.function = _need("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction").LigerFusedMoEFunction
        self.indices = self.problem.indices.int()

    def forward(self) -> Tensor:
        return self.function.apply(self.x, self.gate_up, self.down, self.indices, self.gates)


class ScatterMoE(_Stacked):
    """ScatterMoE's ``GLUMLP``; its first half of the up projection is the value, the second the gate."""

    synchronises = True  # bincount

    def prepare(self) -> None:
        super().prepare()
        if self.x.device.type != "cuda":
            raise AbsentError("scattermoe needs a CUDA device")
        module = _need("scattermoe.mlp", "GLUMLP")
        shape = self.problem.shape
        with torch.device("meta"):
            self.mlp = module.GLUMLP(shape.hidden, shape.ffn, shape.experts, shape.top_k, activation=nn.SiLU())
        gate, value = self.problem.gate_up.split(shape.ffn, 1)
        self.mlp.experts.weight = nn.Parameter(torch.cat([value, gate], 1))
        self.mlp.output_experts.weight = nn.Parameter(self.problem.down.detach())

    def leaves(self) -> Sequence[Tensor]:
        return self.x, self.gates, self.mlp.experts.weight, self.mlp.output_experts.weight

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        named = super().named(grads)
        value, gate = named["gate_up"].split(self.problem.shape.ffn, 1)
        return {**named, "gate_up": torch.cat([gate, value], 1)}

    def forward(self) -> Tensor:
        return self.mlp(self.x, self.gates, self.problem.indices)


class SonicMoE(_Stacked):
    """SonicMoE with the routing given: its path for a fixed K, behind its own metadata kernels."""

    gate_dtype = torch.float32

    def prepare(self) -> None:
        super().prepare()
        if self.x.device.type != "cuda" or torch.cuda.get_device_capability(self.x.device)[0] < 9:
            raise AbsentError("sonicmoe needs a Hopper GPU or later")
        self.functions = _need(
            "sonicmoe.functional", "TC_topk_router_metadata_triton", "_UpProjection", "_DownProjection"
        )
        self.swiglu = _need("sonicmoe.enums", "ActivationType").ActivationType.SWIGLU
        self.indices = self.problem.indices.int()

    def forward(self) -> Tensor:
        shape, device = self.problem.shape, self.x.device
        R, E, K = shape.rows, shape.experts, shape.top_k

        def integers(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        counts, offsets, gather, scatter, back = (integers(size) for size in (E, E + 1, R, R, R))
        self.functions.TC_topk_router_metadata_triton(self.indices, E, counts, offsets, gather, scatter, back)
        up, down = self.gate_up.permute(1, 2, 0), self.down.permute(1, 2, 0)
        plan = gather, scatter, back, None, False
        # concat_layout: gate rows, then up rows, as here; its own layers interleave them.
        a, h = self.functions._UpProjection.apply(
            self.x, up, None, offsets, R, K, *plan, self.swiglu, not torch.is_grad_enabled(), True
        )
        return self.functions._DownProjection.apply(
            a, h, down, None, self.gates, offsets, shape.tokens, K, *plan, self.swiglu
        )


class MegaBlocks(_Stacked):
    """MegaBlocks' ``ParallelDroplessMLP``, ``sparse`` (stk) or ``grouped``; its versions' pins are not enforced."""

    synchronises = True
    implementation = "grouped"

    def prepare(self) -> None:
        super().prepare()
        if self.x.device.type != "cuda":
            raise AbsentError("megablocks needs a CUDA device")
        _need("megablocks_ops")  # its compiled part; the package imports without it, and fails later
        _need("stk")
        if self.implementation == "grouped":
            _need("grouped_gemm")
        arguments = _need("megablocks.layers.arguments", "Arguments").Arguments
        shape = self.problem.shape
        # Its check of Triton's version is what refuses "sparse"; whether that runs is for the check here to find out.
        checked, arguments.__post_init__ = arguments.__post_init__, lambda self: None
        try:
            args = arguments(
                hidden_size=shape.hidden,
                ffn_hidden_size=shape.ffn,
                moe_num_experts=shape.experts,
                moe_top_k=shape.top_k,
                bias=False,
                mlp_type="glu",
                mlp_impl=self.implementation,
                activation_fn=nn.functional.silu,
                fp16=False,
                bf16=True,
                device=self.x.device,
                shared_expert_hidden_size=shape.ffn,
            )
            self.mlp = _need("megablocks.layers.dmoe", "ParallelDroplessMLP").ParallelDroplessMLP(args)
        finally:
            arguments.__post_init__ = checked
        gate, value = self.problem.gate_up.split(shape.ffn, 1)
        experts = self.mlp.mlp
        experts.w1 = nn.Parameter(gate.reshape(-1, shape.hidden))
        experts.v1 = nn.Parameter(value.reshape(-1, shape.hidden))
        experts.w2 = nn.Parameter(self.problem.down.transpose(1, 2).reshape(-1, shape.hidden))

    def leaves(self) -> Sequence[Tensor]:
        experts = self.mlp.mlp
        return self.x, self.gates, experts.w1, experts.v1, experts.w2

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        shape = self.problem.shape
        x, gates, w1, v1, w2 = grads
        gate, value, down = (w.view(shape.experts, shape.ffn, shape.hidden) for w in (w1, v1, w2))
        return {"x": x, "gates": gates, "gate_up": torch.cat([gate, value], 1), "down": down.transpose(1, 2)}

    def forward(self) -> Tensor:
        y, _ = self.mlp.forward_once(self.x, self.gates, self.problem.indices)
        return y


class MegaBlocksSparse(MegaBlocks):
    """The block-sparse path."""

    implementation = "sparse"


class Megatron(Contestant):
    """Megatron-Core's experts without Transformer Engine: its permute, ``SequentialMLP``, its unpermute."""

    synchronises = True

    def prepare(self) -> None:
        shape = self.problem.shape
        self.utils = _need("megatron.core.transformer.moe.moe_utils", "permute", "unpermute")
        config = _need("megatron.core.transformer.transformer_config", "TransformerConfig")
        groups = _need("megatron.core.process_groups_config", "ProcessGroupCollection")
        state = _need("megatron.core.parallel_state", "initialize_model_parallel", "is_initialized")
        if not torch.distributed.is_initialized():
            place = Path(tempfile.mkdtemp(prefix="dmoe-group-")) / "store"
            backend = "nccl" if self.x.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, init_method=f"file://{place}", rank=0, world_size=1)
        if not state.is_initialized():
            state.initialize_model_parallel()
        options = config.TransformerConfig(
            num_layers=1,
            hidden_size=shape.hidden,
            num_attention_heads=1,
            num_moe_experts=shape.experts,
            ffn_hidden_size=shape.ffn,
            moe_ffn_hidden_size=shape.ffn,
            moe_router_topk=shape.top_k,
            gated_linear_unit=True,
            activation_func=nn.functional.silu,
            bias_activation_fusion=True,
            add_bias_linear=False,
            gradient_accumulation_fusion=False,
            params_dtype=torch.bfloat16,
            bf16=True,
            perform_initialization=False,  # the weights are replaced below
            use_cpu_initialization=True,
        )
        self.gates = self.problem.gates.clone().requires_grad_()
        self.build(options, groups.ProcessGroupCollection.use_mpu_process_groups())

    def build(self, options: Any, collection: Any) -> None:
        """The module, with the problem's weights."""
        experts = _need("megatron.core.transformer.moe.experts", "SequentialMLP")
        mlp = _need("megatron.core.transformer.mlp", "MLPSubmodules")
        layers = _need("megatron.core.tensor_parallel.layers", "ColumnParallelLinear", "RowParallelLinear")
        submodules = mlp.MLPSubmodules(linear_fc1=layers.ColumnParallelLinear, linear_fc2=layers.RowParallelLinear)
        problem = self.problem
        self.mlp = experts.SequentialMLP(problem.shape.experts, options, submodules, pg_collection=collection)
        for expert, up, down in zip(self.mlp.local_experts, problem.gate_up, problem.down, strict=True):
            expert.linear_fc1.weight.data = up.detach()
            expert.linear_fc2.weight.data = down.detach()

    def leaves(self) -> Sequence[Tensor]:
        experts = self.mlp.local_experts
        ups, downs = [e.linear_fc1.weight for e in experts], [e.linear_fc2.weight for e in experts]
        return self.x, self.gates, *ups, *downs

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        E = self.problem.shape.experts
        ups, downs = grads[2 : 2 + E], grads[2 + E :]
        return {"x": grads[0], "gates": grads[1], "gate_up": torch.stack(list(ups)), "down": torch.stack(list(downs))}

    def forward(self) -> Tensor:
        shape, indices = self.problem.shape, self.problem.indices
        empty = torch.zeros(shape.tokens, shape.experts, device=self.x.device)
        probs = empty.scatter(1, indices, self.gates)
        routing_map = empty.bool().scatter(1, indices, True)
        counts = routing_map.sum(0)
        rows, weights, order, *_ = self.utils.permute(self.x, routing_map, probs=probs, num_out_tokens=shape.rows)
        out, _ = self.mlp(rows, counts, weights)
        return self.utils.unpermute(out, order, restore_shape=self.x.shape)


class MegatronGrouped(Megatron):
    """Its ``GroupedMLP``: one grouped product for all experts, by the grouped_gemm package; not in every release."""

    def build(self, options: Any, collection: Any) -> None:
        _need("grouped_gemm")
        experts = _need("megatron.core.transformer.moe.experts", "GroupedMLP")
        problem, hidden = self.problem, self.problem.shape.hidden
        self.mlp = experts.GroupedMLP(problem.shape.experts, options, pg_collection=collection)
        # Its parameters' shapes are (H, E 2F) and (E F, H), and their memory is (E, H, 2F) and (E, F, H).
        self.mlp.weight1.data = problem.gate_up.detach().transpose(1, 2).reshape(hidden, -1)
        self.mlp.weight2.data = problem.down.detach().transpose(1, 2).reshape(-1, hidden)

    def leaves(self) -> Sequence[Tensor]:
        return self.x, self.gates, self.mlp.weight1, self.mlp.weight2

    def named(self, grads: Sequence[Tensor]) -> dict[str, Tensor]:
        shape = self.problem.shape
        gate_up = grads[2].view(shape.experts, shape.hidden, -1).transpose(1, 2)
        down = grads[3].view(shape.experts, -1, shape.hidden).transpose(1, 2)
        return {"x": grads[0], "gates": grads[1], "gate_up": gate_up, "down": down}


CONTESTANTS.update(
    {
        "Liger": Liger,
        "ScatterMoE": ScatterMoE,
        "SonicMoE": SonicMoE,
        "MegaBlocks grouped": MegaBlocks,
        "MegaBlocks sparse": MegaBlocksSparse,
        "Megatron-Core": Megatron,
        "Megatron-Core grouped": MegatronGrouped,
    }
)
