"""nanochat's own checkpoints of every age: their logits, how they are found, what is refused, and their optimizers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_files
from nanochat import checkpoint_manager as cm
from nanochat.config.settings import Settings
from nanochat.evaluation import suite
from nanochat.files import sha256_of
from nanochat.optim import build_optimizer
from nanochat.system.environment import UserError
from nanochat.upstream.checkpoints import ERAS
from nanochat.upstream.optimizer import read_optimizer
from scripts import base_eval, inspect_checkpoint
from tests import upstream_fixtures as fixtures
from tests.upstream.test_checkpoints import baits

IDS = torch.randint(0, 265, (400,), generator=torch.Generator().manual_seed(3))
SMALL = dict(n_layer=2, sequence_len=16)
MODEL, META = "model_000007.pt", "meta_000007.json"


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def small(folder: Path, era: str, tokenizer: bool = False, **changes) -> tuple[Path, dict]:
    sizes, state = fixtures.make_state(era, **SMALL | changes)
    return fixtures.write(folder, sizes, state, tokenizer=tokenizer), state


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# the models


@pytest.mark.parametrize("era", fixtures.ERAS)
def test_logits_of_every_era(base, era):
    """Within 1e-5 of plain tensor operations, for windows shorter than the sequence, padded tables, grouped heads,
    another depth, a bf16 embedding and compiled names; the era is told by the file alone.

    Red with any other number in ERAS, or without _orig_mod., .float() or the crop.
    """
    assert list(ERAS) == list(fixtures.ERAS)
    named = era if era == "2026-03-02" else None
    for number, changes in enumerate(({}, dict(n_kv_head=4, n_layer=3, seed=1), dict(vocab_size=256, seed=2))):
        sizes, state = fixtures.make_state(era, **changes)
        if number == 1:
            sizes.pop("window_pattern", None)  # absent: all layers are long
            state = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
            state["cos"] = state["sin"] = torch.zeros(1)
        if number == 2:
            state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
            state.pop("x0_lambdas", None)  # absent: zeros
        folder = fixtures.write(base / f"m{number}", sizes, state, tokenizer=False)
        model, tokenizer, metadata = cm.build_model(folder, fixtures.STEP, "cpu", "eval", named)
        state.pop("cos", None), state.pop("sin", None)
        ids = (IDS if number == 0 else IDS[:48]) % sizes["vocab_size"]
        with torch.no_grad():
            logits = model(ids[None])[0]
        expected = fixtures.reference_logits(era, sizes, state, ids)
        assert (logits.double() - expected).abs().max() < 1e-5
        assert expected.abs().max() > 7
        told = metadata["upstream"]["era"]
        assert told == era or (number == 2 and (told, era) == ("2025-10-13", "2025-12-09"))  # 256 is a multiple of 64
        assert tokenizer is None
        assert model.config.vocab_size == sizes["vocab_size"]
        loaded = cm.load_checkpoint(folder, fixtures.STEP, era=named)[0]
        assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_an_ambiguous_era_is_said_and_can_be_named(base, capsys):
    """January and the first week of March differ in the softcap alone. Red when load() ignores `era`."""
    folder, _ = small(base / "m", "2026-03-02")
    config = cm.build_model(folder, 7, "cpu", "eval")[0].config
    out = capsys.readouterr().out
    assert "era 2026-01-16; a model of the first week of March" in out
    assert "--era 2026-03-02" in out
    named = cm.build_model(folder, 7, "cpu", "eval", "2026-03-02")[0].config
    assert "note: " in (inspect_checkpoint.main([str(folder)]), capsys.readouterr().out)[1]
    assert (config.softcap, named.softcap) == (15.0, 20.0)
    assert "first week" not in capsys.readouterr().out
    step = cm.save_checkpoint(base / "ours", 1, {}, None, {}).parent
    with pytest.raises(UserError, match="era='2026-03-02' is for nanochat's own files"):
        cm.load_checkpoint(step, 1, era="2026-03-02")


CONTRADICTIONS = {
    ("2026-03-14", "2026-03-09"): r"backout_lambda.* is not explained by nanochat's era 2026-03-09 \(--era\)",
    ("2026-03-09", "2026-03-14"): r"backout_lambda \(3 tensors in all\) is missing, which nanochat's era 2026-03-14",
    ("2026-03-09", "2026-01-16"): r"ve_gate.weight has shape \[2, 12\], .* era 2026-01-16 \(--era\) say \[2, 32\]",
    ("2026-01-16", "2026-01-11"): r"ve_gate.weight' \(2 tensors in all\) is not explained",
    ("2026-01-11", "2025-12-09"): "era='2025-12-09' had no window_pattern, which the metadata holds",
    ("2025-12-09", "2025-10-13"): r"wte.weight has shape \[320, 64\], .* say \[265, 64\]",
    ("2026-03-14", "2026-03-15"): "era='2026-03-15' is unknown, did you mean '2026-03-14'.*: one of 2025-10-13, 2025",
}


@pytest.mark.parametrize(("written", "named"), CONTRADICTIONS)
def test_an_era_that_contradicts_the_file_is_refused_by_the_key(base, written, named):
    """Red without _check_fit(), or when an unknown era is passed over."""
    folder, _ = small(base / "m", written)
    with pytest.raises(UserError, match=CONTRADICTIONS[written, named]):
        cm.load_checkpoint(folder, 7, era=named)


# ---------------------------------------------------------------------------------------------------------------------
# finding them


def test_stages_paths_and_tokenizers_of_nanochats_own_folders(base, tmp_path, capsys):
    """By stage and tag as nanochat lays them out, and by path from anywhere; nothing of theirs is changed.

    Red when list_steps() counts our folders alone, or newest_tag() takes step_dir() for theirs.
    """
    for stage, step in (("base", 7), ("sft", 12)):
        folder, _ = small(base / cm.SOURCES[stage] / "d2", "2025-10-13")
        shutil.move(folder / MODEL, folder / f"model_{step:06d}.pt")
        shutil.move(folder / META, folder / f"meta_{step:06d}.json")
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(fixtures.tokenizer_pickle())
    flat, state = small(base / "elsewhere" / "hub", "2025-10-13", vocab_size=264)
    before = contents(base)
    for stage, step in (("base", 7), ("sft", 12)):
        model, tokenizer, metadata = cm.load_model(stage, "cpu", "train")
        assert metadata["step"] == step
        assert tokenizer.vocab_size == 265
        assert model.training
        assert f"d2/model_{step:06d}.pt" in capsys.readouterr().out
    assert cm.find_checkpoint("d2", None) == (base / "base_checkpoints" / "d2", 7)
    for tag in (flat, flat / MODEL):
        assert cm.find_checkpoint(str(tag), None) == (flat, 7)
    with pytest.raises(UserError, match="is of step 7, not 8"):
        cm.find_checkpoint(str(flat / MODEL), 8)
    with pytest.raises(UserError, match=r"there is no .*none$"):
        cm.find_checkpoint(str(base / "none"), None)
    with pytest.raises(UserError, match=r"step 8 is not in .*: steps there are 7"):
        cm.load_model("base", "cpu", "eval", str(flat), 8)
    assert cm.tokenizer_of(flat, 7) is None  # the base folder's has another size
    out = capsys.readouterr().out
    assert "has 265 ids, the model 264: not its tokenizer" in out
    assert f"{flat} has no tokenizer" in out
    assert contents(base) == before
    (flat / "tokenizer.pkl").write_bytes(fixtures.tokenizer_pickle())
    with pytest.raises(UserError, match="the tokenizer has 265 ids, the model only 264"):
        cm.build_model(flat, 7, "cpu", "eval")
    (flat / "tokenizer.pkl").rename(base / "other.pkl")
    assert checkpoint_files.weights_hash(cm.load_checkpoint(flat, 7)[0]) == checkpoint_files.weights_hash(state)


def test_a_folder_with_steps_of_both_kinds(base, capsys):
    """The newest whole one counts, a torn one of theirs is passed over. Red when newest_step() trusts theirs."""
    folder, state = small(base / "base_checkpoints" / "m", "2025-10-13")
    _, _, metadata = cm.load_checkpoint(folder, 7)
    assert cm.save_checkpoint(folder, 5, state, None, {"model_config": metadata["model_config"]})
    assert cm.list_steps(folder) == [5, 7]
    assert cm.find_checkpoint("m", None) == (folder, 7)
    assert f"steps of ours and of nanochat's: taking {MODEL}" in capsys.readouterr().out
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-1])
    assert cm.find_checkpoint("m", None) == (folder, 5)
    assert f"skipping {folder / MODEL}: " in capsys.readouterr().out
    assert cm.load_model("base", "cpu", "eval")[2]["step"] == 5


def test_base_eval_of_a_folder_from_the_hub(base, corpus, monkeypatch):
    """Bits per byte and a sample of what was published. Red when base_eval takes manifest.json for the file's hash."""
    folder, _ = small(base / "hub" / "d2", "2026-03-02", tokenizer=True)
    before = contents(folder)
    monkeypatch.setattr(suite, "SAMPLE_TOKENS", 2)
    flags = [f"--data={corpus}", "--eval=bpb,sample", "--device-type=cpu", "--device-batch-size=64"]
    first = base_eval.main(["--model-tag", str(folder), *flags])
    second = base_eval.main(["--model-tag", str(folder), *flags, "--era=2026-03-02"])
    assert first["model_file_sha256"] == second["model_file_sha256"] == sha256_of(folder / MODEL)
    assert first["bpb"]["val"] != second["bpb"]["val"]  # another softcap
    assert len(first["samples"]) > 1
    assert (base / "base_eval").is_dir()
    assert contents(folder) == before
    (folder / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match="has no tokenizer, without which no text can be scored"):
        base_eval.main(["--model-tag", str(folder), *flags])


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def meta(**changes):
    def change(folder: Path) -> None:
        facts = json.loads((folder / META).read_text())
        facts["model_config"] |= changes
        (folder / META).write_text(json.dumps(facts))

    return change


def tensors(**changes):
    """A change of the state dict: None removes a tensor; names with __ for the dots."""

    def change(folder: Path) -> None:
        state = torch.load(folder / MODEL, weights_only=True)
        for name, tensor in changes.items():
            name = name.replace("__", ".")
            state.pop(name, None) if tensor is None else state.update({name: tensor})
        torch.save(state, folder / MODEL)

    return change


def flip(folder: Path) -> None:
    """One bit of the embedding: the file opens as before."""
    raw = bytearray((folder / MODEL).read_bytes())
    raw[raw.index(torch.load(folder / MODEL)["transformer.wte.weight"][3].numpy().tobytes())] ^= 1
    (folder / MODEL).write_bytes(raw)


BAD = {
    "a cut model": (lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:2000]), r"damaged .*: copy it again"),
    "an empty model": (lambda f: (f / MODEL).write_bytes(b""), r"damaged .*: copy it again"),
    "a changed byte": (flip, "the checksum of its part .* does not hold: copy it again"),
    "a pointer": (lambda f: (f / MODEL).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a context without end": (meta(sequence_len=2 * 10**9), "sequence_len=2000000000 is not a whole number from 1 to"),
    "no metadata": (lambda f: (f / META).unlink(), r"meta_000007.json cannot be read .*put the two side by side"),
    "torn metadata": (lambda f: (f / META).write_text('{"step": 7, '), "meta_000007.json is not JSON"),
    "other metadata": (lambda f: (f / META).write_text("[1]"), "does not hold a JSON object"),
    "no model_config": (lambda f: (f / META).write_text("{}"), "holds no model_config, so it is not the metadata"),
    "deep metadata": (lambda f: (f / META).write_text("[" * 10**5), "meta_000007.json is not JSON"),
    "a future key": (meta(rotary_scaling=2), "model_config holds 'rotary_scaling', which no era of nanochat had"),
    "a misspelt key": (meta(n_kv_heads=2), "holds 'n_kv_heads', .*did you mean 'n_kv_head'"),
    "a wrong size": (meta(n_layer="2"), "n_layer='2' is not a whole number from 1 to"),
    "a wrong pattern": (meta(window_pattern="SXL"), "window_pattern='SXL' is not made of the letters S and L"),
    "another width": (meta(n_embd=128), r"wte.weight has shape \[320, 64\], .* say \[320, 128\]"),
    "another vocabulary": (meta(vocab_size=100), r"wte.weight has shape \[320, 64\], .* say \[128, 64\]"),
    "a thousand layers": (meta(n_layer=10**6), "says 1000000 layers, the file has 18 tensors"),
    "heads that do not divide": (meta(n_head=3), "describes no model that can be"),
    "a tensor of the future": (tensors(engram__weight=torch.ones(2)), "'engram.weight' .*update this repository, or"),
    "a missing matrix": (tensors(transformer__h__0__mlp__c_fc__weight=None), "h.0.mlp.c_fc.weight .* is missing"),
    "no embedding": (tensors(transformer__wte__weight=None), "transformer.wte.weight .* is missing"),
    "a number for a table": (tensors(transformer__wte__weight=torch.tensor(1.0)), r"wte.weight has shape \[\]"),
    "no gate": (tensors(transformer__h__1__attn__ve_gate__weight=None), "ve_gate.weight .* is missing, .* era 2026-01"),
    "another gate": (tensors(transformer__h__1__attn__ve_gate__weight=torch.ones(2, 8)), r"ve_gate.* shape \[2, 8\]"),
    "values of all layers": (
        tensors(value_embeds__0__weight=torch.ones(320, 32)),
        "'value_embeds.0.weight' .* is not e",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line_and_inspected(base, case, capsys):
    """Damaged, foreign and future files. Red without the one check that the message is of."""
    change, message = BAD[case]
    folder, _ = small(base / "m", "2026-01-16")
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        cm.build_model(folder, 7, "cpu", "eval")
    assert "\n" not in str(caught.value)
    assert re.search(r"(model|meta)_000007", str(caught.value))
    assert inspect_checkpoint.main([str(folder)])["corruption"] == str(caught.value)


def test_absent_sizes_are_nanochats_defaults(base, capsys):
    """Said, and checked against the tensors. Red when a missing n_kv_head is taken for n_head."""
    folder, _ = small(base / "m", "2025-10-13", n_head=8, n_kv_head=4)
    facts = json.loads((folder / META).read_text())
    del facts["model_config"]["n_kv_head"]
    (folder / META).write_text(json.dumps(facts))
    with pytest.raises(UserError, match="describes no model that can be"):  # 8 heads, 6 of keys and values
        cm.build_model(folder, 7, "cpu", "eval")
    folder, state = small(base / "six", "2025-10-13", n_embd=48, n_head=6, n_kv_head=6)
    (folder / META).write_text(json.dumps(facts | {"model_config": {**SMALL, "vocab_size": 265, "n_embd": 48}}))
    model = cm.build_model(folder, 7, "cpu", "eval")[0]
    assert "lacks sizes: taking nanochat's defaults, n_head=6, n_kv_head=6" in capsys.readouterr().out
    assert checkpoint_files.weights_hash(model.state_dict()) == checkpoint_files.weights_hash(state)


def test_what_the_inspector_says_of_nanochats_files(base, capsys):
    """Format, what decided it, config, counts, tokenizer, optimizer. Red when raw tensors are hashed."""
    folder, state = small(base / "hub", "2026-03-14", tokenizer=True)
    fixtures.write_optimizer(folder, fixtures.optimizer_files(state, fixtures.moments(state), "one"))
    for path in (folder, folder / MODEL):
        report = inspect_checkpoint.main([str(path), "--tensors"])
        assert (report["folder"], report["corruption"], report["era"]) == (str(folder / MODEL), None, "2026-03-14")
        assert report["weights_hash"] == checkpoint_files.weights_hash(state)
        out = capsys.readouterr().out
        told = ["complete\n", "by smear_gate.weight", "2 of keys", "qk_scale=1.2", "value_embeds 10,240", "265 ids"]
        told += ["data       not recorded", "complete, in optim_000007_rank0.pt", "transformer.h.1.attn.ve_gate"]
        assert [text for text in told if text not in out] == []
    state["lm_head.weight"][0, 0] = float("inf")
    torch.save(state, folder / MODEL)
    assert "lm_head.weight the first" in inspect_checkpoint.main([str(folder)])["corruption"]


# ---------------------------------------------------------------------------------------------------------------------
# the optimizer


LAYOUTS = [("list", 1), ("list", 2), ("stacked", 1), ("stacked", 2), ("stacked", 3), ("one", 1), ("one", 2), ("one", 4)]


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
@pytest.mark.parametrize("era", ["2025-10-13", "2026-03-14"])
def test_optimizer_state_is_taken_over_whole(base, era, layout, ranks):
    """Every tensor as it was, from all layouts and any number of ranks; our next step is the one nanochat would make.

    Red when the shards are joined in another order, a stack is cut elsewhere, or the steps are lost.
    """
    folder, weights = small(base / "m", era, n_layer=3, vocab_size=180)  # whose rows 2, 3 and 4 ranks can share
    memory = fixtures.moments(weights)
    if layout == "list":
        for quantities in memory.values():
            quantities.pop("second_momentum_buffer", None)
    fixtures.write_optimizer(folder, fixtures.optimizer_files(weights, memory, layout, ranks), ranks > 1)
    model, _, _ = cm.build_model(folder, 7, "cpu", "train")
    _, state, _ = cm.load_checkpoint(folder, 7, load_optimizer=True)
    for name in list(memory):  # a gate of nanochat's Muon is AdamW's here, and begins anew
        if name.endswith("ve_gate.weight"):
            zeros = torch.zeros_like(weights[name])
            memory[name] = dict(step=0, exp_avg=zeros, exp_avg_sq=zeros)
    ours = {"momentum_buffer": "momentum", "second_momentum_buffer": "neuron_sq"}
    expected = {f"{n}.{ours.get(k, k)}": torch.as_tensor(v) for n, found in memory.items() for k, v in found.items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    settings = Settings(muon_method="newton_schulz", muon_normalize=layout != "list", cautious_weight_decay=False)
    optimizer = build_optimizer(model, settings, torch.float32)
    optimizer.load_state_dict(state)
    generator = torch.Generator().manual_seed(4)
    after, group_of = {}, {n: group for group in optimizer.param_groups for n in group["param_names"]}
    for name, p in model.named_parameters():
        group_of[name]["weight_decay"] = 0.0
        p.grad = torch.randn(p.shape, generator=generator)
        after[name] = fixtures.reference_step(memory[name], p.detach(), p.grad, group_of[name])
    optimizer.reduce_gradients()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), after[name], atol=1e-5, rtol=1e-5)


def parts(state: dict, layout: str = "one", ranks: int = 1) -> list:
    return fixtures.optimizer_files(state, fixtures.moments(state), layout, ranks)


def without(files: list, *path: object) -> list:
    """The files less what lies at the path."""
    place = files
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return files


def other_step(files: list) -> list:
    files[1]["state"][0]["step"] = torch.tensor(3)
    return files


def doubled(files: list) -> list:
    files[0]["state"][10] = files[0]["state"][9]
    return files


DEEPER = fixtures.make_state("2026-03-14", **SMALL | {"n_layer": 4})[1]
UNFIT = {
    "none": (lambda state: [], "there is no optim_000007.pt"),
    "rank 0 alone": (lambda state: parts(state, "one", 2)[:1], r"lm_head.weight has .* \[160, 64\], not \[320, 64\]"),
    "rank 0 of Muon's buffers": (
        lambda state: [[parts(state, "list")[0][0], parts(state, "list", 2)[0][1]]],
        "has its momentum in 0 files: those of some ranks are missing",
    ),
    "rank 0 of Muon's stacks": (
        lambda state: [[parts(state, "list")[0][0], parts(state, "stacked", 2)[0][1]]],
        "files of some ranks are missing",
    ),
    "rank 1 without a stack": (lambda state: without(parts(state, "one", 2), 1, "state", 9), "some ranks are missing"),
    "rank 0 without a stack": (lambda state: without(parts(state, "one", 2), 0, "state", 8), "some ranks are missing"),
    "a stack too many": (lambda state: doubled(parts(state)), "has a stack for its group, whose others have"),
    "other things": (lambda state: [{"moments": [1, "a", None]}], "not laid out as nanochat's"),
    "a bait": (lambda state: [[baits(Path("marker"))["posix.mkdir"]]], "is refused: it asks for 'posix.mkdir'"),
    "a deeper model": (lambda state: parts(DEEPER), r"resid_lambdas has exp_avg of \[320, 32\], not \[2\]"),
    "ranks of two steps": (lambda state: other_step(parts(state, "one", 2)), "the ranks are 3 and 7 steps old"),
    "no moment": (lambda state: without(parts(state), 0, "state", 0, "exp_avg_sq"), "lm_head.weight .* 'exp_avg_sq'"),
    "no group": (lambda state: without(parts(state), 0, "param_groups", -1), r"nothing for transformer.h.0.mlp.c_fc"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_optimizer_state_in_parts_is_left_out_and_said(base, case, capsys):
    """Never half of it, and never a crash. Red when one shape is not checked, or an error is let through."""
    make, message = UNFIT[case]
    folder, state = small(base / "m", "2026-03-14")
    files = make(state)
    fixtures.write_optimizer(folder, files, named_by_rank=len(files) > 1)
    model, optimizer, metadata = cm.load_checkpoint(folder, 7, load_optimizer=True)
    assert optimizer is None
    assert model
    assert metadata["step"] == 7
    lines = [line for line in capsys.readouterr().out.splitlines() if "optimizer state" in line]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines
    assert "training would begin with a fresh one" in lines[0]


def test_damaged_optimizer_files(base):
    """Cut, or the first rank's gone. Red without read_pt_tree()'s guard, or when the ranks are not counted."""
    folder, state = small(base / "m", "2026-03-14")
    config = cm.model_config(cm.load_checkpoint(folder, 7)[2])
    fixtures.write_optimizer(folder, parts(state, "one", 2))
    first = folder / "optim_000007_rank0.pt"
    for size in (0, 100, first.stat().st_size - 10):
        first.write_bytes(first.read_bytes()[:size].ljust(size, b"x"))
        found, told = read_optimizer(folder, 7, config)
        assert found is None
        assert "rank0.pt is refused: it is damaged" in told
    first.unlink()
    assert read_optimizer(folder, 7, config) == (None, "none: of the ranks' files only those of 1 are there")
