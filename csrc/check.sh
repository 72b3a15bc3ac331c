#!/usr/bin/env bash
# Checks of the native sources that need no GPU; `make check-native` runs them. PYTHON names the interpreter.
#
#   1. the CUDA library compiles for every architecture, a warning or a spilled register being an error
#   2. the main kernels' machine code loads and stores heads by 16 bytes
#   3. the CPU library fuses no product with a sum
#   4. the CPU library passes its tests under AddressSanitizer and UndefinedBehaviorSanitizer
#
# What a machine lacks the tools for is skipped, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

skip() { echo "check-native: skipped $1: $2"; }
pass() { echo "check-native: passed $1"; }
fail() { echo "check-native: FAILED $1" >&2; exit 1; }

nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
if ! command -v "$nvcc" >/dev/null; then
  skip "CUDA sources" "no nvcc (PATH, CUDA_HOME)"
else
  codes=()
  for number in ${ROPE_DIST_CUDA_ARCHS:-80 90 100 120}; do
    codes+=(-gencode "arch=compute_$number,code=sm_$number")
  done
  "$nvcc" -std=c++17 -O3 -fmad=false -shared -Werror all-warnings -Xptxas -warn-spills -Xptxas -Werror \
    -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas --threads 0 "${codes[@]}" \
    csrc/*_cuda.cu -o "$work/cuda.so" || fail "CUDA sources: warnings or spills"
  pass "CUDA sources for ${ROPE_DIST_CUDA_ARCHS:-80 90 100 120}, no warning, no spill"

  cuobjdump=$(command -v cuobjdump || "$PYTHON" -c '
import importlib.util, pathlib
found = importlib.util.find_spec("triton")
path = pathlib.Path(found.origin).parent / "backends/nvidia/bin/cuobjdump" if found else None
print(path if path and path.exists() else "")' || true)
  if [ -z "$cuobjdump" ]; then
    skip "16-byte accesses" "no cuobjdump (CUDA toolkit, or the one in Triton)"
  else
    "$cuobjdump" -sass "$work/cuda.so" >"$work/sass" 2>/dev/null
    # Without a bias, with aligned rows: N is 8 for 16-bit types and 4 for float32. Halves to halves take two heads at a
    # time, interleaved pairs to halves one. With a norm a head has two runs of 16 bytes in either order, and so has its gradient.
    awk '
      function is(order) {
        return name ~ "13rotary_kernel(I13__nv_bfloat16" order "ELi8E|I6__half" order "ELi8E|If" order "ELi4E)Lb0E"
      }
      /Function :/ { name = $3
                     least = is("Lb0ELb0") ? 4 : is("Lb1ELb0") ? 2 : name ~ /(11norm|20norm_backward)_kernel.*ELi[48]E/ ? 2 : 0
                     if (least) { kernels++; needed += least } }
      least && /LDG\.E\.128/ { loads++ }
      least && /STG\.E\.128/ { stores++ }
      END { exit !(kernels >= 24 && loads >= needed && stores >= needed) }
    ' "$work/sass" || fail "16-byte accesses"
    pass "16-byte loads and stores (LDG.E.128, STG.E.128) in the main kernels"
  fi
fi

built=rope_dist/_native/librope_dist_cpu.so
if [ ! -e "$built" ] || ! command -v objdump >/dev/null || [ "$(uname -m)" != x86_64 ]; then
  skip "unfused products" "needs the built CPU library, objdump and x86-64"
else
  if objdump -d --no-show-raw-insn "$built" | grep -qE 'vfn?m(add|sub)'; then fail "unfused products"; fi
  pass "no fused product in the CPU library"
fi

compiler=${CXX:-g++}
if ! command -v "${compiler%% *}" >/dev/null; then
  skip "sanitizers" "no $compiler"
elif ! $compiler -std=c++17 -O1 -g -fPIC -shared -pthread -ffp-contract=off -fno-tree-slp-vectorize -DROPE_NO_CLONES \
  -fsanitize=address,undefined -fno-sanitize-recover=all csrc/*_cpu.cpp \
  -o "$work/librope_dist_cpu.so" 2>"$work/errors"; then
  skip "sanitizers" "$compiler has none: $(head -n 1 "$work/errors")"
else
  asan=$($compiler -print-file-name=libasan.so)
  runtime="$asan $($compiler -print-file-name=libstdc++.so)"
  # Python's own allocations at exit are no leaks of this library.
  LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0 ROPE_DIST_NATIVE_DIR="$work" \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_native.py tests/ops/test_norm_native.py \
    -k "not gpu and not cuda and not missing and not compiles" || fail "sanitizers"
  pass "the tests of the CPU library under AddressSanitizer and UndefinedBehaviorSanitizer"
fi
