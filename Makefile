# Short names for what the scripts do; `make help` lists them. The scripts take arguments, this does not.
.DEFAULT_GOAL := help
.PHONY: help setup format lint test docs schema bench matrix news deb release

help: ## this list
	@sed -n 's/^\([a-z]*\): ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## install what is missing: system packages, .venv/, the compiled parts
	scripts/setup --for test

format: ## put Python and C into their format
	.venv/bin/ruff check --fix --quiet .; .venv/bin/ruff format .; git ls-files -z -- '*.c' '*.h' | xargs -0 clang-format -i

lint: ## ruff, mypy --strict, clang-format
	scripts/lint

test: ## every test this machine can run
	scripts/test

docs: ## the documentation site, into build/site; every warning and wrong link fails it
	scripts/docs

schema: ## the JSON Schema of events anew, of the types in src/sowatch/model/wire.py
	.venv/bin/python tools/event_schema.py --write

bench: ## every benchmark, with its figures
	benchmarks/run

matrix: ## the tests under other kernels, in guests
	scripts/matrix

deb: ## the Debian package, in dist/
	scripts/deb

release: ## what a release consists of, and what stands against one
	scripts/release --dry-run

news: ## what the next release notes say
	.venv/bin/towncrier build --draft --version next
