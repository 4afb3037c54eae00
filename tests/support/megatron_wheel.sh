#!/bin/sh
# The tests of the Megatron integration against another release of megatron-core than the installed one:
#
#     tests/support/megatron_wheel.sh [release, default 0.19.2] [arguments of pytest]
#
# From 0.17 on the wheels are for Python 3.12; unzipped, they run on 3.11 as well. PYTHON names the interpreter.
set -eu
release=${1:-0.19.2}
[ $# -eq 0 ] || shift
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
folder=$PWD/build/megatron-core-$release
if [ ! -d "$folder/megatron" ]; then
    rm -rf "$folder"
    mkdir -p "$folder"
    "$python" -m pip download --quiet --no-deps --python-version 3.12 --only-binary=:all: \
        "megatron-core==$release" --dest "$folder"
    "$python" -m zipfile -e "$folder"/megatron_core-*.whl "$folder"
fi
MEGATRON_WHEEL=$folder MEGATRON_RELEASE=$release OMP_NUM_THREADS=1 \
    "$python" -m pytest -q tests/megatron "$@"
