#!/usr/bin/env bash
# Tests and measures on one GPU, in at most 6 minutes:
#
#     benchmarks/gpu.sh                           figures go to benchmarks/results/gpu.json, gpu_peers.json, gpu_text.json
#     benchmarks/gpu.sh --quick                   for a look; writes nothing
#     benchmarks/gpu.sh --device cpu --quick      the same programs at a tiny size, to see that they run
#     benchmarks/gpu.sh --skip-tests …            the benchmarks alone
#
# Each part has a time limit of its own. One that fails doesn't keep the others from running, and is named at the end; the
# exit status is then 1. $PYTHON is the interpreter, `python` by default.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
total=360

device=cuda quick=() tests=yes
while (($#)); do
    case $1 in
        --device) device=${2-}; shift 2 || shift ;;
        --quick) quick=(--quick); shift ;;
        --skip-tests) tests=no; shift ;;
        *) device=; break ;;
    esac
done
if [[ $device != cuda && $device != cpu ]]; then
    echo "usage: $0 [--device cuda|cpu] [--quick] [--skip-tests]" >&2
    exit 2
fi

failed=()
part() { # name, seconds, command…
    local name=$1 limit=$2 status
    shift 2
    ((limit = limit < total - SECONDS ? limit : total - SECONDS))
    if ((limit <= 0)); then
        failed+=("$name (no time left)")
        return 1
    fi
    echo
    echo "== $name: $* (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@"
    status=$?
    if ((status == 124 || status == 137)); then
        failed+=("$name (time limit)")
    elif ((status)); then
        failed+=("$name (exit status $status)")
    fi
    return $status
}

# Looked for and not imported: what imports torchvision may fail (distaccum/runtime/torchvision_operators.py).
needed='pytest xdist pytest_timeout accelerate lightning transformers'
if ! "$python" -c "
import sys, distaccum.train
from importlib.util import find_spec
sys.exit(not all(map(find_spec, '$needed'.split())))" 2>/dev/null; then
    part "installation" 120 "$python" -m pip install --quiet -e '.[test,bench]'
fi
if [[ $device == cuda ]] && command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi
if [[ $tests == yes ]]; then
    mapfile -t files < <(grep -rl "pytest[.]mark[.]gpu" tests --include='test_*.py')
    part "tests" 60 "$python" -m pytest -m gpu -n 0 -q "${files[@]}"
fi
options=(--device "$device" "${quick[@]}")
[[ $device == cuda && ${#quick[@]} == 0 ]] && options+=(--write)
# A compiler for C++ is not needed to see that compiling works.
[[ $device == cpu ]] && backend=(--backend aot_eager) || backend=()
part "one GPU" 210 "$python" benchmarks/gpu.py "${options[@]}" "${backend[@]}"
part "peers" 80 "$python" benchmarks/gpu_peers.py "${options[@]}"
part "text" 100 "$python" benchmarks/gpu_text.py "${options[@]}"

echo
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts have ended well, in $SECONDS s"
