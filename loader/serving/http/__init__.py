"""The HTTP server: OpenAI's API over one engine.

- *Body*: the JSON of a request, checked once (`bodies.py`).
- *Request maker*: a body to a `Request`, with the model's defaults (`request_maker.py`).
- *Exchange*: one request and its answer, whole or streamed (`exchange.py`, `answer_json.py`).
- *Access*: the API key, or loopback only (`access.py`).
- *App*: the routes (`app.py`). *Server*: runs the app until a signal (`server.py`).

Invariants: the server obeys a parameter or rejects it by name. Only `app.py`, `exchange.py` and
`server.py` import HTTP packages.
"""
