"""Headers and numbers shared by both native libraries, and the search for a built library.

- *ABI*: status codes, dtypes and instruction sets of the C interfaces (`abi.h`; `abi.py` has the
  same numbers for Python).
- *List of packings*: `packings.h`, the one native list. Ids, sizes and kernel tables follow from
  it.
- *Instruction set*: portable, AVX2 or AVX-512, chosen at run time (`cpu_features.h`).

Files: `tile_layout.h` computes sizes from the list, `half_float.h` converts fp16,
`instruction_sets.cmake` has the compiler options, `libraries.py` loads the library of a package.

Invariants: every instruction set gives the same bits. Ids of packings never reach a file.
"""
