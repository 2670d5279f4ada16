# Two commands for a fresh machine: `make demo` and `make test`. Each does all of its own set-up.
PYTHON ?= python3
BIN := .venv/bin
TASK ?= watch
READY := .venv/.ready

.PHONY: install demo test soak check audit bench study search openapi format constraints clean
.DELETE_ON_ERROR:

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,server,local,dev]'
	touch $(READY)

demo: $(READY)  ## ten agents, one coordinator, the whole job; TASK=watch|digits|fashion-mnist DATA=FOLDER KEEP=1 SAVE=FILE; SCENARIO=pilot
ifeq ($(SCENARIO),pilot)
	$(BIN)/python examples/pilot.py $(if $(KEEP),--keep) $(if $(SAVE),--save $(SAVE))
else
	$(BIN)/python examples/demo.py --task $(TASK) $(if $(DATA),--data $(DATA)) $(if $(KEEP),--keep) $(if $(SAVE),--save $(SAVE))
endif

test: $(READY)  ## the whole suite on real servers
	$(BIN)/python -m pytest -n 2

soak: $(READY)  ## long proofs of docs/RELIABILITY.md; QUICK=1 ONLY=name SEED=number
	$(BIN)/python -m tests.soak $(if $(QUICK),--quick) $(addprefix --only ,$(ONLY)) $(if $(SEED),--seed $(SEED))

check: $(READY)  ## style, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive app workers fedselect migrations
	$(BIN)/python -m pytest -q -p no:xdist tests/test_architecture.py

audit: $(READY)  ## known vulnerabilities of what constraints.txt names; fails, too, if the index does not know of them
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

bench: $(READY)  ## speed, as ratios against named references; QUICK=1 (small, docs unchanged) ONLY=name
	$(BIN)/python -m bench $(if $(QUICK),--quick) $(addprefix --only ,$(ONLY))

study: $(READY)  ## policies over splits and seeds, resumable, into docs/STUDY.md; QUICK=1 (three on three, docs unchanged) ONLY=split-or-policy MINUTES=number
ifeq ($(QUICK),)
	$(BIN)/fedselect study docs/study/full.toml --results docs/study/results --page docs/STUDY.md --golden tests/golden/study.json $(addprefix --only ,$(ONLY)) $(if $(MINUTES),--minutes $(MINUTES))
	$(BIN)/fedselect study docs/study/stability.toml --results docs/study/stability --page docs/STUDY.md --golden tests/golden/study.json $(addprefix --only ,$(ONLY)) $(if $(MINUTES),--minutes $(MINUTES))
else
	$(BIN)/fedselect study docs/study/quick.toml --results .study/quick --golden tests/golden/study.json $(addprefix --only ,$(ONLY)) $(if $(MINUTES),--minutes $(MINUTES))
endif

search: $(READY)  ## the search for a better rule, resumable, into docs/SEARCH.md; CONFIRM=1 (its leaders on fresh seeds) ONLY=split-or-policy MINUTES=number
	$(BIN)/fedselect study docs/study/$(if $(CONFIRM),confirm,search).toml --results docs/study/search --page docs/SEARCH.md $(addprefix --only ,$(ONLY)) $(if $(MINUTES),--minutes $(MINUTES))
	$(if $(CONFIRM),,$(BIN)/fedselect study docs/study/moves.toml --results docs/study/moves --page docs/SEARCH.md $(addprefix --only ,$(ONLY)) $(if $(MINUTES),--minutes $(MINUTES)))

openapi: $(READY)  ## write docs/openapi.json and docs/pilot.schema.json anew; BREAKING=1 if it is to break clients
	$(BIN)/python -m tests.contract $(if $(BREAKING),--breaking)
	$(BIN)/fedselect pilot schema > docs/pilot.schema.json.new && mv docs/pilot.schema.json.new docs/pilot.schema.json

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(READY)  ## write what is installed now as the exact versions of the set-up
	{ echo "# Exact versions for a reproducible set-up; ranges are in pyproject.toml. Renew with: make constraints"; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude fedselect | sed 's/+cpu$$//' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## stop the local stack and remove what make made
	-$(BIN)/fedselect down
	rm -rf .venv .venv-flower .fedselect .bench
