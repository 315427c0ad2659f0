"""Odd inputs, run through the product one by one: see __main__.py."""
