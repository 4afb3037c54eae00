"""Two small models of torchtitan, its Trainer's config for them, and data that every number of ranks shares alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import CompileConfig, DebugConfig
from torchtitan.models.common import ComplexRoPE, CosSinRoPE
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import _build_dsv3_layers
from torchtitan.models.deepseek_v3 import model_registry as deepseek_v3
from torchtitan.models.qwen3 import _build_qwen3_moe_layers
from torchtitan.models.qwen3 import model_registry as qwen3
from torchtitan.trainer import Trainer

SEQUENCES, LENGTH, VOCABULARY, WIDTH = 8, 16, 64, 32  # sequences are those of a step, over all ranks
STEPS, LEARNING_RATE, MAX_NORM, BIAS_STEP = 6, 5e-3, 0.5, 0.004
ADAM = {"betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}  # a large eps: no rounding error becomes a step
_WHERE = {"attn_backend": "flex", "moe_comm_backend": "standard", "non_blocking_capacity_factor": None}


def batch(rows):
    """Inputs and labels of sequences by their number in the whole run; some count fewer tokens than others."""
    drawn = [torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(row)) for row in rows]
    tokens = torch.stack(drawn)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    for line, row in enumerate(rows):
        labels[line, : 3 * (row % 4)] = IGNORE_INDEX
    return inputs, labels


class Rows(BaseDataLoader):
    """Each micro-batch takes the next rows, one block of them for each rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **others):
        self.ranks, self.rank, self.size, self.taken = dp_world_size, dp_rank, local_batch_size, 0

    def __iter__(self):
        while True:
            first = self.taken + self.rank * self.size
            self.taken += self.ranks * self.size
            inputs, labels = batch(range(first, first + self.size))
            yield {"input": inputs, "positions": torch.arange(LENGTH).expand(self.size, -1)}, labels

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **others):
        pass

    def encode(self, *arguments, **options):
        return []

    def decode(self, *arguments, **options):
        return ""

    def get_vocab_size(self):
        return VOCABULARY


def spec(name):
    """``qwen3``: softmax, weights that sum to one; ``deepseek_v3``: sigmoid, groups, shared experts, a dense layer."""
    if name == "qwen3":
        made = qwen3("debugmodel_moe")
        rope = CosSinRoPE.Config(dim=8, max_seq_len=64, theta=1e4)
        heads = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
        sizes = {"moe_hidden_dim": 24, "num_experts": 8, "top_k": 2}
        layers = _build_qwen3_moe_layers(n_layers=2, dim=WIDTH, **heads, **sizes, **_WHERE, rope=rope)
    else:
        made = deepseek_v3("debugmodel")
        rope = ComplexRoPE.Config(dim=8, max_seq_len=64, theta=1e4)
        ranks = {"q_lora_rank": 0, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        sizes = {"dense_hidden_dim": 48, "moe_hidden_dim": 24, "num_experts": 8, "num_shared_experts": 2}
        choice = {"router_top_k": 3, "router_score_func": "sigmoid"}
        layers = _build_dsv3_layers(
            n_layers=2,
            n_dense_layers=1,
            dim=WIDTH,
            n_heads=4,
            mscale=1.0,
            **ranks,
            **sizes,
            **choice,
            **_WHERE,
            rope=rope,
        )
        router = layers[1].moe.router
        router.num_expert_groups, router.num_limited_groups = 4, 2
        router.route_norm, router.route_scale = True, 2.5
    model = made.model
    model.dim, model.vocab_size, model.layers = WIDTH, VOCABULARY, layers
    model.tok_embeddings.num_embeddings, model.tok_embeddings.embedding_dim = VOCABULARY, WIDTH
    model.lm_head.in_features, model.lm_head.out_features = WIDTH, VOCABULARY
    model.norm.normalized_shape = WIDTH
    for layer in layers:
        if layer.moe is not None:
            layer.moe.load_balance_coeff = BIAS_STEP
    for _, _, parent, name in list(model.traverse(FlexAttention.Config)):  # which the CPU cannot train
        setattr(parent, name, ScaledDotProductAttention.Config())
    return made


def trainer_config(name, folder, *, local=2, checkpointing=None, compiled=False, steps=STEPS, files=None, **degrees):
    """The Trainer's config; ``degrees`` are fields of ``ParallelismConfig`` by their first words."""
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    for degree, value in degrees.items():
        setattr(parallelism, degree if degree == "spmd_backend" else f"{degree}_degree", value)
    return Trainer.Config(
        model_spec=spec(name),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        tokenizer=NoTokenizer.Config(),
        dataloader=Rows.Config(),
        optimizer=default_adamw(LEARNING_RATE, **ADAM),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0, min_lr_factor=1.0),
        dump_folder=str(folder),
        metrics=MetricsProcessor.Config(log_freq=1),
        training=TrainingConfig(
            local_batch_size=local,
            global_batch_size=SEQUENCES,
            seq_len=LENGTH,
            steps=steps,
            max_norm=MAX_NORM,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        parallelism=parallelism,
        checkpoint=CheckpointManager.Config(enable=files is not None, keep_latest_k=0, **(files or {})),
        activation_checkpoint=checkpointing,
        compile=CompileConfig(enable=compiled, components=["model"], backend="aot_eager"),
        debug=DebugConfig(seed=1),
    )
