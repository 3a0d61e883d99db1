"""Publishes a converted folder: its model card, and one commit on the Hub.

- *Model card*: README.md, made from the folder alone: metadata and text (`model_card.py`), text by
  section (`card_usage.py`, `card_memory.py`, `card_quality.py`, `card_recipe.py`).
- *Part*: the lines of a card between our two marks. The rest is the user's (`card_parts.py`).
- *Carried over*: fields of the source's card that the converted model's card has too
  (`card_metadata.py`, `folder_card.py`).
- *Publication*: the files of one commit (`hub_commit.py`).

Invariants: everything is checked before the first upload; a reader of the repository never sees a
partial model; no text of a user is lost.
"""
