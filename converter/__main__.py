"""python -m converter: the command moe-convert."""

from converter.cli.main import main

main()
