import ctypes
import threading

import pytest
import torch
from cuda_host import COMPILER, host_library

from formats.errors import MoeConvertError
from formats.reading.reader import aligned_bytes
from loader.cuda.device import driver, nvrtc
from loader.cuda.device.device import kernel_argument

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_nvrtc = pytest.mark.skipif(
    not nvrtc.is_available(), reason="no NVRTC: install the extra [cuda-tests]"
)


@pytest.fixture
def context():
    return driver.Context(driver.declare_functions(host_library()))


@pytest.fixture
def module(context):
    return driver.Module(b"cubin", context)


def quantize(module, x, out, **changes):
    values = [kernel_argument(value) for value in (x, x.shape[1], out)]
    run = module.prepare(
        "quantize_f32", (1, x.shape[0], 1), 128, values, changes.get("shared_bytes", 0)
    )
    return run, values


@needs_compiler
def test_a_launch_passes_pointers_and_numbers_as_the_kernel_takes_them(module):
    x, out = torch.ones(2, 256), torch.zeros(2, 4, 80, dtype=torch.uint8)
    quantize(module, x, out)[0](7)
    assert (out[:, :, :64] == 127).all()


@needs_compiler
def test_a_prepared_launch_passes_what_its_values_hold_at_the_call(module):
    x = torch.ones(1, 256)
    out, other = torch.zeros(2, 1, 4, 80, dtype=torch.uint8).unbind()
    run, values = quantize(module, x, out)
    values[2].value = other.data_ptr()
    run(7)
    assert not out.any() and other.any()


@needs_compiler
def test_more_shared_memory_than_a_kernel_has_by_itself_is_asked_for(module):
    x, out = torch.ones(1, 256), torch.zeros(1, 4, 80, dtype=torch.uint8)
    quantize(module, x, out, shared_bytes=60 << 10)[0](7)
    assert out.any()
    with pytest.raises(
        MoeConvertError, match="quantize_f32 with 102400 shared bytes: invalid value"
    ):
        quantize(module, x, out, shared_bytes=100 << 10)


@needs_compiler
def test_a_refused_launch_names_kernel_grid_and_reason(module):
    x, out = torch.ones(1, 256), torch.zeros(1, 4, 80, dtype=torch.uint8)
    with pytest.raises(
        MoeConvertError, match=r"quantize_f32 with grid \(1, 1, 1\), 128 threads.*: invalid value"
    ):
        quantize(module, x, out)[0](8)


@needs_compiler
def test_a_kernel_that_is_not_there_is_named(module):
    with pytest.raises(MoeConvertError, match="kernel nothing: named symbol not found"):
        module.prepare("nothing", (1, 1, 1), 32, [], 0)


@needs_compiler
def test_an_image_that_the_driver_refuses_is_an_error(context):
    with pytest.raises(
        MoeConvertError, match="loading the kernels: device kernel image is invalid"
    ):
        driver.Module(b"broken", context)


@needs_compiler
def test_a_thread_that_has_no_context_enters_it_before_it_pins(context):
    memory, answers = aligned_bytes(8192), []
    thread = threading.Thread(target=lambda: answers.append(context.pin(memory.data_ptr(), 8192)))
    thread.start()
    thread.join()
    assert answers == [True]


@needs_compiler
def test_memory_that_the_system_does_not_pin_is_told(context):
    assert not context.pin(aligned_bytes(8192).data_ptr() + 1, 8192)


@needs_nvrtc
def test_an_unknown_architecture_is_an_error_with_the_compilers_words():
    with pytest.raises(MoeConvertError, match=r"for sm_12: .*invalid value for --gpu-architecture"):
        nvrtc.compile_kernels("sm_12")


@needs_nvrtc
def test_compiled_kernels_are_kept_and_a_broken_copy_is_not_used(tmp_path, monkeypatch):
    source = tmp_path / "kernels"
    source.mkdir()
    (source / "moe_kernels.cu").write_text(
        '#include "a.cuh"\nextern "C" __global__ void f(float* y) { *y = kValue; }'
    )
    (source / "a.cuh").write_text("constexpr float kValue = 1.0f;\n")
    monkeypatch.setattr(nvrtc, "KERNELS", source)
    first = nvrtc.compile_kernels("sm_80", tmp_path / "kept")
    [kept] = (tmp_path / "kept").iterdir()
    monkeypatch.setattr(nvrtc, "_compile", lambda *args: b"compiled again")
    assert nvrtc.compile_kernels("sm_80", tmp_path / "kept") == first
    kept.write_bytes(kept.read_bytes()[:-1])
    assert nvrtc.compile_kernels("sm_80", tmp_path / "kept") == b"compiled again"
    (source / "a.cuh").write_text("constexpr float kValue = 2.0f;\n")
    nvrtc.compile_kernels("sm_80", tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_values_become_what_a_kernel_takes():
    values = [kernel_argument(value) for value in (torch.ones(1), 3, 2.5, (ctypes.c_void_p * 2)())]
    assert [type(value).__name__ for value in values] == [
        "c_void_p",
        "c_long",
        "c_float",
        "c_void_p_Array_2",
    ]
