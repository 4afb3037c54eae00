#!/bin/sh
# The tests of all families behind Transformers' experts interface, and of the Trainer, against another release than the
# installed one:
#
#     tests/support/transformers_wheel.sh [release, default 5.23.0] [arguments of pytest]
#
# The release and what it needs (an older huggingface_hub, httpx) go to build/, in front of what is installed.
# DMOE_FAMILIES=0, 1 or 2 takes a third. PYTHON names the interpreter.
set -eu
release=${1:-5.23.0}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
folder=$PWD/build/transformers-$release
if [ ! -f "$folder/ready" ]; then
    rm -rf "$folder"
    "$python" -m pip --disable-pip-version-check install --quiet --only-binary=:all: --target "$folder" \
        "transformers==$release"
    touch "$folder/ready"
fi
found=$(PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} "$python" -c 'import transformers; print(transformers.__version__)')
[ "$found" = "$release" ] || { echo "expected transformers $release, found $found" >&2; exit 1; }
PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} DMOE_FAMILIES=${DMOE_FAMILIES:-all} OMP_NUM_THREADS=1 \
    "$python" -m pytest -q tests/transformers/test_hf_families.py tests/transformers/test_hf_use.py \
    tests/transformers/test_parallel_trainer.py "$@"
