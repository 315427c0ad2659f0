"""Before the first step: choose the kernels of a model and compile it, so that failures come early."""

import logging
import re
import time

import torch

from nanochat.config.settings import Settings
from nanochat.gpt import GPT, Block
from nanochat.hardware import compiler_problem
from nanochat.optim import MuonAdamW
from nanochat.runtime import first_line
from nanochat.system.environment import import_compiler
from nanochat.training.fp8 import enable_fp8
from nanochat.training.grad_accumulation import is_out_of_memory
from nanochat.training.kernel_selection import select_attention
from nanochat.training.progress import duration

logger = logging.getLogger(__name__)


def choose_kernels(model: GPT, settings: Settings) -> None:
    """To be called before compile_model(): FP8 if the settings say so, and attention's kernels; logs the reasons."""
    if settings.fp8:
        grouped = model.route == "grouped" and model.config.has_experts
        without = "; those of experts stay in the activations' dtype: route=grouped has its own kernel"
        logger.info(f"FP8: {len(enable_fp8(model))} matrices{without if grouped else ''}")
    for choice in select_attention(model, compiled=settings.compile):
        logger.info(choice)


def compile_model(model: GPT, rows: int, optimizer: MuonAdamW) -> float:
    """Compile and try one forward and backward pass on zeros; returns the seconds that it took.

    Falls back to eager, logging why, if compilation fails. rows: the micro-batch size.
    """
    start = time.perf_counter()
    problem = compiler_problem() if model.device.type == "cpu" else None
    if problem is None:
        import_compiler()
        model.compile()
        # On a CPU an update takes 0.9 times as long: in short runs of small models less is saved than compiling costs.
        if model.device.type == "cuda":
            optimizer.compile()
        try:
            ids = torch.zeros(rows, model.config.sequence_len, dtype=torch.long, device=model.device)
            model(ids, ids, loss_reduction="sum").backward()
        except Exception as error:  # any failure inside the compiler: eager computes the same
            if not is_out_of_memory(error):  # eager would need more, not less; the first step halves its micro-batch
                problem = compiler_message(error)
        else:
            logger.info(f"compiled in {duration(time.perf_counter() - start)}")
        model.zero_grad(set_to_none=True)
    if problem is not None:
        model.uncompile()
        optimizer.uncompile()
        logger.info(f"running without torch.compile ({problem})")
    return time.perf_counter() - start


def compiler_message(error: Exception) -> str:
    """The C++ compiler's own message where torch's error quotes it: torch's first line says only that it failed."""
    lines = str(error).splitlines()
    quoted = next((line.strip()[:300] for line in lines[1:] if re.search(r"\b(error|cannot find)\b", line)), None)
    return f"{type(error).__name__}: {first_line(error)}{f': {quoted}' if quoted else ''}"


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether the model's steps run through torch.compile."""
    return isinstance(model, GPT) and model.block_forward is not Block.forward
