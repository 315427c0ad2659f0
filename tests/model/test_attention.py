"""Every attention path against a softmax over an explicit mask in float64; the choice of kernels that need a GPU."""

import dataclasses
import functools
import sys
import types
import weakref
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.gpt import GPT, GPTConfig
from nanochat.model import attention
from nanochat.model import cpu_attention as blocked_attention
from nanochat.model import gpu_attention as kernels
from nanochat.model.attention import blocked_causal_attention, causal_attention, sdpa
from nanochat.model.document_mask import document_block_mask, document_masks
from nanochat.model.gpu_attention import block_mask
from nanochat.training import kernel_selection as choice
from nanochat.training.kernel_selection import choose_attention, plain_attention, rejection_reason, try_candidates

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def qkv(B: int, T: int, S: int, H: int, kv: int, D: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, h, D, generator=generator) for n, h in ((T, H), (S, kv), (S, kv)))


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Query t of T sees keys 0 .. S - T + t, or the last window + 1 of them; head h reads key head h // (H / H_kv).

    documents [B, S]: only those of the same number.
    """
    (_, T, H, D), S = q.shape, k.size(1)
    k, v = (z.double()[:, :, [h * z.size(2) // H for h in range(H)]] for z in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) / D**0.5
    back = torch.arange(S - T, S)[:, None] - torch.arange(S)[None]
    visible = (back >= 0) & (back <= (S if window is None else window))
    if documents is not None:
        visible = visible & (documents[:, None, S - T :, None] - documents[:, None, None, :] == 0)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def numbered(length: int, *ends: list[int]) -> torch.Tensor:
    """int [rows, length]: the number of each position's document, a new one behind each end of a row."""
    place = torch.arange(length)
    return torch.stack([sum((place >= end).long() for end in row) + torch.zeros_like(place) for row in ends])


def begins_of(documents: torch.Tensor) -> torch.Tensor:
    """The first position of the same number, one by one."""
    return torch.tensor([[row.index(number) for number in row] for row in documents.tolist()])


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 300])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 64, 100, 200])
def test_blocked_attention_matches_the_reference_at_block_edges(length, heads, window):
    """Red when a block's keys end one position early or late (`:end`), begin late (`start - window + 1`), or
    `triu(start - first + 1)` loses its 1."""
    q, k, v = qkv(2, length, length, *heads, 4)
    out = blocked_causal_attention(q, k, v, window)
    torch.testing.assert_close(out.double(), reference(q, k, v, window), rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(
    T=st.integers(1, 12),
    past=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    grad=st.booleans(),
    window=st.none() | st.integers(1, 22),
    ends=st.none() | st.lists(st.integers(0, 20), min_size=2, max_size=6),
    seed=st.integers(0, 3),
)
def test_every_attention_path_matches_the_reference(T, past, heads, grad, window, ends, seed):
    """One new token, several behind a cache, none cached, with windows, with documents (ends: in turn of both rows).
    Red when `place[-T:` becomes `place[:T`, or the parts of a window do not get their part of `begins`."""
    q, k, v = qkv(2, T, T + past, *heads, 6, seed)
    documents = mask = None
    if ends is not None:
        documents = numbered(T + past, ends[::2], ends[1::2])
        mask = document_masks(begins_of(documents)[:, past:], [window])[window]
    with torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SDPA_BLOCK", 2)
        out = causal_attention(q, k, v, window, mask)
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), reference(q, k, v, window, documents), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("bound", [50.0, float("inf")])
def test_gradients_of_blocked_attention_match_the_reference(monkeypatch, window, bound):
    """Small blocks, many of them, with shared key heads. Red when `mean` is not subtracted, or keeps the sum of the
    weights."""

    def blocks(length, window):
        return [(s, min(s + 3, length), 0 if window is None else max(0, s - window)) for s in range(0, length, 3)]

    monkeypatch.setattr(blocked_attention, "blocks", blocks)
    q, k, v = (z.requires_grad_() for z in qkv(2, 10, 10, 4, 2, 4))
    weight = torch.randn(2, 10, 4, 4, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((causal_attention(q, k, v, window, bound=bound) * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((reference(q, k, v, window) * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    """Without a known bound the largest score of a row is taken off first. Red when SAFE_BOUND is infinite."""
    q, k, v = qkv(1, 20, 20, 2, 2, 8)
    out = causal_attention((100 * q).requires_grad_(), k, v)
    torch.testing.assert_close(out.double(), reference(100 * q, k, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 64, 65, 512, 513, 4096, 5000])
def test_at_most_eight_blocks(length):
    """Every query is in one of them. Red when the size of a block is not rounded up."""
    spans = blocked_attention.blocks(length)
    assert [s for s, _, _ in spans] == [0, *(e for _, e, _ in spans[:-1])]
    assert spans[-1][1] == length
    assert len(spans) <= 8


def test_bfloat16_keeps_its_dtype_and_stays_close():
    q, k, v = qkv(1, 140, 140, 2, 2, 8)
    out = causal_attention(*(z.bfloat16() for z in (q, k, v)))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(q, k, v), rtol=0.05, atol=0.03)


@pytest.mark.parametrize("past", [0, 50])
@pytest.mark.parametrize("window", [1, 100, 140, 400])
def test_windowed_sdpa_in_chunks_matches_the_reference(window, past):
    """More tokens than a part has, behind a cache or not. Red when a part's keys end elsewhere (`k[:, :end - 1]`)."""
    q, k, v = qkv(2, 300, 300 + past, 4, 2, 8)
    with torch.no_grad():
        out = causal_attention(q, k, v, window)
    torch.testing.assert_close(out.double(), reference(q, k, v, window), rtol=1e-5, atol=1e-5)


class Peak(TorchDispatchMode):
    """The most bytes that the results of operations hold at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
                self.most = max(self.most, self.now)
        return out

    def freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("path", [causal_attention, sdpa])
def test_a_short_window_takes_under_half_of_the_memory(path):
    """Forward and backward, what the caller holds left aside. Red when blocks begin with the first key (`first = 0`),
    or when sdpa() masks all keys (`step = T`). Without any mask torch holds no scores, so that sdpa() is given one."""
    T, most = 2048, []
    for window in (T // 16, None):
        q, k, v = (z.requires_grad_() for z in qkv(1, T, T, 2, 2, 8))
        with Peak() as peak:
            begins = torch.zeros(1, T, dtype=torch.long) if path is sdpa and window is None else None
            path(q, k, v, window, begins).sum().backward()
        most.append(peak.most)
    assert most[0] < 0.5 * most[1], most


# ---------------------------------------------------------------------------------------------------------------------
# kernels of GPUs


@pytest.fixture
def interpreter(monkeypatch):
    """FlexAttention as plain operations, gradients included, which torch refuses on a CPU."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(kernels, "compiled_flex", lambda: flex_attention.flex_attention)
    monkeypatch.setattr(kernels, "block_masks", {})


def gradients(function, inputs, *how) -> list[torch.Tensor]:
    """Output and gradients of a function of q, k and v."""
    inputs = [z.clone().requires_grad_() for z in inputs]
    out = function(*inputs, *how)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, weight)]


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


NUMBERS = numbered(150, [70], [140])


@pytest.mark.parametrize("documents", [None, NUMBERS], ids=["whole", "documents"])
@pytest.mark.parametrize("window", [None, 20])
def test_flex_attention_matches_the_reference(interpreter, window, documents):
    """Red when visible() loses its `<= window`, or the block mask's its `begins`."""
    inputs = qkv(2, 150, 150, 4, 2, 16)
    begins = None if documents is None else begins_of(documents)
    mask = document_masks(begins, [window], {window is not None: kernels.flex})[window]
    assert mask is None or not isinstance(mask, torch.Tensor)
    theirs = gradients(reference, inputs, window, documents)
    attend = functools.partial(causal_attention, kernel=kernels.flex)
    same(gradients(attend, inputs, window, mask), theirs)
    same(gradients(plain_attention, inputs, window, begins), theirs)


@given(
    length=st.integers(1, 700), window=st.none() | st.integers(1, 600), ends=st.lists(st.integers(0, 700), max_size=7)
)
@settings(max_examples=60)
def test_document_block_mask_equals_torchs(length, window, ends):
    """Every list of blocks, also where rows end within one. Red when a block that sees something is left out, or one
    is taken as whole that is not: when `first` and `last` of a pair change places, or the window loses its equality."""
    from torch.nn.attention.flex_attention import create_block_mask

    begins = begins_of(numbered(length, ends, ends[::2]))
    found = document_block_mask(begins, window)
    place = torch.arange(length)
    dense = kernels.visible(place[:, None], place, window, begins[..., None])
    theirs = create_block_mask(lambda b, h, q, k: dense[b, q, k], 2, None, length, length, device="cpu")
    assert found.seq_lengths == theirs.seq_lengths == (length, length)
    for name in ("kv", "full_kv", "q", "full_q"):
        ours, wanted = ([getattr(m, f"{name}_{part}") for part in ("num_blocks", "indices")] for m in (found, theirs))
        assert torch.equal(ours[0], wanted[0]), name
        counted = torch.arange(wanted[1].size(-1)) < wanted[0][..., None]
        ours, wanted = (found[1].where(counted, -1).sort(-1).values for found in (ours, wanted))
        assert torch.equal(ours, wanted), name


@pytest.mark.parametrize("window", [None, 20])
def test_documents_do_not_see_each_other(window):
    """On a CPU: the tokens of a row's second document are what they are alone, by both ways of computing it. Red when
    the blocks' `begins` are those of the whole row (`begins[:, :end`), or are not repeated for each head."""
    q, k, v = qkv(2, 150, 150, 4, 2, 8)
    mask = document_masks(begins_of(NUMBERS), [None, window])[window]
    theirs = gradients(reference, (q, k, v), window, NUMBERS)
    for path in (causal_attention, sdpa):
        same(gradients(path, (q, k, v), window, mask), theirs)
    out = causal_attention(q, k, v, window, mask)[:1, 70:]
    torch.testing.assert_close(out, causal_attention(*(z[:1, 70:] for z in (q, k, v)), window), rtol=1e-4, atol=1e-5)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the two packages of FlashAttention, with their names, order and meaning of arguments."""

    def flash_attn_func(q, k, v, *, causal, window_size, deterministic):
        assert causal
        assert window_size[1] == 0
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        return sdpa(q, k, v, None if window_size[0] < 0 else window_size[0])

    def older(*args, **kwargs):
        return flash_attn_func(*args, **kwargs), None

    for name, function in (("flash_attn", flash_attn_func), ("flash_attn_interface", older)):
        module = types.ModuleType(name)
        module.flash_attn_func = function
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(choice, "on_hopper", lambda device: True)


@pytest.mark.parametrize("window", [None, 700])
def test_installed_packages_pass_the_trial(packages, window):
    """Red when _flash() gives window + 1, or the first of a tuple is not taken."""
    for kernel in (kernels.flash_attention_3, kernels.flash_attention_2):
        assert rejection_reason(kernel, (4, 2, 16), CPU, torch.bfloat16, window) is None
        assert "no document boundaries" in rejection_reason(
            kernel, (4, 2, 16), CPU, torch.bfloat16, window, documents=True
        )


@pytest.mark.parametrize("capability", [(8, 6), (9, 0), (10, 0)])
def test_flash_attention_3_is_tried_on_hopper_alone(monkeypatch, capability):
    """Red when on_hopper() takes what is newer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choice.on_hopper(CUDA) == (capability == (9, 0))
    assert rejection_reason(kernels.flash_attention_3, (4, 2, 16), CPU, torch.bfloat16) == "made for Hopper GPUs"


def test_a_kernel_that_is_wrong_or_fails_is_rejected(interpreter):
    """The trial notices a window that is one too long, NaN and what is raised; torch's own flash is right on a CPU.
    Red when the trial compares only outputs (`found = (out,)`) or lets NaN through (`error > TOLERANCE`)."""

    def trial(function, window=50, dtype=torch.bfloat16):
        return rejection_reason(function, (4, 2, 16), CPU, dtype, window)

    assert trial(lambda q, k, v, window, mask: plain_attention(q, k, v, window)) is None
    assert "in out" in trial(lambda q, k, v, window, mask: plain_attention(q, k, v, window + 1))
    assert "nan% in out" in trial(lambda q, k, v, window, mask: plain_attention(q, k, v, window) * torch.nan)
    detached = trial(lambda q, k, v, window, mask: plain_attention(q, k.detach() + 0 * k, v, window))
    assert detached == "it is wrong by 100.0% in dk"
    assert trial(kernels.flash_attention_2) == "ModuleNotFoundError: No module named 'flash_attn'"
    assert trial(kernels.cudnn) == "NotImplementedError: it has neither windows nor document boundaries"
    assert trial(kernels.torch_flash, None) is None
    assert trial(kernels.cudnn, None).startswith("RuntimeError: ")


def test_torch_flash_attention_gets_the_window():
    """Torch's own account of shapes and gradients, where nothing is computed. Red when the window is not passed on, or
    is one too long."""
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "flash" in str(function):
                asked.append((str(function), kwargs["window_size_left"], kwargs["window_size_right"]))
            return function(*args, **(kwargs or {}))

    with Watch():
        q, k, v = (torch.empty(2, 64, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
        q, k, v = (z.requires_grad_() for z in (q, k, v))
        out = kernels.torch_flash(q, k, v, 20)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert asked == [
        ("aten._flash_attention_forward.default", 20, 0),
        ("aten._flash_attention_backward.default", 20, 0),
    ]


SL = GPTConfig(64, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL", short_window=30)


def test_the_first_right_kernel_is_chosen_and_the_reasons_are_given(interpreter):
    """The trials as on a GPU without packages: layers with windows get one kernel, the rest another, documents a third.
    Red when try_candidates() continues after the first (no `break`)."""

    def chosen(config: GPTConfig, window: int | None) -> choice.Choice:
        return try_candidates(config, window, CPU, torch.bfloat16, compiled=False)

    windowed, whole = chosen(SL, 30), chosen(SL, None)
    assert str(windowed).startswith("attention of layers with a window of 30: FlexAttention (FlashAttention 3: ")
    assert "FlashAttention 2: ModuleNotFoundError: No module named" in str(windowed)
    assert (windowed.kernel, windowed.windowed) == (kernels.flex, True)
    assert (64, 30, CPU) in kernels.block_masks  # built before the compiler needs it
    assert (whole.name, whole.layers) == ("torch's FlashAttention 2", "layers that see everything")
    assert (whole.kernel, whole.windowed) == (kernels.torch_flash, False)
    assert chosen(dataclasses.replace(SL, document_start=1), None).name == "FlexAttention"


def test_without_a_right_kernel_sdpa_trains(monkeypatch):
    monkeypatch.setattr(choice, "CANDIDATES", choice.CANDIDATES[:1])
    none = try_candidates(SL, None, CPU, torch.bfloat16, compiled=True)
    assert (none.name, none.kernel) == ("SDPA", None)
    assert [one.name for one in choose_attention(SL, CPU, torch.float32)] == ["blocked matmuls"]
    assert [one.name for one in choose_attention(SL, torch.device("mps"), torch.float32)] == ["SDPA"]


def test_a_chosen_kernel_trains_and_does_nothing_else():
    """Red when the kernel is called without gradients, or for queries behind a cache."""

    def other(q, k, v, window, mask):
        return v + window

    q, k, v = qkv(1, 5, 5, 2, 2, 4)
    assert torch.equal(causal_attention(q, k, v, 3, kernel=other), v + 3)
    with torch.no_grad():
        same([causal_attention(q, k, v, 3, kernel=other)], [reference(q, k, v, 3)])
    same([causal_attention(q[:, -2:], k, v, 3, kernel=other)], [reference(q, k, v, 3)[:, -2:]])


def test_a_kernel_that_breaks_the_graph_is_rejected_for_compiled_blocks(packages, monkeypatch):
    """Red when rejection_reason() compiles without fullgraph."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def broken(q, k, v, window, mask):
        torch._dynamo.graph_break()
        return plain_attention(q, k, v, window)

    assert rejection_reason(broken, (2, 2, 8), CPU, torch.float32, 9) is None
    assert "Unsupported" in rejection_reason(broken, (2, 2, 8), CPU, torch.float32, 9, compiled=True)
    for kernel in (kernels.torch_flash, kernels.flash_attention_2):
        assert rejection_reason(kernel, (4, 2, 8), CPU, torch.float32, compiled=True) is None


def test_the_rejection_reason_is_the_kernels_own_error(monkeypatch):
    """Red when rejection_reason() does not ask again without the compiler ("Unsupported: Observed exception")."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for kernel, words in ((kernels.cudnn, "it has neither windows"), (kernels.flash_attention_2, "No module named")):
        assert words in rejection_reason(kernel, (4, 2, 8), CPU, torch.float32, 9, compiled=True)


def test_flex_attention_compiles_into_one_graph(interpreter, monkeypatch):
    """No break, and no graph anew for another batch of documents. Red when block_mask() keeps what a tracer made."""
    inputs, graphs = qkv(2, 256, 256, 4, 2, 16), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(q, k, v, mask):
        return causal_attention(2 * q, k, v, 30, mask, kernel=kernels.flex) + 1

    run = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)
    block_mask(256, 30, CPU)
    for documents in (None, None, NUMBERS, NUMBERS.flip(0)):
        if documents is not None:
            documents = torch.nn.functional.pad(documents, (0, 106), value=7)
        begins = None if documents is None else begins_of(documents)
        mask = document_masks(begins, [30], {True: kernels.flex})[30]
        wanted = reference(2 * inputs[0], *inputs[1:], 30, documents) + 1
        torch.testing.assert_close(run(*inputs, mask).double(), wanted, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert block_mask(256, 31, CPU).shape == (1, 1, 256, 256)
    assert set(kernels.block_masks) == {(256, 30, CPU)}


@pytest.mark.parametrize("window", [None, 16])
def test_shapes_and_dtypes_without_data(window):
    """On the meta device, where only shapes are computed: what a GPU takes when nothing was chosen."""
    q, k, v = (z.to("meta", torch.bfloat16).requires_grad_() for z in qkv(2, 300, 300, 4, 2, 64))
    out = causal_attention(q, k, v, window)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_cudnn_is_not_used_behind_a_cache(monkeypatch):
    """It plans for every new shape: a generated token took 50 ms. Red when sdpa() does not ask, or asks always."""
    from torch.backends import cuda

    enabled = {"cudnn": cuda.cudnn_sdp_enabled, "flash": cuda.flash_sdp_enabled, "math": cuda.math_sdp_enabled}
    before = {name: ask() for name, ask in enabled.items()}
    with attention.kernels_for(CUDA, many_shapes=True):
        assert {name: ask() for name, ask in enabled.items()} == {"cudnn": False, "flash": True, "math": True}
    for device, many in ((CUDA, False), (CPU, True)):
        with attention.kernels_for(device, many):
            assert {name: ask() for name, ask in enabled.items()} == before
    asked, real = [], attention.kernels_for
    monkeypatch.setattr(
        attention, "kernels_for", lambda device, many_shapes: asked.append(many_shapes) or real(device, many_shapes)
    )
    for T in (1, 3, 7):
        causal_attention(*qkv(1, T, 7, 2, 2, 4), None) if T < 7 else sdpa(*qkv(1, T, 7, 2, 2, 4))
    assert asked == [True, True, False]


@pytest.mark.parametrize("scoring", ["prompts", "sounds"])
def test_cudnn_is_not_used_for_scoring_in_many_shapes(monkeypatch, scoring):
    """Every call of the kernel within CORE's scorer and within the loss of sounds. Red without their `with` line."""
    from nanochat.audio import loss as audio_loss_eval
    from nanochat.evaluation import core as core_eval

    inside, calls, kernel = [], [], F.scaled_dot_product_attention

    @contextmanager
    def entered(device, many_shapes):
        inside.append(many_shapes)
        yield
        inside.pop()

    def called(*args, **options):
        calls.append(inside[:1])
        return kernel(*args, **options)

    model = GPT(GPTConfig(32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=16))
    model.init_weights()
    for module in (core_eval, audio_loss_eval):
        monkeypatch.setattr(module, "kernels_for", entered)
    monkeypatch.setattr(F, "scaled_dot_product_attention", called)
    if scoring == "prompts":
        rows = [core_eval.Row(i // 2, [1 + i // 2] * 9 + [i] * (1 + i), 9, 10 + i) for i in range(8)]
        core_eval.score_rows(model, rows, 0, 40)
    else:
        audio_loss_eval._nats(model, [([1] * i, [2] * 5) for i in range(1, 6)], 2, 0, 1, lambda: False)
    assert len(calls) >= 6
    assert all(call == [True] for call in calls), calls
