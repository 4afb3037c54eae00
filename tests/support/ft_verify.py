"""Runs an exporter on every entry of ft_hashes.json and compares what it wrote, byte by byte.

    python ft_verify.py ft_hashes.json \
        'python -m dmoe.checkpoint convert {in} {out} --to fastertransformer --gpus {gpus} --dtype {dtype}' \
        --vocab ' --vocab {vocab} --merges {merges}'

{in} is a checkpoint that make_deepspeed_ckpt.py wrote, {out} a folder that does not exist; in {out}/{gpus}-gpu must
then be exactly NVIDIA's files. Where an entry says "dmoe": "refuse", the command must fail and leave no folder.
--only N,N,... picks entries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import make_deepspeed_ckpt as maker


def expected(data: dict, entry: dict) -> dict[str, str] | None:
    """SHA-256 by file name; None: refuse."""
    name = entry.get("dmoe", entry.get("set", "refuse"))
    if name == "refuse":
        return None
    files = {file: digest for file, (_, digest) in data["sets"][name].items()}
    texts = {file: entry.get(file) for file in ("config.ini", "args.txt")}
    for file, key in texts.items():
        if key is not None:
            files[file] = hashlib.sha256(data["texts"][key].encode()).hexdigest()
    return files


def compare(folder: Path, want: dict[str, str]) -> list[str]:
    got = (
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
        if folder.is_dir()
        else {}
    )
    known = {
        file for file in got if file in ("config.ini", "args.txt") and file not in want
    }  # NVIDIA failed before these
    said = [f"missing {file}" for file in sorted(want.keys() - got.keys())]
    said += [f"not NVIDIA's: {file}" for file in sorted(got.keys() - want.keys() - known)]
    return said + [f"other bytes: {file}" for file in sorted(want.keys() & got.keys()) if want[file] != got[file]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hashes", type=Path)
    parser.add_argument("command")
    parser.add_argument("--vocab", default="", help="added to the command for entries with vocabulary files")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    data = json.loads(options.hashes.read_text())
    only = {int(n) for n in options.only.split(",") if n}
    bad = 0
    for number, entry in enumerate(data["entries"]):
        if only and number not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "in"), Path(folder, "out")
            maker.main([str(source), *entry["make"]])
            fill = {
                "in": source,
                "out": out,
                "gpus": entry["gpus"],
                "dtype": entry["weight_data_type"],
                "vocab": source / "vocab.json",
                "merges": source / "merges.txt",
            }
            command = (options.command + (options.vocab if "--vocab-files" in entry["make"] else "")).format(**fill)
            done = subprocess.run(command, shell=True, capture_output=True, text=True)
            want, made = expected(data, entry), out / f"{entry['gpus']}-gpu"
            if want is None:
                problems = [] if done.returncode and not made.exists() else ["expected a refusal, and no folder"]
            elif done.returncode:
                problems = [f"exit {done.returncode}: {done.stderr.strip()[-300:]}"]
            else:
                problems = compare(made, want)
            bad += bool(problems)
            print(
                f"{number:3} {'ok ' if not problems else 'BAD'} {entry['note'][:70]}, {entry['gpus']} GPUs, "
                f"{entry['weight_data_type']}",
                *problems[:4],
                sep="\n        " if problems else " ",
            )
    print(f"{bad} bad")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
