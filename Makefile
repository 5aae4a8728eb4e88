# make run     a server on http://localhost:6167, in a virtual environment of its own
# make test    all tests, with all that they need

PYTHON ?= python3
PORT   ?= 6167
DATA   ?= ./data
JOBS   ?= auto

# The settings of `make run`; each can be given, as in  make run CONDUIT_SERVER_NAME=example.org
CONDUIT_CONFIG             ?= conduit-example.toml
CONDUIT_SERVER_NAME        ?= localhost
CONDUIT_DATABASE_PATH      ?= $(DATA)
CONDUIT_PORT               ?= $(PORT)
CONDUIT_WELL_KNOWN__CLIENT ?= http://localhost:$(CONDUIT_PORT)
TOKEN_FILE := $(CONDUIT_DATABASE_PATH)/registration_token

QUIET   := --quiet --disable-pip-version-check
NO_VENV := Python cannot make virtual environments here. Debian: sudo apt install python3-venv
NO_NPM  := No tests with matrix-js-sdk, which needs Node.js. Debian: sudo apt install nodejs npm

RUN_NEEDS  := pynacl "tomli; python_version < '3.11'"
LINT_NEEDS := ruff mypy
TEST_NEEDS := $(RUN_NEEDS) $(LINT_NEEDS) pytest pytest-xdist hypothesis httpx aiohttp aiosmtpd \
              "matrix-nio[e2e]" pillow pyyaml jsonschema matrix-synapse trustme mautrix \
              prometheus-client selenium heisenbridge pytest-rerunfailures
NODE_NEEDS := matrix-js-sdk@37.5.0  # the newest that Node.js 20 runs

# What ruff looks for, and what we let pass:
#   D105 D107  the docstring of the class says what __init__ and its like do
#   PLR0913 -7 a handler takes the server, the request, and each segment of its path
#   PLR2004    404, 65536 and 255 are the protocol's numbers, and read best as numbers
#   RUF001-3   the banners are drawn with box characters
#   TRY003     the text of an error stands where it is raised, and is meant to be long
#   TRY400     an error that was to be expected is one line in the log, without a traceback
# setting() and live() make fields of the table of configuration keys, as dataclasses.field() does.
RULES   := E,F,W,I,B,UP,S,ASYNC,C90,PL,RUF,SIM,RET,TRY,D1
IGNORED := D105,D107,PLR0913,PLR0917,PLR2004,RUF001,RUF002,RUF003,TRY003,TRY400
FORMAT  := --target-version py310 --line-length 100
CHECK   := $(FORMAT) --select $(RULES) \
           --config "lint.mccabe.max-complexity=10" \
           --config "lint.flake8-bugbear.extend-immutable-calls=['conduit.setting', 'conduit.live']"
# In tests besides:
#   D102 D103  the name of a test says what it is about
#   PLR0915    a conversation of two clients is one story, and long
#   S101       pytest lives by `assert`
#   S104-S108  addresses, passwords and folders of servers that live for one test
#   S608       queries that look into a test's own database
#   ASYNC240   a look at a file does not hold up a test
IGNORED_IN_TESTS := $(IGNORED),D102,D103,PLR0915,S101,S104,S105,S106,S107,S108,S608,ASYNC240

# ── Running ──────────────────────────────────────────────────────────────────

.DELETE_ON_ERROR:
.PHONY: help run test test-deep lint format bench deb clean

help:
	@echo "make run        start a server on http://localhost:$(CONDUIT_PORT), data in $(DATA)"
	@echo "make test       set up what the tests need, then run all of them"
	@echo "make test-deep  the same with many more rounds; takes an hour"
	@echo "make lint       ruff and mypy --strict"
	@echo "make format     let ruff format the two Python files"
	@echo "make bench      measure the server (ARGS=--full for large sizes)"
	@echo "make deb        a Debian package in build/"
	@echo "make clean      remove what make made, but never the data"

# The token of the example file is not accepted by the server, so a fresh one takes its place.
run: .venv/ready $(TOKEN_FILE)
	@echo
	@echo "  Server name   $(CONDUIT_SERVER_NAME)"
	@echo "  Look at it    http://localhost:$(CONDUIT_PORT)/"
	@echo "  Register      with Element, nheko or Cinny: homeserver http://localhost:$(CONDUIT_PORT)"
	@echo "                registration token  $$(cat '$(TOKEN_FILE)')"
	@echo "  The first account becomes the admin. Data is in $(CONDUIT_DATABASE_PATH); Ctrl-C stops it."
	@echo
	@exec env \
	  CONDUIT_CONFIG='$(CONDUIT_CONFIG)' \
	  CONDUIT_SERVER_NAME='$(CONDUIT_SERVER_NAME)' \
	  CONDUIT_DATABASE_PATH='$(CONDUIT_DATABASE_PATH)' \
	  CONDUIT_PORT='$(CONDUIT_PORT)' \
	  CONDUIT_WELL_KNOWN__CLIENT='$(CONDUIT_WELL_KNOWN__CLIENT)' \
	  CONDUIT_REGISTRATION_TOKEN_FILE='$(TOKEN_FILE)' \
	  .venv/bin/python -m conduit

$(TOKEN_FILE):
	@umask 077 && mkdir -p '$(@D)' && \
	  $(PYTHON) -c 'import secrets; print(secrets.token_hex(16))' > '$@'

# With --system-site-packages an installed python3-nacl is used, as on a Raspberry Pi.
.venv/ready: Makefile
	@$(PYTHON) -m venv --system-site-packages .venv || { echo '$(NO_VENV)'; exit 1; }
	@.venv/bin/python -m pip install $(QUIET) $(RUN_NEEDS)
	@touch $@

.venv-test/ready: Makefile
	@$(PYTHON) -m venv .venv-test || { echo '$(NO_VENV)'; exit 1; }
	@.venv-test/bin/python -m pip install $(QUIET) $(TEST_NEEDS)
	@if command -v npm > /dev/null; then \
	  npm install --prefix .venv-test/node --no-audit --no-fund --silent $(NODE_NEEDS); \
	else echo '$(NO_NPM)'; fi
	@touch $@

# ── Checking ─────────────────────────────────────────────────────────────────

test: .venv-test/ready
	.venv-test/bin/python -m pytest test_conduit.py -n $(JOBS) --dist worksteal -q -ra $(ARGS)

test-deep: .venv-test/ready
	DEEP=1 .venv-test/bin/python -m pytest test_conduit.py -n $(JOBS) --dist worksteal -q -ra $(ARGS)

lint: .venv-test/ready
	.venv-test/bin/ruff check $(CHECK) --ignore $(IGNORED) conduit.py
	.venv-test/bin/ruff check $(CHECK) --ignore $(IGNORED_IN_TESTS) test_conduit.py
	.venv-test/bin/ruff format --check $(FORMAT) conduit.py test_conduit.py
	.venv-test/bin/mypy --strict conduit.py

format: .venv-test/ready
	.venv-test/bin/ruff format $(FORMAT) conduit.py test_conduit.py

BENCH ?= ../shared/bench/bench.py

bench: .venv/ready
	@test -f $(BENCH) || { echo 'Say where the benchmark is:  make bench BENCH=path/bench.py'; exit 1; }
	$(PYTHON) $(BENCH) run conduit:conduit.py,python=.venv/bin/python $(ARGS)

# ── Packaging ────────────────────────────────────────────────────────────────

# A Debian package for all architectures, in build/; needs: apt install debhelper dh-python po-debconf
VERSION := $(shell sed -n 's/^VERSION = "\(.*\)"$$/\1/p' conduit.py)
DEB     := build/matrix-conduit_$(VERSION)_all.deb

deb: $(DEB)

$(DEB): conduit.py conduit-example.toml conduit.service README.md $(shell find deploy -type f)
	rm -rf build/source
	mkdir -p build/source
	cp -r conduit.py conduit-example.toml conduit.service README.md deploy build/source/
	mv build/source/deploy/debian build/source/debian
	printf 'matrix-conduit (%s) stable; urgency=medium\n\n  * See README.md.\n\n -- %s  %s\n' \
	  '$(VERSION)' 'The conduit.py developers <conduit@localhost>' "$$(date -R)" \
	  > build/source/debian/changelog
	cd build/source && dpkg-buildpackage --build=binary --no-sign

clean:
	rm -rf build .venv .venv-test __pycache__ .hypothesis .mypy_cache .pytest_cache .ruff_cache
