#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a fresh Debian 12 or 13 machine ready to build, run and test Moat: Debian packages, the docker engine,
# uv and the tools' environment (.venv). Says what it will change before it does, asks once on a terminal
# (not without one, and not with YES=1), and does nothing where nothing is missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${MOAT_CACHE:-$HOME/.cache/moat}
export UV_CACHE_DIR="$cache/uv" PIP_CACHE_DIR="$cache/pip"
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }
die() { # what happened; what to do
    say "error: $1"
    say "  do:       $2"
    exit 1
}

# --- what is there ---------------------------------------------------------------------------------------------

# shellcheck source=/dev/null
. /etc/os-release
case "${ID:-}-${VERSION_ID:-}" in
    debian-12) docker_packages=(docker.io) ;;
    debian-13) docker_packages=(docker.io docker-cli) ;; # Debian 13 ships the client by itself
    *) die "this host is ${PRETTY_NAME:-unknown}; Moat's build host is Debian 12 or 13" \
        "use such a machine (a virtual one will do); a finished bundle needs only Python 3.11 to be verified" ;;
esac
[ "$(dpkg --print-architecture)" = amd64 ] || die "this host is $(dpkg --print-architecture); bundles are made on amd64" \
    "use an amd64 machine"
[ "$(id -u)" = 0 ] || die "the build makes root file systems and namespaces, which needs root" \
    "run the same command with sudo"

# A program of its own each: what the build, the demo and the tests call on the host.
wanted=(
    ca-certificates curl git make python3 python3-venv # the tools themselves
    "${docker_packages[@]}" iptables                   # the engine and its packet filter
    mmdebstrap apt-utils debian-archive-keyring gnupg  # root file systems, apt repositories and their signatures
    minisign strace shellcheck iproute2 util-linux     # what the tests compare with, look through and run in
    nftables openssl openssh-client gpgv libgomp1
)
missing=()
for package in "${wanted[@]}"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done

engine_up() { docker info >/dev/null 2>&1; }
tools_key=$(cat "$here/bundles/locks/tools.txt" "$here/pyproject.toml" | sha256sum | cut -c1-16)
tools_up() { [ "$(cat "$here/.venv/moat-tools" 2>/dev/null)" = "$tools_key" ]; }

# --- what will change ------------------------------------------------------------------------------------------

plan=()
[ ${#missing[@]} = 0 ] || plan+=("install Debian packages: ${missing[*]}")
engine_up || plan+=("start the docker engine")
tools_up || plan+=("make the tools' environment .venv in this checkout (downloads are cached in $cache)")
if [ ${#plan[@]} = 0 ]; then
    say "host: ready, nothing to change"
    exit 0
fi
say "host: this will"
for line in "${plan[@]}"; do say "  - $line"; done
if [ -t 0 ] && [ "${YES:-}" != 1 ] && { [ ${#missing[@]} != 0 ] || ! engine_up; }; then
    read -r -p "Go on? [y/N] " answer
    case $answer in [yY]*) ;; *) die "stopped: nothing was changed" "run it again, or with YES=1" ;; esac
fi

# --- Debian packages -------------------------------------------------------------------------------------------

if [ ${#missing[@]} != 0 ]; then
    say "+ apt-get install ${missing[*]}"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    # A failing third-party source must not stop us: what counts is whether the packages can be installed.
    apt-get update >"$log" 2>&1 || say "warning: apt-get update had errors; going on with the lists that it has"
    apt-get install -y --no-install-recommends "${missing[@]}" >>"$log" 2>&1 || {
        tail -n 20 "$log" >&2
        die "apt-get could not install the packages (log: $log)" "mend the apt sources of this host and run it again"
    }
    rm -f "$log"
fi

# --- the docker engine -----------------------------------------------------------------------------------------

if ! engine_up; then
    if [ -d /run/systemd/system ]; then
        say "+ systemctl enable --now docker"
        systemctl enable --now docker >&2
    else
        say "+ dockerd (this host has no init system; log: $cache/dockerd.log)"
        mkdir -p "$cache"
        # A session of its own: the engine outlives this script, and a Ctrl-C here does not reach it.
        setsid dockerd >"$cache/dockerd.log" 2>&1 </dev/null &
    fi
    for _ in $(seq 60); do
        engine_up && break
        sleep 1
    done
    engine_up || {
        [ ! -f "$cache/dockerd.log" ] || tail -n 15 "$cache/dockerd.log" >&2
        die "the docker engine did not answer within 60 s" "see 'docker info' and the engine's log, then run it again"
    }
fi

# --- uv and the tools' environment -----------------------------------------------------------------------------

if ! tools_up; then
    # pip installs nothing but uv, by the hash in the lock; uv does the rest, by hash too.
    uv_home="$cache/venv/uv-$tools_key"
    if [ ! -x "$uv_home/bin/uv" ]; then
        rm -rf "$uv_home"
        /usr/bin/python3 -m venv "$uv_home"
        awk '/^[^ ]/ { on = ($0 ~ /^uv==/) } on' "$here/bundles/locks/tools.txt" >"$uv_home/uv.txt"
        "$uv_home/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: --require-hashes -r "$uv_home/uv.txt" >&2
    fi
    rm -rf "$here/.venv"
    "$uv_home/bin/uv" venv --quiet --no-python-downloads --python /usr/bin/python3 "$here/.venv"
    "$uv_home/bin/uv" pip install --quiet --compile-bytecode --python "$here/.venv/bin/python" --only-binary :all: --require-hashes \
        -r "$here/bundles/locks/tools.txt"
    "$uv_home/bin/uv" pip install --quiet --python "$here/.venv/bin/python" --no-deps --no-build-isolation -e "$here"
    printf '%s\n' "$tools_key" >"$here/.venv/moat-tools"
fi
say "host: ready"
