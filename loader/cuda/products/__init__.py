"""Products with packed weights on a GPU."""
