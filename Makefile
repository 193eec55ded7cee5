# make         build both programs into target/release
#              (DATAPLANE_FLAGS=--no-default-features: without ring, see SECURITY.md)
# make demo    a tunnel between two namespaces, shown step by step (root)
# make test    install what the tests need, build, run every test (root)
# make attacks only the attacks of SECURITY.md's list (root)
# make bench   how fast, beside peers and a forwarder without cryptography (root); also QUICK=1,
#              BENCH="tcp ping udp memory handshakes flood scale sandbox", RUNS=3, VETH=default|wire|off,
#              PEERS="forwarder wgsep wireguard-go gotatun boringtun"
# make bench-readme  README's section on speed from the latest of its results
# make bench-steps  what each step of a packet's path costs on one core
# make soak    random events on a live tunnel, which must recover from each (root); also MINUTES=60,
#              SEED=1 (the same events again), EVENTS="mtu restart" (only these), EXCEPT="mtu" (all but these)
# make deps    only install what the tests need
# make install the programs, manual pages, unit and completions, under DESTDIR and PREFIX (root)
# make deb     a Debian package of the same, into target; with the version of the commit, or WGSEP_VERSION=
# make clean   remove what cargo built

CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

# Where the tests and the demo find the programs.
WGSEP_BIN_DIR := $(CARGO_TARGET_DIR)/release
export WGSEP_BIN_DIR

# rustup's default place, for a shell that has not been told of it.
export PATH := $(PATH):$(HOME)/.cargo/bin

# What both programs and the package call this build. Only another commit changes it, so that cargo builds
# nothing anew without need. bin/dist/check-tools says why it is empty where it is.
ifndef WGSEP_VERSION
WGSEP_VERSION := $(shell bin/dist/version 2>/dev/null)
endif
export WGSEP_VERSION
# The version of the programs in WGSEP_BIN_DIR, which the package has to be of.
BUILT_VERSION = $(WGSEP_BIN_DIR)/wgsep.version

# Where `make install` puts things; DESTDIR stands before each. The helper finds its dataplane in
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
TMPFILESDIR = $(PREFIX)/lib/tmpfiles.d
# Where `make deb` leaves the package, in place of an older one.
DEBDIR ?= $(CARGO_TARGET_DIR)

.PHONY: build bench bench-readme bench-steps install deb demo test attacks soak hostile deps system-packages clean

build:
	@bin/dist/check-tools $(or $(filter deb,$(MAKECMDGOALS)),build)
	$(CARGO) build --release --locked -p wgsep
	@# Static, because it is executed by descriptor inside an empty root: no loader would be found.
	$(CARGO) rustc --release --locked -p wgsep-dataplane-bin --bin wgsep-dataplane $(DATAPLANE_FLAGS) -- \
		-C target-feature=+crt-static
	@echo '$(WGSEP_VERSION)' >$(BUILT_VERSION)

install: build
	install -d $(addprefix $(DESTDIR),$(SBINDIR) $(LIBEXECDIR) $(MANDIR)/man8 $(MANDIR)/man7 $(DOCDIR) \
		$(UNITDIR) $(SYSUSERSDIR) $(TMPFILESDIR) $(PREFIX)/share/bash-completion/completions \
		$(PREFIX)/share/zsh/site-functions $(PREFIX)/share/fish/vendor_completions.d)
	install -m 755 $(WGSEP_BIN_DIR)/wgsep $(DESTDIR)$(SBINDIR)
	@# Not to be read: a user who starts the helper by a file capability owns the user namespace that
	@# the dataplane is in, and could trace it if its program were readable (SECURITY.md).
	install -m 711 $(WGSEP_BIN_DIR)/wgsep-dataplane $(DESTDIR)$(LIBEXECDIR)
	install -m 755 bin/dist/configure bin/dist/prometheus $(DESTDIR)$(LIBEXECDIR)
	install -m 644 bin/dist/wgsep.8 $(DESTDIR)$(MANDIR)/man8
	install -m 644 bin/dist/wgsep-sandbox.7 $(DESTDIR)$(MANDIR)/man7
	install -m 644 README.md SECURITY.md CHANGELOG.md LICENSE $(DESTDIR)$(DOCDIR)
	bin/dist/licences wgsep wgsep-dataplane-bin >$(DESTDIR)$(DOCDIR)/LICENCES-OF-CRATES
	sed -e 's|@SBINDIR@|$(SBINDIR)|' -e 's|@LIBEXECDIR@|$(LIBEXECDIR)|' \
		bin/dist/wgsep@.service.in >$(DESTDIR)$(UNITDIR)/wgsep@.service
	install -m 644 bin/dist/sysusers.conf $(DESTDIR)$(SYSUSERSDIR)/wgsep.conf
	install -m 644 bin/dist/tmpfiles.conf $(DESTDIR)$(TMPFILESDIR)/wgsep.conf
	install -m 644 bin/dist/completions/wgsep.bash \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/wgsep
	install -m 644 bin/dist/completions/_wgsep $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	install -m 644 bin/dist/completions/wgsep.fish \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d

# Laid out anew, so that the package has nothing of an older one. /usr is where Debian looks.
deb: STAGE = $(CARGO_TARGET_DIR)/deb
deb: build
	rm -rf $(STAGE)
	umask 022 && $(MAKE) --no-print-directory --old-file=build install PREFIX=/usr DESTDIR=$(STAGE)
	strip --strip-unneeded $(STAGE)/usr/sbin/wgsep $(STAGE)/usr/libexec/wgsep/wgsep-dataplane
	bin/dist/build-deb $(STAGE) $(DEBDIR) "$$(cat $(BUILT_VERSION))"

demo: system-packages
	@$(MAKE) --no-print-directory build
	tests/demo.sh

test: deps
	@$(MAKE) --no-print-directory build hostile
	tests/run.sh

attacks: system-packages
	@$(MAKE) --no-print-directory build hostile
	$(CARGO) test --locked -p wgsep-tests --no-fail-fast -- --test-threads=2 attack_

MINUTES ?= 3
soak: system-packages
	@$(MAKE) --no-print-directory build
	$(CARGO) bench --quiet --locked -p wgsep-soak --bench soak -- \
		--minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(EVENTS),--events "$(EVENTS)") \
		$(if $(EXCEPT),--except "$(EXCEPT)")

# A dataplane that attacks its helper. Only tests start it, and it is never installed.
hostile:
	$(CARGO) rustc --release --locked -p wgsep-hostile --bin hostile-dataplane -- \
		-C target-feature=+crt-static

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
	tests/deps.sh debian

system-packages:
	tests/deps.sh system

clean:
	$(CARGO) clean
