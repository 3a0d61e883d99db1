"""Plans of memory and speed before a model is loaded, and trial runs that check them.

- *Plan*: what fits within a memory budget, and the expected tokens per second (`memory_plan.py`,
  `gpu_plan.py`).
- *Sizes*: bytes that a model needs, from its index or a checkpoint's headers (`ModelSizes`).
- *Machine*: measured or given speeds of memory, disk and link.
- *Trial run*: decodes a few tokens, to compare with a plan (`trial_run.py`).

Invariant: a plan uses numbers only; it reads no weights.
"""
