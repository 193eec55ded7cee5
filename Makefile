# make         build both programs into target/release
# make demo    a tunnel between two namespaces, shown step by step (root)
# make test    install what the tests need, build, run every test (root)
# make deps    only install what the tests need
# make clean   remove what cargo built

CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

# Where the tests and the demo find the programs.
WGSEP_BIN_DIR := $(CARGO_TARGET_DIR)/release
export WGSEP_BIN_DIR

# rustup's default place, for a shell that has not been told of it.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: build demo test deps system-packages clean

build:
	$(CARGO) build --release --locked -p wgsep
	@# Static, because it is executed by descriptor inside an empty root: no loader would be found.
	$(CARGO) rustc --release --locked -p wgsep-dataplane-bin --bin wgsep-dataplane -- \
		-C target-feature=+crt-static

demo: system-packages
	@$(MAKE) --no-print-directory build
	tests/demo.sh

test: deps
	@$(MAKE) --no-print-directory build
	tests/run.sh

deps: system-packages
	tests/deps.sh peers
	tests/deps.sh kernel

system-packages:
	tests/deps.sh system

clean:
	$(CARGO) clean
