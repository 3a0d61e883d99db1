"""Without a working C++20 compiler, the build gives a pure wheel and says so."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from project_paths import ROOT

pytest.importorskip("scikit_build_core", reason="needs the extra dev")
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")

# g++ before C++20: CMake finds the compiler, and each file fails.
OLD_COMPILER = """#!/bin/sh
case "$*" in *-std=*++2*) echo "unrecognized option -std" >&2; exit 1;; esac
exec c++ "$@"
"""


def build(hook: str, compiler: Path, out: Path) -> tuple[Path, str]:
    """Run a build hook with `compiler` as C++ compiler; return the wheel and the output."""
    code = f"import scikit_build_core.build as b; b.{hook}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"CXX": str(compiler)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout


@pytest.fixture(params=["none", "old"])
def compiler(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A C++ compiler that does not exist, or that does not know C++20."""
    program = tmp_path / "c++-compiler"
    if request.param == "old":
        if shutil.which("c++") is None:
            pytest.skip("needs a C++ compiler")
        program.write_text(OLD_COMPILER)
        program.chmod(0o755)
    return program


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_wheel_is_tagged_pure_and_the_build_ends_with_the_reason(
    compiler: Path, hook: str, tmp_path: Path
) -> None:
    wheel, output = build(hook, compiler, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    end = " ".join(output.splitlines()[-2:])
    assert "without its native kernels" in end
    assert "C++20 compiler" in end
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        text = archive.read(metadata).decode()
    assert not [name for name in names if name.endswith(".so")]
    assert "Root-Is-Purelib: true" in text
