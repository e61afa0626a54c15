"""What the command line can do, a command or a group of them a file: `add_to` declares its arguments, `run` does it."""
