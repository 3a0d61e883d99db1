"""Experts on GPUs: slots in GPU memory, behind them a tier of page-locked RAM, then the files.

- *Link*: the connection between host RAM and a GPU (PCIe or NVLink).
- *Tier*: a cache of experts in page-locked RAM (`pinned_tier.py`). It holds GPU cache misses, and
  the copies over the link read from it. `loader.experts.stats.TierCounters` is the part of it that
  `ExpertCache` needs.
- *Tier use*: a claim on one expert of the tier; a claimed expert is not evicted (`tier_use.py`).
- *Reader*: fills a GPU's slots from the tier by asynchronous copies (`gpu_reader.py`).
- *CPU share*: the missed experts that the CPU computes from RAM while the link copies others
  (`cpu_share.py`).
- *Budget*: bytes of GPU memory for slots and staging (`gpu_budget.py`).

`stack.py` builds all of it for a model; `out_of_memory.py` frees slots when a forward pass runs out
of GPU memory.

Invariants: CUDA events order every copy against the kernels that use its buffer. Only prefetches
and a full tier make the host wait for a copy. Nothing is written back.
"""
