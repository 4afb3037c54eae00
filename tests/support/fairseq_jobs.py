"""What the fairseq tests run in a process of their own: fairseq changes logging, and its compatibility `dataclasses`.

Importing this file imports none of it; the functions do, once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import sys
from types import SimpleNamespace


def fairseq_moe():
    from dmoe.integrations import fairseq_moe

    fairseq_moe.compat.apply()
    fairseq_moe.register()
    return fairseq_moe


class _Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.name, record.getMessage()))


def run_cli(tool, *flags):
    """A tool with its flags, as from the shell: exit status, error text, standard output, logged (logger, line)s."""
    fairseq_moe()
    from dmoe.integrations.fairseq_moe.__main__ import main

    records, out, err, root = _Records(), io.StringIO(), io.StringIO(), logging.getLogger()
    argv, level = sys.argv, root.level
    sys.argv = ["fairseq_moe", tool, *map(str, flags)]
    root.addHandler(records)
    root.setLevel(logging.INFO)
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int | None) else 1
        err.write(stop.code if isinstance(stop.code, str) else "")
    finally:
        sys.argv = argv
        root.removeHandler(records)
        root.setLevel(level)
    return SimpleNamespace(status=status or 0, err=err.getvalue(), out=out.getvalue(), log=records.lines)


def stats_of(done, logger):
    """The JSON lines of one of fairseq's loggers, as dicts of numbers."""
    found = [json.loads(line) for name, line in done.log if name == logger and line.startswith("{")]
    return [{key: float(value) for key, value in line.items()} for line in found]


# The single-node command, sizes shrunk and --cpu added.
COMMAND = """
    --ddp-backend fully_sharded --memory-efficient-fp16 --checkpoint-activations
    --task dummy_lm --tokens-per-sample 2048 --arch transformer_lm_gpt --share-decoder-input-output-embed
    --decoder-layers 24 --decoder-embed-dim 2048 --decoder-ffn-embed-dim 8192 --decoder-attention-heads 32
    --moe-expert-count 8 --moe-freq 2 --moe-gating-use-fp32 --moe-second-expert-policy all
    --moe-normalize-expert-grad sqrt_world_size --moe-eval-capacity-token-fraction -1.0
    --max-sentences-valid 1 --num-workers-valid 0
    --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum
    --optimizer adam --fp16-adam-stats --adam-betas (0.9,_0.98) --clip-norm 0.0 --lr 0.0005 --warmup-updates 750
    --dropout 0.1 --attention-dropout 0.1 --batch-size 4 --update-freq 1 --max-update 250 --disable-validation
    --log-format json --log-interval 10
"""
SMALL = {
    "--tokens-per-sample": 32,
    "--decoder-layers": 4,
    "--decoder-embed-dim": 32,
    "--decoder-ffn-embed-dim": 64,
    "--decoder-attention-heads": 4,
}


def command(**changes):
    """That command as a list of words, with values changed, added (``cpu=True``) or left out (``x=None``)."""
    words = [word.replace("_", " ") if word.startswith("(") else word for word in COMMAND.split()]
    for flag, value in changes.items():
        spelled = "--" + flag.replace("_", "-")
        if spelled in words:
            at = words.index(spelled)
            words[at : at + (1 if at + 1 == len(words) or words[at + 1].startswith("--") else 2)] = []
        if value is True:
            words.append(spelled)
        elif value is not None:
            words += [spelled, str(value)]
    return words


def small(**changes):
    sizes = {flag[2:].replace("-", "_"): value for flag, value in SMALL.items()}
    # A loader in this process: the pool's may have no children.
    return command(**{**sizes, "cpu": True, "num_workers": 0, **changes})


def model_of(arch, *flags):
    """A model as `train` builds it, in float32, from flags; a dictionary of 16 words."""
    fairseq_moe()
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    argv, sys.argv = sys.argv, ["train"]
    try:
        given = ["--task", "dummy_lm", "--dict-size", "12", "--arch", arch, *map(str, flags)]
        args = options.parse_args_and_arch(options.get_training_parser(), given)
        cfg = convert_namespace_to_omegaconf(args)
        task = tasks.setup_task(cfg.task)
        return task.build_model(cfg.model), cfg, task
    except SystemExit as stop:  # argparse's way to say no, which would end this process
        raise ValueError(f"exit status {stop.code}: {given}") from stop
    finally:
        sys.argv = argv


def words_of(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def write_text(folder):
    """Real sentences, split in two, with a word for every rare one: the help topics of Python."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)[:24])
    lines = [" ".join(words_of(line)) for line in text.splitlines() if len(words_of(line)) > 4]
    for split, part in (("train", lines[:1100]), ("valid", lines[1100:1250])):
        with open(os.path.join(folder, split + ".txt"), "w") as file:
            file.write("\n".join(part) + "\n")


def binarise(folder, *flags):
    """What `preprocess` said of ``folder/train.txt`` and ``valid.txt``, whose words it puts into ``folder/bin``."""
    texts = [f"--{split}pref={folder}/{split}.txt" for split in ("train", "valid")]
    return run_cli("preprocess", "--only-source", *texts, "--destdir", f"{folder}/bin", *flags)


def route(flags, logits, padding=None, training=True, seed=0, from_command_line=False):
    """A MoE layer whose gate's logits are its input: what it kept, weighed, lost and logged, and its output.

    Args:
        flags: ``--moe-*`` by their names.
        logits: ``(B, S, E)``, sentences of tokens; the gate's linear is the identity.
        padding: ``(B, S)`` bool.
        from_command_line: build the whole model with fairseq's parser, and take the layer out of it.
    """
    fairseq_moe()
    import torch

    from dmoe.integrations.fairseq_moe.flags import read_flags
    from dmoe.integrations.fairseq_moe.layer import MoELayer, moe_layers

    width = logits.shape[-1]
    torch.manual_seed(7)
    if from_command_line:
        words = [f"--{k.replace('_', '-')}" if v is True else f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
        sizes = ["--decoder-layers", 2, "--decoder-embed-dim", width, "--decoder-ffn-embed-dim", 6]
        heads = ["--decoder-attention-heads", 1, "--moe-freq", 2, "--moe-expert-count", width, "--dropout", 0]
        model, _, _ = model_of("transformer_lm_gpt", *sizes, *heads, *words)
        (layer,) = moe_layers(model)
    else:
        given = SimpleNamespace(moe_freq=2, moe_expert_count=width, **flags)
        layer = MoELayer(read_flags(given), width, 6, "relu", 0.0, 0.0)
    layer.to(logits.dtype).train(training)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(width))
    seen = []
    layer.gate.register_forward_hook(lambda gate, args, routing: seen.append(routing))
    torch.manual_seed(seed)
    y, loss = layer(logits.transpose(0, 1), padding)
    (routing,) = seen
    starts, tokens = routing.plan.expert_offsets.tolist(), routing.plan.row_to_token.tolist()
    kept = [sorted(t for t in tokens[a:b] if t >= 0) for a, b in itertools.pairwise(starts)]
    one_hot = torch.nn.functional.one_hot(routing.expert_indices, width + 1)[..., :width].to(routing.gate_weights)
    from dmoe.integrations.fairseq_moe.statistics import NAMES

    figures = dict(zip(NAMES, layer.statistics().tolist(), strict=True)) | {"gate_loss": loss.item()}
    weights = (routing.gate_weights.unsqueeze(-1) * one_hot).sum(1).detach()
    experts = {name: value.detach() for name, value in layer.state_dict().items()}
    return kept, weights, figures, y.detach().transpose(0, 1).reshape(-1, width), experts


def gate_in_half(fp32, x, weight):
    """Probabilities of a gate in float16."""
    fairseq_moe()
    from dmoe.integrations.fairseq_moe.flags import read_flags
    from dmoe.integrations.fairseq_moe.layer import MoELayer

    experts, width = weight.shape
    flags = SimpleNamespace(moe_freq=1, moe_expert_count=experts, moe_gating_use_fp32=fp32, moe_dropless=True)
    gate = MoELayer(read_flags(flags), width, 4, "relu", 0.0, 0.0).half().gate
    gate.weight.data.copy_(weight)
    return gate(x).router_probs.detach()


def drawn_seconds(logits, training, flags):
    """How often each expert was the second choice of copies of one token."""
    fairseq_moe()
    import torch

    from dmoe.integrations.fairseq_moe.flags import read_flags
    from dmoe.integrations.fairseq_moe.layer import MoELayer

    experts = logits.shape[-1]
    given = SimpleNamespace(moe_freq=1, moe_expert_count=experts, moe_dropless=True, **flags)
    gate = MoELayer(read_flags(given), experts, 4, "relu", 0.0, 0.0).gate.train(training)
    torch.manual_seed(3)
    chosen = gate.route(logits).expert_indices
    return torch.bincount(chosen[:, 0], minlength=experts + 1), torch.bincount(chosen[:, 1], minlength=experts + 1)


def _batch(task, sentences, length, pairs=False, seed=5):
    """A sample as fairseq's loaders make it, the last sentence padded."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 16, (sentences, length), generator=generator)
    tokens[-1, length - 2 :] = task.source_dictionary.pad()
    net_input = {"src_tokens": tokens, "src_lengths": torch.full((sentences,), length)}
    if pairs:
        net_input["prev_output_tokens"] = tokens.flip(0)[:, : length - 1].contiguous()
    target = torch.randint(4, 16, net_input.get("prev_output_tokens", tokens).shape, generator=generator)
    return {"net_input": net_input, "target": target, "ntokens": target.numel(), "nsentences": sentences}


def flags_of(**values):
    """``--a-b 1`` for ``a_b=1``, as a list of words."""
    return [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), str(value))]


LM_SIZES = flags_of(
    tokens_per_sample=16,
    decoder_layers=4,
    decoder_embed_dim=8,
    decoder_ffn_embed_dim=12,
    decoder_attention_heads=2,
)
PAIR_SIZES = flags_of(
    tokens_per_sample=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_embed_dim=8,
    decoder_embed_dim=8,
    encoder_ffn_embed_dim=12,
    decoder_ffn_embed_dim=20,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
)


def equal_experts(arch, common, *flags):
    """Outputs of a dense model, and of a MoE model all of whose experts are that model's feed-forward layers."""
    import torch

    fairseq_moe()
    from dmoe.integrations.fairseq_moe.layer import moe_layers

    pairs = arch == "transformer"
    sizes = PAIR_SIZES if pairs else LM_SIZES
    dense, _, task = model_of(arch, *sizes, *common)
    sparse, _, _ = model_of(arch, *sizes, *common, *flags)
    dense.double().eval(), sparse.double().eval()
    state, given = sparse.state_dict(), dense.state_dict()
    for name in state:
        layer, experts, rest = name.partition(".moe_layer.experts.")
        if experts:
            state[name] = given[f"{layer}.{rest.partition('.')[2]}"]
        elif ".moe_layer." not in name:
            state[name] = given[name]
    sparse.load_state_dict(state)
    sample = _batch(task, 3, 7, pairs)
    with torch.no_grad():
        (x, _), (y, extra) = dense(**sample["net_input"]), sparse(**sample["net_input"])
    return x, y, [loss.item() for loss in extra["l_aux"]], len(list(moe_layers(sparse)))


def one_backward(checkpointed, *flags):
    """Loss, what is logged, and every gradient of one batch in training, dropout and all."""
    import torch
    from fairseq import utils

    model, cfg, task = model_of(
        "transformer_lm_gpt",
        *LM_SIZES,
        *flags_of(moe_freq=2, moe_expert_count=4, dropout=0.2, attention_dropout=0.1, criterion="moe_cross_entropy"),
        *(["--checkpoint-activations"] if checkpointed else []),
        *flags,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    criterion = task.build_criterion(cfg.criterion)
    model.double().train()
    utils.set_torch_seed(1)
    loss, sample_size, logged = criterion(model, _batch(task, 4, 9))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    held = [
        name
        for name, module in model.named_modules()
        if "gate_loss" in module.__dict__ and module.gate_loss is not None
    ]
    return loss.item(), sample_size, {k: float(v) for k, v in logged.items()}, gradients, held


def dropped_shares(p, encoder=False):
    """Zeros in what a MoE layer adds to its residual, and in what its attention adds, in training."""
    import torch

    arch, sizes = ("transformer", PAIR_SIZES) if encoder else ("transformer_lm_gpt", LM_SIZES)
    model, _, _ = model_of(
        arch, *sizes, *f"--moe-freq 2 --moe-expert-count 2 --moe-top1-expert --dropout {p} --moe-dropless".split()
    )
    layer = (model.encoder if encoder else model.decoder).layers[1].train()
    added = []
    layer.residual_connection = lambda x, residual: (added.append(x.detach()), residual + x)[1]
    torch.manual_seed(0)
    layer(torch.randn(40, 50, 8), encoder_padding_mask=None)
    return [(x == 0).float().mean().item() for x in (added[0], added[-1])]


def logged_by(outputs):
    """What the criterion makes of logging outputs of several ranks or micro-batches, as floats."""
    fairseq_moe()
    from fairseq.logging import metrics

    from dmoe.integrations.fairseq_moe.criterion import MoECrossEntropyCriterion

    with metrics.aggregate(new_root=True) as meters:
        MoECrossEntropyCriterion.reduce_metrics(outputs)
    return {key: float(value) for key, value in meters.get_smoothed_values().items()}


def names_and_numbers():
    """A model's state dict, and a layer's output after loading one with the branch's names and values of its own."""
    import torch

    flags = ["--moe-freq", "2", "--moe-expert-count", "4", "--moe-dropless", "--moe-gating-use-fp32"]
    model, _, _ = model_of("transformer_lm_gpt", *LM_SIZES, *flags)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    theirs = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in model.state_dict().items()
    }
    model.double().load_state_dict(theirs)
    x = torch.randn(5, 2, 8, dtype=torch.float64, generator=generator)
    layer = model.decoder.layers[3].moe_layer.eval()
    y, _ = layer(x)
    again, _, _ = model_of("transformer_lm_gpt", *LM_SIZES, *flags)
    again.double().load_state_dict(model.state_dict())
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    return shapes, theirs, x, y.detach(), same


def wrong_checkpoint(has, wants):
    """The error of loading a checkpoint with another number of experts."""
    flags = ["--moe-freq", 2, "--moe-expert-count"]
    model, _, _ = model_of("transformer_lm_gpt", *LM_SIZES, *flags, wants)
    other, _, _ = model_of("transformer_lm_gpt", *LM_SIZES, *flags, has)
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError as error:
        return str(error)
    return ""


def loaded(names, prefix, strict):
    """What loading says when a state dict has other values in place of an MoE layer's, and whether any experts came."""
    import torch

    model, _, _ = model_of("transformer_lm_gpt", *LM_SIZES, *flags_of(moe_freq=4, moe_expert_count=2))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(prefix)}
    experts = model.decoder.layers[3].moe_layer.moe.experts
    shapes = {"fc1": experts.up_proj.shape[1:], "fc2": experts.down_proj.shape[1:]}
    for name in names:
        of = next((shape for layer, shape in shapes.items() if f"{layer}.weight" in name), (2, 8))
        state[prefix + name] = torch.full(of, 7.0)
    try:
        model.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        return str(error)
    return {name: bool((value == 7).all()) for name, value in model.state_dict().items() if name.startswith(prefix)}


def layers_built(arch, *flags):
    """What each layer's feed-forward half is: its class and width, encoder first."""
    fairseq_moe()
    from dmoe.integrations.fairseq_moe.layer import MoELayer

    model, _, task = model_of(arch, *(PAIR_SIZES if arch == "transformer" else LM_SIZES), *flags)
    stacks = [model.encoder, model.decoder] if arch == "transformer" else [model.decoder]
    found = []
    for stack in stacks:
        for layer in stack.layers.children():
            moe = getattr(layer, "moe_layer", None)
            sparse = isinstance(moe, MoELayer)
            found.append(("moe", moe.moe.config.ffn_hidden_size) if sparse else ("dense", layer.fc1.out_features))
    model.train()
    _, extra = model(**_batch(task, 3, 7, arch == "transformer")["net_input"])
    return found, len(extra.get("l_aux", []))


def real_text(folder):
    """preprocess, 30 updates, stop; 30 more; 60 without a stop; eval_lm: what each said."""
    write_text(folder)
    prepared = binarise(folder, "--thresholdsrc", 2)

    def train(updates, where):
        return run_cli(
            "train",
            f"{folder}/bin",
            *small(
                task="language_modeling",
                tokens_per_sample=64,
                memory_efficient_fp16=None,
                disable_validation=None,
                moe_dropless=True,
                lr=0.01,
                warmup_updates=10,
                batch_size=8,
                max_sentences_valid=8,
                max_update=updates,
                save_dir=f"{folder}/{where}",
                no_epoch_checkpoints=True,
            ),
        )

    def evaluate(*flags):
        where = ["--path", f"{folder}/stopped/checkpoint_last.pt", "--gen-subset", "valid", "--cpu"]
        sizes = ["--tokens-per-sample", 64, "--batch-size", 8, "--num-workers", 0]
        return run_cli("eval_lm", f"{folder}/bin", *where, *sizes, *flags)

    runs = [train(30, "stopped"), train(60, "stopped"), train(60, "straight")]
    evaluations = [evaluate("--is-moe"), evaluate(), evaluate("--moe-eval-capacity-token-fraction", 0.02)]
    evaluations += [evaluate("--moe-eval-capacity-token-fraction", 0.02, "--moe-dropless")]
    return prepared, runs, evaluations


def tool_and_flags(tool, *flags):
    """run_cli, for those that print sentences: status and the last line of the error text."""
    done = run_cli(tool, *flags)
    return done.status, done.err.strip().splitlines()[-1:] or [""], done.out, done.log


def user_dir(path):
    """fairseq's own parser and `--user-dir`, without the launcher's registration: the models it knows then."""
    from dmoe.integrations.fairseq_moe import compat

    compat.apply()
    import fairseq.utils
    from fairseq.models import MODEL_REGISTRY

    sys.modules.pop("fairseq_moe", None)
    fairseq.utils.import_user_module(SimpleNamespace(user_dir=path))
    return [MODEL_REGISTRY[name].__name__ for name in ("transformer_lm", "transformer")]
