"""The commands of moe-convert: `<name>_command.py` holds the command `<name>`.

A file is imported when its command runs. Heavy imports (torch, transformers) stand inside the
functions that use them.
"""
