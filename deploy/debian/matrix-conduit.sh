#!/bin/sh
# The server's command line, on the configuration of the package: --check, --backup, --admin ...
set -e
export CONDUIT_CONFIG="${CONDUIT_CONFIG-/etc/matrix-conduit/conduit.toml}"
export PYTHONPATH=/usr/share/matrix-conduit
exec python3 -m conduit "$@"
