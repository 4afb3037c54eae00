#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most nine minutes, without network and without installing anything:
# build, tests, memory and race checks, a short training run, the benchmark.
#
#     benchmarks/run_gpu.sh [--dry] [OUTDIR]
#
# OUTDIR (default runs/gpu) gets eight files: summary.txt, tests.log, sanitize.log, train.log, benchmark.log and
# layer_gpu.json, .md, .png. A failed step does not stop the next; the exit status is 1 when one failed.
# --dry runs the same steps on a machine without a GPU: arguments, imports, every program's own rehearsal.
#
# Environment: PYTHON (python3), DMOE_PEERS (a folder of other libraries' wheels and sources), DMOE_GPU_SECONDS (530 in
# all), STEPS ("build tests sanitize train bench"), LAYER_GPU_FLAGS (more flags of layer_gpu.py, quoted as in a shell:
# LAYER_GPU_FLAGS='--shapes OLMoE --contestants "dmoe,HF grouped_mm"'), TEST_WORKERS (8), TEST_FLAGS (of pytest).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

dry=
if [ "${1:-}" = --dry ]; then dry=1; shift; fi
case "${1:-}" in -*) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
out=${1:-runs/gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
total=${DMOE_GPU_SECONDS:-530}
steps=" ${STEPS:-build tests sanitize train bench} "
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}
rm -f "$out"/{tests,sanitize,train,benchmark}.log
: >"$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }
wants() { [[ $steps == *" $1 "* ]]; }
left() { echo $((total - SECONDS)); }

failed=
results=()
# step NAME LIMIT LOG COMMAND...: runs it for at most LIMIT seconds, and never beyond the end of all; output to OUTDIR/LOG.
step() {
    local name=$1 limit=$2 log=$out/$3 begin=$SECONDS code
    shift 3
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 5 ]; then
        results+=("$name: LEFT OUT, no time"); failed=1
        return
    fi
    echo "== $name (at most $limit s): $*" | tee -a "$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    local verdict="ok"
    [ $code -eq 0 ] || { verdict="FAILED with status $code"; failed=1; }
    [ $code -ne 124 ] && [ $code -ne 137 ] || verdict="STOPPED after $limit s"
    results+=("$name: $verdict, $((SECONDS - begin)) s")
    tail -n 6 "$log"
}

say "# dmoe on a GPU machine, $(date -u +%Y-%m-%dT%H:%MZ)${dry:+ (DRY: no GPU was used)}"
"$python" - >>"$out/summary.txt" 2>&1 <<'EOF'
import importlib, os, platform
print("python", platform.python_version(), "| cores", os.cpu_count(), "|", platform.platform())
for name in ("torch", "triton", "transformers", "numpy", "pytest", "hypothesis", "xdist", "matplotlib", "tqdm"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "(no version)"))
    except ImportError as error:
        print(name, "ABSENT:", error)
EOF
for tool in nvcc compute-sanitizer g++ nvidia-smi; do
    say "$tool: $(command -v $tool || echo absent)"
done
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm \
    --format=csv,noheader | tee -a "$out/summary.txt"

# ------------------------------------------------------------------------------------------------------------- build
build=(env DMOE_BUILD=required DMOE_CUDA=required)
if ! wants build; then
    :
elif [ -z "$dry" ]; then
    arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || arch=
    [ -n "$arch" ] || say "no CUDA device: everything below will fail; --dry needs none"
    step build 100 summary.txt "${build[@]}" DMOE_CUDA_ARCHS="${arch:-90}" "$python" setup.py -q build_ext --inplace
else
    say "would build: ${build[*]} DMOE_CUDA_ARCHS=<of the GPU> $python setup.py -q build_ext --inplace"
fi
"$python" -c 'import dmoe; dmoe.info()' 2>&1 | tee -a "$out/summary.txt"

# ------------------------------------------------------------------------------------------------------------- tests
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n "${TEST_WORKERS:-8}")
pytest=("$python" -m pytest -q -p no:cacheprovider -m gpu)
eval "more=(${TEST_FLAGS:-})"
if ! wants tests; then
    :
elif [ -z "$dry" ]; then
    step tests 170 tests.log "${pytest[@]}" "${workers[@]}" --durations=10 tests "${more[@]}"
else
    step "tests, collected" 120 tests.log "${pytest[@]}" --collect-only tests
    step "tests, rehearsed" 120 tests.log env DMOE_TEST_DEVICE=cpu "${pytest[@]}" tests/gpu/test_gpu_ops.py
fi

# --------------------------------------------------------------------------------------------------------- sanitizer
if ! wants sanitize; then
    :
elif [ -z "$dry" ]; then
    step "kernels once" 60 sanitize.log "$python" benchmarks/sanitize.py
    if command -v compute-sanitizer >/dev/null; then
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # otherwise a step over a tensor's end lies inside a cached block
        # The checkers share one step: they only count errors, so they need not have the GPU to themselves.
        cat >"$work/check.sh" <<'EOF'
pids=()
for tool in memcheck racecheck; do
    for cases in routing,movement,products moe_mlp options,layer; do
        compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 5 \
            "$1" benchmarks/sanitize.py --only $cases >"$2/$tool-$cases.log" 2>&1 &
        pids+=($!)
    done
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit $status
EOF
        step sanitizer 80 sanitize.log bash "$work/check.sh" "$python" "$work"
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
        for log in "$work"/*check-*.log; do
            echo "-- $(basename "$log")" >>"$out/sanitize.log"
            tail -n 60 "$log" >>"$out/sanitize.log"
            say "$(basename "$log" .log): $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" || echo 'did not end') \
[$(grep -c ': ran' "$log") cases ran]"
        done
    else
        results+=("sanitizer: compute-sanitizer is absent")
    fi
else
    step "kernels once" 120 sanitize.log "$python" benchmarks/sanitize.py --device cpu
fi

# ---------------------------------------------------------------------------------------------------------- training
train=("$python" examples/train_lm.py --overwrite --out "$work/lm")
if ! wants train; then
    :
elif [ -z "$dry" ]; then
    step training 60 train.log "${train[@]}" --device cuda --minutes 0.3 --compare-dense --generate
else
    step training 120 train.log "${train[@]}" --device cpu --steps 4 --eval-every 2 --warmup 1 --layers 1 --hidden 16 \
        --ffn 8 --experts 4 --batch 2 --seq-len 32 --eval-bytes 256 --data benchmarks/README.md --data README.md
fi
[ ! -f "$work/lm/report.json" ] || cat "$work/lm/report.json" >>"$out/train.log"

# --------------------------------------------------------------------------------------------------------- benchmark
peers=()
[ -z "${DMOE_PEERS:-}" ] || peers=(--peers "$DMOE_PEERS")
layer=("$python" benchmarks/layer_gpu.py --out "$out" --name layer_gpu "${peers[@]}")
eval "layer+=(${LAYER_GPU_FLAGS:-})"
if ! wants bench; then
    :
elif [ -z "$dry" ]; then
    # A case that has begun is finished: what is left then is for that.
    step benchmark "$(left)" benchmark.log "${layer[@]}" --budget $(($(left) - 40))
else
    step "benchmark, checks" 200 benchmark.log "${layer[@]}" --check-only --device cpu --shapes tiny
    step "benchmark, dummy" 60 benchmark.log "${layer[@]}" --dummy
fi

say ""
say "# Summary (after $SECONDS s)"
for line in "${results[@]}"; do say "- $line"; done
grep -hE '^(FAILED|ERROR) |^=* ?[0-9]+ (passed|failed)|^[0-9]+ (passed|failed)' "$out/tests.log" 2>/dev/null | tail -n 40 | tee -a "$out/summary.txt"
grep -hE 'REFUSED|FAILED' "$out/benchmark.log" 2>/dev/null | tail -n 10 | tee -a "$out/summary.txt"
say "files: $(cd "$out" && echo *)"
[ -z "$failed" ]
