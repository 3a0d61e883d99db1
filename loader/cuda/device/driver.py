"""The part of CUDA's driver API that torch does not offer: a cubin and its kernels, page-locking
memory.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

from formats.errors import MoeConvertError

_MOST_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: above 48 KiB a kernel must ask first."""
_UNASKED_SHARED_BYTES = 48 << 10
_PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: page-locked for every GPU of the process."""


class Context:
    """The context that is current in the thread which makes this: torch's, of one device."""

    def __init__(self, driver: ctypes.CDLL | None = None) -> None:
        self.driver = driver or _library()
        self._handle = c_void_p()
        self.check(self.driver.cuCtxGetCurrent(ctypes.byref(self._handle)), "finding the context")
        self._threads = {threading.get_ident()}

    def enter(self) -> None:
        """The context is current in this thread: a thread that torch has not used yet has none."""
        if threading.get_ident() not in self._threads:
            self.check(self.driver.cuCtxSetCurrent(self._handle), "entering the context")
            self._threads.add(threading.get_ident())

    def pin(self, address: int, n_bytes: int) -> bool:
        """Page-locks memory; False if the system refuses. The runtime API's call would leave its
        error for torch to stumble over.
        """
        self.enter()
        return int(self.driver.cuMemHostRegister_v2(address, n_bytes, _PORTABLE)) == 0

    def unpin(self, address: int) -> None:
        """Undoes `pin`."""
        self.enter()
        self.driver.cuMemHostUnregister(address)

    def check(self, error: int, what: str) -> None:
        """MoeConvertError if `error`, a CUresult, is one."""
        if not error:
            return
        text = c_char_p()
        self.driver.cuGetErrorString(error, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"CUDA error {error}"
        raise MoeConvertError(f"GPU: {what}: {reason}", "use device='cpu', and report this")


class Module:
    """A cubin in a context, which is current in the thread that makes this and in those that
    launch.
    """

    def __init__(self, cubin: bytes, context: Context) -> None:
        self._context, self._driver, self._check = context, context.driver, context.check
        self._handle = c_void_p()
        self._check(
            self._driver.cuModuleLoadData(ctypes.byref(self._handle), cubin), "loading the kernels"
        )
        self._functions: dict[str, c_void_p] = {}
        self._most_shared: dict[str, int] = {}

    def prepare(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        values: Sequence[Any],
        shared_bytes: int,
    ) -> Callable[[int], None]:
        """What launches `kernel` on the stream whose handle it is given. `values` are ctypes
        objects, whose contents at each call are passed. MoeConvertError, now or then, if the driver
        refuses.
        """
        function = self._function(kernel, shared_bytes)
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        launch, sizes = self._driver.cuLaunchKernel, (*grid, threads, 1, 1, shared_bytes)

        # `values` is named so that it lives as long as the pointers.
        def run(stream: int, values: Sequence[Any] = values) -> None:
            if error := launch(function, *sizes, stream, pointers, None):
                self._check(
                    error,
                    f"kernel {kernel} with grid {grid}, {threads} threads, {shared_bytes} shared bytes",
                )

        return run

    def _function(self, kernel: str, shared_bytes: int) -> c_void_p:
        function = self._functions.get(kernel)
        if function is None:
            function = c_void_p()
            found = self._driver.cuModuleGetFunction(
                ctypes.byref(function), self._handle, kernel.encode()
            )
            self._check(found, f"kernel {kernel}")
            self._functions[kernel] = function
        if shared_bytes > self._most_shared.get(kernel, _UNASKED_SHARED_BYTES):
            error = self._driver.cuFuncSetAttribute(function, _MOST_DYNAMIC_SHARED, shared_bytes)
            self._check(error, f"kernel {kernel} with {shared_bytes} shared bytes")
            self._most_shared[kernel] = shared_bytes
        return function


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return declared(ctypes.CDLL("libcuda.so.1"))
    except OSError as e:
        raise MoeConvertError(
            f"the GPU's driver library is not here: {e}", "use device='cpu'"
        ) from None


def declared(driver: ctypes.CDLL) -> ctypes.CDLL:
    """`driver` with the types of what is used of it."""
    driver.cuCtxGetCurrent.argtypes = driver.cuCtxSetCurrent.argtypes = [c_void_p]
    driver.cuMemHostRegister_v2.argtypes = [c_void_p, c_size_t, c_uint]
    driver.cuMemHostUnregister.argtypes = [c_void_p]
    driver.cuModuleLoadData.argtypes = [c_void_p, c_char_p]
    driver.cuModuleGetFunction.argtypes = [c_void_p, c_void_p, c_char_p]
    driver.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    driver.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    driver.cuGetErrorString.argtypes = [c_int, c_void_p]
    return driver
