"""The control of the experiment with experts: as many parameters, routes that have nothing to do with modalities."""

import torch

from nanochat.gpt import GPT
from scripts.experiments import experts
from scripts.experiments.random_experts import RandomExpertsGPT
from tests.model.test_routing import BOTH, build, mixture


def test_random_experts_have_nothing_to_do_with_the_modality():
    """Red when it routes by the id's own modality, or draws anew for each model."""
    usual = build(**BOTH)
    model = RandomExpertsGPT(usual.config)
    model.init_weights()
    shares = [
        (model.expert_of_id[a:b] == number).float().mean() for number, (a, b) in enumerate(model.vocabulary.ranges)
    ]
    assert all(0.1 < share < 0.6 for share in shares)
    assert torch.equal(model.expert_of_id, RandomExpertsGPT(usual.config).expert_of_id)
    model.load_state_dict(usual.state_dict())
    assert not torch.allclose(model(mixture("prefix")), usual(mixture("prefix")))
    assert type(usual) is GPT


def test_the_experiment_trains_its_control_with_them(monkeypatch):
    """Red when train() gives base_train a setting that it does not know."""
    ran = []

    def base_train(key: str, settings: dict, module: str | None) -> list[dict]:
        ran.append((settings["untie"], module))
        return [
            dict(parameters=1),
            {"event": "eval", "step": 1, "val_loss/text": 1.0, "val_loss/audio": 2.0, "train_seconds": 1},
        ]

    monkeypatch.setattr(experts, "base_train", base_train)
    for name in ("mlp", "random"):
        assert experts.train(name, experts.VARIANTS[name])["settings"] == {"untie": name}
    assert ran == [("mlp", None), ("mlp", "scripts.experiments.random_experts")]
