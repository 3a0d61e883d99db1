"""One token through a whole model on a GPU: launches prepared once, one wait a layer for the
router's choice.
"""
