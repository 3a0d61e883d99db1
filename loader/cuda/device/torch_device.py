"""A CUDA GPU by torch: its allocator, streams, events and copies; kernels by the driver, compiled
when first needed.
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

LEAST_CAPABILITY = (7, 0)
"""Volta: the first with dp4a, independent threads in a warp, and torch 2.6 wheels."""


class CudaDevice:
    """A `loader.cuda.device.device.Device`. kept: a folder for compiled kernels, None for none."""

    def __init__(self, index: int, kept: Path | None = None) -> None:
        self.name, self.index = f"cuda:{index}", index
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.capability = (properties.major, properties.minor)
        self.model: str = properties.name
        if self.capability < LEAST_CAPABILITY:
            raise MoeConvertError(
                f"{self.name} ({self.model}) has compute capability {properties.major}.{properties.minor}, the kernels"
                f" need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}",
                "use device='cpu'",
            )
        self._kept = kept
        with torch.cuda.device(index):
            # Makes the context, where this is the first use.
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
        self, kernel: str, grid: tuple[int, int, int], threads: int, args: Sequence[Value], *, shared_bytes: int = 0,
        reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = (),
    ) -> Callable[[], None]:  # fmt: skip
        values = [kernel_argument(value) for value in args]
        # Tensors among `args` are held by the closure: their memory must stay.
        return self._on_stream(
            self._loaded().prepare(kernel, grid, threads, values, shared_bytes), args
        )

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, args: Sequence[Value], *, shared_bytes: int = 0,
        reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.prepare(kernel, grid, threads, args, shared_bytes=shared_bytes)()

    def _on_stream(self, run: Callable[[int], None], held: Sequence[Value]) -> Callable[[], None]:
        index, enter = self.index, self._context.enter

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
                cubin = compile_kernels(f"sm_{self.capability[0]}{self.capability[1]}", self._kept)
                with torch.cuda.device(self.index):
                    self._module = Module(cubin, self._context)
            return self._module


def cuda_devices(names: Sequence[str], kept: Path | None = None) -> list[CudaDevice]:
    """The devices of `names`, "cuda" (the present one) or "cuda:N". MoeConvertError if one is not
    there.
    """
    if not torch.cuda.is_available():
        build = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise MoeConvertError(
            f"device {', '.join(names)}: torch {torch.__version__} {build}",
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
