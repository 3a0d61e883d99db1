"""Steps that a command takes between its options and its output: sources opened, models loaded,
machines measured, a model compared with its original.

The only room of the command line that calls `converter` and `loader` in one step. It prints nothing
but progress.
"""
