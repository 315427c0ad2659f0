"""Parts of gpt.py: attention and its kernels, routing to experts, tables, the loss head, parameter groups."""
