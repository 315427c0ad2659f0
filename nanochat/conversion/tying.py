"""Tying and untying a trained model: its embedding and its output matrix become one table, or two.

Pure functions of the configuration, the state dict and the optimizer's state ('<parameter>.<quantity>', as
MuonAdamW.state_dict() gives it). A modality with tables of its own (output_layers="separate") is treated like the text.
"""

import dataclasses

import torch
import torch.nn.functional as F

from nanochat.config.settings import Settings
from nanochat.gpt import GPT, GPTConfig
from nanochat.system.environment import UserError

PROJECTION = "output_projection.weight"
# What tied() can keep, the plainest first.
KEEP = {
    "output": "the output matrix, exactly; a token's embedding becomes the direction of its row",
    "input": "the embedding, exactly; its rows take the length of the output matrix's",
    "both": "the mean of both directions, in the length of the output matrix's rows",
    "projection": "the embedding, exactly; the output is this times the output projection that comes nearest",
}

State = dict[str, torch.Tensor]


def _tables(config: GPTConfig) -> list[tuple[str, str]]:
    """Names of each embedding table and of the output matrix that belongs to it."""
    further = [m.name for m in config.modalities] if config.separate else []
    own = [(f"transformer.wtes.{name}.weight", f"lm_heads.{name}.weight") for name in further]
    return [("transformer.wte.weight", "lm_head.weight"), *own]


def untied(
    config: GPTConfig, state: State, optimizer_state: State | None = None, betas=Settings.adam_betas
) -> tuple[GPTConfig, State, State | None]:
    """The same function with an output matrix of its own: wte, or wte @ P where the model has an output projection P.

    wte [rows, C] stays as it is, padding rows included; the other tensors are shared with the arguments, not copied.
    betas: AdamW's, of the run that goes on. UserError for a model that is untied already.

    Both matrices inherit AdamW's moments of the tied one, which summed the gradients of both roles. With a projection
    the first moment is folded like the matrix. A second moment cannot be: it forgot the signs that would cancel in the
    sum over a row. Starting it at zero under an old first moment would divide by almost nothing wherever the next
    gradient is small, and with the old step count take its zeros for measured ones. So the matrix starts as if the
    folded average were the one gradient that AdamW has seen: m = (1 - b1) a, v = (1 - b2) a^2, step = 1. Then bias
    correction is right for both moments, and by Cauchy-Schwarz no next gradient moves an entry by more than
    sqrt((1 + b1^2 / b2) (1 + b2)) / (1 + b1) times the rate: 1.004 for betas of (0.8, 0.95).
    """
    if not config.tie_weights:
        raise UserError("tie_weights=False: the model is untied already")
    projection = state[PROJECTION].cpu().double() if config.use_output_projection else None
    if config.output_projection_residual and projection is not None:
        projection = projection + torch.eye(len(projection), dtype=torch.float64)

    def fold(matrix: torch.Tensor) -> torch.Tensor:  # in float64, on the CPU: logits are equal to float32's rounding
        if projection is None:
            return matrix.clone()
        return (matrix.cpu().double() @ projection).to(matrix.dtype).to(matrix.device)

    new = {name: tensor for name, tensor in state.items() if name != PROJECTION}
    new |= {lm_head: fold(state[wte]) for wte, lm_head in _tables(config)}
    config = dataclasses.replace(
        config, tie_weights=False, use_output_projection=False, output_projection_residual=False
    )
    if optimizer_state is None:
        return config, new, None
    trained = {name: t for name, t in optimizer_state.items() if not name.startswith(f"{PROJECTION}.")}
    for wte, lm_head in _tables(config):
        if f"{wte}.step" not in trained:  # a modality's tables may not have had their first step yet
            continue
        step, average, square = (trained[f"{wte}.{name}"].clone() for name in ("step", "exp_avg", "exp_avg_sq"))
        if projection is not None:
            average = fold(average / (1 - betas[0] ** max(1, int(step))))
            step, average, square = torch.tensor(1), average * (1 - betas[0]), average.square() * (1 - betas[1])
        trained |= {f"{lm_head}.step": step, f"{lm_head}.exp_avg": average, f"{lm_head}.exp_avg_sq": square}
    return config, new, trained


def tied(config: GPTConfig, state: State, keep: str = "output") -> tuple[GPTConfig, State]:
    """The nearest model with one table for both roles; `keep` says what of the old one stays, see KEEP.

    As an input a row counts by its direction alone, for the embedding is normalised; as an output by its values. Only
    data can tell which loss is smaller: scripts.convert measures all. After untied() with a projection, "projection"
    finds it again: P minimises |wte P - lm_head|. The optimizer begins anew, for the one table gets the sum of both
    gradients, that of the input at another length. UserError for a model that is tied already.
    """
    if config.tie_weights:
        raise UserError("tie_weights=True: the model is tied already")
    new = dict(state)
    rows = {}
    for wte, lm_head in _tables(config):
        embedding, output = rows[wte] = state[wte], new.pop(lm_head)
        direction = F.normalize(embedding, dim=1)
        if keep == "both":
            direction = F.normalize(direction + F.normalize(output, dim=1), dim=1)
        if keep in ("input", "both"):
            new[wte] = direction * output.norm(dim=1, keepdim=True)
        elif keep == "output":
            new[wte] = output
    if keep == "projection":  # padding has no say
        ids = [config.vocab_size, *(m.size for m in config.modalities)] if config.separate else [config.vocabulary.size]
        cut = ([table[:n] for table in tables] for n, tables in zip(ids, rows.values(), strict=True))
        embedding, output = (torch.cat(tables).cpu().double() for tables in zip(*cut, strict=True))
        solved = torch.linalg.lstsq(embedding, output).solution
        new[PROJECTION] = solved.to(state[wte].dtype).to(state[wte].device)
    return dataclasses.replace(config, tie_weights=True, use_output_projection=keep == "projection"), new


def untie(model: GPT, optimizer_state: State | None = None, betas=Settings.adam_betas) -> State | None:
    """untied() in place, in the middle of a training; returns the optimizer's state for the changed parameters."""
    config, state, trained = untied(model.config, model.state_dict(), optimizer_state, betas)
    with torch.device("meta"):
        new = GPT(config)
    for name in ("lm_head", "lm_heads"):
        if hasattr(new, name):
            setattr(model, name, getattr(new, name).to_empty(device=model.device))
    if hasattr(model, "output_projection"):
        del model.output_projection
    model.config = config
    model.load_state_dict(state)
    return trained
