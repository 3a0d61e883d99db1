"""Routing traces: recording, replay against cache policies, shares of slots.

- *Trace*: the experts that each token used in each layer, and those that a prefetcher would have
  guessed (`trace.py`).
- *Recording*: a model run with listeners on its routers (`record_trace.py`, `routing_recorder.py`).
- *Replay*: a trace run through a cache policy without a model (`replay.py`, `replay_report.py`).
- *Slot shares*: slots for each layer, chosen from a trace (`slot_shares.py`).
"""
