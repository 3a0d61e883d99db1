"""The conversation of `moe-convert chat`.

- *Message*: one input of the user, one or several lines (`message_input.py`).
- *Slash command*: an input that begins with / and acts on the session (`slash_commands.py`).
- *Chat loop*: reads messages, runs slash commands, prints answers (`chat_loop.py`).
- *Chat server*: a server with OpenAI's API whose model answers (`chat_server.py`, `remote_*.py`).
- *Page*: the chat in a browser, over a chat server (`web_*.py`, `page_*.py`).

Invariants: answers go to stdout, everything else to stderr. At a terminal, an error or Ctrl-C ends
one answer, not the chat.
"""
