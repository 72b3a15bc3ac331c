#!/usr/bin/env bash
# The check on a machine with a GPU and no network, in parts that each end within ten minutes:
#
#     OUT=results benchmarks/gpu_check.sh PART
#
# Without PART it lists the parts in the order in which to run them. Each part leaves its results in $OUT whatever
# becomes of the parts after it, and what it had measured when its time was up:
#   PART.txt                what the part printed
#   cuda.jsonl              a row a measurement, for benchmarks/results (tables of several parts: cat */cuda.jsonl);
#                           those of "compile" and "baselines" are in folders of that name, since they measure again
#                           what other parts have measured
#   choices-PART.json       what was fastest here
#   native.txt              the native libraries built, where that for CUDA is not there yet
#
# OUT is the folder (default: gpu-check), PY the interpreter (python3), which needs torch, triton, transformers,
# pytest, hypothesis and tabulate, and LIMIT the seconds for the part (560). Other packages are measured where they
# are installed or in PYTHONPATH. The exit status is that of the first step that failed, 124 if it took too long, and 2
# where nothing can be run. What needs no GPU is not run here: "make gate" compiles every kernel on any machine.
set -uo pipefail

usage() {
    cat <<'TEXT'
parts, in order:
  tests       every kernel against float64, in CUDA graphs, the native kernel; enabled models, packed, cached, in 4 bits
  rotary      benchmarks of the rotation, alone, with norms and of cached keys, and of decoding's projection
  projection  benchmark of the projection with the rotation, forward and backward
  models      benchmarks of whole models, of the attention block and of windows, without torch.compile
  compile     prefill and training step at 8k with torch.compile
  baselines   rotation, projection and attention block beside the other packages that are installed
  sanitizer   the projection's and decoding's kernels under compute-sanitizer
TEXT
}

case "${1-}" in
    tests | rotary | projection | models | compile | baselines | sanitizer) ;;
    "" | -h | --help)
        echo "usage: OUT=results benchmarks/gpu_check.sh PART"
        usage
        exit 0
        ;;
    *)
        echo "gpu_check.sh: no part '$1'; there are tests, rotary, projection, models, compile, baselines, sanitizer" >&2
        exit 2
        ;;
esac
if [ "$#" -gt 1 ]; then
    echo "gpu_check.sh: one part a call, got $*" >&2
    exit 2
fi
PART="$1"
OUT="${OUT:-gpu-check}"
PY="${PY:-python3}"
LIMIT="${LIMIT:-560}"
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$OUT" || exit 2
CHOICES="$(mktemp -d)" || exit 2
trap 'rm -rf "$CHOICES"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 ROPE_DIST_CACHE="$CHOICES"
status=0

run() { # name, seconds, command...
    local name="$1" limit="$2" code
    shift 2
    echo "== $name"
    # Interrupted, pytest still reports the failures so far.
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$OUT/$name.txt" 2>&1
    code=$?
    tail -n 5 "$OUT/$name.txt"
    if [ "$code" -ne 0 ]; then
        echo "$name failed with status $code (124, 137: its limit of $limit s)"
        [ "$status" -eq 0 ] && status=$code
    fi
}

left() { echo $((LIMIT > SECONDS + 1 ? LIMIT - SECONDS : 1)); }

native() { # One that is there may have been brought along to a machine without a compiler.
    "$PY" -c 'import sys; from rope_dist.ops import native; sys.exit(isinstance(native.load("cuda"), str))' ||
        run native 90 env ROPE_DIST_CUDA=1 "$PY" setup.py -q build_ext --inplace
}

measure() { # folder, benchmarks..., -- options of each
    local folder="$1" seconds
    shift
    mkdir -p "$folder"
    # The suite ends by itself, ten seconds before it would be stopped; its last benchmark has 15 seconds of grace.
    seconds=$(($(left) > 26 ? $(left) - 25 : 1))
    run "$PART" "$(left)" "$PY" -m benchmarks --device cuda --output "$folder" --seconds "$seconds" --only "$@"
    for file in "$CHOICES"/choices-*; do
        [ -e "$file" ] && cp "$file" "$OUT/choices-$PART.json"
    done
}

"$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no GPU that torch can use" >&2
    exit 2
}

case "$PART" in
    tests)
        native
        workers=()
        "$PY" -c 'import xdist' 2>/dev/null && workers=(-n 4)
        run tests "$(left)" "$PY" -m pytest tests/ops tests/test_native.py -v -p no:cacheprovider "${workers[@]}"
        ;;
    rotary)
        native
        measure "$OUT" rotary norm_rotary attention_rest rerotate cache_write decode -- --baselines torch.compile
        ;;
    projection)
        measure "$OUT" projection -- --baselines torch.compile
        ;;
    models)
        measure "$OUT" model_prefill model_decode attention_block window model_train_step -- --baselines
        ;;
    compile)
        measure "$OUT/compile" model_prefill model_train_step -- --baselines torch.compile --lengths 8192
        ;;
    baselines)
        native
        measure "$OUT/baselines" rotary norm_rotary cache_write projection attention_block
        ;;
    sanitizer)
        if ! command -v compute-sanitizer >/dev/null; then
            echo "compute-sanitizer is not installed: nothing was run under it"
            exit 0
        fi
        # Tensors of their own: in torch's blocks of 2 MB an access past the end meets another tensor's memory.
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        run sanitizer "$(left)" compute-sanitizer --error-exitcode 1 --report-api-errors no \
            "$PY" -m pytest tests/ops/test_projection.py tests/ops/test_decode.py -v -p no:cacheprovider \
            -k "rounding_differs or writes_the_cache or packed_and_strided or head_sizes"
        ;;
esac
exit "$status"
