"""Bits per byte, CORE, the offline suite and their report."""
