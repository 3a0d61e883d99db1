"""Runs the command moe-convert as `python -m converter`."""

from converter.cli.main import main

main()
