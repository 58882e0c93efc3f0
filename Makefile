# Every target installs what it needs first, into .venv.
#
#   make demo                                       a small model: train, evaluate, sample, look
#   make train EXP=listops                          train (again: go on)
#   make train EXP=shakespeare:paper WORKDIR=runs/p ARGS="--config.seed=1"
#   make evaluate EXP=listops                       losses and accuracies of runs/listops
#   make harness WORKDIR=runs/x TASKS=mmlu          lm-evaluation-harness (docs/text.md)
#   make sample EXP=shakespeare PROMPT="ROMEO:"     text from runs/shakespeare
#   make analyze WORKDIR=runs/listops [PROMPT=...]  energies and their landscape: figures, a page
#   make export EXP=shakespeare OUT=folder          safetensors, tokenizer, compiled functions
#   make data EXP=shakespeare                       prepare the data only
#   make launch EXP=openwebtext TPU=name ZONE=zone  train elsewhere; DRY_RUN=1 (docs/launch.md)
#   make sweep SWEEP=listops_transition             many runs, here or LAUNCHER=slurm (docs/sweeps.md)
#   make results                                    the paper's figures and tables from them
#   make bench RELEASE=path/to/clone                speed and memory of training, beside the
#   make bench-generation RELEASE=path/to/clone     authors' code; of making text
#   make rates                                      what rates with a guarantee cost (docs/rates.md)
#   make rest                                       may models make more steps? (docs/rest.md)
#   make quality                                    what helps at equal parameters? (docs/quality.md)
#   make signal                                     energy against surprise (docs/signal.md)
#   make docs                                       the site of docs/, into site/
#   make test | test-all | lint

PYTHON ?= python3
EXP ?= listops
WORKDIR ?= runs/$(subst :,-,$(EXP))
ARGS ?=
PROMPT ?=
WORKERS ?= 2

BIN := .venv/bin
NAME := $(firstword $(subst :, ,$(EXP)))
CONFIG := --config=experiments/$(subst $(NAME):,$(NAME).py:,$(EXP)$(if $(findstring :,$(EXP)),,.py))
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: setup demo data train evaluate harness sample analyze export launch bench bench-generation sweep results rates rest quality signal docs test test-all lint clean

setup: .venv/installed
.venv/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about a minute the first time)"
	$(PIP_INSTALL) .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP_INSTALL) '.[docs]'
	@touch $@

DEMO_PROMPT := add_5,(,4,max_5,(,1,3,2,),4,),=
demo: setup
	@$(BIN)/python -m nrgpt_jax.train --config=experiments/listops.py:demo --workdir=runs/demo $(ARGS)
	@$(BIN)/python -m nrgpt_jax.evaluate --workdir=runs/demo
	@$(BIN)/python -m nrgpt_jax.sample --workdir=runs/demo --temperature=0 --prompt="$(DEMO_PROMPT)"
	@$(BIN)/python -m nrgpt_jax.analyze --workdir=runs/demo

data: setup
	@$(BIN)/python -m nrgpt_jax.prepare $(CONFIG) $(ARGS)

train: setup
	@$(BIN)/python -m nrgpt_jax.train $(CONFIG) --workdir=$(WORKDIR) $(ARGS)

evaluate: setup
	@$(BIN)/python -m nrgpt_jax.evaluate --workdir=$(WORKDIR) $(ARGS)

.venv/installed-harness: .venv/installed
	$(PIP_INSTALL) '.[harness]'
	@touch $@

harness: .venv/installed-harness
	$(if $(TASKS),,$(error name the tasks: make harness WORKDIR=runs/x TASKS=mmlu))
	@$(BIN)/python -m nrgpt_jax.harness --model nrgpt_jax --model_args workdir=$(WORKDIR) --tasks $(TASKS) --batch_size auto $(ARGS)

export PROMPT
sample: PROMPT := $(or $(PROMPT),ROMEO:)
sample: setup
	@$(BIN)/python -m nrgpt_jax.sample --workdir=$(WORKDIR) $(if $(findstring --prompts_file,$(ARGS)),,--prompt="$$PROMPT") $(ARGS)

analyze: setup
	@$(BIN)/python -m nrgpt_jax.analyze --workdir=$(WORKDIR) $(if $(PROMPT),--prompt="$$PROMPT") $(ARGS)

OUT ?= exported/$(subst :,-,$(EXP))
export: setup
	@$(BIN)/python -m nrgpt_jax.export --workdir=$(WORKDIR) --out=$(OUT) $(ARGS)

# What is given to make is in the environment too: so values reach the program as they are.
export WORKDIR
TARGET ?= $(if $(TPU),tpu,local)
flag = $(if $($(1)),--$(2)="$$$(1)")
LAUNCH = $(call flag,ACTION,action) $(if $(DRY_RUN),--dry_run) $(call flag,TPU,tpu) \
    $(call flag,ZONE,zone) $(call flag,PROJECT,project) $(call flag,NODES,nodes) \
    $(call flag,GPUS,gpus) $(call flag,TIME,time) $(call flag,IMAGE,image) \
    $(call flag,ACCELERATOR,accelerator) $(call flag,TOPOLOGY,topology) \
    $(call flag,CLUSTER,cluster) $(call flag,TPU_TYPE,tpu_type)
launch: setup
	@$(BIN)/python -m nrgpt_jax.launch $(CONFIG) --workdir="$$WORKDIR" --target=$(TARGET) $(LAUNCH) $(ARGS)

SWEEP ?= listops_transition
LAUNCHER ?= local
.venv/installed-sweep: .venv/installed
	$(PIP_INSTALL) '.[sweep]'
	@touch $@

SCALE := $(firstword $(subst :, ,$(SWEEP)))
sweep: $(if $(filter slurm,$(LAUNCHER)),.venv/installed-sweep,setup)
	@$(BIN)/python -m nrgpt_jax.sweep --sweep=experiments/$(SCALE).py$(SWEEP:$(SCALE)%=%) --launcher=$(LAUNCHER) $(ARGS)

.venv/installed-samples: .venv/installed
	$(PIP_INSTALL) '.[samples]'
	@touch $@

results: .venv/installed-samples
	@$(BIN)/python -m studies.results $(ARGS)

bench-generation: setup
	@$(BIN)/python -m benchmarks.generation $(if $(RELEASE),--release=$(RELEASE)) $(ARGS)

rates: setup
	@$(BIN)/python -m studies.rates $(ARGS)

rest: setup
	@$(BIN)/python -m studies.rest $(ARGS)

quality: setup
	@$(BIN)/python -m studies.quality $(ARGS)

signal: setup
	@$(BIN)/python -m studies.signal $(ARGS)

bench: setup
	@$(BIN)/python -m benchmarks.bench $(if $(RELEASE),--release=$(RELEASE)) $(ARGS)

docs: .venv/installed-docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "" $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv *.egg-info build site
