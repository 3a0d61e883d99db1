"""Memory budgets of the expert cache: how many bytes it may use, and how many experts that holds.

- *Budget*: bytes that experts may use in RAM, or on one GPU (`ram.py`; for GPUs
  `loader/cuda/experts/gpu_budget.py`).
- *Slots*: experts of one layer that the cache keeps (`slot_counts.py`).
- *Staging*: experts without a slot: they are being read, or they are used once and dropped
  (`expert_sizes.py`).

Invariant: slots and staging together never take more than the budget.
"""
