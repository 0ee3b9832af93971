"""Streams a run's records to TensorBoard and Weights & Biases; the JSON lines stay what everything is read from."""
