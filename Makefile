# Every target sets up .venv by itself; after the first time nothing is downloaded.
#   make quickstart [TEXT=path]   pretrain and compare, end to end
#   make test                     the fast tests;  make test-slow  the rest;  make lint
#   make test-oldest test-newest  a part of the tests with the lowest and the newest versions that setup.py admits
#   make bench                    what the kernels and a step cost on this machine, in under three minutes
#   make bench-full               the same with larger shapes, torch.compile, competitors and more rounds
#                                 both keep their figures and a page in runs/bench (BENCH=folder)
#   make frontier                 what every method brings and costs, over seeds and budgets (hours)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COCOMIX := $(BIN)/cocomix
READY := $(VENV)/.ready

TEXT ?= stdlib
ifeq ($(TEXT),stdlib)
OUT ?= runs/quickstart
else
OUT ?= runs/quickstart-$(shell printf '%s' '$(TEXT)' | cksum | cut -d' ' -f1)
endif

.PHONY: setup quickstart test test-slow test-oldest test-newest lint bench bench-full frontier clean

setup: $(READY)

# PyTorch goes first: an unpinned dependency on it would choose another build. DeepSpeed is built from source and
# wants the environment's own setuptools rather than an isolated build's.
define install
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(@D) (once; a few minutes)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip $(PIP_OPTIONS) setuptools wheel ninja "torch==2.13.0" numpy
	@$(@D)/bin/pip $(PIP_OPTIONS) --no-build-isolation -e ".[$(PARTS)]"
	@touch $@
endef

PIP_OPTIONS = --disable-pip-version-check install -q $(VERSIONS)
VERSIONS = -c constraints.txt
PARTS = dev

$(READY): setup.py constraints.txt
	$(install)

# The ends of setup.py's ranges, each in an environment of its own.
.venv-oldest/.ready: VERSIONS = -c constraints-oldest.txt
.venv-newest/.ready: VERSIONS =
.venv-oldest/.ready .venv-newest/.ready: PARTS = train,report,test
.venv-oldest/.ready .venv-newest/.ready: setup.py constraints-oldest.txt
	$(install)

QUICKSTART = "out=$(OUT)"
quickstart: $(READY)
	@echo "1/8 data: text -> tokenizer and token files";        $(COCOMIX) data configs/quickstart/teacher.yaml $(QUICKSTART) "data.text=['$(TEXT)']"
	@echo "2/8 teacher: a small language model";                $(COCOMIX) train configs/quickstart/teacher.yaml $(QUICKSTART) --resume
	@echo "3/8 sae: the teacher's sparse autoencoder";          $(COCOMIX) sae configs/quickstart/student.yaml $(QUICKSTART)
	@echo "4/8 labels: which concepts matter at each token";    $(COCOMIX) labels configs/quickstart/student.yaml $(QUICKSTART)
	@echo "5/8 student by next-token prediction alone";         $(COCOMIX) train configs/quickstart/student.yaml $(QUICKSTART) model.mixing=none train.run=$(OUT)/ntp --resume
	@echo "6/8 student with continuous concepts";              $(COCOMIX) train configs/quickstart/student.yaml $(QUICKSTART) --resume
	@echo "7/8 student with continuous concepts in the paper's form"; $(COCOMIX) train configs/quickstart/student.yaml $(QUICKSTART) model.concept_residual=false train.run=$(OUT)/paper --resume
	@echo "8/8 report"; echo;                                   $(COCOMIX) report $(OUT)/ntp $(OUT)/cocomix $(OUT)/paper --out $(OUT)/report

# One process a core, each with one thread; a file's tests stay together, because they share what they set up.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist loadfile

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

# What meets the libraries whose interfaces move: model, generation, labels, checkpoints, training.
ENDS = tests/engine/model tests/engine/teacher/test_label_cache.py tests/engine/distributed/test_checkpoint.py \
  tests/engine/training/test_trainer.py tests/engine/training/test_version_0_1.py

test-oldest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pytest -q -n auto --dist loadfile -m "not slow" $(ENDS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Where there is no GPU a step has one window, in float32. On a GPU the config says, and the micro batch is what fits.
BENCH ?= runs/bench
KERNELS = $(BIN)/python -m pytest -q benchmarks --benchmark-json $(BENCH)/kernels.json
STEP = configs/openwebtext/69m.yaml $$($(BIN)/python -c 'import torch; print("--fit" \
    if torch.cuda.is_available() else "train.micro_batch=1 train.precision=fp32 teacher.dtype=fp32")') \
    --vocab-size 50257 --random-teacher --json $(BENCH)/profile.json

bench: $(READY)
	@mkdir -p $(BENCH)
	$(KERNELS) --budget 90
	$(COCOMIX) profile $(STEP) --rounds 2
	$(COCOMIX) report --bench $(BENCH)/kernels.json --profile $(BENCH)/profile.json --out $(BENCH)/report
	@echo "kept: $(BENCH)/kernels.json (pytest-benchmark), $(BENCH)/profile.json (cocomix profile), $(BENCH)/report"

bench-full: $(READY)
	@mkdir -p $(BENCH)
	$(KERNELS) --full
	$(BIN)/python benchmarks/profile_against.py $(STEP) --rounds 15 --against public --against transformers
	$(COCOMIX) report --bench $(BENCH)/kernels.json --profile $(BENCH)/profile.json --out $(BENCH)/report
	@echo "kept: $(BENCH)/kernels.json (pytest-benchmark), $(BENCH)/profile.json (cocomix profile), $(BENCH)/report"

# What each method brings at which cost: methods, seeds and budgets. Hours; it goes on where it stopped.
FRONTIER ?= configs/frontier/1m
frontier: $(READY)
	$(BIN)/python benchmarks/frontier.py $(FRONTIER)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs build *.egg-info
