#!/bin/bash
# Shows minitor at work in a private Tor network on this machine: minitor hosts a page as an onion
# service; C tor's client (with curl) opens it, and so does minitor.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${MINITOR_NETWORK:-}" ]; then
    bash tests/setup.sh test
    exec .venv/bin/python tests/tornet.py -- bash tests/demo.sh
fi
exec .venv/bin/python tests/demo.py
