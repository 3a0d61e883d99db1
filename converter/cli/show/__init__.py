"""What commands print: tables, plots, live lines; results to stdout, everything else to stderr."""
