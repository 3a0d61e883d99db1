"""Publishes a converted folder: its model card, and one commit on the Hub.

- *Model card*: README.md, made from the folder alone (`model_card.py`); a card without our mark
  is a user's and is kept (`folder_card.py`).
- *Publication*: the files of one commit (`hub_commit.py`).

Invariants: everything is checked before the first upload; a reader of the repository never sees a
partial model.
"""
