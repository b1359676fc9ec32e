# Everything goes into .venv and build/ here; nothing is installed elsewhere.
#   make demo PYTHON=python3.12                 another Python
#   make demo TENSORFLOW='tensorflow==2.21.*'   another TensorFlow; this one for GPUs
#   make build DICE_OP_CUDA=on                  with CUDA kernels also where there is no GPU

python := .venv/bin/python
# As many tests at a time as there are cores, but each holds a TensorFlow of half a gigabyte.
pytest := $(python) -m pytest tests --numprocesses auto --maxprocesses 4 --dist loadgroup
csrc := $(shell find csrc -type f)
c++ := $(csrc) $(shell find tests benchmarks -name '*.cc' -o -name '*.h' -o -name '*.cu')
export DICE_OP_CUDA DICE_OP_CUDA_ARCHS

.PHONY: help demo test test-full bench build wheels cuda12 check-wheels docs lint format clean FORCE

help:  ## list these commands
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1\t/p' Makefile

demo: build  ## train a small 3D U-Net on a brain volume with the fused loss
	$(python) examples/brain_segmentation.py

test: lint build  ## check style and types, run the tests
	$(pytest)

test-full: build .venv/peers  ## run the tests that take long or need more packages
	$(pytest) -m full

bench: build .venv/peers  ## measure beside the peers, half an hour; BENCH="--only '160³ × 4'" for some
	$(python) -m benchmarks $(BENCH)

wheels: .venv/ready  ## build the wheels of build_tools/wheels.toml; WHEELS="--variant cpu" for some
	$(python) build_tools/wheels.py $(WHEELS)

cuda12: .venv/ready  ## make a compiler for the wheels of CUDA 12, from Debian's and pip's packages
	@sh build_tools/cuda12.sh

check-wheels: .venv/ready  ## try those in dist/, each in a new environment
	$(python) build_tools/check_wheel.py

docs: build .venv/docs  ## make the documentation, into build/docs/index.html
	$(python) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

build: build/ready  ## compile the extension into dice_op/

lint: .venv/ready  ## check the style and the types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(c++)

format: .venv/ready  ## mend the style
	$(python) -m ruff check --fix --exit-zero --quiet .
	$(python) -m ruff format .
	.venv/bin/clang-format -i $(c++)

clean:  ## remove what was built, but not .venv
	rm -rf build demo_output dist *.egg-info dice_op/*.so

# Asks each time, but counts as new only if the script has changed something.
.venv/ready: FORCE
	@sh build_tools/bootstrap.sh

.venv/peers: .venv/ready
	$(python) -m pip install --quiet --no-input --disable-pip-version-check --group jax --group peers
	$(python) -m pip install --quiet --no-input --disable-pip-version-check --no-deps --group legacy_keras
	@touch $@

.venv/docs: .venv/ready
	$(python) -m pip install --quiet --no-input --disable-pip-version-check --group docs
	@touch $@

# What was asked for, written anew only if it is another wish than the last time's.
wishes = $(DICE_OP_CUDA) $(DICE_OP_CUDA_ARCHS) $(CMAKE_ARGS)
build/wishes: FORCE
	@mkdir -p build; echo '$(wishes)' | cmp -s - $@ || echo '$(wishes)' >$@

build/ready: .venv/ready build/wishes $(csrc) CMakeLists.txt setup.py build_tools/cuda.cmake build_tools/tensorflow_flags.py $(wildcard build_tools/*.map)
	@sh build_tools/check_compiler.sh
	$(python) setup.py --quiet build_ext --inplace
	@touch $@
