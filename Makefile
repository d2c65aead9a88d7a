# make demo   try it: installs what is missing, answers requests with keys in a simulated TPM and a PKCS#11 token, ends by itself
# make demo-site  try a site: three daemons serve twenty stations on PostgreSQL and a shared token, one is killed; ends by itself
# make check  the quick part: lint, types, and every test that starts no process
# make test   every check: lint, types, all tests
# make coverage  all tests once more, with branch coverage of the daemon and the commands too; takes twice as long
# make bench  how fast it is, beside the TPM alone and other programs: minutes; QUICK=1 for a look in less than two
# make fuzz   fuzz what reads messages, files and names, and the daemon by a hostile broker: SECONDS=600 for ten minutes; what it finds is kept in tests/abuse
# make simulate  whole stations in a deterministic simulation, by seeds: HOURS=8 for as long, SEED=7 for one, with its trace
# make deb    what a station installs: dist/stationkey_VERSION_ARCH.deb
# make deb-site  the same for a site: with a PKCS#11 key store and a ledger on PostgreSQL
# make deb-site-check  builds it, installs it in a bare Debian with PostgreSQL, Mosquitto and SoftHSM, asks, purges it; as root
# make deb-check  builds the first, installs it in a bare Debian, starts it in a chroot and under systemd, purges it; as root
# make screenshot  docs/status-page.png, of a real daemon
# make docs   the documents as a site: build/site/README.html
# make sbom   what it is made of: dist/stationkey.cdx.json, CycloneDX
# make audit  whether anything is known against what is pinned
.PHONY: help setup demo demo-site check test coverage bench fuzz simulate screenshot deb deb-site deb-site-check deb-check docs sbom audit lint compiled pin clean

help:
	@sed -n 's/^# //p' Makefile

setup:
	@scripts/setup demo

demo:
	@scripts/setup demo
	@.venv/bin/python scripts/demo.py

demo-site:
	@scripts/setup demo
	@.venv/bin/python scripts/demo_site.py

# What tests start hundreds of times is compiled once, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

# One worker more than there are processors, because tests wait. One that has nothing left to do takes over half of what
# another still has.
pytest = .venv/bin/python -m pytest --dist worksteal --numprocesses
workers = $(shell expr 1 + "$$(nproc)")

check:
	@scripts/setup test
	@$(MAKE) --no-print-directory --jobs lint compiled
	$(pytest) $(workers) --quick -r fE

test:
	@scripts/setup test
	@$(MAKE) --no-print-directory --jobs lint compiled
	$(pytest) $(workers)

coverage:
	@scripts/setup test
	$(pytest) $(workers) --cov=stationkey --cov-branch --cov-report=term-missing:skip-covered

bench:
	@scripts/setup bench
	@.venv/bin/python -m bench $(if $(QUICK),--quick)

fuzz:
	@scripts/setup test
	@PYTHONPATH=scripts:tests:tests/support .venv/bin/python tests/abuse/fuzz.py $(if $(SECONDS),--seconds $(SECONDS))

screenshot:
	@scripts/setup test
	@.venv/bin/python scripts/screenshot.py

simulate:
	@scripts/setup test
	@PYTHONPATH=tests .venv/bin/python -m simulation $(if $(HOURS),--hours $(HOURS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(MUTANT),--mutant $(MUTANT))

deb:
	@scripts/setup package
	@scripts/deb

deb-site:
	@scripts/setup package
	@scripts/deb site

deb-site-check: deb-site
	@scripts/setup deb-check
	@scripts/deb-site-check

deb-check: deb
	@scripts/setup deb-check
	@scripts/deb-check

docs:
	@scripts/setup docs
	@scripts/site

sbom:
	@scripts/setup deb
	@.venv/bin/python scripts/sbom.py dist/stationkey.cdx.json
	@echo dist/stationkey.cdx.json

audit:
	@scripts/setup deb
	@.venv/bin/python scripts/audit.py $(if $(AUDIT),-- $(AUDIT))

# What each worker would compile for itself, while mypy keeps one processor busy. The tests tell what is wrong with it.
compiled:
	@.venv/bin/python -m pytest --collect-only --quiet >/dev/null 2>&1 || true

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

pin:
	scripts/pin

clean:
	rm -rf --one-file-system .venv .venv-docs .bench .simulation build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
