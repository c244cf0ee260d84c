#!/bin/bash
# What is true on a GPU, in eight minutes, on a bare machine without a network:
#
#   build -> operators beside a copy -> the strict tests -> against eager and compiled code -> editors of real size
#   -> captured rollouts -> sanitizers -> hardware counters -> the rest
#
# Every step has a limit of its own and leaves its log before the next begins, so that a limit loses only what follows;
# they stand in the order of their worth. Run it in the repository's root, with what the machine lacks as wheels in
# .whl/ (from a machine with a network: pip download --no-deps -d .whl diffusers==0.42.1 'setuptools>=77,<82';
# git describe --always > .whl/COMMIT):
#
#   OUT=results bash scripts/gpu_session.sh
#
# To see what a change gives, put an older tree beside (git archive -o .whl/before.tar COMMIT): its operators are built
# and timed after ours, on the same machine and by the same table; rows in before/ of the logs.
#
# It leaves $OUT/summary.txt, $OUT/headline.log (and before.log) and $OUT/logs.tgz: all logs and rows.
#
#   OUT     a folder for the results (runs/gpu)    LIMIT   seconds in all (470)
#   PYTHON  the interpreter (python3)              SKIP    names of steps to leave out, such as "build editors"
#   CPU=1   what a machine without a GPU can show: the operators at tiny sizes, and in $OUT/selections.txt what pytest
#           would be asked to run, a step a line; tests/test_gpu_session.py looks whether it selects anything
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
: "${LIMIT:=470}" "${PYTHON:=python3}" "${SKIP:=}" "${CPU:=0}"
START=$SECONDS
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
: "${OUT:=$PWD/runs/gpu}"
mkdir -p "$OUT" "$SCRATCH/logs"
OUT=$(cd "$OUT" && pwd)
ROWS=$SCRATCH/logs/rows
SUMMARY=$OUT/summary.txt
: > "$SUMMARY"

export PYTHONPATH=$PWD:$PWD/kernels:$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=4 HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR=$SCRATCH/triton TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor
# The copy may belong to another user than the one that asks git for the commit.
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'

say() { echo "$*" | tee -a "$SUMMARY"; }

# keep: what came out so far, as one file
keep() { tar -C "$SCRATCH/logs" -czf "$SCRATCH/logs.tgz" . && mv "$SCRATCH/logs.tgz" "$OUT/logs.tgz"; }

# step NAME SECONDS COMMAND...: never longer than what is left
step() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS + START)) before=$SECONDS status
  shift 2
  if [[ " $SKIP " == *" $name "* ]]; then
    say "$name: left out"
    return
  fi
  if ((left < 15)); then
    say "$name: no time left"
    return
  fi
  timeout -k 5 $((most < left ? most : left)) "$@" > "$SCRATCH/logs/$name.log" 2>&1
  status=$?
  say "$name: status $status, $((SECONDS - before)) s, at $((SECONDS - START)) s"
  tail -n 3 "$SCRATCH/logs/$name.log" | cut -c1-200 | sed 's/^/    /' | tee -a "$SUMMARY"
  if [[ $name == headline || $name == before ]]; then cp "$SCRATCH/logs/$name.log" "$OUT/"; fi
  keep
}

# on_gpu NAME SECONDS COMMAND...: a step that a CPU cannot show
on_gpu() { if ((CPU == 0)); then step "$@"; fi; }

# tests NAME SECONDS PYTEST_ARGUMENTS...: under $UNDER, where a tool is named
tests() {
  local name=$1 most=$2
  shift 2
  if ((CPU)); then
    printf '%s' "$name" >> "$OUT/selections.txt"
    printf ' %q' "$@" >> "$OUT/selections.txt"
    echo >> "$OUT/selections.txt"
    return
  fi
  # shellcheck disable=SC2086 # $UNDER is a command with its options
  step "$name" "$most" ${UNDER:-} "$PYTHON" -m pytest -q -p no:cacheprovider --no-header -rNfE --tb=short "$@"
}

environment() {
  nvidia-smi || true
  nvcc --version | tail -n 2
  nproc
  git log -1 --oneline || true
  "$PYTHON" -VV
  "$PYTHON" - << 'PYTHON'
import importlib.metadata as metadata
import platform

print(platform.platform())
for name in (
    "torch triton transformers diffusers peft accelerate setuptools pybind11 ninja hypothesis pytest "
    "pytest-benchmark pytest-timeout pytest-xdist"
).split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print("MISSING", name)
PYTHON
}

install_wheels() {
  compgen -G '.whl/*.whl' > /dev/null || return 0
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SCRATCH/site" .whl/*.whl
}

# The operators of an older tree, by this tree's table.
before() {
  mkdir -p "$SCRATCH/before"
  tar -xf .whl/before.tar -C "$SCRATCH/before"
  (cd "$SCRATCH/before" && EDITR2_BUILD_CUDA=1 "$PYTHON" setup.py build_ext --inplace) || return
  PYTHONPATH=$PWD:$SCRATCH/before/kernels:$PYTHONPATH "$PYTHON" -m scripts.headline --first 3 --results "$SCRATCH/logs/before"
  local status=$?
  sed -i "s/\"commit\": \"[^\"]*\"/\"commit\": \"$(git get-tar-commit-id < .whl/before.tar)\"/" "$SCRATCH"/logs/before/*.jsonl
  return $status
}

# Rows name the commit. What travelled may have no folder of git's, or a stale one: .whl/COMMIT goes first.
name_the_commit() {
  local commit
  if [[ -d $ROWS && -f .whl/COMMIT ]] && commit=$(< .whl/COMMIT) && [[ $commit =~ ^[0-9a-z.-]+$ ]]; then
    sed -i "s/\"commit\": \"[^\"]*\"/\"commit\": \"$commit\"/" "$ROWS"/*.jsonl
  fi
}

GPU=tests/kernels/test_gpu.py
STRICT="two_gpu or never_waits or captured or out_of_range or other_stream or (matches and shape2) or last_block"
# Triton compiles anew for each alignment, and waits for the rest.
STRICT+=" or two_to_the_31 or (off_16 and cuda and dtype1) or (repeats and shape2 and dtype1) or by_numbers or comes_last"
FUSED="(test_sde_step or test_grpo_loss or test_nft_loss) and mixed"
NOT="guard or guided or given or log_prob or awm"
BENCH=(bench/test_sde_step.py bench/test_grpo_loss.py bench/test_nft_loss.py -m gpu)
TIMED=(--seconds 0.7 --results "$ROWS" --timeout 100)
PARALLEL=(-n 8 --dist worksteal)

if ((CPU)); then
  : > "$OUT/selections.txt"
else
  install_wheels > "$SCRATCH/logs/environment.log" 2>&1
  environment >> "$SCRATCH/logs/environment.log" 2>&1
  grep -h MISSING "$SCRATCH/logs/environment.log" | tee -a "$SUMMARY"
fi

# 24 units of C++ and nvcc, as many at a time as there are cores.
on_gpu build 120 env EDITR2_BUILD_CUDA=1 "$PYTHON" setup.py build_ext --inplace
step headline 90 "$PYTHON" -m scripts.headline --results "$ROWS"
tests strict 90 "${PARALLEL[@]}" --timeout 80 $GPU -k "$STRICT"
export -f before
export SCRATCH PYTHON
if [[ -f .whl/before.tar ]]; then on_gpu before 100 bash -c before; fi
tests bench_large 110 "${TIMED[@]}" "${BENCH[@]}" -k "$FUSED and 512x4096 and not ($NOT)"
tests editors 90 "${TIMED[@]}" bench/test_transformers.py -m gpu -k "klein or (Kontext and 512 and rollout)"
tests capture 45 --timeout 40 tests/test_capture.py tests/test_sde_scheduler.py -m gpu -k "graph or wait or never"
# One case a kernel: the start of a process costs more than the cases.
UNDER="compute-sanitizer --tool memcheck --error-exitcode 9" \
  tests memcheck 60 --timeout 60 $GPU -k "matches and cuda and shape1 and dtype1 and (None or token or global)"
UNDER="compute-sanitizer --tool racecheck --error-exitcode 9" \
  tests racecheck 60 --timeout 60 $GPU -k "repeats and cuda and shape0 and dtype0 and (None or global)"
# Of each kernel of the CUDA module its first launch, at the largest size.
SECTIONS=(SpeedOfLight MemoryWorkloadAnalysis SchedulerStats WarpStateStats InstructionStats Occupancy LaunchStats)
on_gpu counters 45 ncu --clock-control none "${SECTIONS[@]/#/--section=}" --kernel-id '::regex:^[a-z_]+_kernel$:1' \
  "$PYTHON" -m scripts.headline --first 1 --backends cuda --seconds 0
tests bench_usual 110 "${TIMED[@]}" "${BENCH[@]}" -k "$FUSED and 16x4096 and not ($NOT)"
OTHERS=(tests/kernels/test_token_log_prob.py tests/test_packed.py tests/test_bench.py)
tests rest 120 "${PARALLEL[@]}" $GPU "${OTHERS[@]}" -m gpu -k "not (test_gpu and ($STRICT))"

name_the_commit
keep
say "all: $((SECONDS - START)) s"
if grep -q 'status [1-9]' "$SUMMARY"; then exit 1; fi
