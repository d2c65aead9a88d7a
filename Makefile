# make demo   try it: installs what is missing, answers requests with keys in a simulated TPM, ends by itself
# make test   every check: lint, types, tests with branch coverage
# make bench  how fast it is, beside the TPM alone and other programs: minutes; QUICK=1 for a look in less than two
# make fuzz   fuzz what reads messages, files and names: SECONDS=600 for ten minutes; what it finds is kept in tests/abuse/corpus
.PHONY: help setup demo test bench fuzz lint pin clean

help:
	@sed -n 's/^# //p' Makefile

setup:
	@scripts/setup demo

demo:
	@scripts/setup demo
	@.venv/bin/python scripts/demo.py

test:
	@scripts/setup test
	@$(MAKE) --no-print-directory lint
	.venv/bin/python -m pytest

bench:
	@scripts/setup bench
	@.venv/bin/python -m bench $(if $(QUICK),--quick)

fuzz:
	@scripts/setup test
	@PYTHONPATH=tests .venv/bin/python tests/abuse/fuzz.py $(if $(SECONDS),--seconds $(SECONDS))

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

pin:
	scripts/pin

clean:
	rm -rf .venv .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
