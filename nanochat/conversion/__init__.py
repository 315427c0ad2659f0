"""Checkpoints to and from Hugging Face, tied and grown models."""
