"""Residual vector quantisers fitted by k-means: the frame, pitch and mdct codecs."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from nanochat.audio.codec_files import KINDS, check_codes, save_codec
from nanochat.audio.pitch import OCTAVES, measure_harmonics, synthesize, track_pitch
from nanochat.audio.spectra import HOP, SAMPLE_RATE, from_log_spectra, from_mdct, log_spectra, mdct
from nanochat.checkpoint_files import weights_hash
from nanochat.system.environment import UserError

logger = logging.getLogger(__name__)

COMPONENTS = 96  # principal components of a log spectrum


FIT_FRAMES = 30_000  # frames (10 minutes) that a codec learns from


KMEANS_ROUNDS = 8


BIT_PRICE = 0.1  # of the pitch kind: squared log amplitude, summed over the bands, that is worth a bit


GROUP = 512  # frames computed at a time: more would only leave the processor's cache


@contextmanager
def one_core() -> Iterator[None]:
    """Thousands of small steps: shared among cores that have other work, each would wait longer than it takes, and the
    codec would depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class FittedCodec:
    """A codec of one of KINDS.

    tensors: "codebooks" [stages, K, features], row 0 of the first one being silence and row 0 of the others "nothing to
    add"; "prices" [stages, K], see kmeans(); for frame also "mean" [features] and "basis" [features, components] of the
    log spectra.
    """

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / HOP

    def __init__(self, kind: str, tensors: dict[str, torch.Tensor]):
        self.name, self.tensors = kind, tensors
        self.stages = tensors["codebooks"]
        self.codebooks, self.codes = len(self.stages) + (kind == "pitch"), self.stages.shape[1]
        self.hash = weights_hash({f"{kind}-1/{name}": tensor for name, tensor in tensors.items()})

    def encode(self, wav: np.ndarray | torch.Tensor) -> np.ndarray:
        """float32 [samples] -> int64 [Q, T], T = ceil(samples / 320) and at least 1."""
        return self.encode_batch(np.asarray(wav)[None])[0]

    def decode(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """[Q, T] -> float32 [T * 320]. UserError for another Q and for codes outside 0 .. K-1."""
        return self.decode_batch(np.asarray(codes)[None])[0]

    @torch.no_grad()
    @one_core()
    def encode_batch(self, wavs: np.ndarray | torch.Tensor) -> np.ndarray:
        """float32 [B, samples] -> int64 [B, Q, T]; a sound's codes do not depend on its neighbours."""
        wavs = torch.from_numpy(np.array(wavs, dtype=np.float32))
        return torch.cat([self._encode(group) for group in wavs.split(_group(wavs.shape[1] / HOP))]).numpy()

    @torch.no_grad()
    def decode_batch(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """[B, Q, T] -> float32 [B, T * 320]; UserError as in decode."""
        codes = check_codes(codes, self)
        with nullcontext() if self.name == "frame" else one_core():  # Griffin-Lim's transforms are worth sharing
            return torch.cat([self._decode(group) for group in codes.split(_group(codes.shape[2]))]).numpy()

    def _encode(self, wavs: torch.Tensor) -> torch.Tensor:
        codes, seen = [], None
        if self.name == "pitch":
            states = track_pitch(wavs, bins_for(self.codes))
            codes.append(states)
            rows, seen = measure_harmonics(wavs, states, bins_for(self.codes))
        elif self.name == "mdct":
            rows = mdct(wavs)
        else:
            rows = (log_spectra(wavs) - self.tensors["mean"]) @ self.tensors["basis"]
        for stage, prices in zip(self.stages, self.tensors["prices"], strict=True):
            codes.append(nearest(rows, seen, stage, prices))
            rows = rows - stage[codes[-1]]
        return torch.stack(codes, 1)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        first = self.codebooks - len(self.stages)
        rows = sum(stage[codes[:, q]] for q, stage in enumerate(self.stages, first))
        if self.name == "pitch":
            bins = bins_for(self.codes)
            states = codes[:, 0].masked_fill(codes[:, 0] > OCTAVES * bins, 0)
            return synthesize(states, rows, bins)
        if self.name == "mdct":
            return from_mdct(rows)
        logs = rows @ self.tensors["basis"].T + self.tensors["mean"]
        return from_log_spectra(logs.masked_fill(codes[:, 0, :, None] == 0, -math.inf))

    def save(self, directory: Path | str) -> Path:
        """Write codec.safetensors and codec.json; the folder appears whole or not at all.

        UserError when it already holds another codec; the same one is left as it is.
        """
        return save_codec(Path(directory), self, self.tensors)


def _group(frames: float) -> int:
    return max(1, int(GROUP / max(1.0, frames)))


@one_core()
def fit_codec(kind: str, sounds: Iterable[np.ndarray], codebooks: int, codes: int, seed: int = 0) -> FittedCodec:
    """Fit a codec of this kind on sounds (float32 [samples], 16 kHz mono), read until FIT_FRAMES frames are seen.

    The same sounds and seed give the same codec. UserError: no such kind, too few codebooks, nothing but silence, or
    fewer frames than codes.
    """
    if kind not in KINDS:
        raise UserError(f"codec={kind!r}: the fitted kinds are {', '.join(KINDS)}")
    if kind == "pitch":
        bins_for(codes)
        if codebooks < 2:
            raise UserError("codec='pitch' needs at least 2 codebooks, one of them for the pitch: --codebooks=2")
    start = time.perf_counter()
    measured, count = [], 0
    for wav in sounds:
        measured.append(_measure(kind, torch.as_tensor(wav, dtype=torch.float32)[None, : FIT_FRAMES * HOP], codes))
        count += len(measured[-1][0])
        if count >= FIT_FRAMES:
            break
    silence, _ = _measure(kind, torch.zeros(1, 1), codes)
    rows, seen = (torch.cat(parts) for parts in zip(*measured, strict=True)) if measured else (silence, silence)
    loud = (rows - silence).abs().amax(1) > 1e-3
    rows, seen = rows[loud], seen[loud]
    if not len(rows):
        raise UserError(f"codec={kind!r} cannot be fitted: there is no sound but silence")
    if len(rows) < codes:
        most = 2 ** int(math.log2(len(rows)))
        raise UserError(
            f"{len(rows)} frames of sound cannot fill {codes} codes: give more sound or at most {most} codes "
            f"(--modalities=audio:{most})"
        )
    tensors = {}
    if kind == "frame":
        tensors["mean"] = rows.mean(0)
        rows = rows - tensors["mean"]
        tensors["basis"] = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -COMPONENTS:].contiguous()
        rows, silence = rows @ tensors["basis"], (silence - tensors["mean"]) @ tensors["basis"]
    seen = seen if kind == "pitch" else None
    stages = []
    for q in range(codebooks - (kind == "pitch")):
        generator = torch.Generator().manual_seed(seed * 1000 + q)
        stages.append(kmeans(rows, seen, codes, silence[0] * (q == 0), generator, BIT_PRICE * (kind == "pitch")))
        rows = rows - stages[-1][0][nearest(rows, seen, *stages[-1])]
    tensors["codebooks"], tensors["prices"] = map(torch.stack, zip(*stages, strict=True))
    codec = FittedCodec(kind, tensors)
    logger.info(
        f"codec {kind}: {codebooks} x {codes} codes from {len(rows):,} frames in {time.perf_counter() - start:.1f} s"
    )
    return codec


def _measure(kind: str, wav: torch.Tensor, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A sound [1, samples] as rows [T, features], and which of their entries could be measured."""
    if kind == "pitch":
        bins = bins_for(codes)
        rows, seen = measure_harmonics(wav, track_pitch(wav, bins), bins)
        return rows[0], seen[0]
    rows = (mdct(wav) if kind == "mdct" else log_spectra(wav))[0]
    return rows, rows


def bins_for(codes: int) -> int:
    """Pitches to the octave that this many codes allow, one of them being "no pitch"; UserError when too few."""
    for bins in (48, 24, 12):
        if OCTAVES * bins < codes:
            return bins
    raise UserError(
        f"codec='pitch' needs at least {OCTAVES * 12 + 1} codes a codebook, not {codes}: --modalities=audio:256"
    )


def kmeans(
    rows: torch.Tensor,
    seen: torch.Tensor | None,
    count: int,
    fixed: torch.Tensor,
    generator: torch.Generator,
    bit_price: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids [count, features] of rows [N, features], and the price of each [count].

    Centroid 0 is `fixed`, the others start as random rows; one that lost all its rows starts anew at one of the rows
    that are worst served. Where `seen` is given, only the entries that it marks count. bit_price: squared distance
    that one bit is worth. A rare code then costs more than a common one (entropy-constrained quantisation, Chou et al.
    1989), so that a crowd of equal sounds shares one code instead of being split by its noise.
    """
    picked = torch.randperm(len(rows), generator=generator)[: count - 1]
    centroids, prices = torch.cat([fixed[None], rows[picked]]), torch.zeros(count)
    weights = torch.ones_like(rows) if seen is None else seen.to(rows.dtype)
    for number in range(KMEANS_ROUNDS):
        owner = nearest(rows, seen, centroids, prices)
        sums = torch.zeros_like(centroids).index_add_(0, owner, rows * weights)
        sizes = torch.zeros_like(centroids).index_add_(0, owner, weights)
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
        centroids = torch.cat([fixed[None], means[1:]])
        counts = torch.bincount(owner, minlength=count)
        prices = -bit_price / 2 * torch.log2((counts + 0.5) / len(rows))
        prices[0] = prices.min()  # however rare it was
        if number + 1 < KMEANS_ROUNDS and len(empty := 1 + (counts[1:] == 0).nonzero()[:, 0]):
            worst = ((rows - centroids[owner]) * weights).square().sum(1).topk(len(empty)).indices
            centroids[empty], prices[empty] = rows[worst], prices.median()
    return centroids, prices


def nearest(
    rows: torch.Tensor, seen: torch.Tensor | None, centroids: torch.Tensor, prices: torch.Tensor
) -> torch.Tensor:
    """[..., features] -> [...]: the cheapest centroid's number, by half the squared distance (over the entries that
    `seen` marks, where given) plus its price."""
    squares = centroids.square() / 2
    best = []
    for start in range(0, rows[..., 0].numel(), 4096):
        part = rows.reshape(-1, rows.shape[-1])[start : start + 4096]
        if seen is None:
            best.append((squares.sum(1) + prices - part @ centroids.T).argmin(1))
        else:
            weights = seen.reshape(-1, rows.shape[-1])[start : start + 4096].to(rows.dtype)
            best.append((weights @ squares.T + prices - (part * weights) @ centroids.T).argmin(1))
    return torch.cat(best).view(rows.shape[:-1])
