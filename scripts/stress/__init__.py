"""Stress tests: kills, odd inputs, mutations, pages, releases, a GPU."""
