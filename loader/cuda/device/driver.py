"""The parts of CUDA's driver API that torch lacks: loading kernels, launching, page-locking."""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

from formats.errors import MoeConvertError

_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_DEFAULT_SHARED_BYTES = 48 << 10
"""Shared memory that a kernel gets without setting that attribute."""
_PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: page-locked for every GPU of the process."""


class Context:
    """The CUDA context of the thread that creates this object: torch's context of one GPU."""

    def __init__(self, driver: ctypes.CDLL | None = None) -> None:
        self.driver = driver or _library()
        self._handle = c_void_p()
        self.check(self.driver.cuCtxGetCurrent(ctypes.byref(self._handle)), "finding the context")
        self._threads = {threading.get_ident()}

    def enter(self) -> None:
        """Make the context current in this thread: a thread new to torch has none."""
        if threading.get_ident() not in self._threads:
            self.check(self.driver.cuCtxSetCurrent(self._handle), "entering the context")
            self._threads.add(threading.get_ident())

    def pin(self, address: int, n_bytes: int) -> bool:
        """Page-lock memory; False if the system refuses.

        torch would report a failure of the runtime API's function as its own, later.
        """
        self.enter()
        return int(self.driver.cuMemHostRegister_v2(address, n_bytes, _PORTABLE)) == 0

    def unpin(self, address: int) -> None:
        """Unlock memory that `pin` locked."""
        self.enter()
        self.driver.cuMemHostUnregister(address)

    def check(self, error: int, what: str) -> None:
        """Raise MoeConvertError if `error`, a CUresult of the action `what`, is not 0."""
        if not error:
            return
        text = c_char_p()
        self.driver.cuGetErrorString(error, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"CUDA error {error}"
        raise MoeConvertError(f"GPU: {what}: {reason}", "use device='cpu', and report this")


class Module:
    """A loaded cubin. Its context is current in the creating and in all launching threads."""

    def __init__(self, cubin: bytes, context: Context) -> None:
        self._driver = context.driver
        self._check = context.check
        self._handle = c_void_p()
        error = self._driver.cuModuleLoadData(ctypes.byref(self._handle), cubin)
        self._check(error, "loading the kernels")
        self._functions: dict[str, c_void_p] = {}
        self._allowed_shared_bytes: dict[str, int] = {}

    def prepare(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        values: Sequence[Any],
        shared_bytes: int,
    ) -> Callable[[int], None]:
        """Return a function that launches `kernel` on the stream with the given handle.

        values: ctypes objects; each call passes their contents at that time. This method and the
        function raise MoeConvertError if the driver refuses.
        """
        function = self._function(kernel, shared_bytes)
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        launch = self._driver.cuLaunchKernel
        sizes = (*grid, threads, 1, 1, shared_bytes)

        # The default argument keeps `values` alive as long as the pointers to them.
        def run(stream: int, values: Sequence[Any] = values) -> None:
            if error := launch(function, *sizes, stream, pointers, None):
                self._check(
                    error,
                    f"kernel {kernel} with grid {grid}, {threads} threads,"
                    f" {shared_bytes} shared bytes",
                )

        return run

    def _function(self, kernel: str, shared_bytes: int) -> c_void_p:
        function = self._functions.get(kernel)
        if function is None:
            function = c_void_p()
            error = self._driver.cuModuleGetFunction(
                ctypes.byref(function), self._handle, kernel.encode()
            )
            self._check(error, f"kernel {kernel}")
            self._functions[kernel] = function
        if shared_bytes > self._allowed_shared_bytes.get(kernel, _DEFAULT_SHARED_BYTES):
            error = self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes)
            self._check(error, f"kernel {kernel} with {shared_bytes} shared bytes")
            self._allowed_shared_bytes[kernel] = shared_bytes
        return function


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return declare_functions(ctypes.CDLL("libcuda.so.1"))
    except OSError as e:
        raise MoeConvertError(
            f"the GPU driver's library is missing: {e}",
            "install the NVIDIA driver, or use device='cpu'",
        ) from None


def declare_functions(driver: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument types of the used functions, and return `driver`."""
    driver.cuCtxGetCurrent.argtypes = [c_void_p]
    driver.cuCtxSetCurrent.argtypes = [c_void_p]
    driver.cuMemHostRegister_v2.argtypes = [c_void_p, c_size_t, c_uint]
    driver.cuMemHostUnregister.argtypes = [c_void_p]
    driver.cuModuleLoadData.argtypes = [c_void_p, c_char_p]
    driver.cuModuleGetFunction.argtypes = [c_void_p, c_void_p, c_char_p]
    driver.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    driver.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    driver.cuGetErrorString.argtypes = [c_int, c_void_p]
    return driver
