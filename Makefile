# Everything goes into .venv and build/ here; nothing is installed elsewhere.
#   make demo PYTHON=python3.12                 another Python
#   make demo TENSORFLOW='tensorflow==2.21.*'   another TensorFlow; this one for GPUs

python := .venv/bin/python
csrc := $(shell find csrc -type f)

.PHONY: help demo test build lint format clean FORCE

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

demo: build  ## train a small 3D U-Net on a brain volume with the fused loss
	$(python) examples/brain_segmentation.py

test: lint build  ## check the style, run the tests
	$(python) -m pytest tests

build: build/ready  ## compile the extension into dice_op/

lint: .venv/ready  ## check the style
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(csrc)

format: .venv/ready  ## mend the style
	$(python) -m ruff check --fix --exit-zero --quiet .
	$(python) -m ruff format .
	.venv/bin/clang-format -i $(csrc)

clean:  ## remove what was built, but not .venv
	rm -rf build demo_output dist *.egg-info dice_op/*.so

# Asks each time, but counts as new only if the script has changed something.
.venv/ready: FORCE
	@sh build_tools/bootstrap.sh

build/ready: .venv/ready $(csrc) CMakeLists.txt setup.py build_tools/tensorflow_flags.py
	@sh build_tools/check_compiler.sh
	$(python) setup.py --quiet build_ext --inplace
	@touch $@
