# SPDX-License-Identifier: Apache-2.0
"""README.txt of a bundle: what the operator types, in order, with what each command answers."""

from __future__ import annotations

from moat.manifest import BundleInfo

_TEXT = """\
{name}
{rule}
Moat {version}, profile {profile}, for {target}. Everything that the gateway needs, for hosts without internet.

As root, in the folder of this file. The host needs Python 3.11 or newer (every Debian 12 and 13 can have it) and
nothing else.
KEY is the release key's public half, 56 characters that begin with RW, or a file that holds it. It reaches you apart
from this medium (on paper, by another person). After the first installation leave --key out:
/etc/moat/trusted-keys counts then.

1. Is this medium whole, and from whom you think?
   A moat.pyz from an earlier, verified release is better than the one here: a tool cannot vouch for itself.

     python3 -I moat.pyz verify . --key KEY

   One line "verified: ..." and exit code 0: go on. Anything else: do not install. The message says which file and
   what to do; docs/verify.md has every case.

2. Install: services of systemd, on this host.
   First what would happen; nothing changes yet:

     sh install.sh --key KEY --check

   Then for good. It asks once before it changes anything. Interrupted? Run the same command again: it goes on where
   it was, and on a finished site it changes nothing.

     sh install.sh --key KEY

   (With "sh": a medium with FAT or exFAT cannot say that a file is a program, and hosts often mount media with
   noexec.) More hosts: copy ansible/inventory/example-multinode.yml, put your names in, add --inventory FILE.

   When something is wrong:

     systemctl status moat.target
     journalctl --unit 'moat-gateway@*' --lines 50

3. Or in containers, on one host that has docker (docs/compose.md). Not beside step 2: both want the same ports.

     python3 -I moat.pyz doctor . --key KEY

   It names what is missing. docker, Compose and the rest are in debs/, an apt repository. Its packages are in the
   manifest that step 1 has verified; that is why apt may trust it without a signature of its own:

     echo "deb [trusted=yes] file:$PWD/debs ./" > /etc/apt/sources.list.d/moat.list
     apt-get update && apt-get install --no-install-recommends {docker}

     python3 -I moat.pyz plan . --key KEY
     python3 -I moat.pyz load . --key KEY
     python3 -I moat.pyz prepare . --key KEY --dir /opt/moat
     python3 -I moat.pyz firewall apply
     docker compose --project-directory /opt/moat up --detach --wait --pull never

   When something is wrong:

     docker compose --project-directory /opt/moat ps
     docker compose --project-directory /opt/moat logs --tail 50 SERVICE
     python3 -I moat.pyz doctor

4. Does anything try to leave? (docs/egress-verify.md; it restarts the services)

     python3 -I moat.pyz egress verify

What is here
   manifest.json            every file with its sha256; manifest.json.minisig is its signature
   moat.pyz                 the commands above; the standard library alone
   install.sh               step 2; ansible/ holds its playbooks
   ansible/                 playbooks and roles, an example inventory for several hosts
   wheels/                  Python packages for the target's Python: requirements.txt lists the gateway's by hash,
                            control-requirements.txt those of install.sh (ansible-core); pip installs them
   debs/                    apt repository for site hosts
   images/                  container images; sbom/image-NAME.cdx.json says what is inside each
   tokenizers/              tiktoken's files (set TIKTOKEN_CACHE_DIR to this folder)
   compose/                 the deployment in containers, as `prepare` uses it
   docs/                    documentation; begin with docs/index.md
   sbom/                    CycloneDX 1.6
   sources/                 the source of MinIO (AGPL-3.0), whose program is in an image here
   THIRD-PARTY-NOTICES.txt  licences of everything
"""

#: Debian 12's docker.io holds the client; its docker-compose would be version 1, so the medium brings Debian 13's.
_DOCKER = {"debian12": "docker.io docker-compose iptables"}


def readme_text(info: BundleInfo) -> str:
    """Return the text for one bundle."""
    return _TEXT.format(
        name=info.name,
        rule="=" * len(info.name),
        version=info.version,
        profile=info.profile,
        target=info.target,
        docker=_DOCKER.get(info.target.split("-")[0], "docker.io docker-cli docker-compose iptables"),
    )
