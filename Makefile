# Every target installs what it needs first, into .venv.
#
#   make demo                                       a small model: train, evaluate, sample, look
#   make train EXP=listops                          train (again: go on)
#   make train EXP=shakespeare:paper WORKDIR=runs/p ARGS="--config.seed=1"
#   make evaluate EXP=listops                       losses and accuracies of runs/listops
#   make harness WORKDIR=runs/x TASKS=mmlu          lm-evaluation-harness (docs/train.md)
#   make sample EXP=shakespeare PROMPT="ROMEO:"     text from runs/shakespeare
#   make analyze WORKDIR=runs/listops [PROMPT=...]  energies and their landscape: figures, a page
#   make export EXP=shakespeare OUT=folder          safetensors, tokenizer, compiled functions
#   make data EXP=shakespeare                       prepare the data only
#   make launch EXP=openwebtext TARGET=tpu BUCKET=gs://name  train elsewhere; DRY_RUN=1 (docs/launch.md)
#   make sweep SWEEP=listops_transition             many runs, here or LAUNCHER=slurm (docs/sweeps.md)
#   make results                                    the paper's figures and tables from them
#   make bench RELEASE=path/to/clone                speed and memory of training, beside the
#   make bench-generation RELEASE=path/to/clone     authors' code; of making text
#   make rates                                      what rates with a guarantee cost (docs/results/rates.md)
#   make rest                                       may models make more steps? (docs/results/rest.md)
#   make quality                                    what helps at equal parameters? (docs/results/quality.md)
#   make signal                                     energy against surprise (docs/results/signal.md)
#   make docs                                       the site of docs/, into site/
#   make wheel                                      the package as one file, into dist/
#   make test | test-ci | test-all | lint

# Values reach the programs below as they are given: make expands no $ in them.
GIVEN := EXP WORKDIR ARGS PROMPT OUT TASKS RELEASE SWEEP LAUNCHER DRY_RUN TARGET BUCKET
as_given = $(if $(filter command environment,$(firstword $(origin $(1)))),\
    $(eval override $(1) := $$(value $(1))))
$(foreach name,$(GIVEN),$(call as_given,$(name)))

PYTHON ?= python3
EXP ?= listops
WORKDIR ?= runs/$(subst :,-,$(EXP))
WORKERS ?= 2

BIN := .venv/bin
RUN = @$(BIN)/python -m nrgpt_jax.from_make
NAME := $(firstword $(subst :, ,$(EXP)))
CONFIG := experiments/$(subst $(NAME):,$(NAME).py:,$(EXP)$(if $(findstring :,$(EXP)),,.py))
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
PROGRAMS := data train evaluate harness sample analyze export launch sweep

$(PROGRAMS): export CONFIG := $(CONFIG)
$(PROGRAMS): export WORKDIR := $(WORKDIR)

.PHONY: setup wheel demo data train evaluate harness sample analyze export launch bench bench-generation sweep results rates rest quality signal docs test test-ci test-all lint clean

setup: .venv/installed
.venv/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about a minute the first time)"
	$(PIP_INSTALL) '.[analysis,corpora]'
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP_INSTALL) '.[docs]'
	@touch $@

DEMO_PROMPT := add_5,(,4,max_5,(,1,3,2,),4,),=
demo: export DEMO_CONFIG := experiments/listops.py:demo
demo: export DEMO_WORKDIR := runs/demo
demo: setup
	$(RUN) nrgpt_jax.train config=DEMO_CONFIG workdir=DEMO_WORKDIR
	@$(BIN)/python -m nrgpt_jax.evaluate --workdir=runs/demo
	@$(BIN)/python -m nrgpt_jax.sample --workdir=runs/demo --temperature=0 --prompt="$(DEMO_PROMPT)"
	@$(BIN)/python -m nrgpt_jax.analyze --workdir=runs/demo

data: setup
	$(RUN) nrgpt_jax.prepare config=CONFIG

train: setup
	$(RUN) nrgpt_jax.train config=CONFIG workdir=WORKDIR

evaluate: setup
	$(RUN) nrgpt_jax.evaluate workdir=WORKDIR

.venv/installed-harness: .venv/installed
	$(PIP_INSTALL) '.[harness]'
	@touch $@

harness: export MODEL := nrgpt_jax
harness: export MODEL_ARGS = workdir=$(WORKDIR)
harness: export BATCH_SIZE := auto
harness: .venv/installed-harness
	$(if $(TASKS),,$(error name the tasks: make harness WORKDIR=runs/x TASKS=mmlu))
	$(RUN) nrgpt_jax.harness model=MODEL model_args=MODEL_ARGS tasks=TASKS batch_size=BATCH_SIZE

sample: export PROMPT ?= ROMEO:
sample: setup
	$(RUN) nrgpt_jax.sample workdir=WORKDIR $(if $(findstring --prompts_file,$(ARGS)),,prompt=PROMPT)

analyze: setup
	$(RUN) nrgpt_jax.analyze workdir=WORKDIR prompt=PROMPT

OUT ?= exported/$(subst :,-,$(EXP))
export: export OUT := $(OUT)
export: setup
	$(RUN) nrgpt_jax.export workdir=WORKDIR out=OUT

# SkyPilot has an environment of its own, as it needs other versions of what the tests run with.
.venv/installed-sky: .venv/installed
	$(BIN)/python -m venv .venv/sky
	.venv/sky/bin/python -m pip install --quiet 'skypilot[gcp,kubernetes,slurm]>=0.14,<0.15'
	@touch $@

launch: export PATH := $(PATH):$(CURDIR)/.venv/sky/bin
launch: export DRY := $(if $(DRY_RUN),1)
launch: $(if $(DRY_RUN)$(shell command -v sky),setup,.venv/installed-sky)
	$(RUN) nrgpt_jax.launch config=CONFIG workdir=WORKDIR target=TARGET bucket=BUCKET dry_run=DRY

SWEEP ?= listops_transition
LAUNCHER ?= local

SCALE := $(firstword $(subst :, ,$(SWEEP)))
sweep: export SWEEP_FILE := experiments/$(SCALE).py$(SWEEP:$(SCALE)%=%)
sweep: export LAUNCHER := $(LAUNCHER)
sweep: setup
	$(RUN) nrgpt_jax.sweep sweep=SWEEP_FILE launcher=LAUNCHER

.venv/installed-samples: .venv/installed
	$(PIP_INSTALL) '.[samples]'
	@touch $@

results: .venv/installed-samples
	$(RUN) studies.results

bench-generation: setup
	$(RUN) benchmarks.generation release=RELEASE

rates: setup
	$(RUN) studies.rates

rest: setup
	$(RUN) studies.rest

quality: setup
	$(RUN) studies.quality

signal: setup
	$(RUN) studies.signal

bench: setup
	$(RUN) benchmarks.bench release=RELEASE

docs: .venv/installed-docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

wheel: setup
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-ci: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "" $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/prose.py

clean:
	rm -rf .venv *.egg-info build site
