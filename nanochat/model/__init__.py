"""What gpt.py is made of: attention and its kernels, routing, the loss head."""
