"""The command `moe-convert`. Only this room uses both `converter` and `loader`.

- `main.py`: the command group and the exit codes.
- `commands/`: one file per command, imported when it runs.
- `options/`: click options that commands share, and early checks of their values.
- `steps/`: the work between options and output: open a source, load a model, measure a machine.
- `show/`: everything a user sees: text, tables, progress, plots, errors.
- `chat/`: the conversation of `moe-convert chat`.

Invariants: results go to stdout, everything else to stderr. Every error is one message with a next
step and an exit code.
"""
