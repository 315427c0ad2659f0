"""The control of experts.py: scripts.base_train with as many experts, but each id goes through a random one.

`python -m scripts.experiments.random_experts [config.py] --untie=mlp ...`: only the table of experts by id differs.
"""

import numpy as np
import torch

from nanochat.gpt import GPT
from nanochat.runtime import run_script


class RandomExpertsGPT(GPT):
    def set_buffers(self) -> None:
        """With a modality drawn for every id, always the same one, that has nothing to do with its own."""
        super().set_buffers()
        drawn = np.random.PCG64(0).random_raw(self.vocabulary.size) % len(self.vocabulary.names)
        self.expert_of_id = torch.from_numpy(drawn.astype(np.uint8)).to(self.device)


if __name__ == "__main__":
    from scripts import base_train

    base_train.GPT = RandomExpertsGPT
    run_script(base_train.main)
