"""Formats of other repositories: nanochat's own checkpoints, pickles, foreign weights."""
