"""Answers from a loaded model: what a chat, a server and `generate` share, and the server itself.

- *Settings*: sampling and length of one answer (`settings.py`).
- *Template*: what turns messages into a prompt's tokens (`chat_template.py`).
- *Prefix cache*: a KV cache and the tokens that it holds (`prefix_cache.py`).
- *Generation*: one answer while it is generated (`generation.py`), its text piece by piece
  (`text_stream.py`).
- *Session*: the messages of one conversation with their prefix cache (`session.py`).

The server:

- *Body*: the JSON of a request, parsed and checked once (`bodies.py`).
- *Request*: the tokens of a prompt with everything that decides its answer (`request.py`).
- *Job*: a request in the queue or under way (`job.py`).
- *Engine*: the queue, and the thread that generates (`engine.py`).
- *Event*: a piece of an answer, its end, or a failure (`events.py`).
- *Prefix store*: prefix caches of finished answers, an LRU bounded in bytes (`prefix_store.py`).

Invariants: a prompt never begins with two BOS tokens. What was generated before an interrupt stays
in its generation, and the prefix cache stays usable. One generation of a model runs at a time; the
caller sees to that, for the server its engine. The server obeys a parameter, or refuses it by its
name. Only `app.py`, `exchange.py` and `server.py` import the packages of HTTP, only `grammar.py`
xgrammar.
"""
