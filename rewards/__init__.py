"""Rewards: one final `Reward` per file, or one tight family."""
