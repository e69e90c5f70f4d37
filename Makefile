# `make` lists what there is. Everything runs as root or as an ordinary user, and needs only Rust beforehand.
# cargo-deny of the pinned version, which dev/install brings, comes before another one.
export PATH := $(CURDIR)/.local/tools/bin:$(PATH):$(HOME)/.cargo/bin
# Integration tests mostly wait for servers, so more of them than cores run side by side.
export RUST_TEST_THREADS ?= 4

# Every script of a shell, so that a new one is checked too: by its first line, or by shellcheck's own where it is sourced.
SCRIPTS = $(sort $(shell grep -rlE '^(\#!.*[/ ](ba)?sh$$|\# shellcheck shell=)' .ci dev ops))

.DEFAULT_GOAL := help
# Of these words those that are given, as in COUNT=1000, as options of a command: --count 1000.
options = $(foreach word,$(1),$(if $($(shell echo $(word) | tr a-z A-Z)),--$(word) $($(shell echo $(word) | tr a-z A-Z))))

.PHONY: help demo test dev-up dev-down dev-clean fmt lint build clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

demo: ## start Kafka and Postgres, write 200,000 payments, check and show every outcome, clean up
	@dev/demo

test: lint ## everything CI runs: format, lints, unit, property and integration tests, a share of the fault suite, alerts and dashboard live
	dev/servers install
	dev/observe install
	cargo test --locked --features failpoints

.PHONY: bench bench-latency
bench: ## rate, CPU, memory and transactions of draining payments: CASES=v7,v4,v7-plain,lanes,duplicates-1,table-10m,all REPEAT=3 COUNT=3000000 BASELINE=PROGRAM JSON=FILE
	@dev/bench throughput $(call options,cases repeat count baseline json)

bench-latency: ## from a record to its read event at steady rates: RATES=100,1000,10000,50000 SECONDS=30 REPEAT=1 INPUT=plain BASELINE=PROGRAM JSON=FILE
	@dev/bench latency $(call options,rates seconds repeat input baseline json)

.PHONY: bench-size
bench-size: ## bytes a payment in each table, index and topic, and in the WAL: COUNT=1000000 JSON=FILE
	@dev/bench size $(call options,count json)

.PHONY: bench-idempotency
bench-idempotency: ## what a claim costs as the idempotency table grows to 100 million ids; half an hour
	@dev/bench-idempotency

.PHONY: bench-micro
bench-micro: ## what the daemon's own code costs: parsing, encoding, batches, cursors, allocations; five minutes
	@dev/install
	cargo bench --locked --bench wire --bench batch
	cargo bench --locked --bench allocations

.PHONY: bench-sizing
bench-sizing: ## payments a second by size of batch and number of lanes; draws docs/reference/batch-sizing.svg; ten minutes
	@dev/install
	BENCH_SIZING_PICTURE=docs/reference/batch-sizing.svg cargo bench --locked --bench sizing

.PHONY: test-faults
test-faults: ## of these, kills at named steps, outages and rebalances alone
	cargo test --locked --features failpoints --test it -- crash:: outages:: rebalance::

.PHONY: joins
# The program under test is the release build, or PROGRAM.
joins: ## instances join and leave while a backlog of transactions is drained: COUNT=600000 TRANSACTION=50 JOINS=6 RUNS=5; without TRANSACTION 50 and 500. With LISTENS=300 the daemon's own audit has so many seconds to tell of a loss
	@dev/install
	@dev/servers install
	@$(if $(PROGRAM),true,cargo build --locked --release --bin payment-writer)
	PAYMENT_WRITER_TESTED_PROGRAM=$(or $(PROGRAM),$(CURDIR)/target/release/payment-writer) \
	JOINS_COUNT=$(COUNT) JOINS_TRANSACTION=$(TRANSACTION) JOINS_JOINS=$(JOINS) JOINS_RUNS=$(RUNS) JOINS_LISTENS=$(LISTENS) \
	cargo test --locked --features failpoints --test it -- --ignored --exact joins::full_size --nocapture

.PHONY: upgrade
# The last version whose producer was a Kafka client of its own, with transactional ids of another form.
FROM ?= 18931c3
upgrade: ## instances change from an earlier commit to this tree and back under load, drained and killed: FROM=COMMIT or FORMER=PROGRAM
	@dev/install
	@dev/servers install
	former=$(if $(FORMER),$(FORMER),$$(dev/former $(FROM))) && \
	PAYMENT_WRITER_FORMER_PROGRAM=$$former \
	cargo test --locked --features failpoints --test it -- --ignored --exact upgrade::instances_change_to_this_build_and_back_under_load_and_nothing_is_lost_or_doubled

.PHONY: features
features: ## build with Kerberos (gssapi) and OIDC (curl) in librdkafka, and try OIDC; needs their libraries' headers, ten minutes
	@dev/install --features
	cargo test --locked --features failpoints,gssapi,curl --test it -- security::with_oidc config::
	cargo test --locked --features failpoints,gssapi,curl --lib config::

.PHONY: worst-batches
worst-batches: ## record batches of one megabyte that grow up to a thousandfold, in each codec, in the release build; three minutes
	@dev/install
	@dev/servers install
	cargo build --locked --release --bin payment-writer
	PAYMENT_WRITER_TESTED_PROGRAM=$(CURDIR)/target/release/payment-writer \
	cargo test --locked --features failpoints --test it -- --ignored --exact expansion::the_worst_batch_of_each_codec_is_survived --nocapture

.PHONY: chaos
# Without any of them, CI's share.
CHAOS_WORDS = $(call options,cycles seed brokers faults instances report) $(if $(KEEP_GOING),--keep-going)
chaos: ## faults under load: CYCLES=100 SEED=1 BROKERS=3 FAULTS=zombie,disk-full REPORT=FILE; without CYCLES the share that CI runs
	@dev/servers install
	cargo test --locked --features failpoints --test chaos -- $(CHAOS_WORDS)

.PHONY: observe test-observe
observe: ## Prometheus, Alertmanager and exporters beside a daemon under load: RATE=200 FASTER=60; until Ctrl-C
	@dev/observe run $(if $(FASTER),--faster $(FASTER))

test-observe: ## of the tests, those of dashboard, alerts, runbooks and compose, on the live system too
	dev/servers install
	dev/observe install
	cargo test --locked --features failpoints --test observe

.PHONY: docs
docs: ## write the pages that are made from the program: settings and commands
	@dev/install
	UPDATE_DOCS=1 cargo test --locked --features failpoints --test it -- docs::

dev-up: ## start a local Kafka and Postgres that stay, and print the settings that reach them
	@dev/servers up

dev-down: ## stop them; their data stays
	@dev/servers down

dev-clean: ## stop them and remove their data
	@dev/servers destroy

fmt: ## format the code
	cargo fmt

lint: ## check format, lints, dependencies and scripts
	@dev/install --lint
	cargo fmt --check
	cargo clippy --locked --all-targets --features failpoints -- -D warnings
	cargo-deny --locked check --hide-inclusion-graph bans licenses sources
	shellcheck --severity warning $(SCRIPTS)

.PHONY: advisories
advisories: ## look for known vulnerabilities of the dependencies; needs GitHub, where the database of advisories is
	@dev/install --lint
	cargo-deny --locked check advisories

.PHONY: count
count: ## lines of production code in src/, by module and in all
	@dev/count

build: ## build the release binary, target/release/payment-writer
	@dev/install
	cargo build --locked --release

clean: ## remove everything that was built, fetched or started here
	@dev/observe destroy
	@dev/servers uninstall
	cargo clean
