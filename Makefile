# The targets that a person calls. Programs are built in release; tests, which run those programs, as fast as they can be built.
#
#   make build         the programs
#   make test          everything that every change must pass
#   make test-images   the three real images, in every field, and a second version of one (minutes)
#   make test-matrix   nodes with containerd 1.6, 1.7 and 2.1 (minutes)
#   make test-large    millions of entries, files of gigabytes: bounded memory, the same tree (minutes)
#   make test-kills    kill -9 of each daemon while containers read, LAZULI_KILLS times each, 20 unless said
#   make torture       faults injected for real: a table of what a container sees and what is logged; ROWS="name ..." for some
#   make torture-kills kill -9 of each daemon from the first millisecond of a start on, KILLS times each, 100 unless said
#   make torture-mixed a healthy image beside a hostile registry and images that lie; MINUTES=n, 30 unless said
#   make torture-builds two build machines that publish to the same places, honest, interrupted and hostile; MINUTES=n, 10 unless said
#   make soak          a node that works for an hour, and what it holds at the end; MINUTES=n
#   make fuzz          every parser of bytes from outside under libFuzzer; SECONDS=n each, TARGET=x for one
#   make fuzz-check    one change of a converted image after the other, each of which a check must find; CHANGES=n, 100000 unless said
#   make bench         conversion beside what others take; snapshots and memory; the hot set beside real starts (minutes)
#   make bench-starts  cold starts of real images: full pull, derived and recorded hot packs; IMAGES="...", LINKS="200mbit,10ms ...", WORKS="ready whole mapped four", WAYS="full derived recorded unrecorded ...", SEED=n, SAMPLES=n (minutes)
#   make bench-peers   the same beside estargz, soci, soci-parallel, overlayfs24 and erofs24, which are built the first time (10 minutes); the same words, PEERS="..." (an hour)
#   make bench-mounts  both modes of a mount beside ext4 and overlayfs; mounting 100,000 files; RUNS=n (minutes)
#   make bench-frames  frame sizes and levels side by side, the table of docs/MEASUREMENTS.md (minutes)
#   make demo          full pull against Lazuli on a real image; IMAGE=host/repo:tag for another one
#   make lint          formatting and clippy
#   make audit         licences, known faults and doubles of all crates (builds cargo-deny the first time: minutes; OFFLINE=1 without known faults)
#   make house         lengths of functions and files, and modules in circles
#   make deps          the Debian packages that all this needs
#   make images        the images of the tests and the demo, without a hub

CARGO ?= cargo
CARGO_DENY ?= 0.20.2
SHELL := /bin/bash
COMMA := ,

.PHONY: build test test-images test-matrix test-large test-kills torture torture-kills torture-mixed torture-builds soak fuzz fuzz-check bench bench-starts bench-peers bench-mounts bench-frames demo lint audit house deps images clean

build: deps
	$(CARGO) build --release --workspace --bins

test: build
	tests/images/build busybox debian python
	CARGO=$(CARGO) tests/run
	$(CARGO) test -p storage --features shuttle --lib threads
	$(CARGO) test --workspace --test real_images -- --nocapture python

test-images: build images
	$(CARGO) test --workspace --test real_images -- --nocapture --test-threads 1
	$(CARGO) test --workspace --test versions -- --nocapture

test-matrix: build
	tests/containerd-versions target/containerd
	$(CARGO) test --workspace --test matrix -- --nocapture --test-threads 2

test-large: build
	$(CARGO) test --release --workspace --test large -- --nocapture --test-threads 1

test-kills: build
	LAZULI_KILLS=$(or $(LAZULI_KILLS),20) $(CARGO) test --workspace --test kills -- --nocapture --test-threads 1

torture: build
	$(CARGO) test --workspace --test torture -- table $(ROWS)

torture-kills: build
	$(CARGO) test --workspace --test torture -- kills $(or $(KILLS),100)

torture-mixed: build
	$(CARGO) test --workspace --test torture -- mixed $(or $(MINUTES),30)

torture-builds: build
	LAZULI_BUILD_MINUTES=$(or $(MINUTES),10) $(CARGO) test --workspace --test builds -- --nocapture

soak: build
	$(CARGO) test --workspace --test torture -- soak $(or $(MINUTES),60)

fuzz: deps
	fuzz/run $(or $(SECONDS),60) $(TARGET)

fuzz-check:
	LAZULI_CHANGES=$(or $(CHANGES),100000) $(CARGO) test --release --workspace --test check_changes -- --nocapture every_change

bench: build images
	tests/deps bench
	target/release/bench convert
	target/release/bench convert --large
	target/release/bench snapshots
	$(CARGO) build --release --workspace --example hot_set
	target/release/bench hot-set
	target/release/bench bombs

bench-mounts: build images
	target/release/bench mounts $(if $(RUNS),--rounds $(RUNS))

bench-starts: build images
	target/release/bench starts --samples $(or $(SAMPLES),5) $(addprefix --link ,$(or $(LINKS),loopback 200mbit$(COMMA)10ms)) \
	    $(addprefix --work ,$(or $(WORKS),ready)) $(addprefix --way ,$(WAYS)) $(if $(SEED),--seed $(SEED)) --json target/starts.json --html target/starts.html $(or $(IMAGES),python node jre)

bench-peers: build images
	tests/peers target/peers
	target/release/bench starts --samples $(or $(SAMPLES),5) $(addprefix --link ,$(or $(LINKS),loopback 200mbit$(COMMA)10ms)) \
	    $(addprefix --work ,$(or $(WORKS),ready)) \
	    $(addprefix --way ,full derived recorded $(or $(PEERS),estargz soci soci-parallel overlayfs24 erofs24)) \
	    --json target/peers.json --html target/peers.html $(or $(IMAGES),python node jre)

bench-frames: build images
	tests/deps bench
	mkdir -p target/start-reads
	for image in python node jre; do target/release/bench start-reads $$image >target/start-reads/$$image || exit; done
	$(CARGO) bench --workspace --profile release --bench frames -- --reads $(CURDIR)/target/start-reads

demo: build
	@target/release/demo

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

audit:
	[ -x target/tools/bin/cargo-deny ] || $(CARGO) install --debug --locked --root target/tools --version $(CARGO_DENY) cargo-deny
	PATH=$(CURDIR)/target/tools/bin:$$PATH $(CARGO) deny --all-features check $(if $(OFFLINE),licenses bans sources,)

house:
	@$(CARGO) build -q --workspace --bin house
	@target/debug/house

deps:
	@tests/deps

images: deps
	tests/images/build busybox debian python python2 node jre

clean:
	$(CARGO) clean
