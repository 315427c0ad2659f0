"""Fitted codecs: judged by librosa's pitch tracker and by the waveform, not by their own measures."""

import itertools
import math
from collections import Counter, defaultdict

import librosa
import numpy as np
import pytest
import torch

from nanochat.audio import fitted_codec
from nanochat.audio.codecs import codec_folder, load_codec, open_codec
from nanochat.audio.fitted_codec import fit_codec, one_core
from nanochat.audio.synth import INSTRUMENTS, ROOTS, clip, frequency
from nanochat.system.environment import UserError

KINDS = {"frame": (1, 512), "pitch": (2, 256), "mdct": (4, 256)}  # codebooks and codes


@pytest.fixture(scope="module", autouse=True)
def quick():
    with one_core():  # as quick on a busy machine
        yield


@pytest.fixture(scope="module")
def sounds():
    return [clip(index).wav for index in range(60)]


@pytest.fixture(scope="module")
def codecs(sounds):
    return {kind: fit_codec(kind, sounds, *shape) for kind, shape in KINDS.items()}


@pytest.fixture(scope="module")
def small(sounds):
    """Codecs of 3 codebooks of 64 codes, fitted in no time."""
    return {kind: fit_codec(kind, sounds[:8], 3, 64) for kind in KINDS}


@pytest.fixture(scope="module")
def held_out():
    """Clips that no codec has seen, their f0 as librosa hears it, and where it is steady and not at rest."""
    wavs = np.stack([clip(90_000 + index).wav for index in range(12)])
    f0 = np.stack([heard(wav) for wav in wavs])
    steady = np.abs(np.diff(np.log2(f0), axis=1)) < 1 / 24
    loud = librosa.feature.rms(y=wavs, frame_length=640, hop_length=320)[:, 0, :100] > 0.01
    loud[:, 1:-1] &= steady[:, 1:] & steady[:, :-1]
    return wavs, f0, loud


def heard(wav):
    """f0 in Hz, one a frame of 20 ms."""
    return librosa.yin(wav, fmin=62, fmax=1050, sr=16000, frame_length=2048, hop_length=320)[:100]


def held_note(root, instrument):
    """A note of 16 kHz made here: harmonics of the instrument, a second long."""
    time = np.arange(16000) / 16000
    partials = INSTRUMENTS[instrument].items()
    tones = (
        a * np.exp(-d * time) * np.sin(2 * np.pi * k * frequency(root) * time)
        for k, (a, d) in partials
        if k * frequency(root) < 7600
    )
    fade = np.clip(np.minimum(time / 0.01, (1 - time) / 0.03), 0, 1)
    return (0.5 / sum(a for _, (a, _) in partials) * sum(tones) * fade).astype(np.float32)


def entropy(values):
    counts = np.array(list(Counter(values).values())) / len(values)
    return float(-(counts * np.log2(counts)).sum())


def conditional_entropy(codes, given):
    """Bits of a code when `given` is known."""
    groups = defaultdict(list)
    for code, key in zip(codes, given, strict=True):
        groups[key].append(code)
    return sum(len(group) * entropy(group) for group in groups.values()) / len(codes)


# ---------------------------------------------------------------------------------------------------------------------
# fitting


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_sounds_and_seed_give_the_same_codec(small, sounds, kind):
    """Red when the k-means draws from the global generator, or the seed does not reach it."""
    torch.rand(3)
    assert fit_codec(kind, sounds[:8], 3, 64).hash == small[kind].hash
    assert fit_codec(kind, sounds[:8], 3, 64, seed=1).hash != small[kind].hash


def test_an_endless_source_is_read_to_a_bound(sounds, monkeypatch):
    """Red when fit_codec takes all that it is given."""
    monkeypatch.setattr(fitted_codec, "FIT_FRAMES", 300)
    read = []
    fit_codec("frame", (read.append(wav) or wav for wav in itertools.cycle(sounds)), 1, 64)
    assert len(read) == 3


def test_what_cannot_be_fitted_is_named(sounds):
    """Red when fewer frames than codes, silence, no sounds or too few codebooks reach the k-means."""
    with pytest.raises(UserError, match=r"100 frames of sound cannot fill 128 codes: .* at most 64 .*audio:64"):
        fit_codec("frame", [clip(0).wav], 1, 128)
    for nothing in ([], [np.zeros(0, np.float32)], [np.zeros(9000, np.float32)]):
        for kind in KINDS:
            with pytest.raises(UserError, match="no sound but silence"):
                fit_codec(kind, nothing, 2, 64)
    with pytest.raises(UserError, match=r"at least 2 codebooks.*--codebooks=2"):
        fit_codec("pitch", sounds[:4], 1, 64)
    with pytest.raises(UserError, match=r"at least 61 codes a codebook, not 60"):
        fit_codec("pitch", sounds[:4], 2, 60)
    with pytest.raises(UserError, match=r"codec='mp3': .* frame, pitch, mdct"):
        fit_codec("mp3", sounds[:4], 2, 64)


# ---------------------------------------------------------------------------------------------------------------------
# sounds


@pytest.mark.parametrize(("kind", "share"), [("frame", 0.92), ("pitch", 0.98), ("mdct", 0.98)])
def test_pitch_survives(codecs, held_out, kind, share):
    """f0 by YIN within 50 cents of the original's where that is steady. Red with a window of 512 samples instead of
    2048 (frame), with pitch codes shifted by three (pitch), or with the two halves of a frame swapped (mdct)."""
    wavs, f0, steady = held_out
    decoded = codecs[kind].decode_batch(codecs[kind].encode_batch(wavs))
    cents = 1200 * np.abs(np.log2(np.stack([heard(wav) for wav in decoded]) / f0))
    assert steady.mean() > 0.7
    assert (cents[steady] < 50).mean() >= share


def test_mdct_keeps_the_waveform(sounds, held_out):
    """10 dB SI-SDR at 2000 bit/s (4 x 1024 at 50 frames a second) on unseen clips. Red when a stage codes the sound
    again instead of what the stages before left over."""
    codec = fit_codec("mdct", sounds[:50], 4, 1024)
    assert codec.frame_rate * codec.codebooks * math.log2(codec.codes) == 2000
    wavs = held_out[0].astype(np.float64)
    decoded = codec.decode_batch(codec.encode_batch(wavs))
    scale = (decoded * wavs).sum(1, keepdims=True) / (wavs * wavs).sum(1, keepdims=True)
    ratios = 10 * np.log10(((scale * wavs) ** 2).sum(1) / ((decoded - scale * wavs) ** 2).sum(1))
    assert ratios.mean() > 10, ratios


@pytest.mark.parametrize("kind", KINDS)
def test_silence_is_silence_and_loudness_stays(codecs, sounds, kind):
    """A codec that has learnt from loud and quiet sounds brings each back within 3 dB. Red when code 0 may drift away
    from silence, or the frame's level is dropped."""
    codes = codecs[kind].encode(np.zeros(4000, np.float32))
    assert not codes.any()
    assert not codecs[kind].decode(codes).any()
    both = fit_codec(kind, [gain * wav for wav in sounds[:40] for gain in (1.0, 0.03)], *KINDS[kind])
    for wav in (clip(90_100).wav, clip(90_105).wav):
        for gain in (1.0, 0.03):
            decoded = both.decode(both.encode(gain * wav))
            assert abs(20 * np.log10(decoded.std() / (gain * wav).std())) < 3, (kind, gain)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_batches_and_any_legal_code(small, kind):
    """ceil(samples / 320) frames, one at least; random codes decode to finite sound of 320 samples a frame, alone as in
    a batch. Red when a pitch code beyond the last pitch indexes the table of pitches."""
    codec = small[kind]
    random = np.random.default_rng(0)
    for samples, count in ((0, 1), (1, 1), (319, 1), (320, 1), (321, 2), (16000, 50)):
        codes = codec.encode(random.normal(0, 0.1, samples).astype(np.float32))
        assert codes.dtype == np.int64
        assert codes.shape == (3, count)
        assert 0 <= codes.min() <= codes.max() < 64
        assert codec.decode(codes).shape == (320 * count,)
    codes = random.integers(0, 64, (9, 3, 60))
    decoded = codec.decode_batch(codes)
    assert decoded.dtype == np.float32
    assert decoded.shape == (9, 19200)
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded[7], codec.decode(codes[7]), atol=1e-4)
    wavs = random.normal(0, 0.1, (9, 19200)).astype(np.float32)
    assert np.array_equal(codec.encode_batch(wavs)[7], codec.encode(wavs[7]))
    for wrong in (np.full((3, 4), 64), np.full((3, 4), -1)):
        with pytest.raises(UserError, match=r"outside 0 .. 63"):
            codec.decode(wrong)
    for wrong in (np.zeros((2, 4), int), np.zeros((3, 0), int), np.zeros(3, int)):
        with pytest.raises(UserError, match=r"takes \[3, T\]"):
            codec.decode(wrong)


def test_noise_comes_back_as_noise_of_the_same_colour(sounds):
    """The pitch kind has a code for "no pitch": octaves keep their level within 3 dB, and nothing repeats. Red when
    such frames sound as harmonics of the reference pitch, or are scaled by the number of bins in a band."""
    random = np.random.default_rng(0)
    spectra = np.fft.rfft(random.normal(0, 1, (6, 32000)), axis=1) / np.sqrt(1 + np.arange(16001) / 500)
    noise = (np.fft.irfft(spectra, axis=1) * 0.1).astype(np.float32)
    codec = fit_codec("pitch", [*sounds[:10], *noise[:5]], 2, 256)
    codes = codec.encode(noise[5])
    assert (codes[0] == 0).mean() > 0.9
    decoded = codec.decode(codes)
    repeats = librosa.autocorrelate(decoded, max_size=1000)[200:] / (decoded @ decoded)
    assert np.abs(repeats).max() < 0.3
    before, after = (np.abs(np.fft.rfft(wav)) ** 2 for wav in (noise[5], decoded))
    for low in (125, 250, 500, 1000, 2000):
        octave = slice(2 * low, 4 * low)
        assert abs(10 * np.log10(after[octave].sum() / before[octave].sum())) < 3, low
    tone = fit_codec("pitch", sounds[:10], 2, 64).encode(held_note(60, "organ"))
    assert (tone[0] > 0).mean() > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# pitch apart from timbre


def test_pitch_and_timbre_are_coded_apart(codecs):
    """Notes of 24 roots on 5 instruments. Codebook 0, given root and time, says less than 0.05 bits (of 2.3) about the
    instrument; codebook 1, given instrument and time, less than 0.4 bits about the root (of 4.6), but all about the
    instrument. The frame kind tells everything at once. Red when bands are measured in Hz instead of in multiples of
    the pitch, or when a bit costs nothing, so that noise picks among equal codes."""
    notes = [(instrument, root) for instrument in INSTRUMENTS for root in ROOTS]
    wavs = np.stack([held_note(root, instrument) for instrument, root in notes])
    keys = [(*note, t) for note in notes for t in range(48)]
    pitch, timbre = (codecs["pitch"].encode_batch(wavs)[:, q, :48].ravel().tolist() for q in (0, 1))
    entangled = codecs["frame"].encode_batch(wavs)[:, 0, :48].ravel().tolist()
    without_instrument = [(root, t) for _, root, t in keys]
    without_root = [(instrument, t) for instrument, _, t in keys]
    assert conditional_entropy(pitch, without_instrument) < 0.05
    assert conditional_entropy(timbre, without_root) < 0.4
    assert conditional_entropy(entangled, without_root) > 4
    assert conditional_entropy(pitch, without_root) == pytest.approx(np.log2(24), abs=0.05)
    assert conditional_entropy(timbre, without_instrument) > 2.2


def test_codes_of_two_notes_make_a_third(codecs):
    """The pitch codes of one note with the timbre codes of another instrument on another note: YIN hears the first
    one's pitch, and the spectrum is nearest to the second one's instrument at that pitch. Red when the
    harmonics sound at multiples of a fixed frequency."""
    codec = codecs["pitch"]
    for root, other, (instrument, wanted) in zip(
        (50, 57, 64, 69, 53), (62, 49, 70, 52, 66), itertools.pairwise([*INSTRUMENTS, "sine"]), strict=True
    ):
        codes = np.stack([codec.encode(held_note(root, instrument))[0], codec.encode(held_note(other, wanted))[1]])
        made = codec.decode(codes)
        assert np.abs(1200 * np.log2(np.median(heard(made)[4:40]) / frequency(root))) < 50
        spectra = {name: _bands(held_note(root, name)) for name in INSTRUMENTS}
        assert min(INSTRUMENTS, key=lambda name: np.abs(spectra[name] - _bands(made)).mean()) == wanted


def _bands(wav):
    return np.log(librosa.feature.melspectrogram(y=wav[:15000], sr=16000, n_fft=2048, hop_length=640) + 1e-4)


def test_codes_hold_still_while_a_note_sounds(codecs):
    """Held organ notes half-way between two pitches, with noise 20 dB below: one pitch code each. In tune and clean,
    their timbre does not change either. Red when changing the pitch costs nothing, or a bit of timbre does."""
    random = np.random.default_rng(0)
    for root in ROOTS:
        between = held_note(root + 1 / 8, "organ")
        noise = random.normal(0, 0.1 * between.std(), between.shape)
        assert len(set(codecs["pitch"].encode(between + noise)[0, 2:46])) == 1, root
        assert len(set(codecs["pitch"].encode(held_note(root, "organ"))[1, 4:44])) == 1, root


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_codec_is_the_same_codec(small, sounds, tmp_path, kind):
    """Red when a tensor is not saved."""
    directory = small[kind].save(tmp_path / "codec")
    again = load_codec(directory)
    assert (again.hash, again.name, again.codebooks, again.codes) == (small[kind].hash, kind, 3, 64)
    assert np.array_equal(again.encode(sounds[20]), small[kind].encode(sounds[20]))
    assert small[kind].save(directory) == directory
    with pytest.raises(UserError, match="holds another codec"):
        small["mdct" if kind == "frame" else "frame"].save(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def test_a_damaged_codec_is_named(small, tmp_path):
    """Red when the hash is not compared, or an error of a reader gets through."""
    directory = small["frame"].save(tmp_path / "codec")
    tensors, description = directory / "codec.safetensors", directory / "codec.json"
    whole = tensors.read_bytes()
    for content in (whole[:-4] + b"\0\0\x80?", whole[:1000], b""):
        tensors.write_bytes(content)
        with pytest.raises(UserError, match=r"delete the folder and fit it again"):
            load_codec(directory)
    tensors.unlink()
    with pytest.raises(UserError, match=r"codec.safetensors"):
        load_codec(directory)
    small["mdct"].save(tmp_path / "mdct")
    tensors.write_bytes((tmp_path / "mdct" / "codec.safetensors").read_bytes())
    with pytest.raises(UserError, match="it hashes to"):
        load_codec(directory)
    for content in ("", "[]", "{}", '{"name": "frame"}', "\xff"):
        description.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=r"damaged.*codec.json"):
            load_codec(directory)
    with pytest.raises(UserError, match="cannot be read"):
        load_codec(tmp_path / "nowhere")


def test_codecs_are_found_by_name(small, tmp_path, monkeypatch):
    """A folder, a whole name, a name without its hash; a kind is to be fitted. Red when Q and K are not compared."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"codec='drums' is none of frame, pitch, mdct.*none yet"):
        open_codec("drums", 1, 64)
    directory = small["mdct"].save(codec_folder(small["mdct"]))
    assert directory.parent == tmp_path / "codecs"
    small["mdct"].save(tmp_path / "codecs" / "drums-0123abcd")
    for name in (str(directory), directory.name, "drums"):
        assert open_codec(name, 3, 64).hash == small["mdct"].hash
    assert [open_codec(kind, 3, 64) for kind in KINDS] == [None] * 3
    with pytest.raises(UserError, match=r"3 codebooks of 64 codes, the settings say 2 of 128: --codebooks=3"):
        open_codec("drums", 2, 128)
    small["frame"].save(tmp_path / "codecs" / "drums-4567abcd")
    with pytest.raises(UserError, match="ambiguous: drums-0123abcd, drums-4567abcd"):
        open_codec("drums", 3, 64)
