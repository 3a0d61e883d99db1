"""The command `moe-convert`: one small file a command, the only place that uses converter and
loader together.
"""
