"""Modules over packed weights, in the places of transformers' own."""
