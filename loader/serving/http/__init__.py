"""The HTTP server: OpenAI's interface over the engine.

- *Body*: the JSON of a request, checked once (`bodies.py`). *Exchange*: one request and its answer
  (`exchange.py`).

Invariants: the server obeys a parameter, or refuses it by its name. Only `app.py`, `exchange.py`
and `server.py` import the packages of HTTP.
"""
