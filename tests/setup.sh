#!/bin/bash
# Installs what the tests and the demonstration need, where it is missing: tor, curl, Python's venv,
# and for the tests torsocks, wget, obfs4proxy, tor-geoipdb and controllers (nyx, OnionShare,
# txtorcon), from Debian (as root or through sudo), and a virtual environment in .venv.
#     tests/setup.sh [EXTRA]      EXTRA: an optional dependency of pyproject.toml (default: test)
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-test}
PATH=$PATH:/usr/sbin

packages=() wishes=()
command -v tor >/dev/null && command -v tor-gencert >/dev/null || packages+=(tor)
command -v curl >/dev/null || packages+=(curl)
command -v python3 >/dev/null || packages+=(python3)
if [ "$extra" = test ]; then
    command -v torsocks >/dev/null || packages+=(torsocks)
    command -v wget >/dev/null || packages+=(wget)
    command -v obfs4proxy >/dev/null || packages+=(obfs4proxy)
    [ -e /usr/share/tor/geoip ] || packages+=(tor-geoipdb)
    # Without these, tests are skipped.
    command -v nyx >/dev/null || wishes+=(nyx)
    command -v onionshare-cli >/dev/null || wishes+=(onionshare-cli)
    /usr/bin/python3 -c 'import txtorcon' 2>/dev/null || wishes+=(python3-txtorcon)
fi
python3 -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)
if [ $((${#packages[@]} + ${#wishes[@]})) -gt 0 ]; then
    sudo=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || {
            echo "setup.sh: run as root, or install: ${packages[*]} ${wishes[*]}" >&2
            exit 1
        }
        sudo=sudo
    fi
    echo "setup.sh: installing ${packages[*]} ${wishes[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    install="$sudo apt-get install -q -y --no-install-recommends"
    $sudo apt-get update -q >&2
    $install "${packages[@]}" "${wishes[@]}" >&2 || $install "${packages[@]}" >&2
fi

# Only pip knows what is missing; asking it takes seconds, so a mark says for which list it ran.
mark=.venv/.installed-$extra
if [ ! -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -e ".[$extra]" >&2
    touch "$mark"
fi
