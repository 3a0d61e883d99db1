"""Answers from a loaded model, for `generate`, `chat` and the HTTP server.

- *Prompt*: the tokens that an answer follows (`prompts/`).
- *Answer*: tokens chosen one by one, and their text piece by piece (`answers/`).
- *Prefix cache*: a KV cache with the tokens it holds (`prefixes/`).
- *Session*: the messages of one conversation with their prefix cache (`session.py`).
- *Context*: the tokens of a prompt with its answer (`context.py`).

The server:

- *Job*: a request that waits or runs (`job.py`).
- *Engine*: the queue, and the one thread that calls the model (`engine.py`).
- *Metrics*: counters for Prometheus (`metrics.py`).
- *HTTP*: OpenAI's API over an engine (`http/`).

Imports go in one direction: `http` → this room → `answers` → `prefixes`; `http` and this room →
`prompts` → `answers`.

Invariants: one generation of a model runs at a time; the caller ensures it, for the server its
engine. After an interrupt the generated part stays readable and the prefix cache stays valid. The
server obeys a parameter or rejects it by name. Only `http/app.py`, `http/exchange.py` and
`http/server.py` import HTTP packages, only `answers/grammar.py` imports xgrammar.

Two token loops exist. `Generation` calls transformers' generate, which obeys every field of
generation_config.json. `generate_tokens` serves the engine: it can be cancelled between two layers,
samples with its own random generator, and supports grammars and log-probabilities.
"""
