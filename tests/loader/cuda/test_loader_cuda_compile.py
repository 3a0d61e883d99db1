"""The kernels compile for every GPU generation and keep their numbers in registers."""

import functools
import re
import struct

import pytest
from project_paths import SUPPORT

from formats.packing import PACKINGS
from loader.cuda.device import nvrtc

pytestmark = pytest.mark.skipif(
    not nvrtc.is_available(), reason="no NVRTC: install the extra [cuda-tests]"
)

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90")
TEXT = (SUPPORT / "gpu/cuda_host/names.inc").read_text()
SUFFIXES = [name.removeprefix("tile32-").replace("-", "_") for name in PACKINGS]
NAMES = [
    *re.findall(r"X\((\w+)\)", TEXT),
    *(
        name.replace("##", "").replace("Q", q)
        for name in re.findall(r"X\((\w+##Q\S*)\)", TEXT)
        for q in SUFFIXES
    ),
]
PRODUCTS = [
    name for name in NAMES if name.startswith(("gemv_", "gemm_", "gate_up_", "down_", "add_pairs"))
]

FRAME_SIZE = 0x11
"""Attribute in a cubin's section .nv.info: bytes of local memory, for arrays and spills."""


@functools.cache
def compiled(arch):
    return nvrtc.compile_kernels(arch)


def frame_sizes(cubin):
    """Return the bytes of local memory of each kernel in a cubin, an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names_at = struct.unpack_from("<HH", cubin, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]

    def text(section, at):
        begin = headers[section][4] + at
        return cubin[begin : cubin.index(b"\0", begin)].decode()

    by_name = {text(names_at, header[0]): header for header in headers}
    _, _, _, _, at, size, strings, *_ = by_name[".symtab"]
    symbols = [
        text(strings, struct.unpack_from("<I", cubin, at + 24 * i)[0]) for i in range(size // 24)
    ]
    _, _, _, _, at, size, *_ = by_name[".nv.info"]
    sizes, end = {}, at + size
    while at < end:
        form, attribute, length = struct.unpack_from("<BBH", cubin, at)
        if form != 4:
            length = 0
        elif attribute == FRAME_SIZE:
            symbol, value = struct.unpack_from("<II", cubin, at + 4)
            sizes[symbols[symbol]] = value
        at += 4 + length
    return sizes


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_in_the_code_for_each_generation(arch):
    assert set(frame_sizes(compiled(arch))) >= set(NAMES)


@pytest.mark.parametrize("arch", ARCHS)
def test_products_keep_their_numbers_in_registers(arch):
    # A few spilled words are the compiler's choice; an array in local memory would be hundreds of
    # bytes.
    sizes = frame_sizes(compiled(arch))
    assert {name: sizes[name] for name in PRODUCTS if sizes[name] > 32} == {}
