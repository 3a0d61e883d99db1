"""A model's objects in a forked child process and in a copy of the model.

- *Fork*: a child process has the parent's memory, but none of its threads (`forks.py`).
- *Copy*: copy.deepcopy or pickle of a model (`copies.py`).
"""
