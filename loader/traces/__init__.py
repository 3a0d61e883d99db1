"""Routing traces: recording, replay with eviction policies, and slots chosen from them.

- *Trace*: the experts that each token used in each layer, and those that a prefetcher would have
  guessed (`trace.py`).
- *Recording*: running a model with hooks on its experts (`record_trace.py`, `routing_recorder.py`).
- *Replay*: running a trace through slots and a policy, without a model (`replay.py`). It counts the
  bytes that are read (`replay_reads.py`) and reports results as JSON (`replay_report.py`).
- *Belady*: the optimal policy; it needs to know future requests.
- *Slot shares*: slots of each layer that minimize a trace's misses (`slot_shares.py`).
- *Tier misses*: misses of a GPU's slots and of the RAM behind them (`tier_misses.py`).

Invariant: replay uses the cache's own policy objects and calls them in the cache's order.
"""
