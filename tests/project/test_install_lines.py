"""Only formats/install.py has install commands, and none of them replaces torch."""

import ast
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from project_paths import ROOT
from support_hints import check_pip_line

from formats import install

SOURCES = sorted(
    path
    for package in ("converter", "loader", "formats")
    for path in (ROOT / package).rglob("*.py")
    if path != ROOT / "formats" / "install.py"
)


def lines_with_pip(text: str) -> list[int]:
    """Return the lines of string literals, docstrings included, that have an install command."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and any(word in node.value for word in ("pip install", "-reinstall", "moe-convert["))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_install_commands_come_from_one_module(path: Path) -> None:
    assert lines_with_pip(path.read_text()) == []


def test_an_install_command_in_a_message_is_reported() -> None:
    assert lines_with_pip("x = 1\nraise E(f\"{x}: pip install 'moe-convert[{x}]'\")") == [2]


def with_origin(monkeypatch: pytest.MonkeyPatch, record: object) -> str:
    """Return the reinstall command of an installation with this direct_url.json."""

    class Installed:
        def read_text(self, name: str) -> str | None:
            return json.dumps(record) if record and name == "direct_url.json" else None

    monkeypatch.setattr(install, "distribution", lambda name: Installed())
    line = install.reinstall()
    check_pip_line(line)
    return line


def test_installation_from_the_index_is_reinstalled_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert with_origin(monkeypatch, None).endswith(" --no-deps --no-cache-dir moe-convert")


def test_checkout_is_reinstalled_from_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"url": "file:///home/my%20code", "dir_info": {}}
    assert with_origin(monkeypatch, record).endswith(" '/home/my code'")
    record["dir_info"] = {"editable": True}
    assert with_origin(monkeypatch, record).endswith(" -e '/home/my code'")


def test_repository_is_reinstalled_from_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"url": "https://example.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "0"}}
    assert with_origin(monkeypatch, record).endswith(" git+https://example.org/r.git")


def test_sdist_is_reinstalled_from_its_file_and_a_wheel_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = {"url": "file:///dist/moe_convert-0.1.0.tar.gz", "archive_info": {}}
    assert with_origin(monkeypatch, record).endswith(" /dist/moe_convert-0.1.0.tar.gz")
    record["url"] = "https://example.org/moe_convert-0.1.0-py3-none-any.whl"
    assert with_origin(monkeypatch, record).endswith(" moe-convert")


def test_source_tree_that_is_not_installed_has_a_command_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> object:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install, "distribution", missing)
    assert install.reinstall().endswith(" moe-convert")


def test_lines_for_extras_and_torch_are_commands() -> None:
    assert install.INSTALL == "pip install moe-convert"
    assert install.install_extra("serve") == "pip install 'moe-convert[serve]'"
    for line in (install.INSTALL, install.INSTALL_TORCH_FOR_CPU, install.install_extra("serve")):
        check_pip_line(line)


def test_readme_begins_with_torch_for_the_cpu_then_the_package_then_env() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Install\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```\n(.*?)```", section, re.S)
    commands = [line.split("  ")[0] for line in block.splitlines()]
    torch, package, env = commands
    assert (torch, env) == (install.INSTALL_TORCH_FOR_CPU, "moe-convert env")
    # The first release replaces the checkout's line.
    assert package in ("pip install .", install.INSTALL)
    assert install.INSTALL in block


def test_pages_state_the_glibc_of_the_wheel_that_make_builds() -> None:
    (tag,) = re.findall(
        r"^WHEEL_PLATFORM := manylinux_(\d+_\d+)_", (ROOT / "Makefile").read_text(), re.M
    )
    glibc = tag.replace("_", ".")
    assert f"needs glibc {glibc} or newer" in (ROOT / "README.md").read_text()
    assert f"| oldest glibc | {glibc} |" in (ROOT / "docs" / "release.md").read_text()
    assert f"-manylinux_{tag}_x86_64`" in (ROOT / "docs" / "release.md").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "pip install --force-reinstall moe-convert",
        "pip install -U moe-convert",
        "pip install 'moe-convert[nonsense]'",
    ],
)
def test_line_that_replaces_torch_or_names_no_extra_fails_the_check(line: str) -> None:
    with pytest.raises(AssertionError):
        check_pip_line(line)
