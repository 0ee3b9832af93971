"""Named experiments, one YAML file each; `python -m harness list presets` shows them."""
