"""Codecs, sounds and captions, generation and its evaluation."""
