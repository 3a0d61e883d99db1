"""Turns messages or text into the tokens of a prompt.

- *Template*: the rule from messages to tokens, a Jinja program or plain text (`chat_template.py`).
- *Request prompts*: the same for requests over HTTP, checked field by field (`request_prompts.py`).

Invariants: a prompt has at least one token and never begins with two BOS tokens. A template is
foreign code: any exception it raises becomes one error with a next step.
"""
