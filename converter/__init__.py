"""Converts a mixture-of-experts checkpoint to the expert-addressable format of moe-convert.

- `convert.py` converts in one call; `source_origin.py` repairs a converted folder from its source.
- `convert_options.py`, `solver_errors.py` and `squared_error.py` are shared by several rooms and
  import none of them.
- Rooms, from the source to the folder: `checkpoint`, `forward`, `solvers`, `calibration`, `recipe`,
  `journal`, `output`, `publish`, and `conversion`, which runs them; `cli` is the command line.
"""

__version__ = "0.1.0"
