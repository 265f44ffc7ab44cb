# SPDX-License-Identifier: Apache-2.0
"""README.txt of a bundle: what the operator types, in order, with what each command answers."""

from __future__ import annotations

from moat.manifest import BundleInfo

_TEXT = """\
{name}
{rule}
Moat {version}, profile {profile}, for {target}. Everything that the gateway needs, for hosts without internet.

On the host, as root, in the folder of this file. The host needs python3 (3.11 or newer) alone for step 1.

1. Is this medium whole, and from whom you think?
   The release key comes to you by another way than this medium (printed, by phone, from an earlier install).

     python3 moat.pyz verify . --key /etc/moat/trusted-keys/moat.pub

   Exit code 0 and one line: go on. Anything else: do not install; the message says which file and what to do.

2. Is this host ready?

     python3 moat.pyz doctor .

   Missing docker or Compose: they are in debs/, an apt repository. Its packages are listed in the manifest that step 1
   has verified, and that is why apt may trust it without a second signature:

     echo "deb [trusted=yes] file:$PWD/debs ./" > /etc/apt/sources.list.d/moat.list
     apt-get update && apt-get install docker.io docker-cli docker-compose

3. What would change here?

     python3 moat.pyz plan .

4. Load the images, make the deployment folder, start.

     python3 moat.pyz load .
     python3 moat.pyz prepare . --dir /opt/moat
     cd /opt/moat && docker compose up --detach --wait --pull never

5. When something is wrong:

     cd /opt/moat && docker compose ps
     cd /opt/moat && docker compose logs --tail 50 SERVICE
     python3 moat.pyz doctor .

What is here
   manifest.json            every file with its sha256; manifest.json.minisig is its signature
   moat.pyz                 the commands above; standard library only
   images/                  container images (docker load); sbom/image-*.cdx.json says what is inside each
   wheels/                  Python packages for the target's Python, with a hashed requirements.txt
   debs/                    apt repository for site hosts
   tokenizers/              tiktoken's files (set TIKTOKEN_CACHE_DIR to this folder)
   compose/ docs/           the deployment and its documentation
   sbom/                    CycloneDX 1.6
   sources/                 the source of MinIO (AGPL-3.0), which this bundle distributes as a program
   THIRD-PARTY-NOTICES.txt  licences
"""


def readme_text(info: BundleInfo) -> str:
    """Return the text for one bundle."""
    return _TEXT.format(
        name=info.name, rule="=" * len(info.name), version=info.version, profile=info.profile, target=info.target
    )
