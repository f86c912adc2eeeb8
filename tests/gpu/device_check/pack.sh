#!/usr/bin/env bash
# Usage, in the project's root: bash tests/gpu/device_check/pack.sh [PYTHON_VERSION]
# Writes .check/site.tar.xz: the libraries that the GPU machine lacks. See README.md.
set -euo pipefail
version=${1:-3.12}
packages=(
  ray duckdb botocore aiobotocore aioitertools jmespath s3fs tyro typeguard docstring_parser
  tensorboardx pycocotools pytz jsonschema jsonschema_specifications referencing rpds_py
  pydantic pydantic_core annotated_types typing_inspection
)
# what a check needs of the largest packages
unused=(ray/rllib ray/llm ray/serve ray/dashboard/client/build ray/jars ray/core/libjemalloc.so)
services='^(s3|sts|sso|sso-oidc|signin|endpoints.json|partitions.json|_retry.json|sdk-default-configuration.json)$'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
platforms=(--platform any --platform manylinux2014_x86_64)
for glibc in 17 24 27 28 31 34; do
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
# the versions of constraints.txt, without the packages that these depend on
normalize() { tr 'A-Z_' 'a-z-'; }
for package in "${packages[@]}"; do
  name=$(normalize <<<"$package")
  pin=$(normalize <constraints.txt | grep -m1 "^$name==" || true)
  echo "${pin:-$name}"
done >"$work/requirements.txt"
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "$version" "${platforms[@]}" --dest "$work/wheels" -r "$work/requirements.txt"

mkdir "$work/site"
for wheel in "$work"/wheels/*.whl; do
  unzip -q -o "$wheel" -d "$work/site"
done
(cd "$work/site" && rm -rf "${unused[@]}")
(cd "$work/site/botocore/data" && ls | grep -v -x -E "$services" | xargs rm -rf)
mkdir -p .check
tar -C "$work/site" -cf - . | xz -T0 -6e >.check/site.tar.xz
{ git ls-files -z && printf '.check\0'; } | du -cb --files0-from=- | tail -1 |
  awk '{ printf "the tree and .check: %.1f MiB\n", $1 / 1048576 }'
