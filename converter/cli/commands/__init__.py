"""The commands of moe-convert, one file each; imported when they run."""
