# make demo     set up .venv, convert the shipped model to Q4_K_M and prove it
# make test     set up .venv, run the tests
#               (vLLM has an environment of its own, .venv-vllm, 3 GB; make test VLLM=no leaves it out)
# make check    lint, types, tests        make bench    measurements against the incumbents
# make install  the development environment alone

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# On Linux, PyPI's torch brings several GB of CUDA; TORCH_ARGS="--index-url <PyTorch's CPU wheel index>" avoids that.
TORCH_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
VLLM ?= yes
VLLM_ENV := $(if $(filter no,$(VLLM)),,.venv-vllm/.installed .venv-vllm/cuda-wheel)
# The build for GPUs: its Python files import without one, and its config classes judge what we write.
VLLM_WHEEL := vllm==0.33.0
OUT := demo-out

.PHONY: demo test install check lint bench clean kernels

demo: install
	@mkdir -p $(OUT)
	$(BIN)/lconvert hf-to-gguf examples/demo_model --q4_k_m -o $(OUT)/demo-Q4_K_M.gguf --force --no-validate
	$(BIN)/lconvert inspect $(OUT)/demo-Q4_K_M.gguf
	$(BIN)/lconvert validate examples/demo_model $(OUT)/demo-Q4_K_M.gguf --require llamacpp --layers \
	  --report $(OUT)/report.json --html $(OUT)/report.html
	@echo "the proof is in $(OUT)/report.html and report.json, the manifest in $(OUT)/demo-Q4_K_M.gguf.manifest.json"

# Every oracle is installed by `install`, so a test that skips for want of one fails here.
test: install $(VLLM_ENV)
	LCONVERT_REQUIRE_ORACLES=1 LCONVERT_WITHOUT_VLLM=$(if $(VLLM_ENV),,1) OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)

check: install lint
	$(MAKE) --no-print-directory test

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/end_to_end.py

install: $(VENV)/.installed

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) -c constraints.txt torch
	touch $@

# llama.cpp's converter is in llama-cpp-python's source distribution; the byte-equality tests run it.
$(VENV)/share/llama.cpp: $(VENV)/.python
	mkdir -p $(VENV)/share/sdist
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python -c constraints.txt \
	  --dest $(VENV)/share/sdist llama-cpp-python
	tar -xzf $(VENV)/share/sdist/llama_cpp_python-*.tar.gz -C $(VENV)/share/sdist
	mv $(VENV)/share/sdist/llama_cpp_python-*/vendor/llama.cpp $@
	rm -rf $(VENV)/share/sdist

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt $(wildcard kernels/*.cpp kernels/*.h kernels/CMakeLists.txt) | $(VENV)/share/llama.cpp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv-vllm/.installed: $(VENV)/.installed
	rm -rf .venv-vllm
	$(BIN)/lconvert doctor --install vllm --into .venv-vllm --yes
	touch $@

.venv-vllm/cuda-wheel: .venv-vllm/.installed
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 \
	  --dest $@.download $(VLLM_WHEEL)
	$(BIN)/python -c "import glob, zipfile; z = zipfile.ZipFile(glob.glob('$@.download/*.whl')[0]); \
	  z.extractall('$@', [n for n in z.namelist() if n.endswith(('.py', '.json', 'METADATA'))])"
	rm -rf $@.download

clean:
	rm -rf build $(OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis
