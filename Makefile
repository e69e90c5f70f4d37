# `make` lists the commands. They run as root or as an ordinary user, and need only Rust installed beforehand.
# The pinned version of cargo-deny, which dev/install installs, takes precedence over another one.
export PATH := $(CURDIR)/.local/tools/bin:$(PATH):$(HOME)/.cargo/bin
# Integration tests mostly wait for servers, so more of them run in parallel than there are cores.
export RUST_TEST_THREADS ?= 4

# All shell scripts, including future ones: found by their first line, or by shellcheck's directive if they are sourced.
SCRIPTS = $(sort $(shell grep -rlE '^(\#!.*[/ ](ba)?sh$$|\# shellcheck shell=)' .ci dev ops))

.DEFAULT_GOAL := help
# Turns the variables with these names that are set, such as COUNT=1000, into command-line options: --count 1000.
options = $(foreach word,$(1),$(if $($(shell echo $(word) | tr a-z A-Z)),--$(word) $($(shell echo $(word) | tr a-z A-Z))))

# Keeps the output of a command as evidence, if it succeeds.
kept = $(shell mkdir -p target)>target/$(1).log 2>&1; result=$$?; cat target/$(1).log; \
    [ $$result -ne 0 ] || cp target/$(1).log docs/evidence/$(1).log; exit $$result

.PHONY: help demo test dev-up dev-down dev-clean fmt lint build clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

demo: ## start Kafka and Postgres, write 200,000 payments, check and show every outcome, clean up; KEEP=1 leaves it running until Ctrl-C
	@dev/demo

test: lint ## run everything that CI runs: format, lints, unit, property and integration tests, a part of the fault suite, alerts and dashboard
	dev/servers install
	dev/observe install
	dev/install --browser
	cargo test --locked --features failpoints

.PHONY: bench bench-latency
bench: ## measure rate, CPU, memory and transactions of draining payments: CASES=v7,v4,v7-plain,lanes,duplicates-1,table-10m,all REPEAT=3 COUNT=3000000 BASELINE=PROGRAM JSON=FILE
	@dev/bench throughput $(call options,cases repeat count baseline json)

bench-latency: ## measure the time from a record to its read event at steady rates: RATES=100,1000,10000,50000 SECONDS=30 REPEAT=1 INPUT=plain BASELINE=PROGRAM JSON=FILE
	@dev/bench latency $(call options,rates seconds repeat input baseline json)

.PHONY: bench-size
bench-size: ## measure bytes a payment in each table, index and topic, and in the WAL: COUNT=1000000 JSON=FILE
	@dev/bench size $(call options,count json)

.PHONY: bench-console
bench-console: ## measure what ten open pages of the console cost an idle daemon: PAGES=10 SECONDS=60 REPEAT=3 JSON=FILE
	@dev/bench console $(call options,pages seconds repeat json)

.PHONY: picture
picture: ## make docs/console.png, the picture of the console under load in the README; needs chromium
	@dev/picture

.PHONY: soak
soak: ## run for hours under load, bursts, rebalances and housekeeping; compare memory, files, dead rows and latency early and late: MINUTES=120 RATE=1000 BURST=50000 REPORT=FILE JSON=FILE
	@dev/bench soak $(call options,minutes rate burst report json)

.PHONY: bench-idempotency
bench-idempotency: ## measure the cost of a claim as the idempotency table grows to 100 million ids; half an hour
	@dev/bench-idempotency

.PHONY: bench-micro
bench-micro: ## measure the daemon's own code: parsing, encoding, batches, cursors, allocations; five minutes
	@dev/install
	cargo bench --locked --bench wire --bench batch
	cargo bench --locked --bench allocations

.PHONY: bench-sizing
bench-sizing: ## measure payments a second by batch size and number of lanes; draws docs/reference/batch-sizing.svg; ten minutes
	@dev/install
	BENCH_SIZING_PICTURE=docs/reference/batch-sizing.svg cargo bench --locked --bench sizing

.PHONY: test-faults
test-faults: ## run only the integration tests with crashes, outages and rebalances
	cargo test --locked --features failpoints --test it -- crash:: outages:: rebalance::

.PHONY: joins
# Tests the release build, or PROGRAM.
joins: ## test instances that join and leave while a backlog of transactions is drained: COUNT=600000 TRANSACTION=50 JOINS=6 RUNS=5; without TRANSACTION, 50 and 500. LISTENS=300: wait this many seconds for the daemon's own audit to report a loss
	@dev/install
	@dev/servers install
	@$(if $(PROGRAM),true,cargo build --locked --release --bin payment-writer)
	PAYMENT_WRITER_TESTED_PROGRAM=$(or $(PROGRAM),$(CURDIR)/target/release/payment-writer) \
	JOINS_COUNT=$(COUNT) JOINS_TRANSACTION=$(TRANSACTION) JOINS_JOINS=$(JOINS) JOINS_RUNS=$(RUNS) JOINS_LISTENS=$(LISTENS) \
	cargo test --locked --features failpoints --test it -- --ignored --exact joins::full_size --nocapture

.PHONY: trials
trials: ## run the integration tests of situations at users that take minutes
	@dev/install
	@dev/servers install
	@POSTGRES=15 dev/servers install
	cargo test --locked --features failpoints --test it -- --ignored trials_

.PHONY: drill
drill: ## do what Kubernetes does to the instances of a StatefulSet, under load: update, scaling, eviction, loss of a node; prints the pauses
	@dev/install
	@dev/servers install
	{ echo "make drill, $$(dev/commit)"; \
	    cargo test --locked --features failpoints --test it -- --ignored --exact --nocapture \
	    statefulset::trials_what_kubernetes_does_to_a_statefulset_loses_and_duplicates_nothing; } \
	    $(call kept,statefulset-drill)

.PHONY: upgrade
# The last version with its own Kafka producer, whose transactional ids have another format.
FROM ?= 18931c3
upgrade: ## test upgrade and rollback between an earlier commit and this tree under load, with drains and kills: FROM=COMMIT or FORMER=PROGRAM
	@dev/install
	@dev/servers install
	former=$(if $(FORMER),$(FORMER),$$(dev/former $(FROM))) && export PAYMENT_WRITER_FORMER_PROGRAM=$$former && \
	{ echo "make upgrade, $$(dev/commit), from $(if $(FORMER),a program,$(FROM))"; \
	    cargo test --locked --features failpoints --test it -- --ignored --exact --nocapture \
	    upgrade::instances_change_to_this_build_and_back_under_load_and_nothing_is_lost_or_duplicated; } \
	    $(call kept,upgrade)

.PHONY: asyncapi-check
asyncapi-check: ## compare docs/asyncapi.yaml, docs/schemas and the programs of the guides with the daemon and a broker: COUNT=3000 PROGRAM=FILE; needs Node and Go; minutes on a quiet machine
	@dev/install
	@dev/servers install
	@$(if $(PROGRAM),true,cargo build --locked --release --bin payment-writer)
	COUNT=$(COUNT) PROGRAM=$(PROGRAM) ops/asyncapi/check $(call kept,asyncapi-check)

.PHONY: asyncapi-page
asyncapi-page: ## render docs/asyncapi.yaml as one HTML file, target/asyncapi.html; needs Node
	@ops/asyncapi/page/render

.PHONY: compat
PAIRS ?= 3.7.2/15 3.9.1/16 4.0.0/17 /18
compat: ## test kills and rebalances with other versions of Kafka and Postgres: PAIRS="3.9.1/16 /18"; without a version of Kafka, that of dev/pom.xml; ten minutes
	@dev/install
	cargo test --locked --features failpoints --test it --no-run
	@set -e; for pair in $(PAIRS); do \
	    kafka=$${pair%/*} postgres=$${pair#*/}; \
	    echo "== Kafka $${kafka:-of dev/pom.xml}, Postgres $$postgres"; \
	    KAFKA=$$kafka POSTGRES=$$postgres dev/servers install; \
	    KAFKA=$$kafka POSTGRES=$$postgres cargo test --locked --features failpoints --test it -- \
	        --ignored --exact compat::kills_and_rebalances_lose_and_duplicate_nothing --nocapture; \
	done

.PHONY: features
features: ## build with Kerberos (gssapi) and OIDC (curl) in librdkafka, and test both; needs their libraries' headers and a KDC; ten minutes
	@dev/install --features
	cargo test --locked --features failpoints,gssapi,curl --test it -- security::oidc security::kerberos
	cargo test --locked --features failpoints,gssapi,curl --lib config::

.PHONY: worst-batches
worst-batches: ## test record batches of one megabyte that decompress to up to a thousand times that, in each codec, with the release build; three minutes
	@dev/install
	@dev/servers install
	cargo build --locked --release --bin payment-writer
	PAYMENT_WRITER_TESTED_PROGRAM=$(CURDIR)/target/release/payment-writer \
	cargo test --locked --features failpoints --test it -- --ignored --exact expansion::the_worst_batch_of_each_codec_is_survived --nocapture

.PHONY: chaos
# Without any of them, the tests that CI runs.
CHAOS_WORDS = $(call options,cycles seed brokers faults instances report) $(if $(KEEP_GOING),--keep-going)
chaos: ## inject faults under load: CYCLES=100 SEED=1 BROKERS=3 FAULTS=zombie,disk-full REPORT=FILE; without CYCLES, those that CI runs
	@dev/servers install
	cargo test --locked --features failpoints --test chaos -- $(CHAOS_WORDS)

.PHONY: observe test-observe
observe: ## run Prometheus, Alertmanager and exporters with a daemon under load until Ctrl-C: RATE=200 FASTER=60
	@dev/observe run $(if $(FASTER),--faster $(FASTER))

test-observe: ## run only the tests of dashboard, alerts, runbooks and compose file
	dev/servers install
	dev/observe install
	cargo test --locked --features failpoints --test observe

.PHONY: docs
docs: ## update the pages that are generated from the program: settings and commands
	@dev/install
	UPDATE_DOCS=1 cargo test --locked --features failpoints --test it -- docs::

dev-up: ## start a local Kafka and Postgres, and print the settings to connect to them
	@dev/servers up

dev-down: ## stop the local Kafka and Postgres, and keep their data
	@dev/servers down

dev-clean: ## stop the local Kafka and Postgres, and remove their data
	@dev/servers destroy

fmt: ## format the code
	cargo fmt

lint: ## check format, lints, dependencies and scripts
	@dev/install --lint
	cargo fmt --check
	cargo clippy --locked --all-targets --features failpoints -- -D warnings
	cargo-deny --locked check --hide-inclusion-graph bans licenses sources
	shellcheck --severity warning $(SCRIPTS)
	ops/systemd/check
	ops/helm/table --check

.PHONY: chart-check
# In CI only the README's table is checked (`make lint`): the tools take five minutes to compile.
chart-check: ## check the Helm chart: lint, every combination that matters, wrong values, strict schemas of each Kubernetes version: PROGRAM=FILE
	@$(if $(PROGRAM),,dev/install && cargo build --locked --bin payment-writer)
	@PROGRAM=$(or $(PROGRAM),target/debug/payment-writer) ops/helm/check $(call kept,chart-check)

.PHONY: release release-check
release: ## check the tree, set the version, commit, tag, and build tarball, package, chart, SBOM and checksums into dist/: VERSION=0.2.0
	@dev/release $(VERSION)

release-check: ## build the artefacts of a release twice and compare the bytes; a quarter of an hour
	@dev/release --check $(call kept,release-check)

.PHONY: deb deb-check
deb: ## build the Debian package, target/debian/payment-writer_*.deb: REVISION=1 PROGRAM=FILE
	@dev/install --deb
	@REVISION=$(REVISION) PROGRAM=$(PROGRAM) ops/deb/build

deb-check: ## build the Debian package, check it with lintian, and install, run, upgrade and purge it in a bare root under systemd: PROGRAM=FILE FORMER=PROGRAM; needs root; eight minutes
	@dev/install --deb
	@PROGRAM=$(PROGRAM) FORMER=$(FORMER) ops/deb/check $(call kept,deb-check)

.PHONY: image-check
# Not in CI: the release build takes too long there.
image-check: ## build the image without a registry, look into it, and run what ops/compose.yml makes of it; needs root and Go; half an hour
	@ops/image/check $(call kept,image-check)

.PHONY: advisories
advisories: ## check the dependencies for known vulnerabilities; fetches the advisory database from GitHub
	@dev/install --lint
	cargo-deny --locked check advisories

.PHONY: mutants
mutants: ## check that the model notices each mutation in tests/model/mutants/: NAME=mutation; without NAME all, half an hour
	@dev/mutants $(NAME)

.PHONY: count
count: ## count lines of production code in src/, by module and in total
	@dev/count

build: ## build the release binary, target/release/payment-writer
	@dev/install
	PAYMENT_WRITER_COMMIT="$$(dev/commit)" cargo build --locked --release

clean: ## remove everything that was built, fetched or started here
	@dev/observe destroy
	@dev/servers uninstall
	cargo clean
