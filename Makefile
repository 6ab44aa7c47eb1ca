# What a person calls. Everything is built in release, the one profile of tests and programs.
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
#   make bench-mounts  both modes of a mount beside ext4 and overlayfs; mounting 100,000 files (minutes)
#   make bench-frames  frame sizes and levels side by side, the table of docs/MEASUREMENTS.md (minutes)
#   make demo          full pull against Lazuli on a real image; IMAGE=host/repo:tag for another one
#   make lint          formatting and clippy
#   make deps          the Debian packages that all this needs
#   make images        the images of the tests and the demo, without a hub

CARGO ?= cargo
SHELL := /bin/bash

.PHONY: build test test-images test-matrix test-large test-kills torture torture-kills torture-mixed torture-builds soak fuzz fuzz-check bench bench-mounts bench-frames demo lint deps images clean

build: deps
	$(CARGO) build --release --workspace --bins

test: build
	tests/images/build busybox debian python
	$(CARGO) test --release --workspace
	$(CARGO) test --release -p storage --features shuttle --lib threads
	$(CARGO) test --release --workspace --test real_images -- --nocapture python

test-images: build images
	$(CARGO) test --release --workspace --test real_images -- --nocapture --test-threads 1
	$(CARGO) test --release --workspace --test versions -- --nocapture

test-matrix: build
	tests/containerd-versions target/containerd
	$(CARGO) test --release --workspace --test matrix -- --nocapture --test-threads 2

test-large: build
	$(CARGO) test --release --workspace --test large -- --nocapture --test-threads 1

test-kills: build
	LAZULI_KILLS=$(or $(LAZULI_KILLS),20) $(CARGO) test --release --workspace --test kills -- --nocapture --test-threads 1

torture: build
	$(CARGO) test --release --workspace --test torture -- table $(ROWS)

torture-kills: build
	$(CARGO) test --release --workspace --test torture -- kills $(or $(KILLS),100)

torture-mixed: build
	$(CARGO) test --release --workspace --test torture -- mixed $(or $(MINUTES),30)

torture-builds: build
	LAZULI_BUILD_MINUTES=$(or $(MINUTES),10) $(CARGO) test --release --workspace --test builds -- --nocapture

soak: build
	$(CARGO) test --release --workspace --test torture -- soak $(or $(MINUTES),60)

fuzz: deps
	fuzz/run $(or $(SECONDS),60) $(TARGET)

fuzz-check:
	LAZULI_CHANGES=$(or $(CHANGES),100000) $(CARGO) test --release --workspace --test check_changes -- --nocapture every_change

bench: build images
	tests/deps bench
	benches/convert
	benches/convert --large
	benches/snapshotter
	$(CARGO) build --release -p converter --example hot_set
	benches/hot_set
	benches/bombs

bench-mounts: build images
	benches/mounts

bench-frames: images
	mkdir -p target/start-reads
	for image in python node jre; do benches/start-reads $$image >target/start-reads/$$image || exit; done
	$(CARGO) bench --workspace --profile release --bench frames -- --reads $(CURDIR)/target/start-reads

demo: build
	@target/release/demo

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings

deps:
	@tests/deps

images: deps
	tests/images/build busybox debian python python2 node jre

clean:
	$(CARGO) clean
