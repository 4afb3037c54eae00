# `make demo`, `make test` and `make fairseq` each start from nothing: they make .venv, install, compile csrc/ and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := $(wildcard csrc/*) setup.py

.PHONY: demo test test-frameworks test-megatron-0.19 test-transformers test-checkpoints test-kernels test-oldest check bench fairseq clean

demo: $(VENV)/ready
	$(BIN)/python examples/train_lm.py --compare-dense --seeds 3 --lr 12e-3 --dense-lr 8.5e-3 --minutes 8 \
		--eval-every 80 --eval-bytes 32768 --overwrite --generate --out runs/demo

# loadgroup: tests that share one set of processes stay together, and all others go wherever there is room. logical:
# `auto` counts two hardware threads of a core as one.
test: check fairseq $(VENV)/deepspeed $(VENV)/browser
	$(BIN)/python tests/support/machine.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist loadgroup $(PYTEST_FLAGS)

# Frameworks that `make test` does not install: a test without its framework is skipped there.
test-frameworks: $(VENV)/torchtitan $(VENV)/optimizers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/torchtitan tests/parallel/test_optim.py $(PYTEST_FLAGS)

# The newest megatron-core, which needs Python 3.12 to be installed, from its unzipped wheel.
test-megatron-0.19: $(VENV)/ready
	PYTHON=$(BIN)/python tests/support/megatron_wheel.sh 0.19.2

# All families behind Transformers' experts interface, in the installed release and in others (250 MB each, in build/).
test-transformers: $(VENV)/ready
	DMOE_FAMILIES=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/transformers
	for release in 5.8.1 5.17.0 5.23.0; do \
		PYTHON=$(BIN)/python tests/support/transformers_wheel.sh $$release || exit 1; done

# NVIDIA's converter: every recorded FasterTransformer folder, byte for byte (a third of them is in `make test`).
test-checkpoints: $(VENV)/ready
	cd tests/support && PATH=$(abspath $(BIN)):$$PATH python ft_verify.py ft_hashes.json \
		'python -m dmoe.checkpoint convert {in} {out} --to fastertransformer --gpus {gpus} --dtype {dtype}' \
		--vocab ' --vocab {vocab} --merges {merges}'

# Every kernel through the compiler, for every architecture: `make test` takes those whose source has changed, and a part
# of the others, another each day.
test-kernels: $(VENV)/ready
	DMOE_KERNELS=all $(BIN)/python -m pytest -q -n logical tests/kernels/test_kernel_table.py tests/kernels/test_gluon_table.py

# The oldest PyTorch that is promised, and its Triton: an environment of their own in build/ (5 GB), with Python 3.11.
test-oldest:
	tests/support/oldest.sh $(PYTEST_FLAGS)

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fairseq: $(VENV)/fairseq

bench: $(VENV)/ready
	$(BIN)/python benchmarks/routing_ops.py
	$(BIN)/python benchmarks/layer_cpu.py

clean:
	rm -rf $(VENV) build dmoe/_C.so *.egg-info

# torch first, then without build isolation: pip would otherwise fetch another torch to build against. torch for CUDA
# brings the one Triton that it accepts; where it brings none, this one is as good as pinned.
$(VENV)/ready: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.9.0
	DMOE_BUILD=required $(PIP) --no-build-isolation --editable '.[test,dev,examples]'
	touch $@

# No extra of the package: pip refuses fairseq's own list (an omegaconf of 2020, with metadata that is no longer valid).
# PIP_CONSTRAINT also pins what fairseq, a source package, is built with; that takes a C++ compiler and Python's headers.
$(VENV)/fairseq: $(VENV)/ready
	$(PIP) hydra-core omegaconf numpy cffi cython regex sacrebleu tqdm bitarray
	PIP_CONSTRAINT=constraints.txt $(PIP) --no-deps fairseq
	touch $@

# In a folder of its own: Transformers and others behave differently where it can be imported. It compiles nothing then.
$(VENV)/deepspeed: $(VENV)/ready
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --target $@ deepspeed hjson msgpack py-cpuinfo einops ninja \
		pydantic pydantic-core annotated-types typing-inspection typing-extensions
	touch $@

# What it says it needs besides (wandb, torch_checkpointing, einops, Pillow) is imported by parts that are not used here.
$(VENV)/torchtitan: $(VENV)/ready
	$(PIP) --no-deps --target $@ torchtitan spmd-types torchdata tyro docstring-parser typeguard
	touch $@

# 8-bit optimizers: 120 MB that nothing else needs.
$(VENV)/optimizers: $(VENV)/ready
	$(PIP) --no-deps --target $@ bitsandbytes torchao
	touch $@

# A browser, to look at the report in. Where none is to be had there is no such folder, and that test is skipped.
$(VENV)/browser: tests/support/browser.sh | $(VENV)/ready
	tests/support/browser.sh $@
