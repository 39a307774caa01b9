"""One module per claim; its header says the command, the machine and what to expect."""
