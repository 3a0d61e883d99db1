"""Compiles the kernels for a GPU with NVRTC, which torch's CUDA wheels contain.

So neither a compiler nor the CUDA toolkit is needed.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
from pathlib import Path

import torch

from formats.errors import MoeConvertError
from formats.files.partial_file import write_file

KERNELS = Path(__file__).parents[1] / "kernels"
SHARED = Path(__file__).parents[3] / "formats/native/packings.h"
"""The list of packings, which the CPU's native code includes too."""
_MAIN = "moe_kernels.cu"
OPTIONS = ("--std=c++17", "--fmad=false")
"""Without --fmad=false NVRTC fuses products and sums into fma, and bits differ from the CPU's."""


def compile_kernels(arch: str, cache: Path | None = None) -> bytes:
    """Return the kernels' cubin for `arch`, such as "sm_86".

    cache: a folder that keeps cubins for later calls; None: compile each time. Raises
    MoeConvertError if NVRTC is missing, does not know `arch`, or refuses the source (with its log).
    """
    nvrtc = _library()
    sources = {path.name: path.read_bytes() for path in (*sorted(KERNELS.iterdir()), SHARED)}
    key = hashlib.sha256(repr((arch, OPTIONS, _version(nvrtc), sources)).encode()).hexdigest()
    kept = cache / f"kernels-{arch}-{key[:32]}.cubin" if cache else None
    if kept and (cubin := _read_kept(kept)):
        return cubin
    cubin = _compile(nvrtc, sources, arch)
    if kept:
        _keep(kept, cubin)
    return cubin


def is_available() -> bool:
    """True if NVRTC is installed."""
    try:
        _library()
    except MoeConvertError:
        return False
    return True


def _compile(nvrtc: ctypes.CDLL, sources: dict[str, bytes], arch: str) -> bytes:
    headers = {name: text for name, text in sources.items() if name != _MAIN}
    strings = ctypes.c_char_p * len(headers)
    program = ctypes.c_void_p()
    error = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        sources[_MAIN],
        _MAIN.encode(),
        len(headers),
        strings(*headers.values()),
        strings(*(name.encode() for name in headers)),
    )
    _check(nvrtc, error, "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in OPTIONS)]
        failed = nvrtc.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        if failed:
            log = _bytes(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise MoeConvertError(
                f"NVRTC cannot compile the kernels for {arch}: {log[:4000]}", "use device='cpu'"
            )
        return _bytes(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, error: int, what: str) -> None:
    if error:
        raise MoeConvertError(
            f"{what}: {nvrtc.nvrtcGetErrorString(error).decode()}", "use device='cpu'"
        )


def _version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


@functools.cache
def _library() -> ctypes.CDLL:
    tried = []
    for name in _candidates():
        try:
            nvrtc = ctypes.CDLL(name)
        except OSError as e:
            tried.append(str(e))
            continue
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        for function in (
            "nvrtcGetProgramLogSize",
            "nvrtcGetProgramLog",
            "nvrtcGetCUBINSize",
            "nvrtcGetCUBIN",
        ):
            getattr(nvrtc, function).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        nvrtc.nvrtcCompileProgram.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        return nvrtc
    raise MoeConvertError(
        f"NVRTC, which compiles the GPU kernels, is missing: {'; '.join(tried[:3])}",
        "install torch from a CUDA wheel, or nvidia-cuda-nvrtc for torch's CUDA version",
    )


def _candidates() -> list[str]:
    """Return files and names to try: installed wheels first, of torch's CUDA version first."""
    files: list[str] = []
    for package in importlib.metadata.distributions():
        if (package.metadata["Name"] or "").startswith("nvidia-cuda-nvrtc"):
            files += [
                str(package.locate_file(f))
                for f in package.files or ()
                if f.name.startswith("libnvrtc.so")
            ]
    major = (torch.version.cuda or "").split(".")[0]
    files.sort(key=lambda name: not (major and name.endswith(f".so.{major}")))
    return [*files, *([f"libnvrtc.so.{major}"] if major else []), "libnvrtc.so"]


def _read_kept(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:32], content[32:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _keep(path: Path, cubin: bytes) -> None:
    """Write a cubin for the next start. Without it that start takes some seconds longer."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, hashlib.sha256(cubin).digest() + cubin)
    except (OSError, MoeConvertError):
        return
