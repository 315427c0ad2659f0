"""A frozen language model that learns audio through adapters."""
