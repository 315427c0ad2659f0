"""Benchmarks of every part: `python -m scripts.bench PART`, see __main__.py."""
