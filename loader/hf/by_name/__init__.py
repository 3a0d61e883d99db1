"""Loading by name: transformers' from_pretrained and pipeline accept converted models.

- *Import hook*: a finder in sys.meta_path that waits until transformers is imported
  (`import_hook.py`).
- *Registry entry*: the class that transformers' registry returns for a model type
  (`registry_entry.py`); `registration.py` adds the entries.
- *Named folder*: a converted folder or repository that the caller named (`load_by_name.py`). Its
  arguments are translated by `arguments.py` and `device_map.py`.

Invariants: `import loader` imports neither torch nor transformers. Ordinary checkpoints load by
transformers' own class. An argument that a converted model does not support raises RecipeError.
`loader/__init__.py` passes the function that loads, so this room does not import it.
"""
