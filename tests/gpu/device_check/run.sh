#!/usr/bin/env bash
# Usage, in the project's root on the GPU machine: bash tests/gpu/device_check/run.sh [PART...]
# PART: forms bulk steps tests (default: all). See README.md.
set -uo pipefail
check=tests/gpu/device_check
package=${PACKAGE:-.check/site.tar.xz}
export OUT=${OUT:-${TMPDIR:-/tmp}/device_check} PYTHONUNBUFFERED=1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 # leave CUDA_VISIBLE_DEVICES alone for actors without GPU
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site images=$work/images
python=${PYTHON:-python3} device=${DEVICE:-cuda} parts=${*:-forms bulk steps tests}

mkdir -p "$OUT"
if [[ -f $package ]]; then
  mkdir "$site" && xz -dc -T0 "$package" | tar -x -C "$site" || exit 1
fi
export PYTHONPATH=$PWD/$check/shim:$PWD:$site

part() {
  local limit_s=$1 name=$2
  shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  echo "== $name at ${SECONDS} s"
  timeout "$limit_s" "$@" 2>&1 | grep -v -i warn | tee "$OUT/$name.log"
  local code=${PIPESTATUS[0]}
  [[ $code == 0 ]] || { echo "== $name: exit code $code"; failed=1; }
}

failed=0
$python -c "
import torch, ray, duckdb, pyarrow, PIL
for module in (torch, ray, duckdb, pyarrow, PIL):
    print(module.__name__, module.__version__)
" || exit 1
$python -m tests.gpu.device_check.images "$images" "${IMAGES:-320}" || exit 1
echo "== data set written at ${SECONDS} s"
# the options are lists of words
# shellcheck disable=SC2086
{
  part 205 forms $python -m tests.gpu.device_check.forms --device $device ${FORMS:-}
  part 120 bulk $python -m tests.gpu.device_check.bulk --device $device --images "$images" ${BULK:-}
  part 90 steps $python -m tests.gpu.device_check.steps --device $device --images "$images" ${STEPS:-}
}
part 60 tests $python -m pytest tests/gpu -q -p no:cacheprovider --maxfail=5
echo "== end at ${SECONDS} s; results are in $OUT"
exit $failed
