#!/bin/bash
# Runs all tests, after setting up what they need.   tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/setup.sh test
exec .venv/bin/python -m pytest "$@"
