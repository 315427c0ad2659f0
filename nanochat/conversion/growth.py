"""A trained model that gets further modalities: every old weight keeps its place, the new ones start beside them."""

import dataclasses

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.modality import Modality
from nanochat.system.environment import UserError


def grown_config(
    config: GPTConfig, modalities: tuple[Modality, ...], untie: str | None = None, output_layers: str | None = None
) -> GPTConfig:
    """The configuration with modalities behind those it has; UserError where it cannot have them.

    untie and output_layers: of a text-only model, by default "mlp" and "separate"; one with modalities keeps its own.
    """
    known = {m.name for m in config.modalities} | {"text"}
    starts = {m.start for m in config.modalities}
    for modality in modalities:
        if modality.name in known:
            raise UserError(f"the model has {modality.name} already: {', '.join(sorted(known))}")
        if modality.start in starts or not 0 <= modality.start < config.vocab_size:
            raise UserError(f"id {modality.start} cannot start {modality.name}: it is taken or no text id")
        known, starts = known | {modality.name}, starts | {modality.start}
    if config.modalities:
        for name, wish in (("untie", untie), ("output_layers", output_layers)):
            if wish not in (None, getattr(config, name)):
                raise UserError(f"{name}={wish!r}: the model was trained with {getattr(config, name)!r}, which stays")
    else:
        config = dataclasses.replace(config, untie=untie or "mlp", output_layers=output_layers or "separate")
    return dataclasses.replace(config, modalities=(*config.modalities, *modalities))


@torch.no_grad()
def grow(
    state: dict[str, torch.Tensor], config: GPTConfig, seed: int = 0, copy_experts: bool = True, tied_std: float = 0.02
) -> dict[str, torch.Tensor]:
    """The state of the model `config` describes, out of that of a model with fewer modalities; text keeps its logits.

    copy_experts: experts of the model's own width begin as text's (as in LlamaFusion, arXiv 2412.15188), else as at the
    start of a training. Rows of new ids in shared tables are drawn as at the start.
    """
    torch.manual_seed(seed)
    model = GPT(config)
    model.init_weights(tied_std)
    grown = model.state_dict()
    missing = set(state) - set(grown)
    assert not missing, missing
    modalities = [m.name for m in config.modalities]
    for name, tensor in grown.items():
        if name in state:
            old = state[name]
            tensor[: len(old)] = old  # joint tables have more rows, all else is as large as it was
            continue
        source = name
        for modality in modalities:
            source = source.replace(f".experts.{modality}.", ".")
        if copy_experts and source != name and grown.get(source) is not None and grown[source].shape == tensor.shape:
            tensor.copy_(state[source])
    return grown
