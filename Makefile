# Two commands do everything: `make quickstart` trains and adapts a small model; `make test` passes the tests.
# Each sets up .venv by itself. PYTHON: 3.11 or newer; g++ is needed. TORCH: the torch to install on a machine without a GPU.
# WORKERS: processes for the tests that get on with each other (tests/README.md).
PYTHON ?= python3
WORKERS ?= 2
TORCH ?= torch==2.13.0
VENV ?= .venv
PEERS ?= .venv-peers
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml fastft/__init__.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)

.NOTPARALLEL: # two installs would meet in one environment
.PHONY: setup setup-test setup-lint quickstart reference lint peers test test-long test-clusters bench corpus clean

setup: $(VENV)/.ready
setup-test: $(VENV)/.ready-test
setup-lint: $(VENV)/.ready-lint

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastft needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# Without a GPU, torch is installed first and by version, so that no later dependency pulls in CUDA packages.
$(VENV)/.torch: | $(BIN)/python
	command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || $(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.ready: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e .
	touch $@

# Stands for .ready as well: it installs all of that and more.
$(VENV)/.ready-test: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $(VENV)/.ready $@

# And this one for both.
$(VENV)/.ready-lint: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e ".[test,lint]"
	touch $(VENV)/.ready $(VENV)/.ready-test $@

quickstart: setup
	$(BIN)/fastft quickstart

# Both parts run, whatever the first says; either one fails the target. 5 is pytest's "no tests": fine for one part (ARGS may name a file), not for both.
test: setup-test
	@together=0; alone=0; \
	$(BIN)/python -m pytest -q --part together -n $(WORKERS) --dist worksteal $(ARGS) || together=$$?; \
	$(BIN)/python -m pytest -q --part alone $(ARGS) || alone=$$?; \
	case "$$together $$alone" in "0 0" | "0 5" | "5 0") ;; *) echo "make test: failed (together: $$together, alone: $$alone)"; exit 1 ;; esac

test-long: setup-test
	$(BIN)/python -m pytest -q -m long $(ARGS)

# `fastft prepare` on a real Ray and a real Slurm, all of it, and from a local S3 server; make test has what takes
# seconds, and neither Ray nor S3. moto's own list for a server (moto[server]) brings 40 packages for other services.
test-clusters: setup-test
	$(BIN)/python -m pip install -q -e ".[ray,s3]" "moto[s3]>=5" flask flask-cors
	$(BIN)/python -m pytest -q -m "long or not long" tests/corpus/test_executors.py tests/corpus/test_object_store.py $(ARGS)

# What the docs say of the configuration's keys, and the schemas that configs name, after a key was added or changed.
reference: setup
	$(BIN)/fastft config schema > docs/config.schema.json
	$(BIN)/fastft config schema --corpus > docs/corpus.schema.json
	$(BIN)/fastft config reference > docs/config_reference.md

# What CI runs beside the tests. ruff and clang-format are pinned: every machine formats alike.
lint: setup-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.h' 'csrc/*.cuh')

# What benchmarks compare with lives in an environment of its own: benchmarks/tasks.py --peers-python $(PEERS)/bin/python
peers: $(PEERS)/.ready
$(PEERS)/.ready:
	$(PYTHON) -m venv $(PEERS)
	command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || $(PEERS)/bin/python -m pip install -q "$(TORCH)"
	$(PEERS)/bin/python -m pip install -q "transformers>=5.17,<6" accelerate datasets peft scikit-learn scipy seqeval safetensors sacrebleu sacremoses sentencepiece trl \
		datatrove orjson nltk ftfy regex fasteners xxhash spacy
	touch $@

bench: setup-test
	$(BIN)/python benchmarks/cross_entropy.py
	$(BIN)/python benchmarks/adamw.py
	$(BIN)/python benchmarks/zero_step.py
	$(BIN)/python benchmarks/linear_cross_entropy.py
	$(BIN)/python -m pip install -q matplotlib
	$(BIN)/python benchmarks/train_step.py

# Two models adapted to four domains, an encoder to one, and new tokens: an hour and a half on two cores, and what is done is not done again.
# FASTFT_SHARED_DATA: the folder of the data sets, as for the tests; beside it is what makes the pretrained models.
FASTFT_SHARED_DATA ?= ../shared/data
MODELS ?= build/models
corpus: setup-test
	@if [ ! -d "$(FASTFT_SHARED_DATA)/corpus" ]; then \
		echo "make corpus: skipped: the corpora are not in $(FASTFT_SHARED_DATA); set FASTFT_SHARED_DATA"; exit 0; fi; \
	for model in smollm2 minilm; do [ -d $(MODELS)/$$model ] || \
		$(BIN)/python "$(FASTFT_SHARED_DATA)/../models/make.py" $(MODELS) $$model || echo "no $$model: its part is skipped"; done; \
	set -e; \
	if [ -d $(MODELS)/smollm2 ]; then smollm2="--smollm2 $(MODELS)/smollm2"; fi; \
	$(BIN)/python benchmarks/domains.py --data "$(FASTFT_SHARED_DATA)" $$smollm2; \
	if [ -d $(MODELS)/minilm ]; then \
		$(BIN)/python benchmarks/domain_encoder.py --data "$(FASTFT_SHARED_DATA)" --model $(MODELS)/minilm; fi; \
	for domain in medical legal finance education; do for variant in plain extended; do \
		$(BIN)/python benchmarks/vocabulary.py --model build/domains/small/pretraining/model --name small --variant $$variant \
			--corpus "$(FASTFT_SHARED_DATA)/corpus/$$domain/train.txt.gz" --train 150000 --held-out 10000 --batch 8 --lr 5e-4; \
	done; done

clean:
	rm -rf build dist *.egg-info fastft/*.so $(VENV) $(PEERS)
