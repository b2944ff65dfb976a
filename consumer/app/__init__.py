"""What a person or a supervisor starts: the command line, the daemon with its parts, the checks."""
