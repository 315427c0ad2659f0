"""The layout of ids, target masks and the grammar of generation, against rules written out by hand."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from nanochat.config.settings import Settings
from nanochat.modality import Grammar, Modality, Vocabulary, modalities_of
from nanochat.system.environment import UserError

AUDIO = Modality("audio", codebooks=2, codes=5, start=13)
IMAGE = Modality("image", codebooks=1, codes=512, start=14)
VOCABULARY = Vocabulary(20, (AUDIO, IMAGE))  # text 0..19, audio 20..29 and end 30, image 31..542 and end 543


def test_id_ranges_are_contiguous():
    """V + q*K + c, then `end`. Red when a codebook's offset is forgotten, or `end` belongs to the next modality."""
    assert VOCABULARY.names == ("text", "audio", "image")
    assert VOCABULARY.ranges == [(0, 20), (20, 31), (31, 544)]
    assert VOCABULARY.size == 544
    assert (VOCABULARY.end("audio"), VOCABULARY.end("image")) == (30, 543)
    codes = np.array([[0, 4], [3, 0]])
    assert VOCABULARY.ids_of("audio", codes).tolist() == [20, 29, 23, 25]
    assert VOCABULARY.codes_of("audio", [20, 29, 23, 25, 21]).tolist() == codes.tolist()  # half a frame is none
    assert VOCABULARY.ids_of("image", np.array([[0], [511]])).tolist() == [31, 542]


def test_start_is_text_that_goes_through_the_expert():
    """Experts go by the input's modality, heads by the target's. Red when `start` routes like text."""
    by_expert, by_target = VOCABULARY.table(by_expert=True), VOCABULARY.table(by_expert=False)
    assert by_target.tolist() == [0] * 20 + [1] * 11 + [2] * 513
    changed = (by_expert != by_target).nonzero()[:, 0].tolist()
    assert changed == [13, 14]
    assert by_expert[[13, 14]].tolist() == [1, 2]


def test_mask_targets_keeps_the_named_modalities():
    """Rows whose captions differ in length: found from the ids. Red when the mask goes by position."""
    targets = torch.tensor([[1, 2, 13, 20, 26, 30, 0], [5, 13, 29, 30, 0, 7, -100]])
    audio = VOCABULARY.mask_targets(targets, ("audio",))
    ignored = -100
    assert audio.tolist() == [[ignored] * 3 + [20, 26, 30, ignored], [ignored] * 2 + [29, 30] + [ignored] * 3]
    assert torch.equal(VOCABULARY.mask_targets(targets, None), targets)
    text = VOCABULARY.mask_targets(targets, ("text",))
    assert text.tolist() == [[1, 2, 13, ignored, ignored, ignored, 0], [5, 13, ignored, ignored, 0, 7, ignored]]


def test_wrong_codes_ids_and_names_are_refused_by_name():
    for codes, said in (([[0, 5]], "code 5 is outside"), ([[-1, 0]], "code -1"), ([[1]], r"not \[frames, 2")):
        with pytest.raises(UserError, match=said):
            VOCABULARY.ids_of("audio", np.array(codes))
    for ids in ([25, 20], [20, 30], [1, 2]):
        with pytest.raises(UserError, match="not frames of audio"):
            VOCABULARY.codes_of("audio", ids)
    with pytest.raises(UserError, match="no modality 'video' here: text, audio, image"):
        VOCABULARY.end("video")


@pytest.mark.parametrize("text", ["audio", "audio:1", "audio:x", "Audio:8", "audio:8,audio:8", "text:8", ":8", "a b:8"])
def test_a_misspelt_modality_is_refused(text):
    with pytest.raises(UserError, match=r"name:codes|audio twice"):
        Settings(modalities=text).modality_codes()


def test_settings_name_modalities():
    """Reserved ids start them in their order; codebooks are audio's. Red when the starts begin at another id."""
    settings = Settings(modalities="image:512, audio:2048", codebooks=4, expert_dim=96)
    assert modalities_of(settings, 300) == (
        Modality("image", 1, 512, start=293, expert_dim=96),
        Modality("audio", 4, 2048, start=294, expert_dim=96),
    )
    assert modalities_of(Settings(), 300) == ()
    assert Settings(modalities="audio:8", tie_weights=True).tag == "d4-tied-audio"


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"name": "audio"},
        "audio",
        None,
        3,
        dict(name="audio", codebooks=0, codes=2, start=1),
        dict(name="audio", codebooks=1.0, codes=2, start=1),
        dict(name="audio", codebooks=True, codes=2, start=1),
        dict(name="text", codebooks=1, codes=2, start=1),
        dict(name="../x", codebooks=1, codes=2, start=1),
        dict(name="audio", codebooks=1, codes=2, start=1, more=1),
        dict(name="audio", codebooks=10**9, codes=2, start=1),
    ],
)
def test_metadata_that_describes_no_modality_is_refused(saved):
    with pytest.raises(UserError, match="modalities holds"):
        Modality.read(saved)


def legal_by_hand(history: list[int], frames: int | None) -> set[int]:
    """What may follow, from the whole sequence: the rules as one would say them."""
    inside, emitted = None, 0
    for token in history:
        if inside is None:
            if token in (13, 14):
                inside, emitted = (AUDIO if token == 13 else IMAGE), 0
        elif token in (30, 543):
            inside = None
        else:
            emitted += 1
    if inside is None:
        return set(range(20))
    first, end = (20, 30) if inside is AUDIO else (31, 543)
    frame, book = divmod(emitted, inside.codebooks)
    whole = book == 0 and frame > 0
    legal = (
        set()
        if whole and frames is not None and frame >= frames
        else set(range(first + book * inside.codes, first + (book + 1) * inside.codes))
    )
    return legal | ({end} if whole else set())


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.sampled_from([None, 1, 3]))
def test_grammar_is_the_rules(random, frames):
    """Random legal walks of three rows. Red when `end` may come inside a frame, or the codebooks do not take turns."""
    grammar = Grammar(VOCABULARY, 3, frames=frames)
    rows: list[list[int]] = [[], [], []]
    for _ in range(12):
        allowed = grammar.allowed()
        for row, mask in zip(rows, allowed, strict=True):
            legal = legal_by_hand(row, frames)
            assert set(mask.nonzero()[:, 0].tolist()) == legal
            favourites = sorted(legal & {13, 14, 30, 543}) or sorted(legal)
            row.append(random.choice(favourites if random.random() < 0.5 else sorted(legal)))
        grammar.advance(torch.tensor([row[-1] for row in rows]))
