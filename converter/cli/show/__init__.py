"""Everything that commands print: results to stdout; progress, notes and errors to stderr.

- *Output*: the destination of a command's results, notes and progress (`console.py`).
- *Facts*: plain values of a result, for `--json`; tables show the same values as text.
- *Failure*: an exception as message, next step and exit code (`failures.py`).

Invariant: text from files passes `printable` before it reaches a terminal (`terminal.py`).
"""
