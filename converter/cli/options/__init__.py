"""Options of the commands, and the checks of their values before any work begins.

An option that two commands have stands in `shared_options.py`. Its help says what it does, then the
unit or the choices, then the default.
"""
