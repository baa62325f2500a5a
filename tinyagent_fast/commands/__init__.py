"""One module a command: flags in, one call, an exit code out."""
