"""One file for each command; nothing heavy is imported before a command needs it, so that --help is immediate."""
