#!/usr/bin/env bash
# The wheel, as a user gets it: built, installed with its dependencies into a fresh environment, and used from another folder.
# Tests see the checkout; this does not. Usage: tools/check_wheel.sh [PYTHON [oldest]]; with the second word, the oldest
# dependencies that pyproject.toml promises instead of those of constraints.txt.
set -euo pipefail
python=$(command -v "${1:-python3}")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
pip=("$work/env/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" wheel --no-deps --wheel-dir "$work" "$root"
constraints=$root/constraints.txt
if [ "${2:-}" = oldest ]; then
    constraints=$work/oldest.txt
    "$python" "$root/tools/oldest.py" cpu optimum >"$constraints"
fi
"${pip[@]}" install -c "$constraints" "$(echo "$work"/swquant-*.whl)[cpu,optimum]"

cd "$work"
export PATH="$work/env/bin:$PATH" HF_HUB_OFFLINE=1
swquant doctor
PYTHONPATH="$root/tests" python - <<'TINY'
from pathlib import Path
from support.tiny_models import planted_model
import swquant
assert not Path(swquant.__file__).is_relative_to(Path(planted_model.__code__.co_filename).parents[2]), "not the wheel"
planted_model("llama", Path("tiny"))
TINY
swquant compress tiny packed --block 32 --prompt "t5 t9 t17"
swquant verify packed
swquant generate packed "t5 t9" --tokens 4
swquant export packed exported
swquant generate exported "t5 t9" --tokens 4
optimum-cli export swquant --help | grep --quiet -- --lm-head-bits
echo "The wheel works."
