"""Models: one adapter per file that makes a family of generators look like a `DiffusionModel`."""
