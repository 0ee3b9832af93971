"""Prompt suites: one per file, with `suite()` returning a `PromptSuite`."""
