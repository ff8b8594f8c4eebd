"""One library serves every ONNX Runtime from 1.20 on: each version in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.linear_nbits import assert_close, attributes, initializers, one_node, random_case, reference

RUN = """
import sys
import numpy as np, onnxruntime
folder, library, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for index in range(count):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(f"{folder}/{index}.onnx", options, providers=["CPUExecutionProvider"])
    np.save(f"{folder}/y{index}.npy", session.run(None, {"A": np.load(f"{folder}/a{index}.npy")})[0])
try:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    onnxruntime.InferenceSession(f"{folder}/hostile.onnx", options, providers=["CPUExecutionProvider"])
except Exception as error:
    assert "attribute bits is 9, allowed are 2 to 8" in str(error), error
else:
    raise SystemExit("the hostile model was loaded")
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.20.1", "1.27.0", "1.31.1", "1.32.0"])
def test_every_runtime_gives_the_same(library: Path, tmp_path: Path, version: str) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    packages = [f"onnxruntime=={version}", f"numpy=={np.__version__}"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"onnxruntime {version} does not install here: {done.stderr.strip().splitlines()[-1]}")
    rng = np.random.default_rng(20)
    settings = [(4, 32, 4, np.float32), (4, 128, 0, np.float16), (3, 48, 4, np.float32), (8, 300, 0, np.float32)]
    expected = []
    for index, (bits, block, level, dtype) in enumerate(settings):
        case = random_case(
            rng,
            bits=bits,
            rows=40,
            cols=300,
            block_cols=block,
            zero=["none", "integer", "float", "none"][index],
            outliers=9,
            channels=3 * (index % 2),
            bias=index > 1,
            level=level,
            dtype=dtype,
        )
        a = rng.normal(size=(5, 300)).astype(dtype)
        model = one_node(initializers(case), attributes(case), case.dtype)
        (tmp_path / f"{index}.onnx").write_bytes(model)
        np.save(tmp_path / f"a{index}.npy", a)
        expected.append((case, reference(case, a)))
    hostile = one_node(initializers(case), {**attributes(case), "bits": 9}, case.dtype)
    (tmp_path / "hostile.onnx").write_bytes(hostile)
    done = subprocess.run(
        [python, "-c", RUN, str(tmp_path), str(library), str(len(settings))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for index, (case, y) in enumerate(expected):
        assert_close(np.load(tmp_path / f"y{index}.npy"), y, case.dtype)
