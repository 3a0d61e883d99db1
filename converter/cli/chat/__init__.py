"""The conversation of `moe-convert chat`: input, slash commands, the loop."""
