#!/bin/bash
# Installs what the tests and the demonstration need, where it is missing: tor, curl, Python's venv,
# and for the tests torsocks, wget and obfs4proxy, from Debian (as root or through sudo), and a
# virtual environment in .venv.
#     tests/setup.sh [EXTRA]      EXTRA: an optional dependency of pyproject.toml (default: test)
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-test}
PATH=$PATH:/usr/sbin

packages=()
command -v tor >/dev/null && command -v tor-gencert >/dev/null || packages+=(tor)
command -v curl >/dev/null || packages+=(curl)
command -v python3 >/dev/null || packages+=(python3)
if [ "$extra" = test ]; then
    command -v torsocks >/dev/null || packages+=(torsocks)
    command -v wget >/dev/null || packages+=(wget)
    command -v obfs4proxy >/dev/null || packages+=(obfs4proxy)
fi
python3 -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)
if [ ${#packages[@]} -gt 0 ]; then
    sudo=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || {
            echo "setup.sh: run as root, or install: ${packages[*]}" >&2
            exit 1
        }
        sudo=sudo
    fi
    echo "setup.sh: installing ${packages[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    $sudo apt-get update -q >&2
    $sudo apt-get install -q -y --no-install-recommends "${packages[@]}" >&2
fi

# Only pip knows what is missing; asking it takes seconds, so a mark says for which list it ran.
mark=.venv/.installed-$extra
if [ ! -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$extra]" >&2
    touch "$mark"
fi
