# SPDX-License-Identifier: Apache-2.0
"""Proves the rules of the house on the tree itself: layout, no URL at a site, standard library only, licences.

Each rule is also run on a planted violation, so that a rule that cannot fail is noticed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

TOP_LEVEL = {
    ".ci", ".gitignore", ".yamllint", "ansible", "bundles", "compose", "docs", "images", "molecule", "scripts", "tests",
    "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "pyproject.toml",
}  # fmt: skip

#: URLs that do run at a site because the format asks for a URL: they name the site's own containers, nothing outside.
NAMED_URLS = re.compile(
    r"https?://(model|minio|gateway-\d|nginx|localhost|127\.0\.0\.1|moat_\w+|\$\w+)(?=[:/;\s\"'$]|$)"
)
URL = re.compile(r"https?://[^\s\"'`<>]+")


def tracked() -> list[Path]:
    """Return the files of the tree as git sees them, untracked ones included, ignored ones not."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return [p for line in done.stdout.decode().splitlines() if (p := ROOT / line).is_file()]


FILES = tracked()


def rel(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- no URL in anything that runs at a site ---


def urls_in_python(text: str) -> list[str]:
    """Return the URLs in string constants, docstrings left out (comments are no constants)."""
    tree = ast.parse(text)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        url
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        for url in URL.findall(node.value)
    ]


def urls_in_text(text: str) -> list[str]:
    """Return the URLs outside of whole-line and trailing comments (``#`` or ``//``)."""
    found = []
    for line in text.splitlines():
        code = re.sub(r"(^|\s)(#|//)(?!/).*$", "", line)
        found += URL.findall(code)
    return found


def outside_urls(path: str, text: str) -> list[str]:
    urls = urls_in_python(text) if path.endswith(".py") else urls_in_text(text)
    return [u for u in urls if not NAMED_URLS.match(u)]


def runs_at_a_site(path: Path) -> bool:
    name = rel(path)
    if name.endswith((".md", ".txt", ".jsonl", ".in", ".go.sum", "go.mod")):
        return False
    return name.startswith(("ansible/", "compose/", "images/", "molecule/", "scripts/moat/site/")) or (
        name.startswith("scripts/moat/") and name.count("/") == 2
    )


@pytest.mark.parametrize("path", [p for p in FILES if runs_at_a_site(p)], ids=rel)
def test_nothing_that_runs_at_a_site_holds_a_url(path: Path) -> None:
    assert outside_urls(rel(path), path.read_text("utf-8")) == []


def test_the_url_rule_catches_planted_urls() -> None:
    assert outside_urls("a.py", 'X = "https://203.0.113.9/x"') == ["https://203.0.113.9/x"]
    assert outside_urls("a.py", '"""See https://203.0.113.9/x."""\n# https://203.0.113.9/y') == []
    assert outside_urls("a.yaml", "a: http://example.net/x  # http://ok") == ["http://example.net/x"]
    assert outside_urls("a.yaml", "a: http://model:8081/v1") == []
    assert outside_urls("a.yaml", "a: http://model.example.net/v1") == ["http://model.example.net/v1"]


# --- nothing names a registry host or a path of the machine it was written on ---

REGISTRY_HOSTS = re.compile(
    r"(files\.pythonhosted|pypi\.org|proxy\.golang|sum\.golang|registry\.npmjs|deb\.debian|crates\.io|repo1?\.maven)"
)
MACHINE_PATHS = re.compile(r"(/work/|/root/|\.pyenv|/tmp/scratch)")


@pytest.mark.parametrize("path", FILES, ids=rel)
def test_nothing_names_a_registry_host_or_a_path_of_this_machine(path: Path) -> None:
    if path == Path(__file__).resolve():
        pytest.skip("holds the patterns")
    text = path.read_bytes().decode("utf-8", "replace")
    assert REGISTRY_HOSTS.findall(text) == []
    assert MACHINE_PATHS.findall(text) == []


# --- the site's half ---


def foreign_imports(text: str) -> set[str]:
    """Return the modules that ``text`` imports and that neither the standard library nor the site's half has."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {
        n
        for n in names
        if n.split(".")[0] not in sys.stdlib_module_names | {"moat"} or n.startswith(("moat.build", "moat.demo"))
    }


SITE_SIDE = [p for p in FILES if re.fullmatch(r"scripts/moat/(site/(\w+/)?)?\w+\.py", rel(p))]


@pytest.mark.parametrize("path", SITE_SIDE, ids=rel)
def test_the_site_side_imports_the_standard_library_only(path: Path) -> None:
    assert foreign_imports(path.read_text("utf-8")) == set()


def test_the_import_rule_catches_planted_imports() -> None:
    assert foreign_imports("import yaml\nfrom moat.build import locks\nimport json") == {"yaml", "moat.build"}


def test_every_command_of_the_table_exists() -> None:
    from moat.cli import BUILD_COMMANDS, SITE_COMMANDS

    for room, names in (("site", SITE_COMMANDS), ("build", BUILD_COMMANDS)):
        for name in names:
            module = ROOT / "scripts/moat" / room / f"{name.replace('-', '_')}.py"
            assert module.is_file(), f"moat {name} has no module"


# --- code ---

CODE = [
    p for p in FILES if p.suffix in {".py", ".sh", ".go", ".yaml", ".yml", ".conf", ".toml"} or p.name == "Makefile"
]


@pytest.mark.parametrize("path", CODE, ids=rel)
def test_each_source_file_names_its_licence(path: Path) -> None:
    if rel(path).startswith("bundles/locks/"):
        pytest.skip("made by a program")
    head = path.read_text("utf-8")[:400]
    assert "SPDX-License-Identifier: Apache-2.0" in head


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".py" and not rel(p).startswith("tests/")], ids=rel)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert imported & {"pickle", "marshal", "shelve", "dill", "joblib"} == set()
    assert called & {"eval", "exec"} == set()


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name.startswith(("test_", "bench_")) and p.suffix == ".py"], ids=rel
)
def test_each_test_file_says_what_it_proves(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert doc is not None
    assert len(doc) > 40


def test_no_container_is_privileged() -> None:
    for path in FILES:
        if path.suffix in {".yaml", ".yml", ".sh", ".py"} and path != Path(__file__).resolve():
            assert not re.search(r"--privileged\b|^\s*privileged:\s*true", path.read_text("utf-8"), re.MULTILINE), rel(
                path
            )


# --- tree and docs ---


def test_the_top_level_is_fixed() -> None:
    assert {rel(p).split("/")[0] for p in FILES} - TOP_LEVEL == set()


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".md"], ids=rel)
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{rel(path)} links to {target}"


def test_every_page_can_be_reached_from_the_start_page() -> None:
    start = ROOT / "docs" / "index.md"
    seen: set[Path] = set()
    todo = [start]
    while todo:
        page = todo.pop().resolve()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        if page.suffix == ".md":
            todo += [page.parent / t for t in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")) if "://" not in t]
    lost = [rel(p) for p in FILES if p.suffix == ".md" and rel(p).startswith("docs/") and p.resolve() not in seen]
    assert lost == []


#: pytest walks the tree and asks what each file is; without its plugin for Python nothing is imported.
WALK = """
import pytest, sys
class Walk:
    def pytest_collect_file(self, file_path):
        print(f"={file_path}")
sys.exit(pytest.main(["--collect-only", "-qs", "-p", "no:python", "-p", "no:anyio", "tests"], [Walk()]) not in (0, 5))
"""


def test_no_test_file_is_passed_over() -> None:
    """Holds pytest's own list against the tree: a folder's name (``build``, say) can hide its tests."""
    done = subprocess.run([sys.executable, "-c", WALK], cwd=ROOT, capture_output=True, text=True, check=True)
    collected = {line.removeprefix(f"={ROOT}/") for line in done.stdout.splitlines() if line.startswith("=")}
    ours = {rel(p) for p in FILES if p.name.startswith("test_") and p.suffix == ".py"}
    # Molecule's verifier collects the tests of its scenarios, on their hosts.
    assert {name for name in ours if not name.startswith("molecule/")} - collected == set()


def test_no_test_of_a_host_is_passed_over() -> None:
    run = ast.parse((ROOT / "molecule/run.py").read_text("utf-8"))
    assigned = [n for n in run.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "SCENARIOS"]
    scenarios = ast.literal_eval(assigned[0].value)
    lost = [
        rel(p)
        for p in FILES
        if rel(p).startswith("molecule/")
        and p.name.startswith("test_")
        and p.suffix == ".py"
        and not re.fullmatch(rf"molecule/({'|'.join(scenarios)})/tests/test_\w+\.py", rel(p))
    ]
    assert lost == []
    assert {p.parent.name for p in FILES if p.name == "molecule.yml"} <= set(scenarios)
