"""Answers from a loaded model: what a chat, a server and `generate` share. No terminal, no network.

- *Settings*: sampling and length of one answer (`settings.py`).
- *Template*: what turns messages into a prompt's tokens (`chat_template.py`).
- *Prefix cache*: a KV cache and the tokens that it holds (`prefix_cache.py`).
- *Generation*: one answer while it is generated (`generation.py`), its text piece by piece (`text_stream.py`).
- *Session*: the messages of one conversation with their prefix cache (`session.py`).

Invariants: a prompt never begins with two BOS tokens. What was generated before an interrupt stays in its generation,
and the prefix cache stays usable. One generation of a model runs at a time; the caller sees to that.
"""
