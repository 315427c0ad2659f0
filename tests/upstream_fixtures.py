"""Tiny checkpoints as nanochat wrote them, by age, and what they must compute, in plain tensor operations.

Written from the description of each age, not from nanochat/: nothing of it is imported here.
"""

import json
import math
import pickle
from pathlib import Path

import tiktoken
import torch

SPECIALS = (
    "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end".split()
)
SIZES = dict(sequence_len=400, vocab_size=265, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)
PADDED = 320  # rows of a table for 265 ids, from December on
STEP = 7
RESIDUAL = ("2026-01-11", "2026-01-16", "2026-03-02", "2026-03-09", "2026-03-14")
VALUES = RESIDUAL[1:]
ERAS = ("2025-10-13", "2025-12-09", *RESIDUAL)


def tokenizer_pickle() -> bytes:
    """A tokenizer of the 256 bytes and nanochat's specials: 265 ids."""
    ranks = {bytes([i]): i for i in range(256)}
    specials = {f"<|{name}|>": 256 + i for i, name in enumerate(SPECIALS)}
    encoding = tiktoken.Encoding("rustbpe", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=specials)
    return pickle.dumps(encoding)


def make_state(era: str, seed: int = 0, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """(model_config, state dict) of that age, with random weights that make logits of up to 10."""
    sizes = SIZES | ({"window_pattern": "SSSL"} if era in RESIDUAL else {}) | changes
    generator = torch.Generator().manual_seed(seed)
    V, C, L = sizes["vocab_size"], sizes["n_embd"], sizes["n_layer"]
    rows = V if era == "2025-10-13" else -(-V // 64) * 64
    kv = sizes["n_kv_head"] * (C // sizes["n_head"])

    def matrix(out: int, into: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(out, into, generator=generator) * gain / math.sqrt(into)

    state = {"transformer.wte.weight": torch.randn(rows, C, generator=generator)}
    for i in range(L):
        block = f"transformer.h.{i}."
        for name, shape in {"c_q": (C, C), "c_k": (kv, C), "c_v": (kv, C), "c_proj": (C, C)}.items():
            state[f"{block}attn.{name}.weight"] = matrix(*shape)
        if era in VALUES and i % 2 == (L - 1) % 2:
            channels = 12 if era in ("2026-03-09", "2026-03-14") else 32
            state[f"{block}attn.ve_gate.weight"] = matrix(sizes["n_kv_head"], channels)
        state[f"{block}mlp.c_fc.weight"] = matrix(4 * C, C)
        state[f"{block}mlp.c_proj.weight"] = matrix(C, 4 * C)
    state["lm_head.weight"] = matrix(rows, C, gain=2.0)
    if era in RESIDUAL:
        state["resid_lambdas"] = 1 + 0.1 * torch.randn(L, generator=generator)
        state["x0_lambdas"] = 0.2 * torch.randn(L, generator=generator)
    if era in VALUES:
        for i in range(L):
            if i % 2 == (L - 1) % 2:
                state[f"value_embeds.{i}.weight"] = torch.randn(rows, kv, generator=generator)
    if era == "2026-03-14":
        state["smear_gate.weight"] = matrix(1, 24)
        state["smear_lambda"] = torch.tensor([0.7])
        state["backout_lambda"] = torch.tensor([0.3])
    return sizes, state


def write(folder: Path, sizes: dict, state: dict, step: int = STEP, tokenizer: bool = True, **meta) -> Path:
    """model_000007.pt, meta_000007.json and, where asked for, tokenizer.pkl; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"model_{step:06d}.pt")
    known = {"step": step, "val_bpb": 1.5, "model_config": sizes, "user_config": {"depth": sizes["n_layer"]}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(known | {"device_batch_size": 2} | meta))
    if tokenizer:
        (folder / "tokenizer.pkl").write_bytes(tokenizer_pickle())
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# the forward pass


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def turned(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions for x [T, H, D]."""
    T, _, D = x.shape
    angle = torch.arange(T)[:, None].float() * base ** -(torch.arange(0, D, 2).float() / D)  # nanochat's own rounding
    cos, sin = angle.double().cos()[:, None], angle.double().sin()[:, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos + b * sin, -a * sin + b * cos], dim=-1)


def reference_logits(era: str, sizes: dict, state: dict, ids: torch.Tensor) -> torch.Tensor:
    """float64 logits [T, V] for ids [T], as nanochat of that age computes them."""
    W = {name.removeprefix("_orig_mod."): tensor.double() for name, tensor in state.items()}
    T, L, C, H, K = len(ids), sizes["n_layer"], sizes["n_embd"], sizes["n_head"], sizes["n_kv_head"]
    D, context = C // H, sizes["sequence_len"]
    late = era in ("2026-03-09", "2026-03-14")
    scale = {"2026-03-09": 1.15, "2026-03-14": 1.2}.get(era, 1.0)
    pattern = sizes.get("window_pattern", "L").upper()
    short = math.ceil(context / 3 / 128) * 128 if era == "2026-03-09" else context // 2
    short = math.ceil(context / 4 / 128) * 128 if era == "2026-03-14" else short
    x = rms(W["transformer.wte.weight"][ids])
    if "smear_lambda" in W:
        before = torch.cat([torch.zeros(1, C), x[:-1]])
        x = x + W["smear_lambda"] * torch.sigmoid(x[:, :24] @ W["smear_gate.weight"].T) * before
    x0 = x
    for i in range(L):
        w = {name: W[f"transformer.h.{i}.{name}.weight"] for name in ("attn.c_q", "attn.c_k", "attn.c_v")}
        x = W.get("resid_lambdas", torch.ones(L))[i] * x + W.get("x0_lambdas", torch.zeros(L))[i] * x0
        y = rms(x)
        q, k, v = ((y @ w[f"attn.c_{z}"].T).view(T, -1, D) for z in "qkv")
        if f"value_embeds.{i}.weight" in W:
            most, channels = (3, 12) if late else (2, 32)
            gate = most * torch.sigmoid(y[:, :channels] @ W[f"transformer.h.{i}.attn.ve_gate.weight"].T)
            v = v + gate[..., None] * W[f"value_embeds.{i}.weight"][ids].view(T, K, D)
        q, k = (rms(turned(z, 100_000.0 if late else 10_000.0)) * scale for z in (q, k))
        k, v = (z.repeat_interleave(H // K, dim=1) for z in (k, v))
        window = context if i == L - 1 or pattern[i % len(pattern)] == "L" else short
        distance = torch.arange(T)[:, None] - torch.arange(T)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(D)
        scores = scores.masked_fill((distance < 0) | (distance > window), -math.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(T, C)
        x = x + mixed @ W[f"transformer.h.{i}.attn.c_proj.weight"].T
        hidden = (rms(x) @ W[f"transformer.h.{i}.mlp.c_fc.weight"].T).clamp(min=0).square()
        x = x + hidden @ W[f"transformer.h.{i}.mlp.c_proj.weight"].T
        if i == L // 2:
            middle = x
    if "backout_lambda" in W:
        x = x - W["backout_lambda"] * middle
    cap = 20 if era == "2026-03-02" else 15
    return cap * torch.tanh((rms(x) @ W["lm_head.weight"].T)[:, : sizes["vocab_size"]] / cap)


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


def by_adamw(state: dict) -> list[list[str]]:
    """Parameters of AdamW, in the order of nanochat's groups."""
    values = [name for name in state if name.startswith("value_embeds.")]
    smear = ["smear_gate.weight", "smear_lambda", "backout_lambda"]
    groups = [["lm_head.weight"], ["transformer.wte.weight"], values, ["resid_lambdas"], ["x0_lambdas"], smear]
    return [group for group in groups if group and group[0] in state]


def by_muon(state: dict) -> list[str]:
    return [name for name in state if name.startswith("transformer.h.")]


def moments(state: dict, seed: int = 1) -> dict[str, dict]:
    """What an optimizer remembers of each parameter after STEP steps: random, in nanochat's terms."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in (name for group in by_adamw(state) for name in group):
        shape = state[name].shape
        found[name] = dict(
            step=STEP,
            exp_avg=0.1 * torch.randn(shape, generator=generator),
            exp_avg_sq=torch.rand(shape, generator=generator),
        )
    for name in by_muon(state):
        rows, columns = state[name].shape
        factored = (rows, 1) if rows >= columns else (1, columns)
        found[name] = dict(
            momentum_buffer=torch.randn(rows, columns, generator=generator),
            second_momentum_buffer=torch.rand(factored, generator=generator),
        )
    return found


def numbered(groups: list[list[str]], states: dict[str, dict], extra: list[dict]) -> dict:
    """torch's Optimizer.state_dict(): states by the parameter's number, groups with numbers for their parameters."""
    names = [name for group in groups for name in group]
    number = {name: i for i, name in enumerate(names)}
    listed = [{"lr": 0.1, **more, "params": [number[n] for n in g]} for g, more in zip(groups, extra, strict=True)]
    return {"state": {number[name]: states[name] for name in names if name in states}, "param_groups": listed}


def share(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's rows of AdamW's moments; small tensors are whole everywhere."""
    return tensor.clone() if tensor.numel() < 1024 else tensor.chunk(ranks)[rank].clone()


def optimizer_files(state: dict, memory: dict, layout: str, ranks: int = 1) -> list:
    """What nanochat saves of each rank: "list" [AdamW, Muon] with a buffer a matrix, as until December; "stacked", the
    same with the matrices of a shape in one buffer; "one", a single optimizer of both kinds."""
    files = []
    adamw, shapes = by_adamw(state), {}
    for name in by_muon(state):
        key = state[name].numel() if (layout, ranks) == ("list", 1) else tuple(state[name].shape)
        shapes.setdefault(key, []).append(name)
    muon = [names for _, names in sorted(shapes.items())]
    for rank in range(ranks):
        mine = {}
        for name in (name for group in adamw for name in group):
            mine[name] = {
                key: value if key == "step" else share(value, rank, ranks) for key, value in memory[name].items()
            }
            mine[name]["step"] = torch.tensor(float(STEP)) if ranks == 1 else torch.tensor(STEP)
        for names in muon:
            if layout == "list":
                for i, name in enumerate(names):
                    if i % ranks == rank:
                        mine[name] = {"momentum_buffer": memory[name]["momentum_buffer"].clone()}
                continue
            chunk = math.ceil(len(names) / ranks)
            mine[names[0]] = {}
            for key, sample in memory[names[0]].items():
                stack = torch.zeros(chunk, *sample.shape)
                for i, name in enumerate(names[rank * chunk : (rank + 1) * chunk]):
                    stack[i] = memory[name][key]
                mine[names[0]][key] = stack
        if layout == "one":
            kinds = [{"kind": "adamw", "betas": (0.8, 0.95)}] * len(adamw) + [{"kind": "muon"}] * len(muon)
            files.append(numbered(adamw + muon, mine, kinds))
        else:
            spare = [{"zero_buffer": torch.zeros(1)}] * len(muon)
            files.append([numbered(adamw, mine, [{}] * len(adamw)), numbered(muon, mine, spare)])
    return files


def write_optimizer(folder: Path, files: list, named_by_rank: bool = True) -> None:
    for rank, content in enumerate(files):
        torch.save(content, folder / f"optim_{STEP:06d}{f'_rank{rank}' if named_by_rank else ''}.pt")


def reference_step(memory: dict, p: torch.Tensor, g: torch.Tensor, group: dict) -> torch.Tensor:
    """The parameter after one more step of nanochat's from what its optimizer remembers, in float64; no decay.

    group: lr, and betas and eps, or momentum, of the optimizer that makes the step.
    """
    p, g = p.double(), g.double()
    if "exp_avg" in memory:
        (beta1, beta2), t = group["betas"], memory["step"] + 1
        mean = (beta1 * memory["exp_avg"].double() + (1 - beta1) * g) / (1 - beta1**t)
        square = (beta2 * memory["exp_avg_sq"].double() + (1 - beta2) * g * g) / (1 - beta2**t)
        return p - group["lr"] * mean / (square.sqrt() + group["eps"])
    rows, columns = p.shape
    buffer = group["momentum"] * memory["momentum_buffer"].double() + (1 - group["momentum"]) * g
    x = (1 - group["momentum"]) * g + group["momentum"] * buffer
    x = x.T if rows > columns else x
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    x = x.T if rows > columns else x
    if "second_momentum_buffer" in memory:
        along = 1 if rows >= columns else 0
        square = 0.95 * memory["second_momentum_buffer"].double() + 0.05 * (x * x).mean(along, keepdim=True)
        scaled = x / square.sqrt()
        x = scaled * x.norm() / scaled.norm()
    return p - group["lr"] * math.sqrt(max(1, rows / columns)) * x
