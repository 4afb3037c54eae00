"""What the fine-tuning recipes share: a small model to begin with, text as tokens, figures of a model, the picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    ProgressCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last: examples/transformers must not hide transformers

from lm.data import help_topics, load_corpus
from lm.settings import UsageError as UsageError  # for the recipes

from dmoe.integrations.transformers import register
from dmoe.losses import load_balancing_loss

BALANCE = 0.05  # coefficient of the balance loss while the small model is trained
INK, FAINT, BLUE, ORANGE = "#222222", "#8a8a8a", "#0072B2", "#D55E00"
# A Qwen3-MoE of bytes: 1.8 million parameters, of which 0.6 are at work on each byte.
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Text:
    """A text as tokens, cut into what is trained on and what is not."""

    name: str
    train: Tensor
    """``(N,)`` int64."""
    held_out: Tensor
    """``(M,)`` int64."""


class Windows(Dataset):
    """Sequences of a text, at places that follow from the seed: what a Trainer takes as its data.

    Args:
        tokens: ``(N,)``.
        seq_len: tokens of a sequence.
        length: how many sequences.
        seed: of their places.
    """

    def __init__(self, tokens: Tensor, seq_len: int, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens, self.seq_len = tokens, seq_len
        self.starts = torch.randint(len(tokens) - seq_len + 1, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.starts[index])
        window = self.tokens[start : start + self.seq_len]
        return {"input_ids": window, "labels": window}  # the model itself shifts them


def text_of(data: Sequence[str], seq_len: int, model: str | None = None) -> Text:
    """The text that a model is fine-tuned on.

    Args:
        data: files and folders; none is Python's help topics, English that comes with Python.
        seq_len: tokens of a sequence.
        model: whose tokenizer makes the tokens; None is a token a byte.
    """
    corpus = load_corpus(data, 8_000_000, seq_len) if data else help_topics()
    parts = [corpus.train, corpus.held_out]
    if model is not None:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        written = [bytes(part.tolist()).decode(errors="replace") for part in parts]
        parts = [torch.tensor(tokenizer(text).input_ids) for text in written]
    return Text(corpus.name, *(part.long() for part in parts))


def base_model(folder: Path, steps: int, seq_len: int, batch: int) -> Path:
    """A small Qwen3-MoE that has learned something, in files: trained once on the standard library's sources."""
    if (folder / "config.json").exists():
        return folder
    corpus = load_corpus([], 8_000_000, seq_len)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, output_router_logits=True))
    print(f"{folder}: training a model to begin with, on {corpus.name}")
    register()
    model.set_experts_implementation("dmoe")
    windows = Windows(corpus.train.long(), seq_len, steps * batch)
    trainer_of(model, arguments(folder.parent, steps, batch, lr=3e-3), windows, compute_loss_func=_balanced).train()
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    return folder


def arguments(out: Path, steps: int, batch: int, lr: float) -> TrainingArguments:
    """For a Trainer: short runs, nothing saved in between, nothing reported to anybody."""
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, max(1, steps // 10)),
        logging_steps=max(1, steps // 50),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class _Bar(ProgressCallback):
    """The Trainer's progress bar with the loss in it, instead of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows it."""
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


def _balanced(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Loss of the text and of each layer's balance; Transformers' own balances the mean over layers alone."""
    loss = loss_of(outputs.logits, labels)
    for logits in outputs.router_logits:
        probs = logits.float().softmax(-1)
        chosen = probs.topk(SMALL["num_experts_per_tok"], -1).indices.flatten().bincount(minlength=probs.shape[-1])
        loss = loss + BALANCE / len(outputs.router_logits) * load_balancing_loss(probs, chosen)
    return loss


def trainer_of(model: Any, args: TrainingArguments, data: Windows, **more: Any) -> Trainer:
    """Transformers' own, with a quiet bar."""
    trainer = Trainer(model=model, args=args, train_dataset=data, **more)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar())
    return trainer


@torch.no_grad()
def held_out(model: PreTrainedModel, text: Text, seq_len: int, batch: int = 16) -> tuple[float, Tensor]:
    """Loss on text that was not trained on, nats a token, and who got its tokens.

    Returns:
        The loss, and each expert's share of its layer's choices times E, ``(layers, E)``: 1 is even.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    sequences = held_out_sequences(text, seq_len)
    loss, load = 0.0, None
    for ids in sequences.to(device).split(batch):
        out = model(input_ids=ids, output_router_logits=True)
        loss += loss_of(out.logits, ids).item() * len(ids)
        top_k, experts = model.config.num_experts_per_tok, out.router_logits[0].shape[-1]
        chosen = [logits.topk(top_k, -1).indices.flatten().bincount(minlength=experts) for logits in out.router_logits]
        load = torch.stack(chosen) + (0 if load is None else load)
    model.train(training)
    assert load is not None
    return loss / len(sequences), shares(load).cpu()


def held_out_sequences(text: Text, seq_len: int) -> Tensor:
    """Up to 32 of them, ``(S, L)``."""
    count = max(1, min(32, len(text.held_out) // seq_len))
    return text.held_out[: count * seq_len].view(count, -1)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Of each token's prediction from those before it, nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def shares(counts: Tensor) -> Tensor:
    """``(layers, E)`` counts as multiples of an even share."""
    return counts * counts.shape[1] / counts.sum(1, keepdim=True)


def draw(
    path: Path,
    title: str,
    note: str,
    losses: Sequence[tuple[float, float]],
    ends: tuple[float, float],
    loads: tuple[Tensor, Tensor],
) -> None:
    """The picture of a run.

    Args:
        path: a PNG file.
        title, note: above it.
        losses: ``(step, loss of the training text)``.
        ends: loss on held-out text before and after.
        loads: of the experts before and after, see :func:`held_out`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 11, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "text.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(12, 5), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.065, 0.93, title, fontsize=16, fontweight="bold")
        figure.text(0.065, 0.875, note, color=FAINT)
        grid = figure.add_gridspec(
            2, 2, left=0.065, right=0.97, top=0.78, bottom=0.12, wspace=0.2, hspace=0.65, width_ratios=[1.35, 1]
        )
        curve = figure.add_subplot(grid[:, 0])
        curve.plot(*zip(*losses, strict=True), color=BLUE, linewidth=1.5, label="training text")
        curve.plot([0, losses[-1][0]], ends, "o", color=ORANGE, label="held-out text, before and after", clip_on=False)
        for step, loss, place in ((0, ends[0], (8, 6)), (losses[-1][0], ends[1], (-8, 10))):
            side = "left" if step == 0 else "right"
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            how: dict[str, Any] = {"textcoords": "offset points", "ha": side, "color": ORANGE, "bbox": box}
            curve.annotate(f"{loss:.3f}", (step, loss), place, **how)
        curve.margins(y=0.12)
        curve.set_title("Loss, nats a token")
        curve.set_xlabel("steps")
        curve.legend(frameon=False)
        top = max(2.0, *(float(load.max()) for load in loads))
        for row, (when, load) in enumerate(zip(("before", "after"), loads, strict=True)):
            axes = figure.add_subplot(grid[row, 1])
            image = axes.imshow(load.numpy(), cmap="Blues", vmin=0, vmax=top, aspect="auto")
            axes.set_title(f"Load of the experts {when} (1 is even)")
            axes.set_xlabel("expert")
            axes.set_ylabel("layer")
            axes.set_yticks(range(load.shape[0]))
            figure.colorbar(image, ax=axes, pad=0.02).outline.set_visible(False)
        figure.savefig(path)
