"""A CUDA GPU through torch: allocator, streams, events and copies.

Kernels are compiled at the first launch, and launched through CUDA's driver.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from formats.errors import MoeConvertError
from loader.cuda.device.device import Value, kernel_argument
from loader.cuda.device.driver import Context, Module
from loader.cuda.device.nvrtc import compile_kernels

MIN_CAPABILITY = (7, 0)
"""Volta: the oldest GPUs with dp4a, independent threads in a warp, and wheels of torch 2.6."""


class CudaDevice:
    """A `loader.cuda.device.device.Device`.

    kept: a folder that keeps compiled kernels; None: compile in each process. Raises
    MoeConvertError if the GPU is older than MIN_CAPABILITY.
    """

    def __init__(self, index: int, kept: Path | None = None) -> None:
        self.name = f"cuda:{index}"
        self.index = index
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.capability = (properties.major, properties.minor)
        self.model: str = properties.name
        if self.capability < MIN_CAPABILITY:
            needed = ".".join(map(str, MIN_CAPABILITY))
            raise MoeConvertError(
                f"{self.name} ({self.model}) has compute capability"
                f" {properties.major}.{properties.minor}; the kernels need {needed}",
                "use device='cpu'",
            )
        self._kept = kept
        with torch.cuda.device(index):
            # Creates the CUDA context if this is the process's first use of the GPU.
            torch.cuda.synchronize()
            self._context = Context()
        self._lock = threading.Lock()
        self._module: Module | None = None

    def empty(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.torch_device)

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.index)
        held = torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index)
        return free + held, total

    def release(self) -> None:
        with torch.cuda.device(self.index):
            torch.cuda.empty_cache()

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.index)

    def compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.index)

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def copy(self, target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def pin(self, memory: Tensor) -> bool:
        return self._context.pin(memory.data_ptr(), memory.numel())

    def unpin(self, memory: Tensor) -> None:
        self._context.unpin(memory.data_ptr())

    def prepare(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        args: Sequence[Value],
        *,
        shared_bytes: int = 0,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
    ) -> Callable[[], None]:
        values = [kernel_argument(value) for value in args]
        run = self._loaded().prepare(kernel, grid, threads, values, shared_bytes)
        # The launch keeps the tensors among `args` alive: the kernel has their addresses.
        return self._on_stream(run, args)

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        args: Sequence[Value],
        *,
        shared_bytes: int = 0,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
    ) -> None:
        self.prepare(kernel, grid, threads, args, shared_bytes=shared_bytes)()

    def _on_stream(self, run: Callable[[int], None], held: Sequence[Value]) -> Callable[[], None]:
        index = self.index
        enter = self._context.enter

        def launch(held: Sequence[Value] = held) -> None:
            stream = torch.cuda.current_stream(index).cuda_stream
            if torch.cuda.current_device() == index:
                enter()
                run(stream)
            else:
                with torch.cuda.device(index):
                    enter()
                    run(stream)

        return launch

    def _loaded(self) -> Module:
        with self._lock:
            if self._module is None:
                major, minor = self.capability
                cubin = compile_kernels(f"sm_{major}{minor}", self._kept)
                with torch.cuda.device(self.index):
                    self._module = Module(cubin, self._context)
            return self._module


def cuda_devices(names: Sequence[str], kept: Path | None = None) -> list[CudaDevice]:
    """Return the GPUs with these names: "cuda:N", or "cuda" for torch's current one.

    Raises MoeConvertError if one is missing, or too old (`CudaDevice`).
    """
    if not torch.cuda.is_available():
        cause = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise MoeConvertError(
            f"device {', '.join(names)}: torch {torch.__version__} {cause}",
            "use device='cpu', or install torch for CUDA and the GPU's driver",
        )
    result = []
    for name in names:
        index = torch.device(name).index
        index = torch.cuda.current_device() if index is None else index
        if index >= torch.cuda.device_count():
            raise MoeConvertError(
                f"device {name}: there are {torch.cuda.device_count()} GPUs", "count from cuda:0"
            )
        result.append(CudaDevice(index, kept))
    return result
