"""One answer: prompt, settings, tokens one by one, text piece by piece.

- *Settings*: sampling and length (`settings.py`). *Sampler*: chooses the next token (`sampler.py`).
- *Template*: turns messages into a prompt's tokens (`chat_template.py`, `prompts.py`).
- *Grammar*: a JSON schema that the answer follows (`grammar.py`, `schema_check.py`); only it
  imports xgrammar.

Invariants: a prompt never begins with two BOS tokens; a text piece never ends inside a character or
a stop string.
"""
