"""The commands that install moe-convert. Every hint, help text and model card takes them from here.

No command here reinstalls or upgrades torch: a CPU build would become a CUDA build of gigabytes.
"""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlparse
from urllib.request import url2pathname

PACKAGE = "moe-convert"


def pip_install(*requirements: str) -> str:
    """Return the command that installs `requirements`, quoted for a shell."""
    return " ".join(["pip install", *map(shlex.quote, requirements)])


INSTALL = pip_install(PACKAGE)
INSTALL_TORCH_FOR_CPU = f"{pip_install('torch')} --index-url https://download.pytorch.org/whl/cpu"
"""Without it, INSTALL brings a torch with CUDA on Linux."""


def install_extra(extra: str) -> str:
    """Return the command that installs moe-convert's optional packages `extra`."""
    return pip_install(f"{PACKAGE}[{extra}]")


def reinstall() -> str:
    """Return the command that installs moe-convert again from its origin, and nothing else.

    The origin is the checkout, repository or sdist that pip installed, else the package index.
    """
    # pip keeps the wheel that it built without a compiler, and would install that again.
    options = "--force-reinstall --no-deps --no-cache-dir"
    return " ".join(["pip install", options, *map(shlex.quote, _origin())])


def build_native() -> str:
    """Return what to do if a native library is missing: the compiler, then the command."""
    return f"install a C++20 compiler (gcc 11, clang 14 or newer) and reinstall: {reinstall()}"


def _origin() -> list[str]:
    """Return pip's arguments for the origin that direct_url.json records (PEP 610)."""
    try:
        text = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    record = json.loads(text) if text else {}
    url = record.get("url", "")
    if vcs := record.get("vcs_info"):
        return [f"{vcs['vcs']}+{url}"]
    parts = urlparse(url)
    place = url2pathname(parts.path) if parts.scheme == "file" else url
    if (folder := record.get("dir_info")) is not None:
        return ["-e", place] if folder.get("editable") else [place]
    # The same wheel would have the same libraries, or none.
    is_sdist = "archive_info" in record and not place.endswith(".whl")
    return [place] if is_sdist else [PACKAGE]
