"""Compile the CUDA kernels for the CPU (cuda_host/) to test their arithmetic without a GPU."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from project_paths import ROOT

HERE = Path(__file__).parent / "cuda_host"
KERNELS = ROOT / "loader/cuda/kernels"
SHARED = ROOT / "formats/native"
COMPILER = shutil.which("g++") or shutil.which("clang++")


@cache
def host_library(*defines):
    """Return the library, built with these macros if its sources changed.

    Tests that use it need a C++ compiler.
    """
    sources = sorted([*HERE.iterdir(), *KERNELS.iterdir(), SHARED / "packings.h"])
    digest = hashlib.sha256(
        b"".join([*(path.read_bytes() for path in sources), repr(defines).encode()])
    )
    digest = digest.hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"moe-cuda-host-{os.getuid()}-{digest}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder) / "host.so"
            subprocess.run(
                [
                    COMPILER,
                    "-std=c++20",
                    "-O1",
                    "-ffp-contract=off",
                    "-fPIC",
                    "-shared",
                    f"-I{HERE}",
                    f"-I{SHARED}",
                    *(f"-D{name}" for name in defines),
                    *HERE.glob("*.cpp"),
                    "-o",
                    fresh,
                ],
                check=True,
            )
            shutil.copy(fresh, f"{built}.{os.getpid()}")
            os.replace(f"{built}.{os.getpid()}", built)
    library = ctypes.CDLL(str(built))
    library.host_error.restype = ctypes.c_char_p
    return library


def launch_on_host(kernel, grid, threads, args, shared_bytes=0, order=0, defines=()):
    """Run a kernel at once over CPU tensors, with the arguments of `Device.launch`.

    order: order of threads between barriers (0, 1, 2). Raises RuntimeError for an unknown kernel,
    and for a barrier or warp operation that some threads do not reach.
    """
    from loader.cuda.device.device import kernel_argument

    library = host_library(*defines)
    values = [kernel_argument(value) for value in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    library.host_set_order(order)
    if library.host_launch(
        kernel.encode(), (ctypes.c_uint * 3)(*grid), threads, shared_bytes, pointers
    ):
        raise RuntimeError(f"{kernel}: {library.host_error().decode()}")
