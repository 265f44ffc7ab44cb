# SPDX-License-Identifier: Apache-2.0
"""``make demo``, step by step. Building needs the network to fetch; nothing after it does."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from moat.build.locks import active_locks
from moat.console import Console
from moat.demo import chat, places, plugin
from moat.demo.down import check_ours, remove_lost
from moat.demo.places import (
    BUNDLE,
    BUNDLES,
    CLIENT_KEY,
    CURL_HEADER,
    DEMO_JSON,
    DEPLOY,
    IMAGES,
    KEYS,
    MODEL,
    ROOT,
    TARGET,
)
from moat.demo.steps import CUT, Steps, moat
from moat.errors import DemoFailed
from moat.manifest import MANIFEST_NAME, parse_manifest
from moat.site.deployment import GATEWAY, write_file

#: Why two of the commands keep the host's network: it is the host's network that they are about.
_FILTER = "host's own, to see ports and routes"
_RULES = "host's own, to set the rules"
_PUBLISHED = "host's own, to its published port"
_PLAIN = "In one sentence: what is a castle moat for?"
_STREAMED = "Count from one to ten in words."


def up(console: Console, *, https_port: int, http_port: int) -> None:
    """Bring the demo up, or see that it is up, and use it.

    Raises:
        MoatError: a step failed; the next run goes on from there.
    """
    if os.geteuid() != 0:
        raise DemoFailed(
            "the demo builds root file systems and installs, which needs root", hint="run `sudo make demo`"
        )
    steps = Steps(console)
    remove_lost(steps)
    check_ours()
    places.HOME.mkdir(mode=0o755, exist_ok=True)
    build(steps)
    pyz = _verify(steps)
    _install(steps, pyz, https_port, http_port)
    _start(steps)
    with steps.step("create a client key", "cut"):
        make_client_key(steps)
    with steps.step("publish the configuration as a signed revision", "cut"):
        publish(steps)
    with steps.step("chat from a container on moat-edge, plain and streamed", "cut; the container's is moat-edge"):
        _chat_inside(steps)
    with steps.step("chat from the host, plain and streamed", _PUBLISHED):
        _chat_outside(console, https_port)
    _write_demo_json(https_port)
    _tell(console, steps, https_port)


def build(steps: Steps) -> None:
    """Have a release key, the locked files and a bundle of this checkout."""
    with steps.step("release key", "not used"):
        if (KEYS / "moat.key").exists():
            steps.console.info(f"{KEYS / 'moat.key'} is there")
        else:
            # No passphrase: this key signs what never leaves the machine. A real one has one (docs/bundle.md).
            steps.watch(moat("keys", "new", "--dir", str(KEYS), "--no-passphrase"), what="make the release key")
    with steps.step("check the locks", "not used"):
        locks = active_locks(places.PROFILE, TARGET)
        where = "this machine's own lock of the Debian packages" if locks.local_debs else "the reviewed locks"
        steps.console.info(f"{len(locks.everything)} files in {where}")
    with steps.step("fetch the locked files", "open"):
        steps.watch(
            moat("fetch", "--profile", places.PROFILE, "--target", TARGET, "--relock-vanished"),
            what="fetch the locked files",
        )
    with steps.step("Compose plugin", "not used"):
        plugin.ensure(steps.console)
    with steps.step("build and sign the bundle", "cut"):
        options = ["--profile", places.PROFILE, "--target", TARGET, "-o", str(BUNDLES), "--key", str(KEYS / "moat.key")]
        steps.watch([*CUT, *moat("build", *options)], what="build the bundle")


def _verify(steps: Steps) -> list[str]:
    """Verify with the bundle's own program, and return its argv for what follows."""
    pyz = [places.SYSTEM_PYTHON, str(BUNDLE / "moat.pyz")]
    with steps.step("verify the bundle", "cut"):
        steps.watch([*CUT, *pyz, "verify", *_trust()], what="verify the bundle")
    return pyz


def _trust() -> list[str]:
    """The bundle, the key that counts, and where this deployment keeps its record."""
    return [str(BUNDLE), "--key", str(KEYS / "moat.pub"), "--state-dir", str(DEPLOY / "state")]


def _install(steps: Steps, pyz: list[str], https_port: int, http_port: int) -> None:
    ports = ["--https-port", str(https_port), "--http-port", str(http_port)]
    with steps.step("doctor: is this host ready?", _FILTER):
        trust = [str(BUNDLE), "--key", str(KEYS / "moat.pub")]
        steps.watch([*pyz, "doctor", *trust, *ports, "--dir", str(DEPLOY)], what="doctor")
    with steps.step("load the images", "cut"):
        _remember_images()
        steps.watch([*CUT, *pyz, "load", *_trust()], what="load the images")
    with steps.step("prepare the deployment folder", "cut"):
        # On the loopback: a demo is for whoever sits at this machine.
        options = ["--dir", str(DEPLOY), *ports, "--bind", "127.0.0.1"]
        steps.watch([*CUT, *pyz, "prepare", *_trust(), *options], what="prepare")
    with steps.step("close the containers' ways out", _RULES):
        steps.watch([*pyz, "firewall", "apply"], what="firewall")


def _remember_images() -> None:
    """Note what is about to be loaded, before it is: an interrupted run leaves nothing unknown behind."""
    manifest = parse_manifest((BUNDLE / MANIFEST_NAME).read_bytes())
    known = set(IMAGES.read_text("utf-8").split()) if IMAGES.exists() else set()
    IMAGES.write_text("\n".join(sorted(known | {i.reference for i in manifest.images})) + "\n", "utf-8")


def compose(*words: str) -> list[str]:
    """Return the argv of a Compose command on the deployment, without a network."""
    return [*CUT, "docker", "compose", "--project-directory", str(DEPLOY), *words]


def _start(steps: Steps) -> None:
    with steps.step("start the services and wait until all are healthy", "cut"):
        steps.watch(
            compose("--progress", "quiet", "up", "--detach", "--wait", "--wait-timeout", "300", "--pull", "never"),
            what="start the services",
        )
        listing = steps.ask(
            compose("ps", "--all", "--format", "{{.Service}}\t{{.State}}\t{{.Health}}"), what="list", show=False
        )
        for line in listing.splitlines():
            service, state, health = line.split("\t")
            steps.console.info(f"{service:<12} {health or state}")


def make_client_key(steps: Steps) -> None:
    """Have a client key: the last one if the gateways still know it, else a new one."""
    known = (DEPLOY / "config/keys.yaml").read_text("utf-8")
    inside = DEPLOY / "client/demo.key"
    if CLIENT_KEY.exists() and inside.exists():
        digest = hashlib.sha256(CLIENT_KEY.read_bytes().strip()).hexdigest()
        if digest in known and inside.read_bytes() == CLIENT_KEY.read_bytes():
            steps.console.info(f"the key in {CLIENT_KEY} still counts")
            return
    if "id: demo" in known:
        steps.ask(
            compose("run", "--rm", "--no-deps", "-T", "admin", "keys", "revoke", "demo"), what="revoke the old key"
        )
    argv = compose("run", "--rm", "--no-deps", "-T", "admin", "keys", "new", "demo", "--team", "default")
    secret = steps.ask(argv, what="create a client key").strip()
    if not secret.startswith("sk-moat-") or "\n" in secret:
        raise DemoFailed("`moat-gateway keys new` printed no key", expected="one line sk-moat-...")
    write_file(CLIENT_KEY, secret.encode() + b"\n", 0o600, 0)
    write_file(CURL_HEADER, f"Authorization: Bearer {secret}\n".encode(), 0o600, 0)
    write_file(inside, secret.encode() + b"\n", 0o600, GATEWAY)
    steps.console.info(f"written to {CLIENT_KEY} (mode 0600); the gateways know its hash only")


def gateway_cli() -> list[str]:
    """Return the argv prefix of a command of ``moat-gateway``, as the operator of a site gives it."""
    # The option's default, written out: whoever means the other gateway has a word to exchange.
    return [
        places.SYSTEM_PYTHON, str(DEPLOY / "moat.pyz"), "gateway", "--dir", str(DEPLOY), "--instance", "gateway-1",
    ]  # fmt: skip


def publish(steps: Steps) -> None:
    """Push ``config/`` and wait until both gateways serve it; where the store has it already, nothing is made."""
    words = ["config", "push", str(DEPLOY / "config"), "--message", "the demo's configuration", "--wait"]
    steps.watch([*CUT, *gateway_cli(), *words], what="publish the configuration")


def _chat_inside(steps: Steps) -> None:
    base = ["run", "--rm", "--no-deps", "-T", "client", "ask", "--url", "https://nginx:8443"]
    base += ["--ca-file", "/run/secrets/ca.pem", "--key-file", "/run/secrets/demo.key", "--model", MODEL]
    for more, prompt in (([], _PLAIN), (["--stream"], _STREAMED)):
        steps.watch(compose(*base, *more, prompt), what="chat from a container")


def _chat_outside(console: Console, port: int) -> None:
    for stream, prompt in ((False, _PLAIN), (True, _STREAMED)):
        answer = chat.ask(
            port=port,
            ca_file=DEPLOY / "tls/ca.pem",
            key_file=CLIENT_KEY,
            model=MODEL,
            prompt=prompt,
            stream=stream,
            max_tokens=48,
        )
        console.info(f"{'streamed' if stream else 'plain'}: {prompt}")
        console.info("  " + " ".join(answer.text.split())[:200])
        console.info(f"  {answer.usage}")


def _write_demo_json(https_port: int) -> None:
    public = (KEYS / "moat.pub").read_text("ascii").splitlines()
    document = {
        "base_url": f"https://localhost:{https_port}",
        "ca_file": str(DEPLOY / "tls/ca.pem"),
        "key_file": str(CLIENT_KEY),
        "bundle": str(BUNDLE),
        "public_key": next(line for line in public if line.startswith("RW")),
        "compose_project": places.PROJECT,
        "model": MODEL,
        "gateway_cli": gateway_cli(),
        "config_dir": str(DEPLOY / "config"),
    }
    write_file(DEMO_JSON, (json.dumps(document, indent=2) + "\n").encode(), 0o644, 0)


def _tell(console: Console, steps: Steps, port: int) -> None:
    def short(path: Path) -> str:
        return str(path.relative_to(ROOT))

    body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Hello!"}]})
    console.result(
        {"ok": True, "steps": [vars(s) for s in steps.done]},
        f"""
The demo runs. Steps:
{steps.table()}

Try it by hand (the key is read from a file, so that no process list shows it):
  curl -sN --cacert {short(DEPLOY / "tls/ca.pem")} -H @{short(CURL_HEADER)} -H 'content-type: application/json' \\
    https://localhost:{port}/v1/chat/completions -d '{body}'
Look:    docker compose --project-directory {short(DEPLOY)} ps
Change:  python3 {short(DEPLOY / "moat.pyz")} gateway --dir {short(DEPLOY)} config status     (then: docs/hot-reload.md)
Bundle:  {short(BUNDLE)}
Stop:    make demo-down
""",
    )
    sys.stdout.flush()
