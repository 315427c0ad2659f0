"""Which functions compute the training steps of one model."""

from dataclasses import dataclass, field

from nanochat.model.gpu_attention import Kernel
from nanochat.model.loss_head import ChunkGradient, chunk_gradient


@dataclass
class Kernels:
    """What a model's forward and backward passes call in training; every model has its own, eager ones at first.

    attention: by whether a layer has a window. Without an entry: blocked matmuls on a CPU, torch's SDPA elsewhere.
    """

    attention: dict[bool, Kernel] = field(default_factory=dict)
    loss_head: ChunkGradient = chunk_gradient
