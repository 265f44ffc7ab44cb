# SPDX-License-Identifier: Apache-2.0
"""README.txt of a bundle: what the operator types, in order, with what each command answers."""

from __future__ import annotations

from moat.manifest import BundleInfo

_TEXT = """\
{name}
{rule}
Moat {version}, profile {profile}, for {target}. Everything that the gateway needs, for hosts without internet.

As root, in the folder of this file. Step 1 needs Python 3.11 or newer and nothing else.
KEY is the release key's public half, 56 characters that begin with RW. It reaches you apart from this medium
(on paper, by another person). After the first installation leave --key out: /etc/moat/trusted-keys counts then.

1. Is this medium whole, and from whom you think?
   A moat.pyz from an earlier, verified release is better than the one here: a tool cannot vouch for itself.

     python3 -I moat.pyz verify . --key KEY

   One line "verified: ..." and exit code 0: go on. Anything else: do not install. The message says which file and
   what to do; docs/verify.md has every case.

2. Is this host ready?

     python3 -I moat.pyz doctor . --key KEY

   It names what is missing. docker, Compose and the rest are in debs/, an apt repository. Its packages are in the
   manifest that step 1 has verified; that is why apt may trust it without a signature of its own:

     echo "deb [trusted=yes] file:$PWD/debs ./" > /etc/apt/sources.list.d/moat.list
     apt-get update && apt-get install docker.io docker-cli docker-compose iptables

3. What would change here? (Nothing does, yet.)

     python3 -I moat.pyz plan . --key KEY

4. Install: images, deployment folder, firewall rules, services.

     python3 -I moat.pyz load . --key KEY
     python3 -I moat.pyz prepare . --key KEY --dir /opt/moat
     python3 -I moat.pyz firewall apply
     docker compose --project-directory /opt/moat up --detach --wait --pull never

5. When something is wrong:

     docker compose --project-directory /opt/moat ps
     docker compose --project-directory /opt/moat logs --tail 50 SERVICE
     python3 -I moat.pyz doctor

What is here
   manifest.json            every file with its sha256; manifest.json.minisig is its signature
   moat.pyz                 the commands above; the standard library alone
   images/                  container images; sbom/image-NAME.cdx.json says what is inside each
   wheels/                  Python packages for the target's Python, with a hashed requirements.txt
   debs/                    apt repository for site hosts
   tokenizers/              tiktoken's files (set TIKTOKEN_CACHE_DIR to this folder)
   compose/                 the deployment, as `prepare` uses it
   docs/                    documentation; begin with docs/index.md
   sbom/                    CycloneDX 1.6
   sources/                 the source of MinIO (AGPL-3.0), whose program is in an image here
   THIRD-PARTY-NOTICES.txt  licences of everything
"""


def readme_text(info: BundleInfo) -> str:
    """Return the text for one bundle."""
    return _TEXT.format(
        name=info.name, rule="=" * len(info.name), version=info.version, profile=info.profile, target=info.target
    )
