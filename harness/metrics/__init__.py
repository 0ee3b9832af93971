"""Measures that no method is trained on: diversity and drift from the base model."""
