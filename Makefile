# Every target sets up .venv by itself; after the first time nothing is downloaded.
#   make quickstart [TEXT=path]   pretrain and compare, end to end
#   make test                     the fast tests;  make test-slow  the rest;  make lint
#   make bench                    what the kernels and a step cost on this machine, in under three minutes
#   make bench-full               the same with larger shapes, torch.compile, competitors and more rounds
#                                 both keep their figures and a page in runs/bench (BENCH=folder)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COCOMIX := $(BIN)/cocomix
READY := $(VENV)/.ready
PIP := $(BIN)/pip --disable-pip-version-check install -q -c constraints.txt

TEXT ?= stdlib
ifeq ($(TEXT),stdlib)
OUT ?= runs/quickstart
else
OUT ?= runs/quickstart-$(shell printf '%s' '$(TEXT)' | cksum | cut -d' ' -f1)
endif

.PHONY: setup quickstart test test-slow lint bench bench-full clean

setup: $(READY)

# PyTorch goes first: an unpinned dependency on it would choose another build. DeepSpeed is built from source and
# wants the environment's own setuptools rather than an isolated build's.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools wheel ninja "torch==2.13.0" numpy
	@$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

QUICKSTART = "out=$(OUT)"
quickstart: $(READY)
	@echo "1/7 data: text -> tokenizer and token files";        $(COCOMIX) data configs/quickstart/teacher.yaml $(QUICKSTART) "data.text=['$(TEXT)']"
	@echo "2/7 teacher: a small language model";                $(COCOMIX) train configs/quickstart/teacher.yaml $(QUICKSTART) --resume
	@echo "3/7 sae: the teacher's sparse autoencoder";          $(COCOMIX) sae configs/quickstart/student.yaml $(QUICKSTART)
	@echo "4/7 labels: which concepts matter at each token";    $(COCOMIX) labels configs/quickstart/student.yaml $(QUICKSTART)
	@echo "5/7 student by next-token prediction alone";         $(COCOMIX) train configs/quickstart/student.yaml $(QUICKSTART) model.mixing=none train.run=$(OUT)/ntp --resume
	@echo "6/7 student with continuous concepts";               $(COCOMIX) train configs/quickstart/student.yaml $(QUICKSTART) --resume
	@echo "7/7 report"; echo;                                   $(COCOMIX) report $(OUT)/ntp $(OUT)/cocomix --out $(OUT)/report

# One process a core, each with one thread; a file's tests stay together, because they share what they set up.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

lint: $(READY)
	$(BIN)/ruff check .

# Where there is no GPU a step has one window, in float32. On a GPU the config says, and the micro batch is what fits.
BENCH ?= runs/bench
KERNELS = $(BIN)/python -m pytest -q benchmarks --benchmark-json $(BENCH)/kernels.json
STEP = $(COCOMIX) profile configs/openwebtext/69m.yaml $$($(BIN)/python -c 'import torch; print("--fit" \
    if torch.cuda.is_available() else "train.micro_batch=1 train.precision=fp32 teacher.dtype=fp32")') \
    --vocab-size 50257 --random-teacher --json $(BENCH)/profile.json

bench: $(READY)
	@mkdir -p $(BENCH)
	$(KERNELS) --budget 90
	$(STEP) --rounds 2
	$(COCOMIX) report --bench $(BENCH)/kernels.json --profile $(BENCH)/profile.json --out $(BENCH)/report
	@echo "kept: $(BENCH)/kernels.json (pytest-benchmark), $(BENCH)/profile.json (cocomix profile), $(BENCH)/report"

bench-full: $(READY)
	@mkdir -p $(BENCH)
	$(KERNELS) --full
	$(STEP) --rounds 15 --against public --against transformers
	$(COCOMIX) report --bench $(BENCH)/kernels.json --profile $(BENCH)/profile.json --out $(BENCH)/report
	@echo "kept: $(BENCH)/kernels.json (pytest-benchmark), $(BENCH)/profile.json (cocomix profile), $(BENCH)/report"

clean:
	rm -rf $(VENV) runs build *.egg-info
