"""Numbers of the shared part of both C ABIs; formats/native/abi.h has the same."""

from enum import IntEnum

import torch


class Status(IntEnum):
    """Status codes of a native call. abi.h describes them."""

    OK = 0
    PACKING = 1
    SIZE = 2
    ISA = 3
    INDEX = 4
    MEMORY = 5
    MISSING = 6
    ARGUMENT = 7
    NON_FINITE = 8
    OVERFLOW = 9


ISAS = {"auto": -1, "portable": 0, "avx2": 1, "avx512": 2}
"""Instruction sets. "auto" is the best one of this processor."""

ISA_NAMES = {number: name for name, number in ISAS.items()}

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
