"""One answer: settings, tokens one by one, text piece by piece.

- *Request*: everything that decides one answer of the server (`request.py`).
- *Token loop*: one forward pass per token over a KV cache (`token_loop.py`).
- *Sampler*: chooses the next token from logits (`sampler.py`).
- *Grammar*: a JSON schema that the answer must match (`grammar.py`, `schema_check.py`).
- *Text stream*: tokens to text (`text_stream.py`); *tool calls* in that text (`tool_calls.py`).
- *Streamed answer*: the answer to one request, as pieces (`streamed_answer.py`).
- *Event*: a piece, the end, or a failure of an answer (`events.py`).
- *Generation*: one answer by transformers' generate, for chat and `generate` (`generation.py`),
  with its *settings* (`settings.py`).

Invariant: a piece of text never ends inside a character or inside a stop string.
"""
