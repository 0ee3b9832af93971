"""Comparing a run with a pinned baseline, or with another run: has a method become worse? Needs no torch."""
