# SPDX-License-Identifier: Apache-2.0
"""Where the demo keeps its things: all below ``.moat/`` of the checkout, which git ignores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from moat import __version__

ROOT: Final = Path(__file__).resolve().parents[3]
HOME: Final = ROOT / ".moat"
KEYS: Final = HOME / "keys"
BUNDLES: Final = HOME / "bundles"
DEPLOY: Final = HOME / "deploy"
DEMO_JSON: Final = HOME / "demo.json"
#: References of every image that a run of the demo has loaded, one a line, for the removal.
IMAGES: Final = HOME / "images.txt"
CLIENT_KEY: Final = HOME / "client.key"
CURL_HEADER: Final = HOME / "client.header"

PROFILE: Final = "demo"
TARGET: Final = "debian13-amd64"
BUNDLE: Final = BUNDLES / f"moat-{__version__}-{PROFILE}-{TARGET}"
PROJECT: Final = "moat"
MODEL: Final = "smollm2-135m-instruct"
#: The site's side runs on the system's own Python, without the tools' environment.
SYSTEM_PYTHON: Final = "/usr/bin/python3"
HTTPS_PORT: Final = int(os.environ.get("MOAT_HTTPS_PORT", "8443"))
HTTP_PORT: Final = int(os.environ.get("MOAT_HTTP_PORT", "8080"))
