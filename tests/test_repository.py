"""Rules that hold for the whole repository."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("megamoe", "tools", "benchmarks")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_and_functions_fit_a_screen(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > 60
    }
    assert not too_long


@pytest.mark.parametrize("room", ["config", "data", "moe", "models"])
def test_only_higher_rooms_know_of_ranks(room):
    files = sorted((REPOSITORY / "megamoe" / room).rglob("*.py"))
    assert files
    assert not [path for path in files if "distributed" in path.read_text(encoding="utf-8")]


def tracked_files():
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True
    ).stdout
    return [REPOSITORY / name for name in listing.decode().split("\0") if name]


def test_nothing_large_is_committed():
    tracked = tracked_files()
    assert len(tracked) > 50
    assert sum(path.stat().st_size for path in tracked if path.exists()) < 25e6


def test_shell_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        if "CI" in os.environ:
            pytest.fail("shellcheck is missing: apt-get install shellcheck")
        pytest.skip("shellcheck is missing")
    scripts = [
        path for path in tracked_files() if path.suffix in (".sh", ".env") or path.parent.name == ".ci"
    ]
    assert len(scripts) > 10
    done = subprocess.run(
        ["shellcheck", "--external-sources", *scripts], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_links_in_the_documentation_lead_somewhere():
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    assert len(pages) > 5
    broken = [
        f"{page.relative_to(REPOSITORY)} -> {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken
