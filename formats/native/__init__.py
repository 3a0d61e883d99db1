"""Headers and numbers that both native libraries share, and the search for a library.

`abi.h` has the status codes, `packings.h` the list of packings, `cpu_features.h` the instruction
sets. `abi.py` gives the same numbers to Python; `libraries.py` finds and loads the library of a
package.
"""
