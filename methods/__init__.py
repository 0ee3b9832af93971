"""Methods: one final `FineTuner` per file; the file's name, with dashes, is its name on the command line."""
