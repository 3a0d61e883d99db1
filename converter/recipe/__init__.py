"""Recipes: which packing and which solver each weight gets.

- *Recipe*: data: bits, group sizes, solver and options by kind of weight (`recipes.py`), from the
  command line or a JSON file (`recipe_file.py`).
- *Bit rule*: other bits for some layers, experts or projections (`bit_rules.py`).
- *Bit budget*: bytes to spend; rules are chosen so that they reduce the error most
  (`bit_budget.py`).

Invariants: a recipe is stored in the index under the names of its options; the same recipe gives
the same bytes.
"""
