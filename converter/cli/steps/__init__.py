"""Steps that a command takes between its options and its output: sources opened, models loaded,
machines measured, a model compared with its original.

Commands call these functions; steps never call commands. They print only progress and notes.
"""
