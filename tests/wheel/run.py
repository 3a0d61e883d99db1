"""Tries the wheel in dist/ as a user gets it: `make test-wheel`, or `python tests/wheel/run.py`.

Installs it into a fresh environment and runs convert, verify, generate and chat on the example, in
a folder outside the checkout. Then builds a wheel from the sdist without a compiler, and generates
with that. Exit code 1 with the failed check. Needs only Python; dependencies come from pip's index.
"""

import argparse
import filecmp
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tiny-mixtral"
PROMPT = "So Jonah arose, and went to"
NEW_TOKENS = 12
IN_SDIST = {
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "converter",
    "formats",
    "loader",
    "pyproject.toml",
}


class Environment:
    """A fresh virtual environment, and commands run in it, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / "bin"
        hidden = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV"}
        self.variables = {k: v for k, v in os.environ.items() if k not in hidden}

    def run(
        self, *command: object, stdin: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Return the finished command. SystemExit, with both outputs, if it fails."""
        program, *arguments = map(str, command)
        shown = " ".join([program, *arguments])
        print(f"$ {shown}", flush=True)
        begin_s = time.monotonic()
        done = subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            env=self.variables | variables,
            input=stdin,
            capture_output=True,
            text=True,
        )
        check(done.returncode == 0, f"{shown}\n{done.stdout}{done.stderr}")
        print(f"  {time.monotonic() - begin_s:.0f} s", flush=True)
        return done

    def facts(self) -> dict[str, str]:
        """Return what `moe-convert env` shows."""
        return dict(json.loads(self.run("moe-convert", "env", "--json").stdout))


def check(passed: bool, failure: str) -> None:
    if not passed:
        raise SystemExit(f"failed: {failure}")


def check_files(dist: Path) -> tuple[Path, Path]:
    """Check names and contents of dist/; return the sdist and the wheel."""
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    tag = re.search(r"-py3-none-manylinux_(\d+)_(\d+)_\w+\.whl$", wheel.name)
    glibc = f"{tag[1]}.{tag[2]}" if tag else "no manylinux tag"
    stated = re.findall(r"glibc (\d+\.\d+)", (ROOT / "README.md").read_text())
    check(set(stated) == {glibc}, f"README.md states glibc {stated}, {wheel.name} {glibc}")
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    check(names == IN_SDIST, f"{sdist.name} differs in {names ^ IN_SDIST}")
    return sdist, wheel


def install(at: Environment, dist: Path, requirement: str, index: str | None) -> None:
    """Install the package from `dist` or from the index at that URL, then its dependencies."""
    # Apart, because another index may have this version, and TestPyPI lacks the dependencies.
    origin = ["--index-url", index] if index else ["--no-index", "--find-links", dist]
    # --no-compile: Python compiles the modules that run, a small part of torch.
    pip = ["pip", "install", "-q", "--no-compile"]
    at.run(*pip, "--no-deps", "--only-binary", ":all:", *origin, requirement)
    at.run(*pip, "-c", ROOT / "constraints.txt", requirement)


def check_run(at: Environment) -> None:
    """Convert, verify, generate and chat with native kernels."""
    code = "import converter, formats, loader; print(loader.__file__)"
    places = at.run("python", "-c", code).stdout
    check(str(at.bin.parent) in places, f"the checkout was imported: {places}")
    facts = at.facts()
    for part in ("kernels", "solver"):
        check(facts[part].startswith("native"), f"{part}: {facts[part]}")
    at.run("moe-convert", "convert", EXAMPLE, "-o", "model", "--quiet")
    at.run("moe-convert", "verify", "model", "--read-data")
    answer = json.loads(generate(at).stdout)
    # The first new token comes from the prompt's pass, all others from the native decoder.
    decoded = answer["cache"]["tokens"]["decoder"]
    check(decoded == NEW_TOKENS - 1, f"the native decoder computed {decoded} tokens")
    chat = ["moe-convert", "chat", "model", "--max-new-tokens", NEW_TOKENS]
    check(bool(at.run(*chat, stdin=f"{PROMPT}\n").stdout.strip()), "chat answers nothing")


def generate(at: Environment) -> subprocess.CompletedProcess[str]:
    """Generate NEW_TOKENS with the converted model; the statistics are JSON on standard output."""
    options = ["--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS, "--ram-cache", "8MiB", "--json"]
    return at.run("moe-convert", "generate", "model", *options)


def check_same_bytes(at: Environment, program: Path) -> None:
    """Check that `program`, the checkout's moe-convert, converts to the same bytes."""
    expected = at.folder / "expected"
    command = [program, "convert", EXAMPLE, "-o", expected, "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    files = sorted(str(p.relative_to(expected)) for p in expected.rglob("*") if p.is_file())
    _, differing, missing = filecmp.cmpfiles(expected, at.folder / "model", files, shallow=False)
    check(not differing and not missing, f"conversions differ: {differing + missing}")


def check_without_compiler(at: Environment, sdist: Path) -> None:
    """Install the sdist where no compiler is; check that torch generates, and that users see it."""
    pip = ["pip", "install", "--force-reinstall", "--no-deps", sdist]
    out = at.run(*pip, CXX="/none/c++").stdout
    check("-py3-none-any.whl" in out, f"pip does not name a pure wheel:\n{out}")
    facts = at.facts()
    for part in ("kernels", "solver"):
        check(facts[part].startswith("torch"), f"{part}: {facts[part]}")
    # Not the same text: native products round activations to int8.
    done = generate(at)
    check(json.loads(done.stdout)["new_tokens"] == NEW_TOKENS, done.stdout)
    check(facts["reinstall"] in done.stderr, f"generate does not warn:\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="[default: dist]")
    parser.add_argument(
        "--compare", type=Path, metavar="MOE_CONVERT", help="convert with this program too"
    )
    parser.add_argument(
        "--index",
        metavar="URL",
        help="install the version of dist/ from this index [default: dist/]",
    )
    options = parser.parse_args()
    begin_s = time.monotonic()
    sdist, wheel = check_files(options.dist.absolute())
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory(prefix="moe-convert-wheel-") as folder:
        at = Environment(Path(folder))
        install(at, wheel.parent, f"moe-convert=={version}", options.index)
        check_run(at)
        if options.compare:
            check_same_bytes(at, options.compare.absolute())
        check_without_compiler(at, sdist)
    shown = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"ok: {wheel.name} with Python {shown} in {time.monotonic() - begin_s:.0f} s")


if __name__ == "__main__":
    main()
