"""KV-cache generation: prefill the prompt once, then decode one token per step."""

from collections.abc import Iterator

import torch

from nanochat.decoding import Step, cast_for_inference, last_logits, make_decode_step
from nanochat.gpt import GPT
from nanochat.modality import Grammar
from nanochat.model.parameters import find_non_finite
from nanochat.system.environment import UserError


@torch.inference_mode()
def decode(
    model: GPT,
    prompts: torch.Tensor,
    max_tokens: int,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 42,
    frames: int | None = None,
    inside: str | None = None,
    unguided: list[int] | None = None,
    guidance: float = 1.0,
    compiled: bool = False,
) -> Iterator[torch.Tensor]:
    """Continue prompts int64 [B, P] of one length: yields the next ids int64 [B] of all rows, at most max_tokens times.

    num_samples: of a single prompt, which is prefilled once (B is num_samples then). temperature 0 is greedy. frames:
    the most frames of a sound; a model with several modalities emits only legal ids (see Grammar). inside: a modality
    without a start that the rows enter behind the prompt. unguided: a prompt without the caption; logits are moved away
    from its logits, `guidance` times as far: classifier-free guidance (arXiv 2207.12598). compiled: each step is one
    compiled graph (see decoding.py), which takes seconds to make.
    The prompt with max_tokens has to fit the rotary table, 10 times the training context.
    """
    model, prompts = cast_for_inference(model), prompts.to(model.device)
    generator = torch.Generator(device=model.device).manual_seed(seed)

    logits, step = prefill(model, prompts, max_tokens, num_samples, compiled)
    grammar = start_grammar(model, prompts, num_samples, frames, inside) if model.vocabulary.modalities else None
    guided = unguided is not None and guidance != 1.0
    if guided:
        without_caption = torch.tensor([unguided] * len(logits), device=model.device)
        free, free_step = prefill(model, without_caption, max_tokens, 1, compiled)

    for number in range(max_tokens):
        if guided:
            logits = free + guidance * (logits - free)
        if grammar is not None:
            logits = logits.masked_fill(~grammar.allowed(), -float("inf"))
        if not logits.amax(-1).isfinite().all():  # NaN anywhere, or no id is possible
            raise UserError(_why_not_finite(model))

        tokens = sample(logits, generator, temperature, top_k)
        if grammar is not None:
            grammar.advance(tokens[:, 0])
        yield tokens[:, 0]

        if number < max_tokens - 1:
            logits = step(tokens)
            if guided:
                free = free_step(tokens)


def prefill(
    model, prompts: torch.Tensor, max_tokens: int, num_samples: int, compiled: bool
) -> tuple[torch.Tensor, Step | None]:
    """Read prompts int64 [B, P]: the logits [B, V] behind them, and the step that decodes the tokens to come.

    num_samples: copies of the cache of a single prompt, B is num_samples then. None in place of a step that is not
    needed.
    """
    static = compiled and isinstance(model, GPT)  # a compiled step has a cache of its own
    cache = model.new_cache(len(prompts), prompts.size(1) + (0 if static else max_tokens))
    logits = last_logits(model, prompts, cache)
    if num_samples > 1:
        assert len(prompts) == 1, "several samples are drawn from a single prompt"
        cache, logits = cache.repeated(num_samples), logits.repeat(num_samples, 1)
    if max_tokens < 2:
        return logits, None
    return logits, make_decode_step(model, cache, prompts.size(1) + max_tokens, compiled)


def start_grammar(model, prompts: torch.Tensor, num_samples: int, frames: int | None, inside: str | None) -> Grammar:
    """The grammar of each row behind prompts [B, P]; arguments as decode() takes them."""
    grammar = Grammar(model.vocabulary, len(prompts), model.device, frames)
    for column in prompts.unbind(1):
        grammar.advance(column)
    if inside is not None:
        grammar.enter(inside)
    return grammar.repeated(num_samples) if num_samples > 1 else grammar


def generate(
    model: GPT, ids: list[int], max_tokens: int, *, num_samples: int = 1, stop: tuple[int, ...] = (), **options
) -> list[list[int]]:
    """Continue one prompt (not empty): the new ids of each sample, up to and without the first id in `stop`.

    options: temperature, top_k, seed, frames, compiled, as decode() takes them.
    """
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    running = [True] * num_samples
    for tokens in decode(model, torch.tensor([ids]), max_tokens, num_samples=num_samples, **options):
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and token not in stop
            if running[row]:
                samples[row].append(token)
        if not any(running):
            break
    return samples


def _why_not_finite(model) -> str:
    found = find_non_finite(model.state_dict())
    if found is None:
        dtype = getattr(model, "compute_dtype", "their dtype")
        return f"the logits are not finite although all weights are: {dtype} overflows, float32 may not"
    return f"nothing can be generated, the logits are not finite: {found}: take an earlier step or another copy"


def sample(logits: torch.Tensor, generator: torch.Generator, temperature: float, top_k: int | None) -> torch.Tensor:
    """Draw one id per row of logits [B, V] -> int64 [B, 1]; temperature 0 is greedy, top_k keeps the k best."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None:  # draw among those only: drawing from a whole vocabulary takes as long as a layer
        ids = logits.topk(min(top_k, logits.size(-1))).indices.sort().values  # topk's order of equal logits varies
        logits = logits.gather(1, ids)
    if temperature < 1e-6:  # the quotient could overflow; only the distance from the largest logit counts
        logits = logits - logits.amax(-1, keepdim=True)
    drawn = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
    return drawn if ids is None else ids.gather(1, drawn)
