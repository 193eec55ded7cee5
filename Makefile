# make         build both programs into target/release
#              (DATAPLANE_FLAGS=--no-default-features: without ring, see SECURITY.md)
# make demo    a tunnel between two namespaces, shown step by step (root)
# make test    install what the tests need, build, run every test (root)
# make attacks only the attacks of SECURITY.md's list, on a daemon started in each of three ways (root)
# make bench   how fast, beside peers and a forwarder without cryptography (root); also QUICK=1,
#              BENCH="tcp ping udp memory handshakes flood scale sandbox", RUNS=3, VETH=default|wire|off,
#              PEERS="forwarder wgsep wireguard-go wireguard-go-installed gotatun boringtun"
# make bench-readme  the sections on speed of README.md and tests/speed/README.md, from its latest results
# make bench-steps  what each step of a packet's path costs on one core
# make soak    random events on a live tunnel, which must recover from each (root); also MINUTES=60,
#              SEED=1 (the same events again), EVENTS="mtu restart" (only these), EXCEPT="mtu" (all but these)
# make deps    only install what the tests need
# make install the programs, manual pages, unit and completions, under DESTDIR and PREFIX (root)
# make deb     a Debian package of the same, into target; with the version of the commit, or WGSEP_VERSION=
# make source-package  a Debian source package of the tree with its crates, into target: .dsc, .orig, .orig-vendor, .debian
# make reproducible  build the package again elsewhere, and hold it against this directory's
# make clean   remove what cargo built
#
# build, install and deb take TARGET=: aarch64-unknown-linux-gnu for arm64, x86_64-unknown-linux-musl for
# a pair without any library, or another of rustc's. What they make is then in target/TARGET.
# make test-targets  the protocol's library for all the targets that its README names, with unit tests by emulators
# make test-libraries  the facts of the table in the library's README, by the other libraries themselves
# make semver     the libraries' interfaces, compared with those of the last release
# make c-header  the header of dataplane/proto/c, from its source
# make test-aarch64  the unit tests of ipc, policy and the protocol, by an emulator of that processor

CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

# rustup's default place, for a shell whose PATH lacks it.
export PATH := $(PATH):$(HOME)/.cargo/bin

# What the programs are built for, where that is not this machine.
TARGET =
FOR_TARGET = $(addprefix --target ,$(TARGET))
TARGET_DIR = $(CARGO_TARGET_DIR)$(addprefix /,$(TARGET))

# Where the tests and the demo find the programs.
WGSEP_BIN_DIR = $(TARGET_DIR)/release
export WGSEP_BIN_DIR

# The processor that they are for; and the names of its compiler, where it is not this one's.
PROCESSOR = $(or $(firstword $(subst -, ,$(TARGET))),$(shell uname -m))
ifneq ($(PROCESSOR),$(shell uname -m))
CROSS = $(PROCESSOR)-linux-gnu-
export CARGO_TARGET_$(shell echo $(TARGET) | tr a-z- A-Z_)_LINKER := $(CROSS)gcc
endif

# Static, because it is executed by descriptor inside an empty root: no loader would be found. And at
# another address each time.
STATIC = -C target-feature=+crt-static -C relocation-model=pie
# What rustc does not offer for this one, though Debian's C library has what it takes.
ifeq ($(PROCESSOR)$(findstring musl,$(TARGET)),aarch64)
STATIC += -C linker=$(CURDIR)/bin/dist/static-pie-cc
export STATIC_PIE_CC := $(CROSS)gcc
endif

# What leaves no path of this machine in a program, so that two directories give the same bytes: panics and
# line tables of ours, of the crates, of the standard library, and of ring's C and assembly.
CARGO_HOME ?= $(HOME)/.cargo
RUST_LIBRARY = $(shell rustc --print sysroot 2>/dev/null)/lib/rustlib/src/rust
# Each place by its name and, where that leads through a symbolic link, by its own.
MAPPED = $(foreach place,$(CARGO_HOME)=/cargo $(CURDIR)=/wgsep $(CARGO_TARGET_DIR)=/target, \
	$(sort $(place) $(addsuffix =$(lastword $(subst =, ,$(place))),$(realpath $(firstword $(subst =, ,$(place)))))))
# What .cargo/config.toml has, which the variable below takes the place of.
CONFIGURED = --cfg poly1305_backend="soft" \
	$(if $(filter x86_64,$(PROCESSOR)),--cfg curve25519_dalek_backend="avx512")
REPRODUCIBLE = CFLAGS='$(strip $(CFLAGS) $(addprefix -ffile-prefix-map=,$(MAPPED)))' \
	RUSTFLAGS='$(strip $(RUSTFLAGS) $(CONFIGURED) $(addprefix --remap-path-prefix=,$(RUST_LIBRARY)=/rust $(MAPPED)))'

# What both programs and the package call this build. Only another commit changes it, so that cargo builds
# nothing anew without need. bin/dist/check-tools says why it is empty where it is.
ifndef WGSEP_VERSION
WGSEP_VERSION := $(shell bin/dist/version 2>/dev/null)
endif
export WGSEP_VERSION
# The time that all files of the package have: that of the commit, too. Only for what makes the package:
# ring would be compiled anew with each.
ifndef SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH := $(shell bin/dist/version date 2>/dev/null)
endif
DATED = $(addprefix SOURCE_DATE_EPOCH=,$(SOURCE_DATE_EPOCH))
# The version of the programs in WGSEP_BIN_DIR, which the package has to be of.
BUILT_VERSION = $(WGSEP_BIN_DIR)/wgsep.version

# Where `make install` puts things; DESTDIR is put before each. The helper finds its dataplane in
# ../libexec/wgsep from where it is itself; any other place is compiled in.
PREFIX ?= /usr/local
SBINDIR = $(PREFIX)/sbin
ifdef LIBEXECDIR
export WGSEP_LIBEXECDIR := $(LIBEXECDIR)
else
LIBEXECDIR = $(PREFIX)/libexec/wgsep
endif
MANDIR = $(PREFIX)/share/man
DOCDIR = $(PREFIX)/share/doc/wgsep
UNITDIR = $(PREFIX)/lib/systemd/system
SYSUSERSDIR = $(PREFIX)/lib/sysusers.d
# Writes a file with the places of this installation: the documents have those of the package.
PLACED = sed -e 's|@SBINDIR@|$(SBINDIR)|g; s|@LIBEXECDIR@|$(LIBEXECDIR)|g' \
	-e 's|/usr/sbin/wgsep|$(SBINDIR)/wgsep|g; s|/usr/libexec/wgsep|$(LIBEXECDIR)|g' \
	-e 's|/usr/share/doc/wgsep|$(DOCDIR)|g'
# Where `make deb` leaves the package, in place of an older one.
DEBDIR ?= $(TARGET_DIR)

.PHONY: build bench bench-readme bench-steps install deb source-package reproducible demo test attacks print-attacks-on-a-daemon soak hostile deps system-packages clean miri \
	target-compiler other-targets filters test-aarch64 unit-tests c-header test-targets test-libraries semver

build: $(addsuffix -compiler,$(if $(TARGET),target))
	@bin/dist/check-tools $(or $(filter deb,$(MAKECMDGOALS)),build)
	$(REPRODUCIBLE) $(CARGO) build --release $(FOR_TARGET) --locked -p wgsep
	$(REPRODUCIBLE) $(CARGO) rustc --release $(FOR_TARGET) --locked -p wgsep-dataplane-bin --bin wgsep-dataplane $(DATAPLANE_FLAGS) -- $(STATIC)
	@echo '$(WGSEP_VERSION)' >$(BUILT_VERSION)

target-compiler:
	@tests/deps.sh target $(TARGET)

install: build
	install -d $(addprefix $(DESTDIR),$(SBINDIR) $(LIBEXECDIR) $(MANDIR)/man8 $(MANDIR)/man7 $(DOCDIR) \
		$(UNITDIR) $(SYSUSERSDIR) $(PREFIX)/share/bash-completion/completions \
		$(PREFIX)/share/zsh/site-functions $(PREFIX)/share/fish/vendor_completions.d)
	install -m 755 $(WGSEP_BIN_DIR)/wgsep $(DESTDIR)$(SBINDIR)
	@# Not to be read: a user who starts the helper by a file capability owns the user namespace that
	@# the dataplane is in, and could trace it if its program were readable (SECURITY.md).
	install -m 711 $(WGSEP_BIN_DIR)/wgsep-dataplane $(DESTDIR)$(LIBEXECDIR)
	install -m 755 bin/dist/wgsep-quick $(DESTDIR)$(SBINDIR)
	$(PLACED) bin/dist/wgsep.8 >$(DESTDIR)$(MANDIR)/man8/wgsep.8
	$(PLACED) bin/dist/wgsep-quick.8 >$(DESTDIR)$(MANDIR)/man8/wgsep-quick.8
	$(PLACED) bin/dist/wgsep-sandbox.7 >$(DESTDIR)$(MANDIR)/man7/wgsep-sandbox.7
	for page in README.md SECURITY.md CHANGELOG.md; do $(PLACED) $$page >$(DESTDIR)$(DOCDIR)/$$page || exit; done
	install -m 644 LICENSE bin/dist/grafana-dashboard.json bin/dist/grafana-dashboard.png $(DESTDIR)$(DOCDIR)
	TARGET=$(TARGET) bin/dist/licences wgsep wgsep-dataplane-bin >$(DESTDIR)$(DOCDIR)/LICENCES-OF-CRATES
	$(DATED) TARGET=$(TARGET) DATAPLANE_FLAGS='$(DATAPLANE_FLAGS)' bin/dist/sbom "$$(cat $(BUILT_VERSION))" >$(DESTDIR)$(DOCDIR)/wgsep.cdx.json
	for unit in wgsep@ wgsep-resolve@; do \
		$(PLACED) bin/dist/$$unit.service.in >$(DESTDIR)$(UNITDIR)/$$unit.service || exit; done
	install -m 644 bin/dist/wgsep-resolve@.timer $(DESTDIR)$(UNITDIR)
	$(PLACED) bin/dist/prometheus.in >$(DESTDIR)$(LIBEXECDIR)/prometheus
	@# What a redirection makes has the mode of the umask, or of what an earlier install left.
	chmod 644 $(addprefix $(DESTDIR),$(MANDIR)/man8/wgsep.8 $(MANDIR)/man8/wgsep-quick.8 $(MANDIR)/man7/wgsep-sandbox.7 \
		$(addprefix $(UNITDIR)/,wgsep@.service wgsep-resolve@.service) \
		$(addprefix $(DOCDIR)/,README.md SECURITY.md CHANGELOG.md LICENCES-OF-CRATES wgsep.cdx.json))
	chmod 755 $(DESTDIR)$(LIBEXECDIR)/prometheus
	install -m 644 bin/dist/sysusers.conf $(DESTDIR)$(SYSUSERSDIR)/wgsep.conf
	@# bash and fish look for a file that is named after the command.
	for command in wgsep wgsep-quick; do \
		install -m 644 bin/dist/completions/$$command.bash \
			$(DESTDIR)$(PREFIX)/share/bash-completion/completions/$$command && \
		install -m 644 bin/dist/completions/$$command.fish \
			$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d || exit; done
	install -m 644 bin/dist/completions/_wgsep $(DESTDIR)$(PREFIX)/share/zsh/site-functions

# Laid out anew, so that the package has nothing of an older one. /usr is where Debian looks.
deb: STAGE = $(TARGET_DIR)/deb
deb: build
	rm -rf $(STAGE)
	umask 022 && $(MAKE) --no-print-directory --old-file=build install PREFIX=/usr DESTDIR=$(STAGE)
	$(CROSS)strip --strip-unneeded --remove-section=.comment $(STAGE)/usr/sbin/wgsep $(STAGE)/usr/libexec/wgsep/wgsep-dataplane
	$(DATED) bin/dist/build-deb $(STAGE) $(DEBDIR) "$(or $(PACKAGE_VERSION),$$(cat $(BUILT_VERSION)))" $(TARGET)

source-package:
	$(DATED) bin/dist/source-package $(DEBDIR) "$(WGSEP_VERSION)"

reproducible: deb
	$(DATED) tests/reproducible.sh

demo: system-packages
	@$(MAKE) --no-print-directory build
	tests/demo.sh

test: deps
	@$(MAKE) --no-print-directory build hostile other-targets
	tests/run.sh

# The tests of attacks on a daemon that was started in the usual way, which is one of three: filters of cargo test.
ATTACKS_ON_A_DAEMON = --test attacks --test system -- $(addsuffix ::attack_, \
	claims confinement dataplane_memory faults faults::panics helper hijacked uapi_socket lifecycle)
print-attacks-on-a-daemon:
	@echo '$(ATTACKS_ON_A_DAEMON)'

attacks: system-packages
	@$(MAKE) --no-print-directory build hostile
	$(CARGO) test --locked -p wgsep-tests -p wgsep-policy --no-fail-fast -- --test-threads=2 attack_
	for way in file-capability container; do \
		tests/attacks_as.sh $$way $(CARGO) test --locked -p wgsep-tests --no-fail-fast $(ATTACKS_ON_A_DAEMON) \
			--test-threads=2 || exit 1; done

MINUTES ?= 3
soak: system-packages
	@$(MAKE) --no-print-directory build
	$(CARGO) bench --quiet --locked -p wgsep-soak --bench soak -- \
		--minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(EVENTS),--events "$(EVENTS)") \
		$(if $(EXCEPT),--except "$(EXCEPT)")

# A dataplane that attacks its helper. Only tests start it, and it is never installed.
hostile:
	$(REPRODUCIBLE) $(CARGO) rustc --release $(FOR_TARGET) --locked -p wgsep-hostile --bin hostile-dataplane -- $(STATIC)

# Interprets the vector code, and looks for undefined behaviour: the loads and stores are the unsafe code of the AEAD.
# It takes half an hour, and Rust's nightly toolchain.
miri:
	rustup toolchain install nightly --profile minimal --component miri
	MIRIFLAGS=-Zmiri-disable-isolation \
	RUSTFLAGS='-C target-feature=+avx512f,+avx512bw,+avx512ifma,+avx512vbmi2,+bmi2' \
	$(CARGO) +nightly miri test --locked --target-dir target/miri -p wgsep-aead --no-default-features --features avx512 \
		--lib --test agreement

# What the tests run of other targets. Where one cannot be built for, they are skipped, and say so.
other-targets:
	@if tests/deps.sh target x86_64-unknown-linux-musl; then \
		$(MAKE) --no-print-directory build hostile TARGET=x86_64-unknown-linux-musl; fi
	@if tests/deps.sh target aarch64-unknown-linux-gnu; then \
		$(MAKE) --no-print-directory build filters TARGET=aarch64-unknown-linux-gnu; fi

# The test of the filters, as a program for a machine without cargo.
filters:
	program=$$($(REPRODUCIBLE) $(CARGO) test --release $(FOR_TARGET) --locked -p wgsep-policy --test attacks_filters --no-run \
		--message-format json | jq -r 'select(.executable).executable') && \
		install "$$program" $(WGSEP_BIN_DIR)/attacks_filters

# Which they are, and how: tests/targets.sh.
test-targets:
	tests/deps.sh targets
	tests/targets.sh

# A workspace of its own, so that neither a crate of the others nor its licence is in the tree of what ships. The benchmark
# runs each measurement once.
test-libraries:
	$(CARGO) test --locked --manifest-path tests/libraries/Cargo.toml --all-targets

test-aarch64:
	tests/deps.sh emulator
	@$(MAKE) --no-print-directory unit-tests TARGET=aarch64-unknown-linux-gnu

# By an emulator where the target is not of this machine.
unit-tests: target-compiler
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu" \
		$(CARGO) test --target $(TARGET) --locked --lib -p wgsep-ipc -p wgsep-policy -p wgsep-proto

SUITE = $(CARGO) bench --quiet --locked -p wgsep-speed --bench suite --
BENCH_DIR = $(CARGO_TARGET_DIR)/bench

bench: system-packages
	tests/deps.sh peers
	@$(MAKE) --no-print-directory build
	@$(SUITE) --out $(BENCH_DIR) \
		--said '$(strip make bench $(foreach given,QUICK BENCH RUNS VETH PEERS,$(if $($(given)),$(given)="$($(given))")))' \
		$(if $(QUICK),--pace quick) $(if $(BENCH),--measures "$(BENCH)") $(if $(RUNS),--runs $(RUNS)) \
		$(if $(VETH),--veth $(VETH)) $(if $(PEERS),--peers "$(PEERS)")

bench-readme:
	$(SUITE) publish $(BENCH_DIR)/latest/results.json

bench-steps:
	$(CARGO) bench --locked -p wgsep-tests --bench packet_path

deps: system-packages
	tests/deps.sh peers
	tests/deps.sh kernel
	tests/deps.sh arm64
	tests/deps.sh debian
	tests/deps.sh prometheus
	tests/deps.sh rosenpass
	tests/deps.sh kubernetes
	tests/deps.sh cbindgen

# A release is the last tag that begins as a version. What the feature `internals` shows is promised to nobody.
RELEASE ?= $(shell git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null)

semver:
ifeq ($(RELEASE),)
	@echo 'skipped: no release is tagged: there is nothing to compare with'
else
	tests/deps.sh semver
	PATH="$$(tests/deps.sh where cargo-semver-checks)/bin:$$PATH" \
		$(CARGO) semver-checks --default-features --baseline-rev $(RELEASE) -p wgsep-aead -p wgsep-proto -p wgsep-tokio
endif

# The header of the protocol's library for C.
c-header:
	tests/deps.sh cbindgen
	cd dataplane/proto/c && "$$(../../../tests/deps.sh where cbindgen)/bin/cbindgen" --quiet --output include/wgsep_tunnel.h .

system-packages:
	tests/deps.sh system

clean:
	$(CARGO) clean
