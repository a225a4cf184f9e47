# The two commands: `make run` and `make test`. Everything else is for developers; see CONTRIBUTING.md.

PREFIX ?= $(HOME)/.local
CARGO ?= cargo
# What `banger` is asked to do by `make run`.
ARGS ?= vm run --rm . -- sh -c 'uname -srm; hostname; git log -1 --oneline'

export BANGER_COMMIT := $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
# Where cargo puts the binaries: they are built for the host by its own name (see .cargo/config.toml).
BIN = target/$(shell rustc -vV | sed -n 's/^host: //p')/release

.PHONY: run build setup test lab lint fmt bench docs install uninstall clean

run: build  ## set up, build, and run a command in a machine with this checkout in it
	@$(BIN)/banger $(ARGS)

setup:  ## install what this host lacks
	@scripts/setup.sh

build: setup
	@$(CARGO) build --release

test: build  ## set up and run every test, real machines included
	$(CARGO) test --release --workspace

lab: build  ## run the scenarios of system mode in a machine of their own (LAB='NAME…'); see docs/lab.md
	$(CARGO) xtask lab run $(LAB)

lint:  ## what has to be clean before a change goes in
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) xtask check-walls

fmt:
	$(CARGO) fmt --all

bench: build  ## figures and ratios (BENCH='--only run'); see docs/performance.md
	$(CARGO) xtask bench $(BENCH)

docs: build  ## write the generated references anew
	BLESS=1 $(CARGO) test --release -p banger-cli -p banger-daemon generated

install: build  ## install for this user: make install PREFIX=~/.local
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/banger
	install -m 755 $(BIN)/banger $(BIN)/bangerd $(DESTDIR)$(PREFIX)/bin/
	install -m 755 $(BIN)/banger-agent $(BIN)/banger-shim $(BIN)/banger-helper $(DESTDIR)$(PREFIX)/lib/banger/
	install -d $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
	    $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BIN)/banger man $(DESTDIR)$(PREFIX)/share/man/man1
	$(BIN)/banger completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/banger
	$(BIN)/banger completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_banger
	$(BIN)/banger completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/banger.fish

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/banger $(DESTDIR)$(PREFIX)/bin/bangerd
	rm -rf $(DESTDIR)$(PREFIX)/lib/banger
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/banger*.1 $(DESTDIR)$(PREFIX)/share/bash-completion/completions/banger \
	    $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_banger $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/banger.fish

clean:
	$(CARGO) clean
