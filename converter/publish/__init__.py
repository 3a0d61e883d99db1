"""Publishing a converted folder: its model card, and one commit on the Hub.

Invariants: everything is checked before the first upload; a reader of the repository never sees a
partial model.
"""
