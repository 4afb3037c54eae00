#!/bin/sh
# The oldest PyTorch that is promised with the Triton that belongs to it, as many machines with a GPU have them: an
# environment of their own, csrc/ and every kernel compiled there, and the tests on the CPU and under the interpreter.
#
#     tests/support/oldest.sh [arguments of pytest]
#
# PYTHON names the interpreter (python3.11). TORCH=2.10.0 tries the floor itself. PyTorch's wheel for CUDA, which is what
# most package indexes have of these releases, brings 5 GB along. The tests of Megatron and fairseq are left out: what
# these packages need is pinned for the newest PyTorch.
set -eu
cd "$(dirname "$0")/../.."
torch=${TORCH:-2.11.0}
triton=3.6.0
folder=$PWD/build/oldest-$torch
python=$folder/env/bin/python
# This Triton's interpreter takes arrays of one number for numbers, which numpy 2.4 refuses.
if [ ! -e "$folder/ready" ]; then
    rm -rf "$folder"
    "${PYTHON:-python3.11}" -m venv "$folder/env"
    grep -vE "^(torch|setuptools|numpy)==" constraints.txt >"$folder/constraints.txt"
    "$python" -m pip --disable-pip-version-check install --quiet --constraint "$folder/constraints.txt" \
        "torch==$torch" "triton==$triton" "numpy<2.4" "setuptools>=77" wheel \
        pytest pytest-xdist hypothesis scipy transformers peft accelerate trl lightning tensorboard stanford-stk \
        matplotlib tqdm ruff mypy psutil
    touch "$folder/ready"
fi
# A copy of the tracked files: the checkout's own library was built against another PyTorch.
rm -rf "$folder/src"
mkdir "$folder/src"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$folder/src"
cd "$folder/src"
mkdir -p ../objects build
ln -s "$folder/objects" build/objects
DMOE_BUILD=required "$python" -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
"$python" -c 'import dmoe; dmoe.info()'
# tests/kernels compiles every kernel for every architecture.
OMP_NUM_THREADS=1 "$python" -m pytest -q -n logical --dist loadgroup --ignore tests/megatron --ignore tests/fairseq \
    -p no:cacheprovider "$@"
