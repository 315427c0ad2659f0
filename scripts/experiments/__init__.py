"""Experiments: the tables of dev/LOG.md."""
