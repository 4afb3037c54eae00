"""What ranks are told to do about Megatron: one small GPT trained with its own MoE layer, or with dmoe's."""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import zlib
from unittest.mock import patch

import megatron_harness

megatron_harness.install()

import megatron.core  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.optimizer import (  # noqa: E402
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import Float16Module, MegatronModule  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron_cases import Case  # noqa: E402
from patience import PATIENCE  # noqa: E402

from dmoe.integrations import megatron as integration  # noqa: E402
from dmoe.integrations.megatron import layer, losses, parameters, translate  # noqa: E402
from dmoe.integrations.megatron.layer import DmoeLayer  # noqa: E402

megatron_harness.patch_megatron()
gc.freeze()  # what was imported stays: looking for a job's leftovers need not look there

RANK = dist.get_rank() if dist.is_initialized() else 0  # in the pool, when the first job imports this
VOCABULARY, LENGTH, MICRO_BATCH, MICRO_BATCHES = 64, 16, 2, 2


def connect(ranks, store):
    """The first ranks of the pool as a run of Megatron's of their own."""
    if dist.is_initialized():  # the pool's own group: from here on there is one only while a job runs
        disconnect()
    limit = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=RANK, world_size=ranks.world, timeout=limit)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=ranks.tp,
        pipeline_model_parallel_size=ranks.pp,
        expert_model_parallel_size=ranks.ep,
        expert_tensor_parallel_size=ranks.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    _forget_logged_losses()
    torch.manual_seed(1234)


def disconnect():
    """No group of the last run stays, nor anything that holds one."""
    _forget_logged_losses()
    with contextlib.suppress(AssertionError, AttributeError):
        mpu.destroy_model_parallel()
    for thing in gc.get_objects():  # DDP's hooks keep a model alive where Python does not see it
        if issubclass(type(thing), torch.nn.Module) and not issubclass(type(thing), torch.fx.GraphModule):  # inductor's
            thing.__dict__.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _forget_logged_losses():
    """Megatron keeps them for the whole process, with the layers and groups of the first run."""
    with contextlib.suppress(ImportError):
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        return get_moe_metrics_tracker().metrics.clear()
    return moe_utils.get_moe_layer_wise_logging_tracker().clear()


def config_of(case):
    ranks = case.ranks
    fields = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": 48,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_z_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "tensor_model_parallel_size": ranks.tp,
        "pipeline_model_parallel_size": ranks.pp,
        "expert_model_parallel_size": ranks.ep,
        "sequence_parallel": ranks.tp > 1,
    }
    if ranks.etp is not None:
        fields["expert_tensor_parallel_size"] = ranks.etp
    return TransformerConfig(**fields | case.config)


def spec_of(config, impl):
    if impl == "main_grad":  # Megatron's own linears would ask Apex for it
        spec = integration.dmoe_block_spec(config, use_transformer_engine=False)
        for layer in {id(layer): layer for layer in spec.layer_specs}.values():
            layer.submodules.mlp.module = _AddsToMainGrad
        return spec
    if impl == "layer":
        return integration.dmoe_layer_spec(config, use_transformer_engine=False)
    if impl == "native":  # with what Megatron's own scripts pass
        passed = {"normalization": config.normalization, "qk_l2_norm": config.qk_l2_norm}
        return get_gpt_decoder_block_spec(config, use_transformer_engine=False, **passed)
    if impl == "constant":  # --spec dmoe.integrations.megatron dmoe_gpt_spec
        return integration.dmoe_gpt_spec
    if impl == "constant experts":
        return integration.dmoe_experts_spec
    makers = {"dmoe": integration.dmoe_block_spec, "experts": integration.dmoe_experts_spec}
    return makers[impl](config, use_transformer_engine=False)


class _AddsToMainGrad(DmoeLayer):
    """Built as under ``--gradient-accumulation-fusion``."""

    def __init__(self, config, *args, **kwargs):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = True
        super().__init__(config, *args, **kwargs)


def build(case, impl):
    """A model of this rank with the same values whatever the layer and the ranks: see :func:`fill`."""
    config = config_of(case)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec_of(config, impl),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    fill(model, config)
    return config, model


def values(shape, *key):
    """Normal numbers that depend on nothing but the key."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def fill(model, config):
    """Every value from its place in the whole model; native and dmoe's experts get the same."""
    for block in getattr(model.decoder, "layers", ()):
        for name, parameter in block.named_parameters():
            tp = mpu.get_tensor_model_parallel_rank() if getattr(parameter, "tensor_model_parallel", False) else 0
            if ".experts." in f".{name}" and "shared" not in name:
                fill_expert(name, parameter, config, block.layer_number)
            elif "norm" not in name:
                kind = name.removeprefix("mlp.").removeprefix("moe.")
                scale = 0.5 if "router" in name else 0.2
                parameter.copy_(values(parameter.shape, block.layer_number, kind, tp) * scale)
    for name, parameter in model.named_parameters():
        if "layers." not in name and "norm" not in name:
            parameter.copy_(values(parameter.shape, name, mpu.get_tensor_model_parallel_rank()) * 0.2)


def fill_expert(name, parameter, config, layer_number):
    etp, etp_rank = mpu.get_expert_tensor_parallel_world_size(), mpu.get_expert_tensor_parallel_rank()
    each = config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    first = mpu.get_expert_model_parallel_rank() * each
    H, F, halves = config.hidden_size, config.moe_ffn_hidden_size, 1 + config.gated_linear_unit
    columns = slice(etp_rank * F // etp, (etp_rank + 1) * F // etp)

    def of(expert, kind):
        shape = {"fc1.weight": (halves, F, H), "fc2.weight": (H, F), "fc1.bias": (halves, F), "fc2.bias": (H,)}[kind]
        whole = values(shape, layer_number, expert, kind) * 0.2
        return whole if kind == "fc2.bias" else whole[:, columns]

    own = {"proj": "weight", "bias": "bias"}
    if "local_experts" in name:
        number, field = name.split("local_experts.")[1].split(".linear_")
        parameter.copy_(of(first + int(number), field).reshape(parameter.shape))
    else:
        field = name.removesuffix(".original").split(".")[-1]  # biases are kept flat
        kind = ("fc2." if field.startswith("down") else "fc1.") + own[field[-4:]]
        for expert in range(each):
            part = parameter.view(each, -1)[expert]
            part.copy_(of(first + expert, kind).reshape(part.shape))


def batches(config):
    generator = torch.Generator().manual_seed(100 + mpu.get_data_parallel_rank())
    while True:
        start = torch.randint(0, VOCABULARY, (MICRO_BATCH, 1), generator=generator)
        stride = torch.randint(1, 4, (MICRO_BATCH, 1), generator=generator)
        yield (start + torch.arange(LENGTH + 1) * stride) % VOCABULARY


def forward_step(padding, per_token):
    position = torch.arange(LENGTH).unsqueeze(0).expand(MICRO_BATCH, -1)
    attention = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    counted = torch.ones(MICRO_BATCH, LENGTH)
    if padding:
        counted[0, -3:] = 0
        counted[1, -5:] = 0

    def step(iterator, model):
        tokens = next(iterator)
        extra = {"padding_mask": counted == 0} if padding else {}
        output = model(tokens[:, :-1].contiguous(), position, attention, labels=tokens[:, 1:].contiguous(), **extra)

        def loss_of(losses):
            total = (losses.float() * counted).sum()
            if per_token:
                return total, counted.sum().int(), {"loss": (total / counted.sum()).detach()}
            mean = total / counted.sum()
            return mean, {"loss": mean.detach().clone()}

        return output, loss_of

    return step


class Training:
    """A model, its DDP and its optimizer, one step at a time."""

    def __init__(self, case, impl):
        self.case, (self.config, model) = case, build(case, impl)
        ddp = DistributedDataParallelConfig(
            overlap_grad_reduce=case.overlap,
            use_distributed_optimizer=case.distributed_optimizer,
            average_in_collective=False,
            grad_reduce_in_fp32=self.config.bf16,
        )
        model = Float16Module(self.config, model) if self.config.bf16 else model
        self.model = DistributedDataParallel(self.config, ddp, model)
        options = OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=self.config.bf16,
            use_distributed_optimizer=case.distributed_optimizer,
        )
        rules = get_standard_config_overrides(options) if case.weight_decay else None  # as Megatron's scripts pass
        self.optimizer = get_megatron_optimizer(options, [self.model], rules)
        for group in self.optimizer.param_groups if case.weight_decay else ():  # as Megatron's scheduler, in each step
            group["weight_decay"] = case.weight_decay * group["wd_mult"]
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.no_sync_func = self.model.no_sync
        self.config.timers = None
        self.batches = batches(self.config)

    def step(self):
        """Loss (on the last pipeline stage), gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step(self.case.padding, self.config.calculate_per_token_loss),
            data_iterator=self.batches,
            model=[self.model],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        loss = sum(float(each["loss"]) for each in reduced) / len(reduced) if reduced else None
        return loss, float(norm)

    def logged(self):
        """The router's losses as Megatron logs them."""
        total = {}
        kinds = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
        kinds["global_aux_loss"] = "global_load_balancing_loss"
        wanted = self.config.moe_router_load_balancing_type
        names = [kinds[kind] for kind in ([wanted] if isinstance(wanted, str) else wanted) if kind in kinds]
        names += ["z_loss"] if self.config.moe_z_loss_coeff else []
        if not self.config.moe_aux_loss_coeff:
            names = [name for name in names if name == "z_loss"]
        moe_utils.track_moe_metrics(
            loss_scale=1 / MICRO_BATCHES,
            iteration=0,
            total_loss_dict=total,
            force_initialize=True,
            track_names=names,
            num_layers=self.config.num_layers,
        )
        return {name: float(value) for name, value in total.items()}


def train(group, case, impl, store, without=None):
    """Losses and gradient norms of each step, and what the last one logs; ``without`` one item of the contract."""
    connect(case.ranks, store)
    with left_out(without):
        training, steps, logged = Training(case, impl), [], {}
        for _ in range(case.steps):
            steps.append(training.step())
            logged = training.logged()
    modules = training.model.modules()
    biases = [each.expert_bias.tolist() for each in modules if getattr(each, "expert_bias", None) is not None]
    saved = training.model.state_dict().items()
    biases += [value.tolist() for name, value in saved if name.endswith("qb_beta")]  # dmoe keeps its negative
    dtypes = {str(parameter.dtype) for parameter in training.model.parameters()}
    return {"steps": steps, "logged": logged, "biases": biases, "dtypes": dtypes}


@contextlib.contextmanager
def left_out(what):
    """The layer without one thing that Megatron expects of it."""
    with contextlib.ExitStack() as stack:
        if what in ("allreduce", "tensor_model_parallel", "sequence_parallel"):
            for module in (layer, parameters):
                for name in ("mark_experts", "mark_router"):
                    stack.enter_context(patch.object(module, name, _marking_without(getattr(module, name), what)))
        elif what == "aux loss scaler":
            stack.enter_context(patch.object(losses.RouterLosses, "_attached", lambda self, y, loss, tokens: y))
        elif what == "sharded_state_dict":
            stack.enter_context(patch.object(DmoeLayer, "sharded_state_dict", MegatronModule.sharded_state_dict))
        elif what == "load for the expert bias":
            zeros = property(lambda self: torch.zeros(self.config.num_moe_experts))
            stack.enter_context(patch.object(DmoeLayer, "local_tokens_per_expert", zeros))
        elif what is not None:
            raise ValueError(what)
        yield


def _marking_without(mark, what):
    def marked(module, *arguments):
        mark(module, *arguments)
        for parameter in module.parameters():
            if hasattr(parameter, what):
                delattr(parameter, what)

    return marked


def release(group, ranks, nothing, store):
    """The megatron-core at work here."""
    return megatron.core.__version__


def initial_values(group, ranks, impl, store):
    """The experts and the router that a seed gives, by layer: ``{layer: (router, {expert: (up, down)})}``."""
    connect(ranks, store)
    config = config_of(Case(ranks))
    torch.manual_seed(77)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec_of(config, impl),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
    )
    return {
        each.layer_number: (each.mlp.router.weight if impl == "native" else each.mlp.moe.router.weight).detach()
        for each in model.decoder.layers
    }, owned(config, model)


def owned(config, model):
    """What this rank holds: ``{(layer, expert): (its slice of F, of how many, up projection, down projection)}``."""
    found = {}
    each = config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
    first = mpu.get_expert_model_parallel_rank() * each
    shard = (mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size())
    for block in model.decoder.layers:
        named = dict(block.mlp.named_parameters())
        for local in range(each):
            native = f"experts.local_experts.{local}.linear_fc"
            if f"{native}1.weight" in named:
                up, down = named[f"{native}1.weight"], named[f"{native}2.weight"]
            else:
                up, down = (
                    next(value[local] for name, value in named.items() if name.endswith(end))
                    for end in ("up_proj", "down_proj")
                )
            whole = up.detach().clone().reshape(1 + config.gated_linear_unit, -1, config.hidden_size)
            found[block.layer_number, first + local] = (*shard, whole, down.detach().clone())
    return found


def told(group, ranks, kind, store, fields, attributes):
    """The sentence that a wrong setting is answered with, and its type."""
    connect(ranks, store)
    case = Case(ranks, fields, steps=1)
    try:
        config = config_of(case)
        for name, value in attributes.items():
            setattr(config, name, value)
        if kind == "translate":
            translate.moe_config(config)
        elif kind == "experts":
            translate.experts_config(config)
        elif kind == "train":
            Training(case, "dmoe").step()
        elif kind == "overlap":
            wanted = [translate.moe_config(config, options) for options in ({}, {"overlap_degree": 2})]
            return [each.accumulate_main_grad for each in wanted]
        elif kind == "options":
            translate.moe_config(config, {"top_k": 3})
        else:
            moe_layer = DmoeLayer(config)
            for parameter in moe_layer.parameters():
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.bfloat16)
            moe_layer(torch.zeros(LENGTH, MICRO_BATCH, config.hidden_size))
    except Exception as error:
        return type(error).__name__, str(error)
    return None
