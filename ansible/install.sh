#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs Moat from the medium that this file lies on: run `sh install.sh`. POSIX shell and the host's own Python only.
#
# Phase 1 changes nothing: the bundle is verified, every host is checked, and what would be done is shown. Phase 2 asks
# once and then changes things. Interrupted at any point, the same command goes on from what is complete.
# Described in docs/install.md; exit codes in docs/reference/exit-codes.md.
set -eu
umask 022

PYTHON=/usr/bin/python3
STORE=/opt/moat
SITE=/etc/moat/site
TRUSTED=/etc/moat/trusted-keys

usage() {
    cat <<'END'
usage: sh install.sh [options]

  --check             phase 1 only: verify, check, show what would be done; leaves nothing behind
  --key FILE|STRING   the release key, from paper or from a file that is not on the medium; pinned in phase 2
  --inventory FILE    the hosts of the site; default: everything on this host, or the inventory of the last run
  --vars FILE         your variables (YAML); kept in /etc/moat/site/vars.yml from then on
  -e NAME=VALUE       one variable for this run only; may be repeated. A number, true or false counts as such
  --playbook NAME     run this playbook instead of site.yml, or of upgrade.yml where another release runs
  --allow-older       accept a bundle that is older than the release that is installed, on purpose
  --yes               do not ask before phase 2
  --help              this text

Without --key the keys in /etc/moat/trusted-keys/ count. Exit codes: docs/reference/exit-codes.md.
END
}

say() { printf '%s\n' "$*"; }
# refuse CODE MESSAGE FOUND EXPECTED DO
refuse() {
    printf 'error: %s\n' "$2" >&2
    [ -z "$3" ] || printf '  found:    %s\n' "$3" >&2
    [ -z "$4" ] || printf '  expected: %s\n' "$4" >&2
    [ -z "$5" ] || printf '  do:       %s\n' "$5" >&2
    exit "$1"
}
wrong() { refuse 2 "$1" '' '' 'sh install.sh --help'; }

# typed ARGUMENT: Ansible takes the value in NAME=VALUE for text, and the text "false" is true. A number, true or false is
# printed as JSON, which keeps its type; all else as it is: 007 and 1.10 may be names, '"5"' says that text is meant.
typed() {
    typed_value=${1#*=}
    case ${1%%=*} in
    "$1" | '' | [!A-Za-z_]* | *[!A-Za-z0-9_]*) typed_value='' ;;
    esac
    case $typed_value in
    true | false) ;;
    True) typed_value=true ;;
    False) typed_value=false ;;
    *)
        case ${typed_value#-} in
        '' | *[!0-9.]* | .* | *. | *.*.* | 0[0-9]* | *.*0) typed_value='' ;;
        esac
        ;;
    esac
    case $typed_value in
    '' | -0) printf '%s\n' "$1" ;;
    *) printf '{"%s": %s}\n' "${1%%=*}" "$typed_value" ;;
    esac
}

check='' yes='' older='' inventory='' vars='' playbook='' keys='' extra=''
# Values may hold blanks; they are kept one a line, and a line end in one is refused.
one_line() {
    case $2 in
    '') wrong "$1 needs a value" ;;
    *"
"*) wrong "the value of $1 holds a line end" ;;
    esac
}
while [ $# -gt 0 ]; do
    case $1 in
    --check) check=1 ;;
    --yes) yes=1 ;;
    --allow-older) older=--allow-older extra="$extra$(typed bundle_allow_older=true)
" ;;
    --help | -h)
        usage
        exit 0
        ;;
    --key | --inventory | --vars | -e | --extra-vars | --playbook)
        [ $# -ge 2 ] || wrong "$1 needs a value"
        one_line "$1" "$2"
        case $1 in
        --key) keys="$keys$2
" ;;
        --inventory) inventory=$2 ;;
        --vars) vars=$2 ;;
        --playbook) playbook=${2%.yml} ;;
        *) extra="$extra$(typed "$2")
" ;;
        esac
        shift
        ;;
    *) wrong "unknown option: $1" ;;
    esac
    shift
done

bundle=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
[ -f "$bundle/manifest.json" ] ||
    refuse 9 'install.sh does not lie in a bundle' "$bundle has no manifest.json" 'the folder moat-<version>-<profile>-<target>' \
        'run the install.sh at the top of the medium'

say 'Phase 1 of 2: no impact yet'
say '---------------------------'

if [ ! -x "$PYTHON" ] || ! "$PYTHON" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found='no /usr/bin/python3'
    [ ! -x "$PYTHON" ] || found=$("$PYTHON" -I -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null) || found='a Python that does not start'
    refuse 20 'this host has no Python 3.11 or newer' "$found" 'Debian 12 or 13 with python3' \
        "verify the medium on another host (python3 -I moat.pyz verify . --key KEY), then here, as root:
            echo 'deb [trusted=yes] file:$bundle/debs ./' > /run/moat.list
            apt-get -o Dir::Etc::sourcelist=/run/moat.list -o Dir::Etc::sourceparts=- update
            apt-get -o Dir::Etc::sourcelist=/run/moat.list -o Dir::Etc::sourceparts=- --no-install-recommends install python3
            and run install.sh again"
fi
[ "$(id -u)" = 0 ] || refuse 2 'an installation needs root' "user $(id -un)" 'root' 'run it again as root (su -, or sudo sh install.sh)'

# One at a time. The lock is gone with the last process that has it, ansible-playbook among them, whatever ends them.
exec 9>/run/moat-install.lock
flock -n 9 || refuse 28 'another install.sh or moat-site is at work on this host' '' 'one at a time' 'wait until it ends, then run it again'

export PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8
unset PYTHONPATH PYTHONHOME ANSIBLE_CONFIG 2>/dev/null || true

# Below /opt, where programs may run: /tmp is mounted noexec on many hosts. What an earlier run left goes first.
rm -rf /opt/.moat-install.*
mkdir -p /opt
work=$(mktemp -d /opt/.moat-install.XXXXXX)
trap 'rm -rf "$work"' EXIT
# Nothing of Ansible's below the home folder of root.
export ANSIBLE_HOME="$work/ansible" ANSIBLE_LOCAL_TEMP="$work/tmp" ANSIBLE_NOCOLOR=1
trap 'echo "interrupted; run the same command again: it goes on from what is complete" >&2; exit 130' INT TERM HUP

# --- the bundle ---

# A tool cannot vouch for itself: the one of the release that runs here checks the new medium, where there is one.
tool=$bundle/moat.pyz
[ ! -f "$STORE/current/bundle/moat.pyz" ] || tool=$STORE/current/bundle/moat.pyz
arch=$(dpkg --print-architecture 2>/dev/null || uname -m)
release_of() { sed -n "s/^$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}\$/\1/p" /etc/os-release 2>/dev/null; }
target=$(release_of ID)$(release_of VERSION_ID)-$arch

# run_keyed COMMAND...: adds --key for every key that was given.
run_keyed() {
    while IFS= read -r key; do
        [ -z "$key" ] || set -- "$@" --key "$key"
    done <<END
$keys
END
    "$@"
}
say "==> verify the bundle with $tool"
code=0
run_keyed "$PYTHON" -I "$tool" verify "$bundle" --target "$target" ${older:+"$older"} --json >"$work/verify.json" || code=$?
if [ "$code" != 0 ]; then
    if [ "$code" = 4 ] && [ -z "$keys" ]; then
        cat >&2 <<END

The bundle is signed, but this host knows no release key that made the signature. A key on the medium would prove
nothing. Take the key from paper, or from another channel than the medium, compare the key id shown above with the
printed one, and run:

    sh install.sh --key RW...          (the 56 characters of the key)
    sh install.sh --key /path/moat.pub (a file that is not on the medium)
END
    fi
    exit "$code"
fi
# read_json FILE NAME: one value of an object.
read_json() { "$PYTHON" -I -c 'import json,sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2"; }
version=$("$PYTHON" -I -c 'import json,sys; print(json.load(open(sys.argv[1]))["bundle"]["version"])' "$work/verify.json")
signer=$(read_json "$work/verify.json" key)
release=$version-$(read_json "$work/verify.json" manifest_sha256 | cut -c1-12)
say "    verified: $(read_json "$work/verify.json" files) files, release $release, key $signer"

# --- the control environment ---

python_version=$("$PYTHON" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])')
control_hash=$({
    echo "$python_version"
    cat "$bundle/wheels/control-requirements.txt"
} | sha256sum | cut -c1-12)
control=$STORE/control/$control_hash
works() { [ -x "$1/bin/python" ] && "$1/bin/python" -I -B -m ansible playbook --version >/dev/null 2>&1; }
if works "$control"; then
    say "==> control environment: $control"
else
    control=$work/control
    say '==> make the control environment from the wheels of the bundle (in a temporary folder)'
    "$PYTHON" -I -m venv --without-pip "$control"
    pip=$(ls "$bundle"/wheels/pip-*.whl)
    PIP_CONFIG_FILE=/dev/null "$control/bin/python" -I "$pip/pip" --isolated install --quiet --no-input --no-cache-dir \
        --disable-pip-version-check --no-index --no-deps --require-hashes --find-links "$bundle/wheels" \
        -r "$bundle/wheels/control-requirements.txt" >"$work/pip.log" 2>&1 || {
        tail -n 15 "$work/pip.log" >&2
        refuse 28 'the control environment cannot be made' 'see the lines above' "room below /opt and the bundle's wheels" \
            'make room (df -h /opt), then run install.sh again'
    }
    works "$control" || refuse 28 'the control environment does not start' "$("$control/bin/python" -I -B -m ansible playbook --version 2>&1 | tail -n 1)" \
        'ansible-core' 'check that /opt is not mounted noexec (findmnt -T /opt), then run install.sh again'
fi

# --- the hosts ---

for file in "$inventory" "$vars"; do
    [ -z "$file" ] || [ -f "$file" ] || refuse 2 "$file is no file" '' 'a YAML file' 'give its path'
done
saved_inventory=$SITE/inventory.yml saved_vars=$SITE/vars.yml
use_inventory=$inventory
[ -n "$use_inventory" ] || { [ ! -f "$saved_inventory" ] || use_inventory=$saved_inventory; }
[ -n "$use_inventory" ] || use_inventory=$bundle/ansible/inventory/localhost.yml
use_vars=$vars
[ -n "$use_vars" ] || { [ ! -f "$saved_vars" ] || use_vars=$saved_vars; }

# holds_vars FILE: whether it has more than comments. Ansible refuses a file of variables that has none.
holds_vars() { grep -qvE '^[[:space:]]*(---)?[[:space:]]*(#.*)?$' "$1"; }

# play PLAYBOOK ANSIBLE-OPTIONS...: runs one from the medium, for phase 1.
play() {
    name=$1
    shift
    set -- -i "$use_inventory" -e "moat_medium=$bundle" "$@"
    if [ -n "$use_vars" ] && holds_vars "$use_vars"; then set -- "$@" -e "@$use_vars"; fi
    while IFS= read -r value; do
        [ -z "$value" ] || set -- "$@" -e "$value"
    done <<END
$extra
END
    ANSIBLE_CONFIG=$bundle/ansible/ansible.cfg "$control/bin/python" -I -B -m ansible playbook "$bundle/ansible/$name.yml" "$@" </dev/null
}
say "==> check the hosts of $use_inventory"
code=0
play site --tags preflight || code=$?
case $code in
0) ;;
2) refuse 20 'a host would make the installation fail' 'the lines after "fatal" above' 'hosts that pass every check' 'do what the lines say, then run install.sh again; nothing was changed' ;;
*) refuse 28 'the hosts could not be checked' "ansible-playbook ended with code $code" 'a reachable host and a valid inventory' 'read the lines above; nothing was changed' ;;
esac

# --- what would be done ---

before=''
for link in "$STORE/current" "$STORE/site"; do
    [ -n "$before" ] || [ ! -L "$link" ] || before=$(basename "$(readlink "$link")")
done
if [ -z "$playbook" ]; then
    playbook=site
    # A first installation that did not come to its end has no `current` yet: site.yml goes on with it.
    if [ -L "$STORE/current" ] && [ "$before" != "$release" ] && [ -f "$bundle/ansible/upgrade.yml" ]; then playbook=upgrade; fi
fi
[ -f "$bundle/ansible/$playbook.yml" ] ||
    refuse 2 "there is no playbook $playbook" "$(cd "$bundle/ansible" && echo ./*.yml)" '' 'name one of those that are found'
say ''
say "Phase 2 would run $playbook.yml on the hosts above:"
if [ -z "$before" ]; then
    say "  install release $release (nothing of Moat is installed by this control host yet)"
elif [ "$before" = "$release" ]; then
    say "  bring release $release back to what the variables say; where all is so already, nothing changes"
else
    say "  go from release $before to $release"
fi
say "  keep the release in $STORE/releases/$release, the control environment in $STORE/control/$control_hash"
say "  keep inventory and variables in $SITE, the log in /var/log/moat/"
[ -z "$keys" ] || say "  trust the release key $signer (in $TRUSTED)"

if [ -n "$check" ]; then
    say ''
    say 'Only phase 1 was asked for (--check): nothing was changed.'
    exit 0
fi

# --- phase 2 ---

if [ -z "$yes" ]; then
    [ -t 0 ] || refuse 2 'phase 2 asks before it changes anything, and there is no terminal to ask on' '' 'a terminal, or --yes' \
        'run it again with --yes'
    printf '\nGo on with phase 2? [y/N] '
    read -r answer || answer=''
    case $answer in
    y | Y | yes | Yes | YES) ;;
    *)
        say 'Nothing was changed.'
        exit 0
        ;;
    esac
fi

say ''
say 'Phase 2 of 2: changing things'
say '-----------------------------'

# put FILE MODE: stdin becomes FILE, whole or not at all.
put() {
    cat >"$1.new.$$"
    chmod "$2" "$1.new.$$"
    sync "$1.new.$$"
    mv -f "$1.new.$$" "$1"
}

mkdir -p "$TRUSTED"
chmod 755 /etc/moat "$TRUSTED"
if [ -n "$keys" ] && ! cat "$TRUSTED"/*.pub 2>/dev/null | grep -qxF "$signer"; then
    printf 'untrusted comment: release key of Moat, pinned by install.sh\n%s\n' "$signer" | put "$TRUSTED/$(printf '%s' "$signer" | sha256sum | cut -c1-12).pub" 644
    say "==> pinned the release key $signer"
fi

say "==> stage the release in $STORE/releases/$release"
code=0
"$PYTHON" -I "$bundle/moat.pyz" stage "$bundle" --store "$STORE" ${older:+"$older"} || code=$?
[ "$code" = 0 ] || exit "$code"

if [ "$control" = "$work/control" ]; then
    say "==> keep the control environment as $STORE/control/$control_hash"
    mkdir -p "$STORE/control"
    rm -rf "$STORE/control/.new" "$STORE/control/$control_hash"
    mv "$control" "$STORE/control/.new"
    sync -f "$STORE/control"
    mv "$STORE/control/.new" "$STORE/control/$control_hash"
fi
# Programs that were made for the folder's first name are not used: `python -m ansible` is.
ln -sfn "$control_hash" "$STORE/control/.use.$$"
mv -fT "$STORE/control/.use.$$" "$STORE/control/use"

mkdir -p "$SITE"
chmod 700 "$SITE"
cmp -s "$use_inventory" "$saved_inventory" || put "$saved_inventory" 600 <"$use_inventory"
if [ -n "$vars" ]; then
    cmp -s "$vars" "$saved_vars" || put "$saved_vars" 600 <"$vars"
elif [ ! -f "$saved_vars" ]; then
    put "$saved_vars" 600 <<'END'
# The variables of this site, one a line (docs/install.md). Every role's defaults/main.yml says what there is; for instance:
# gateway_count: 4
END
fi
put /usr/local/sbin/moat-site 755 <"$STORE/releases/$release/bundle/ansible/moat-site"
if [ ! -L "$STORE/current" ] && [ ! -L "$STORE/site" ]; then ln -s "releases/$release" "$STORE/site"; fi

set -- "$playbook"
while IFS= read -r value; do
    [ -z "$value" ] || set -- "$@" -e "$value"
done <<END
$extra
END
started=$(date +%s)
code=0
MOAT_LOCKED=1 MOAT_RELEASE=$release MOAT_LOG_NAME=install /usr/local/sbin/moat-site "$@" || code=$?
[ "$code" = 0 ] || exit "$code"
ln -sfn "releases/$release" "$STORE/.site.$$"
mv -fT "$STORE/.site.$$" "$STORE/site"

cat <<END

Done in $(($(date +%s) - started)) s: release $release.

What to do next:
  moat-site verify             prove that everything answers, and that nothing leaves the site
  moat-gateway keys new ID --team default --keys $SITE/config/keys.yaml
                               make a first API key, on a gateway's host; then: moat-site config
  $SITE/config/config.yaml     add your models, then: moat-site config
  moat-site                    everything else: upgrade, rollback, drain, scale, rotate_secrets, uninstall

  Clients call   https on port 8443 of $(hostname) (nginx_https_port), and trust $SITE/pki/ca.pem
  Back up        $SITE (configuration, secrets, certificates); it is the source of truth
END
