"""The zoo: one tiny checkpoint of every format that was ever released must open and give the logits it gave then.

tests/zoo/README.md says how a release adds an entry.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.checkpoint_files import find_corruption, step_dir
from nanochat.checkpoint_manager import build_model, load_checkpoint, model_config, save_checkpoint
from nanochat.config.config_file import as_dict
from nanochat.config.settings import FIELDS, Settings, checked
from nanochat.data.tokenizer import Tokenizer
from nanochat.gpt import GPT, GPTConfig
from nanochat.model.parameters import SCALARS
from nanochat.optim import build_optimizer

ZOO = Path(__file__).parent / "zoo"
STEP = 3
ENTRIES = sorted(path.name for path in ZOO.iterdir() if path.is_dir())


def add_entry(
    name: str, settings: Settings, vocab_size: int = 50, optimizer: bool = False, tokenizer: bool = False, **config
) -> Path:
    """Write an entry with the code of today: random weights whose logits reach about 10, and those logits.

    config: fields of GPTConfig that no setting decides. optimizer: with its state after a step. Returns the folder.
    """
    own = Tokenizer([bytes([i]) for i in range(256)]) if tokenizer else None
    vocab_size = own.vocab_size if own else vocab_size
    model = GPT(dataclasses.replace(GPTConfig.from_settings(settings, vocab_size), **config))
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            output = "lm_head" in parameter_name or (settings.tie_weights and "wte" in parameter_name)
            scale = 4 * parameter.size(-1) ** -0.5 if output else parameter.size(-1) ** -0.5
            parameter.copy_(parameter + 0.3 * noise if parameter_name in SCALARS else scale * noise)
    state = None
    if optimizer:
        trained = build_optimizer(model, settings, torch.float32)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        trained.reduce_gradients()
        trained.step()
        state = trained.state_dict()
    ids = torch.randint(model.vocabulary.size, (2, settings.max_seq_len), generator=generator)
    for start in model.vocabulary.starts:
        ids[0, settings.max_seq_len // 2] = start
    with torch.no_grad():
        logits = model(ids)
    facts = dict(settings=as_dict(settings), model_config=dataclasses.asdict(model.config))
    if own:
        facts["tokenizer_hash"] = own.hash
    save_checkpoint(ZOO / name, STEP, model.state_dict(), state, facts, tokenizer=own)
    save_file(dict(ids=ids, logits=logits), ZOO / name / "expected.safetensors")
    return ZOO / name


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_gives_the_logits_it_gave(name):
    """Red when a default of GPTConfig changes, a tensor is renamed, or any formula of the forward pass moves."""
    assert find_corruption(step_dir(ZOO / name, STEP)) is None
    model, tokenizer, metadata = build_model(ZOO / name, STEP, "cpu", "eval")
    expected = load_file(ZOO / name / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]), expected["logits"], rtol=1e-5, atol=1e-5)
    assert expected["logits"].abs().max() > 5  # large enough to tell one softcap from another
    if "tokenizer_hash" in metadata:
        assert tokenizer.decode(tokenizer.encode("Zoë\n 12")) == "Zoë\n 12"


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entrys_run_could_go_on(name):
    """Its settings still describe its model, and its optimizer state loads.

    Red when a setting that came later, as window_pattern, is on by default or changes a model where it is off.
    """
    _, _, metadata = load_checkpoint(ZOO / name, STEP)
    settings = Settings(**{key: checked(key, value) for key, value in metadata["settings"].items() if key in FIELDS})
    config = model_config(metadata)
    described = GPTConfig.from_settings(settings, config.vocab_size, config.document_start or 0)
    no_settings = {key: getattr(config, key) for key in ("value_gate_channels", "value_gate_range")}
    assert dataclasses.replace(described, **no_settings) == config
    if (step_dir(ZOO / name, STEP) / "optimizer.safetensors").exists():
        _, state, _ = load_checkpoint(ZOO / name, STEP, load_optimizer=True)
        optimizer = build_optimizer(GPT(config), settings, torch.float32)
        optimizer.load_state_dict(state)
        again = optimizer.state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], state[key]) for key in state)


def test_what_an_absent_key_means_is_frozen():
    """Red when a field of GPTConfig has no default, has another than defaults.json, or is not in it."""
    now = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
    assert dataclasses.MISSING not in now.values()
    frozen = json.loads((ZOO / "defaults.json").read_text())
    assert json.loads(json.dumps(now)) == frozen, "see tests/zoo/README.md"


def test_entries_are_small():
    assert ENTRIES
    for name in ENTRIES:
        assert sum(path.stat().st_size for path in (ZOO / name).rglob("*") if path.is_file()) < 60_000
