#!/usr/bin/env bash
# Everything that needs a GPU, in stages of a few minutes that leave their report behind whenever they are stopped.
# Without network, without installing anything. GPU.md says which stage to run first and what to bring.
#
#     benchmarks/run_gpu.sh [--dry] [OUTDIR] [STAGE ...]
#
# Stages (default: smoke bench tests), each run in the order given:
#   smoke     the compiled library that lies in dmoe/, or a build; every kernel once; python -m dmoe.certify
#   bench     the four sizes that say most, in 240 s; after all other stages the others, as time remains
#   tests     the GPU tests, by file
#   sanitize  compute-sanitizer, memcheck and racecheck, a process for each group of cases
#   tune      other launch shapes, measured (dmoe.tune)
#   peers     the benchmark beside the libraries in DMOE_PEERS
#   ncu       three kernels under Nsight Compute
# OUTDIR (default runs/gpu) gets at most eight files: summary.txt, log.txt, certify.json, layer_gpu.json, .md and .png,
# peers.json, tuned.json. A failed step does not stop the next; the exit status is 1 when one failed.
# --dry rehearses the stages on a machine without a GPU: arguments, imports, every program's own rehearsal.
#
# Environment: PYTHON (python3), DMOE_PEERS (a folder of other libraries' wheels and sources), DMOE_GPU_SECONDS (540 in
# all), TRITON_CACHE_DIR (kernels compiled before, see precompile.py), LAYER_GPU_FLAGS (more flags of layer_gpu.py, quoted
# as in a shell), TEST_WORKERS (8), TEST_FLAGS (of pytest), SANITIZE_DTYPES (bfloat16).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

dry=
if [ "${1:-}" = --dry ]; then dry=1; shift; fi
case "${1:-}" in -*) sed -n '2,23s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
out=${1:-runs/gpu}
[ $# -eq 0 ] || shift
stages=("${@:-smoke}")
[ $# -gt 0 ] || stages=(smoke bench tests)
for stage in "${stages[@]}"; do
    case $stage in smoke | bench | tests | sanitize | tune | peers | ncu) ;; *) echo "unknown stage: $stage" >&2; exit 2 ;; esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
total=${DMOE_GPU_SECONDS:-540}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export DMOE_CERTIFY=0 # what is measured and tested are the kernels themselves; smoke says which ones would be refused
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}
[ ! -d /usr/local/cuda/bin ] || export PATH="$PATH:/usr/local/cuda/bin"
log=$out/log.txt
: >"$log"

failed=
lines=()
# Written whole after every step, so that whoever stops this finds what was known until then.
note() {
    lines+=("$*")
    echo "$*"
    printf '%s\n' "${lines[@]}" >"$out/.summary" && mv "$out/.summary" "$out/summary.txt"
}
left() { echo $((total - SECONDS)); }

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, and never beyond the end of all; output to the log.
step() {
    local name=$1 limit=$2 begin=$SECONDS code verdict=ok
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 5 ]; then
        note "- $name: LEFT OUT, no time"
        failed=1
        return 1
    fi
    note "- $name: under way since second $SECONDS"
    echo "== $name (at most $limit s): $*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    [ $code -eq 0 ] || { verdict="FAILED with status $code"; failed=1; }
    [ $code -ne 124 ] && [ $code -ne 137 ] || verdict="STOPPED after $limit s"
    unset 'lines[-1]'
    note "- $name: $verdict, $((SECONDS - begin)) s"
    return $code
}

about() {
    "$python" - 2>&1 <<'EOF'
import importlib, os, platform
print("python", platform.python_version(), "| cores", os.cpu_count(), "|", platform.platform())
for name in ("torch", "triton", "transformers", "numpy", "pytest", "hypothesis", "xdist", "matplotlib", "tqdm"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "(no version)"))
    except ImportError as error:
        print(name, "ABSENT:", error)
EOF
    for tool in nvcc compute-sanitizer ncu g++ nvidia-smi; do
        echo "$tool: $(command -v $tool || echo absent)"
    done
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm \
        --format=csv,noheader
    true
}
# shellcheck source=benchmarks/parts/gpu_stages.sh
. benchmarks/parts/gpu_stages.sh

note "# dmoe on a GPU machine, $(date -u +%Y-%m-%dT%H:%MZ)${dry:+ (DRY: no GPU was used)}"
note "$(about)"
for stage in "${stages[@]}"; do
    begin=$SECONDS
    note "## $stage"
    "stage_$stage"
    note "$stage took $((SECONDS - begin)) s"
done
if [[ " ${stages[*]} " == *" bench "* ]] && [ -z "$dry" ] && [ "$(left)" -gt 60 ]; then
    note "## bench, the other sizes"
    bench_rest
fi
# A log that grew beyond what can be carried back keeps its end.
if [ "$(stat -c %s "$log")" -gt 8000000 ]; then
    tail -c 8000000 "$log" >"$out/.log" && mv "$out/.log" "$log"
fi
note "## Done after $SECONDS s"
[ -z "$failed" ]
