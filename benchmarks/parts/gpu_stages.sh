# shellcheck shell=bash
# The stages of run_gpu.sh, which sources this: it sets python, out, work, log, dry and failed, and has note, step, left.
# shellcheck disable=SC2154,SC2034

# precompile LIMIT FLAGS...: every kernel that the next steps launch, by all cores, while the GPU waits for nobody.
precompile() {
    local limit=$1
    shift
    step "precompile $*" "$limit" "$python" benchmarks/precompile.py "$@"
}

# ------------------------------------------------------------------------------------------------------------- smoke
loads() { "$python" -c 'import sys; from dmoe.ops import _library; sys.exit(not _library.compiled)' >>"$log" 2>&1; }

build() {
    local arch tools
    if loads; then
        note "- library: the one in dmoe/ loads"
        return
    fi
    if [ -n "$dry" ]; then
        note "- library: none loads; a GPU machine would build one"
        return
    fi
    arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>>"$log") || arch=90
    tools=$("$python" -c 'import setuptools; print(setuptools.__version__)' 2>/dev/null)
    note "- library: none loads; building for sm_$arch with setuptools ${tools:-absent}"
    step build 100 env DMOE_BUILD=required DMOE_CUDA=required DMOE_CUDA_ARCHS="$arch" \
        "$python" setup.py -q build_ext --inplace
}

stage_smoke() {
    build
    if [ -n "$dry" ]; then
        step "every kernel once, on the CPU" 200 "$python" benchmarks/sanitize.py --device cpu --dtypes bfloat16
        step "precompile, its arguments" 60 "$python" benchmarks/precompile.py --help
    else
        precompile 60 --set smoke --dtypes bfloat16
        step "every kernel once" 60 "$python" benchmarks/sanitize.py --dtypes bfloat16
    fi
    if [ -n "$dry" ]; then
        step "certify, under the interpreter" 200 env TRITON_INTERPRET=1 "$python" -m dmoe.certify --device cpu \
            --only "grouped_gemm float32" --json "$out/certify.json"
    else
        step certify 60 "$python" -m dmoe.certify --seconds 45 --json "$out/certify.json"
    fi
}

# ------------------------------------------------------------------------------------------------------------- bench
layer_gpu() { # FLAGS...: into the array layer
    local more
    eval "more=(${LAYER_GPU_FLAGS:-})"
    layer=("$python" benchmarks/layer_gpu.py --out "$out" "$@" "${more[@]}")
}

stage_bench() {
    if [ -n "$dry" ]; then
        layer_gpu --name rehearsal --out "$work" --device cpu --check-only --shapes tiny --first 2 --apart \
            --contestants "dmoe,dmoe layer,grouped_mm"
        step "benchmark, checks" 200 "${layer[@]}"
        layer_gpu --name layer_gpu --dummy
        step "benchmark, dummy" 100 "${layer[@]}"
        return
    fi
    local begin=$SECONDS
    precompile 60 --set bench --first 4
    layer_gpu --name layer_gpu --first 4 --budget $((235 - SECONDS + begin))
    step "benchmark, four sizes" $((245 - SECONDS + begin)) "${layer[@]}"
}

bench_rest() {
    precompile 40 --set bench
    layer_gpu --name layer_gpu --resume --budget $(($(left) - 20))
    step "benchmark, the others" "$(left)" "${layer[@]}"
}

stage_peers() {
    if [ -n "$dry" ]; then
        mkdir -p "$work/peers"
        layer_gpu --name peers --out "$work" --device cpu --check-only --shapes tiny \
            --first 1 --peers "${DMOE_PEERS:-$work/peers}" --contestants "dmoe,SonicMoE,Liger,ScatterMoE" --files json
        step "peers, checks" 200 "${layer[@]}"
        return
    fi
    if [ -z "${DMOE_PEERS:-}" ]; then
        note "- peers: DMOE_PEERS names no folder"
        return
    fi
    precompile 60 --set bench --first 4
    layer_gpu --name peers --files json --first 4 --peers "$DMOE_PEERS" --budget 235 \
        --contestants "dmoe,SonicMoE,ScatterMoE,Liger,MegaBlocks grouped"
    step peers 245 "${layer[@]}"
}

# ------------------------------------------------------------------------------------------------------------- tests
stage_tests() {
    local workers=() more pytest files=(tests/gpu tests/ops/test_router_logits.py tests/examples/test_train_lm.py)
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n "${TEST_WORKERS:-8}")
    # By name: collecting all tests imports all that they use, in each worker.
    pytest=("$python" -m pytest -q -p no:cacheprovider -m gpu)
    eval "more=(${TEST_FLAGS:-})"
    if [ -n "$dry" ]; then
        step "tests, collected" 200 "${pytest[@]}" --collect-only "${files[@]}"
        step "tests, rehearsed" 200 env DMOE_TEST_DEVICE=cpu "${pytest[@]}" tests/gpu/test_gpu_ops.py
    else
        step tests 240 "${pytest[@]}" "${workers[@]}" --durations=10 -rf "${files[@]}" "${more[@]}"
    fi
    note "$(grep -hE '^(FAILED|ERROR) |^=* ?[0-9]+ (passed|failed|skipped)' "$log" | tail -n 40)"
}

# ---------------------------------------------------------------------------------------------------------- sanitizer
# one TOOL CASES: a checker over a group of cases; its lines go to the log as they come.
one() {
    timeout --kill-after=5 "$3" compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 \
        "$python" benchmarks/sanitize.py --only "$2" --dtypes "${SANITIZE_DTYPES:-bfloat16}" 2>&1 |
        sed -u "s/^/$1 $2: /" >>"$log"
}

stage_sanitize() {
    local tool cases pids=() names=() status i
    if [ -n "$dry" ]; then
        step "sanitize, its arguments" 60 "$python" benchmarks/sanitize.py --help
        step "sanitize, one group" 100 "$python" benchmarks/sanitize.py --device cpu --only movement --dtypes bfloat16
        return
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        note "- sanitizer: compute-sanitizer is absent"
        return
    fi
    precompile 60 --set smoke --dtypes "${SANITIZE_DTYPES:-bfloat16}"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # otherwise a step over a tensor's end lies inside a cached block
    # Side by side: the checkers only count errors, and need not have the GPU to themselves.
    for cases in products moe_mlp options layer routing movement; do
        for tool in memcheck racecheck; do
            one $tool $cases "$(left)" &
            pids+=($!)
            names+=("$tool $cases")
        done
    done
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        status=$?
        [ $status -eq 0 ] || failed=1
        note "- ${names[$i]}: status $status; $(grep -hE "^${names[$i]}: .*(ERROR|RACECHECK) SUMMARY" "$log" | tail -n 1 ||
            true) $(grep -cE "^${names[$i]}: .*: ran" "$log") case ran"
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

# --------------------------------------------------------------------------------------------------------- tune, ncu
stage_tune() {
    if [ -n "$dry" ]; then
        step "tune, its candidates" 60 "$python" -m dmoe.tune --shape 32768,4096,1024,64,4 --list
        return
    fi
    "$python" -m dmoe.tune --shape 32768,4096,1024,64,4 --list --tables "$work/tables.json" >>"$log" 2>&1
    precompile 60 --set tables --tables "$work/tables.json" --shapes "30B T=32768 H=4096 F=1024"
    step tune 180 "$python" -m dmoe.tune --shape 32768,4096,1024,64,4 --budget "${TUNE_SECONDS:-150}" \
        --out "$out/tuned.json"
}

stage_ncu() {
    layer_gpu --once --shapes "30B T=32768 H=4096 F=1024" --contestants dmoe
    if [ -n "$dry" ]; then
        layer_gpu --once --shapes tiny --contestants dmoe --device cpu
        step "ncu, its program" 100 "${layer[@]}"
        return
    fi
    if ! command -v ncu >/dev/null; then
        note "- ncu: absent"
        return
    fi
    precompile 40 --set bench --shapes "30B T=32768 H=4096 F=1024"
    # The clocks are left as they are; of each kernel the second launch, when everything is loaded.
    step "ncu" 150 ncu --clock-control none --kernel-name 'regex:^(up_|hidden_grad|weight_grad)' --launch-skip 4 \
        --launch-count 4 --section SpeedOfLight --section WarpStateStats --section Occupancy "${layer[@]}" ||
        note "- ncu: it cannot read the counters here; the times of bench stand alone"
}
