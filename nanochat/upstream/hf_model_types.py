"""Which model a config.json of Hugging Face describes: transformers' NanoChat, ours that needs code, or another."""

CLASSIC, MODERN = "nanochat", "nanochat_modern"  # two formats; the second was the model_type of earlier exports


MODELING, ARCHITECTURE = "hf_modeling.py", "ModernNanoChatForCausalLM"


NEEDS_CODE = "none: this model runs by the code beside it, load it with trust_remote_code=True"  # as in hf_modeling.py


def format_of(found: dict) -> str | None:
    """CLASSIC or MODERN by the content of a config.json; None for a model that is not ours."""
    model_type, architectures = found.get("model_type"), found.get("architectures")
    if model_type == CLASSIC:
        named = isinstance(architectures, list) and ARCHITECTURE in architectures
        return MODERN if named or found.get("hidden_act") == NEEDS_CODE else CLASSIC
    return MODERN if model_type == MODERN else None
