# Everything goes into .venv and build/ in this folder; nothing is installed elsewhere.
#   make demo PYTHON=python3.12                 uses another Python
#   make demo TENSORFLOW='tensorflow==2.21.*'   uses another TensorFlow (this one supports GPUs)
#   make demo BACKEND=jax                       trains with Keras on JAX (or torch), not on TensorFlow
#   make build DICE_OP_CUDA=on                  compiles the CUDA kernels even if there is no GPU

python := .venv/bin/python
# Each core runs a test, but no more than four run at a time, because each holds half a gigabyte of TensorFlow.
pytest := $(python) -m pytest tests --numprocesses auto --maxprocesses 4 --dist worksteal
pip := $(python) -m pip install --quiet --no-input --disable-pip-version-check
csrc := $(shell find csrc -type f)
c++ := $(csrc) $(shell find tests benchmarks -name '*.c' -o -name '*.cc' -o -name '*.h' -o -name '*.cu')
pages := $(wildcard *.md) $(shell find docs -name '*.md')
export DICE_OP_CUDA DICE_OP_CUDA_ARCHS CLANG

.PHONY: help demo test test-full reliability fuzz coverage bench bounds build wheels cuda12 check-wheels docs links notebooks lint stub format clean FORCE

help:  ## list these commands
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1\t/p' Makefile

demo: build $(if $(BACKEND),.venv/peers)  ## train a small 3D U-Net on a brain volume with the fused loss; BACKEND=jax or torch
	$(if $(BACKEND),KERAS_BACKEND=$(BACKEND)) $(python) examples/brain_segmentation.py

test: lint build  ## check style and types, run the tests
	$(pytest)

test-full: build .venv/peers  ## run the tests that take long or need more packages
	$(pytest) -m full

reliability: build .venv/peers  ## try hostile input, faults, huge volumes and long runs, hours; RELIABILITY="-k scale" for some
	$(python) -m pytest tests/reliability tests/kernels/test_cuda_emulator.py -m "" --record docs/reliability.json $(RELIABILITY); \
	  status=$$?; $(python) tests/reliability/report.py && exit $$status

fuzz: build .venv/peers  ## try other random calls than the tests, FUZZ=10000 of each sort, and libFuzzer for SECONDS=600
	@sh build_tools/check_fuzzer.sh
	DICE_OP_FUZZ=$(or $(FUZZ),10000) DICE_OP_FUZZ_SECONDS=$(or $(SECONDS),600) $(python) -m pytest -s -m 'not full' $(addprefix tests/reliability/test_,fuzz.py raw_calls.py entry_points.py)

coverage: build .venv/peers .venv/coverage  ## say which lines the tests reach, an hour; RECORD=docs/reliability.json writes it
	PYTHONPATH=tests $(python) build_tools/measure_coverage.py $(if $(RECORD),--record $(RECORD))

bench: build .venv/peers  ## compare time and memory with other libraries, half an hour; BENCH="--only '160³ × 4'" for some
	$(python) -m benchmarks $(BENCH)

bounds: build  ## calculate what the CUDA kernels can reach at most; with DICE_OP_CUDA=on DICE_OP_CUDA_ARCHS=80,90
	PYTHONPATH=tests $(python) -m benchmarks.gpu.bounds

wheels: .venv/ready  ## build the wheels of build_tools/wheels.toml; WHEELS="--variant cpu" for some
	$(python) build_tools/wheels.py $(WHEELS)

cuda12: .venv/ready  ## make a compiler of CUDA 12 for the wheels, from packages of Debian and pip
	@sh build_tools/cuda12.sh

check-wheels: .venv/ready  ## try each wheel in dist/ in a new environment
	$(python) build_tools/check_wheel.py

docs: build .venv/docs  ## make the documentation, into build/docs/index.html; check spelling, prose and links
	$(python) -m codespell_lib $(pages) dice_op csrc examples tests benchmarks build_tools
	cd docs && ../$(python) -m proselint check $(addprefix ../,$(pages))
	$(python) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

links: build .venv/docs  ## follow the links of the documentation to other sites
	$(python) -m sphinx --keep-going --quiet -b linkcheck docs build/links

notebooks: build .venv/notebooks  ## execute the examples, into docs/examples; takes minutes
	$(python) build_tools/notebooks.py

build: build/ready  ## compile the extension into dice_op/

lint: .venv/ready  ## check the style and the types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(c++)

stub: build  ## write dice_op/core.pyi, the types of dice_op.core, from a build with CUDA kernels
	$(python) -m pybind11_stubgen dice_op.core --output-dir build/stub
	cp build/stub/dice_op/core.pyi dice_op/core.pyi

format: .venv/ready  ## correct the style
	$(python) -m ruff check --fix --exit-zero --quiet .
	$(python) -m ruff format .
	.venv/bin/clang-format -i $(c++)

clean:  ## remove what was built, but keep .venv
	rm -rf build demo_output dist *.egg-info dice_op/*.so

# The script runs each time, but .venv/ready is only newer afterwards if the script had something to do.
.venv/ready: FORCE
	@sh build_tools/bootstrap.sh

.venv/peers: .venv/ready
	$(pip) --group jax --group peers
	$(pip) --no-deps --group legacy_keras
	@touch $@

.venv/coverage: .venv/ready
	$(pip) --group coverage
	@touch $@

.venv/docs: .venv/ready
	$(pip) --group docs
	@touch $@

.venv/notebooks: .venv/ready
	$(pip) --group notebooks
	@touch $@

# This file holds the options of the last build. It is written again only if they have changed.
options = $(DICE_OP_CUDA) $(DICE_OP_CUDA_ARCHS) $(CMAKE_ARGS)
build/options: FORCE
	@mkdir -p build; echo '$(options)' | cmp -s - $@ || echo '$(options)' >$@

build/ready: .venv/ready build/options $(csrc) CMakeLists.txt setup.py build_tools/tensorflow_flags.py build_tools/find_nvcc.py build_tools/find_ffi_header.py build_tools/wheels.toml $(wildcard build_tools/*.cmake build_tools/*.map)
	@sh build_tools/check_compiler.sh
	$(python) setup.py --quiet build_ext --inplace
	@touch $@
