"""Jobs of the fairseq tests that run its tools on text from end to end; see :mod:`fairseq_jobs`."""

from __future__ import annotations

import io
import os
import sys
from unittest.mock import patch

from fairseq_jobs import binarise, fairseq_moe, flags_of, run_cli, words_of, write_text

PAIRS = flags_of(
    task="translation",
    arch="transformer",
    encoder_layers=2,
    decoder_layers=2,
    encoder_embed_dim=16,
    decoder_embed_dim=16,
    encoder_ffn_embed_dim=24,
    decoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    dropout=0,
    optimizer="adam",
    lr=0.01,
    batch_size=16,
    num_workers=0,
    log_format="json",
    log_interval=1,
)
EXPERTS = ["--moe-dropless"]
EXPERTS += flags_of(moe_freq=2, moe_expert_count=4, moe_second_expert_policy="all", criterion="moe_cross_entropy")
LINES = flags_of(
    task="language_modeling",
    arch="transformer_lm_gpt",
    decoder_layers=2,
    decoder_embed_dim=16,
    decoder_ffn_embed_dim=24,
    decoder_attention_heads=2,
    dropout=0,
    optimizer="adam",
    lr=0.01,
    batch_size=8,
    max_update=2,
    num_workers=0,
    log_format="json",
    tokens_per_sample=64,
)


def write_pairs(folder, name="pairs"):
    """Sentences of real text and the same backwards, binarised in ``folder/name``."""
    write_text(folder)
    for split, most in (("train", 96), ("valid", 24)):
        with open(os.path.join(folder, split + ".txt")) as file:
            sentences = [words_of(line)[:8] for line in file][:most]
        for language, there in (("en", 1), ("ne", -1)):
            with open(os.path.join(folder, f"{split}.{language}"), "w") as file:
                file.writelines(" ".join(words[::there]) + "\n" for words in sentences)
    prefixes = [f"--{split}pref={folder}/{split}" for split in ("train", "valid")]
    languages = ["--source-lang", "en", "--target-lang", "ne", "--workers", 1]
    done = run_cli("preprocess", *languages, *prefixes, "--destdir", f"{folder}/{name}")
    assert done.status == 0, done.err
    return f"{folder}/{name}"


def translation(folder, experts):
    """A translation model from training, stopped and resumed, to text: what each tool said, by its name."""
    data = write_pairs(folder)
    kind = EXPERTS if experts else flags_of(criterion="cross_entropy")
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 9}']
    where = ["--save-dir", f"{folder}/saved", "--no-epoch-checkpoints", "--cpu"]
    trained = [run_cli("train", data, *PAIRS, *kind, *bleu, *where, "--max-update", updates) for updates in (6, 12)]
    saved = ["--path", f"{folder}/saved/checkpoint_last.pt", "--cpu"]
    valid = ["--batch-size", 8, "--num-workers", 0]
    beam, subset = ["--beam", 2, "--max-len-b", 9], ["--gen-subset", "valid"]
    with open(f"{folder}/valid.en") as file, patch.object(sys, "stdin", io.StringIO("".join(file.readlines()[:5]))):
        interactive = run_cli("interactive", data, *saved, *beam, "--num-workers", 0)
    return trained, {
        "generate": run_cli("generate", data, *saved, *valid, *beam, *subset),
        "sacrebleu": run_cli("generate", data, *saved, *valid, *beam, *subset, "--scoring", "sacrebleu"),
        "reference": run_cli("generate", data, *saved, *valid, *subset, "--score-reference"),
        "interactive": interactive,
        "validate": run_cli("validate", data, "--task", "translation", *saved, *valid, "--log-format", "json"),
        "no task": run_cli("validate", data, *saved, *valid),
    }


def write_lines(folder):
    """Real text with documents, which an empty line ends, binarised in ``folder/bin``."""
    write_text(folder)
    for split, most in (("train", 80), ("valid", 40)):
        with open(f"{folder}/{split}.txt") as file:
            lines = file.readlines()[:most]
        with open(f"{folder}/{split}.txt", "w") as file:
            file.writelines(line + ("\n" if n % 7 == 6 else "") for n, line in enumerate(lines))
    prepared = binarise(folder, "--workers", 1)
    assert prepared.status == 0, prepared.err
    return f"{folder}/bin"


def cut_into_samples(folder, mode):
    """A language model on text that is cut as ``--sample-break-mode`` says: its training, and `eval_lm` of the same."""
    data = write_lines(folder)
    cut = ["--sample-break-mode", mode, "--cpu"]
    where = ["--save-dir", f"{folder}/{mode}", "--no-epoch-checkpoints"]
    trained = run_cli("train", data, *LINES, *EXPERTS, *cut, *where)
    sizes = flags_of(gen_subset="valid", tokens_per_sample=64, batch_size=8, num_workers=0)
    saved = ["--path", f"{folder}/{mode}/checkpoint_last.pt"]
    return trained, run_cli("eval_lm", data, *saved, *sizes, *cut)


READ = "its flags are read"


def read_alone(commands):
    """What each tool says, stopped when it has read its flags: ``READ``, or why not. For (ranks, tool, flags...)."""
    from importlib import import_module

    def stop(*_):
        sys.exit(READ)

    fairseq_moe()
    program, started, built = (
        import_module(name) for name in ("fairseq_cli.preprocess", "fairseq.distributed.utils", "fairseq.tasks")
    )
    told = []
    for ranks, *command in commands:
        with (
            patch.object(program, "main", stop),
            patch.object(started, "call_main", stop),
            patch.object(built, "setup_task", stop),  # which `count` does first
            patch.dict(os.environ, {"WORLD_SIZE": str(ranks)} if ranks > 1 else {}),
        ):
            told.append(run_cli(*command).err.strip())
    return told
