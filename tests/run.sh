#!/bin/bash
# Runs all tests, after setting up what they need.   tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/setup.sh test
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# What needs no relays goes two files at a time; the rest measures times of its own.
status=0
.venv/bin/python -m pytest -n 2 --dist loadfile --ignore=tests/live || status=$?
.venv/bin/python -m pytest tests/live || status=$?
exit $status
