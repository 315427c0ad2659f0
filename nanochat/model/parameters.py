"""Parameters by name: their group, the modality that alone uses them; counts and FLOPs; tensors that are not finite."""

SCALARS = ("smear_lambda", "resid_lambdas", "x0_lambdas", "backout_lambda", "bigram_lambdas")
TABLES = {
    "transformer.wte": "wte",
    "lm_head": "lm_head",
    "value_embeds.": "value_embeds",
    "bigram_embed": "bigram_embed",
    "output_projection.": "output_projection",
}


def is_scalar(name: str) -> bool:
    """Lambdas and gates: parameters of a few numbers, trained by AdamW and not counted in the FLOPs."""
    return name in SCALARS or name.endswith("gate.weight")


def modality_of(name: str, config) -> str | None:
    """The modality whose tokens (of an output layer: targets) alone use a parameter; None: all modalities do."""
    parts = name.split(".")
    if "experts" in parts:
        return parts[parts.index("experts") + 1]
    if "wtes" in parts or "lm_heads" in parts:
        return parts[-2]
    if name in ("transformer.wte.weight", "lm_head.weight"):
        return "text" if config.separate else None
    routed = {"mlp": ("mlp",), "all": ("mlp", "attn")}.get(config.untie, ())
    routed = routed if config.modalities else ()
    return "text" if parts[-3:-2] and parts[-3] in routed and not is_scalar(name) else None


def group_of(name: str) -> str:
    if is_scalar(name):
        return "scalars"
    table = next((group for prefix, group in TABLES.items() if name.startswith(prefix)), None)
    return table or ("experts" if ".experts." in name else "transformer")


def num_parameters(model) -> dict[str, int]:
    """Parameters by group; every parameter is in exactly one (lm_head is 0 when tied)."""
    count = dict.fromkeys((*TABLES.values(), "transformer", "experts", "scalars"), 0)
    for name, parameter in model.named_parameters():
        count[group_of(name)] += parameter.numel()
    return {**count, "total": sum(count.values())}


def num_matmul_parameters(model) -> int:
    """Parameters that a token is multiplied with: no embedding parameters, no scalars.

    A token passes the experts of one modality and one output layer; the modality with the most counts.
    """
    met = dict.fromkeys(model.vocabulary.names, 0)
    for name, parameter in model.named_parameters():
        if group_of(name) in ("transformer", "experts", "output_projection"):
            modality = modality_of(name, model.config)
            for key in [modality] if modality else met:
                met[key] += parameter.numel()
    for key, (_, matrix) in zip(met, model.output_weights(), strict=True):
        met[key] += matrix.numel()
    return max(met.values())


def flops_per_token(model) -> int:
    """Training FLOPs per token, forward and backward: 6 N_matmul + 12 C T per layer (arXiv 2204.02311, appendix B).

    Attention is counted over the whole square, not halved for causality, as in nanochat. T is limited by the window.
    """
    config = model.config
    windows = [config.window(layer) for layer in range(config.n_layer)]
    seen = sum(config.sequence_len if w is None else min(config.sequence_len, w + 1) for w in windows)
    return 6 * num_matmul_parameters(model) + 12 * config.n_embd * seen


def find_non_finite(state) -> str | None:
    """A message that names the first tensor of {name: tensor} with NaN or infinities; None: all are finite."""
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if not broken:
        return None
    first = state[broken[0]]
    count = int((~first.isfinite()).sum())
    return f"{len(broken)} tensors are not finite, {broken[0]} the first ({count:,} of its {first.numel():,} values)"
