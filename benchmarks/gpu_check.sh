#!/usr/bin/env bash
# One command for a machine with a GPU and no network: the kernels' and the models' tests on the GPU, then the
# benchmarks.
#
#     OUT=results benchmarks/gpu_check.sh
#
# Leaves in $OUT
#   native.txt          the native libraries built, where that for CUDA is not there yet
#   tests.txt           every kernel against float64, in CUDA graphs, the native kernel against Triton's; whole models
#                       by flash-attention on packed sequences, from a static cache in a CUDA graph, in 4 bits
#                       (what is not installed is skipped by name)
#   sanitizer.txt       compute-sanitizer, where it is installed, over Triton's and the native kernels
#   gate.txt            what the compiler makes of the kernels
#   benchmarks.txt, QUESTION-cuda.json    each benchmark; LLaMA2-7B's prefill and 32 tokens after it among them
#   choices/            what was fastest here
#
# Takes less than eight minutes: each part has a limit of its own, and the benchmarks take what the others have
# left, each question writing as it goes. PY chooses the interpreter, which needs torch, triton, transformers,
# pytest, hypothesis and tabulate; peers take part where they are installed or in PYTHONPATH. The exit status is
# that of the first part that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-gpu-check}"
PY="${PY:-python3}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
# The choices that these runs measure stay with their results.
export ROPE_DIST_CACHE="$PWD/$OUT/choices"
case "$OUT" in /*) export ROPE_DIST_CACHE="$OUT/choices" ;; esac
status=0

part() { # name, seconds, command...
    local name="$1" limit="$2" code
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1
    code=$?
    tail -n 5 "$OUT/$name.txt"
    if [ "$code" -ne 0 ]; then
        echo "$name failed with status $code (124: its limit of $limit s)"
        [ "$status" -eq 0 ] && status=$code
    fi
}

"$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no GPU that torch can use" >&2
    exit 2
}
workers=()
"$PY" -c 'import xdist' 2>/dev/null && workers=(-n 4)

# One that is there may have been brought along to a machine without a compiler.
"$PY" -c 'import sys; from rope_dist.ops import native; sys.exit(isinstance(native.load("cuda"), str))' ||
    part native 60 "$PY" setup.py -q build_ext --inplace
part tests 180 "$PY" -m pytest tests/ops tests/test_native.py -q -p no:cacheprovider "${workers[@]}"
if command -v compute-sanitizer >/dev/null; then
    part sanitizer 50 compute-sanitizer --error-exitcode 1 "$PY" -m pytest tests/ops -q -p no:cacheprovider \
        -k "rounding_differs or writes_the_cache or agrees_with_tritons"
else
    echo "compute-sanitizer is not installed: kernels are not run under it"
fi
part gate 40 "$PY" -m rope_dist.ops.static_gate --target sm_90
left=$((460 - SECONDS))
part benchmarks "$left" "$PY" -m benchmarks --device cuda --output "$OUT" --seconds $((left - 10))
exit "$status"
