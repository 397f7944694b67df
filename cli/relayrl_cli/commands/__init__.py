"""One module a command, imported after parsing; each has `run(arguments) -> exit status`."""
