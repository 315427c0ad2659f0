"""The way of a batch: sources, preparation, tokenizer, token store, data loader."""
