"""Bytes become the text that Python's own codecs wrote, or are refused by name; no encoding is guessed wrongly."""

import codecs

import hypothesis
import hypothesis.strategies as st
import pytest

from nanochat.data.encodings import Undecodable, check_encodable, decode_text, detect_encoding

WIDE = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TEXTS = {
    "English": "The quick brown fox\r\njumps over the lazy dog.\r\n",
    "German": "Größe, Straße, Ärger: „schön“ – 5 €\n",
    "Russian": "Съешь ещё этих мягких французских булок\nда выпей чаю\n",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία\n",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה\n",
    "Arabic": "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ\n",
    "Hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा\n",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า\nกว่าบรรดาฝูงสัตว์\n",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고\n가가 나나\n",
    "Japanese": "吾輩は猫である。名前はまだ無い。\nどこで生れたか　とんと見当がつかぬ。\n",
    "Chinese": "道可道,非常道。名可名,非常名。\n一生二,二生三\n",
    "emoji": "great 😀😃 fun\r\n",
    "DNA": "ACGTTGCA" * 20,
    "Japanese blanks": "こんにちは　世界　です",
    "syllables that end in a NUL byte": "가가가가가가 가",
    "and a line that ends in CR": "가가가\r가",
    "characters that end in NUL bytes": "　一　二　三　",
    "a number": "0,000",
    "CR only": "one\rtwo\rthree\r",
}


@pytest.mark.parametrize("language", TEXTS)
def test_every_unicode_encoding_is_read(language):
    """With and without a mark: exactly the text, line ends included, no mark in it.

    Red when a mark is not cut off, when UTF-16's mark is looked for before UTF-32's, when the WEIGHTS are 1, or when
    U+2000 is plausible, or when a text of common characters alone gets no further score.
    """
    text = TEXTS[language]
    assert decode_text(text.encode()) == decode_text(codecs.BOM_UTF8 + text.encode()) == text
    for encoding, mark in WIDE.items():
        assert decode_text(mark + text.encode(encoding)) == text
        assert decode_text(text.encode(encoding)) == text, encoding
        assert detect_encoding(text.encode(encoding)[:-1], complete=False) == (encoding, 0)


@hypothesis.given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")), st.sampled_from(["utf-8", *WIDE])
)
def test_marked_text_is_what_codecs_read(text, encoding):
    """Any text under any mark, against codecs. Red when the text is normalised, stripped, or its line ends changed."""
    raw = WIDE.get(encoding, codecs.BOM_UTF8) + text.encode(encoding)
    hypothesis.assume(not raw.startswith(codecs.BOM_UTF32_LE) or encoding == "utf-32-le")
    text = text.lstrip("\ufeff")
    assert decode_text(raw) == text == raw.decode({"utf-8": "utf-8-sig"}.get(encoding, encoding[:6])).lstrip("\ufeff")
    if encoding == "utf-8":
        assert decode_text(text.encode()) == text


@hypothesis.given(
    st.lists(st.sampled_from(sorted({word for text in TEXTS.values() for word in text.split()})), min_size=4),
    st.sampled_from([" ", "\n", "\r\n"]),
    st.sampled_from(list(WIDE)),
)
def test_words_without_a_mark(words, blank, encoding):
    """Words of all scripts mixed: found by their NUL bytes. Red when Latin letters alone count as common."""
    text = blank.join(words) + blank
    assert decode_text(text.encode(encoding)) == text


@hypothesis.given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(raw):
    """Never another exception, never NUL or a mark in a text, and valid UTF-8 without NUL is itself.

    Red when decode_text decodes with errors="replace", or does not look for NUL.
    """
    try:
        expected = raw.decode().lstrip("\ufeff")
    except UnicodeDecodeError:
        expected = None
    try:
        text = decode_text(raw)
    except Undecodable as error:
        assert "\n" not in str(error)
        assert expected is None or b"\0" in raw
        return
    assert "\0" not in text
    if b"\0" not in raw and not raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        assert text == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_second_mark_is_no_text(encoding):
    """Of files that were joined, or marked by two programs. Red when only the first mark is removed."""
    assert decode_text("\ufeff\ufeffone, \ufefftwo".encode(encoding)) == "one, \ufefftwo"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("Straße\n".encode("latin-1"), r"not UTF-8 at byte 4, looks like latin-1: iconv -f iso-8859-1 -t UTF-8"),
        ("“quoted” – and more\n".encode("cp1252"), r"looks like cp1252: iconv -f cp1252 -t UTF-8"),
        ("привет, мир".encode("cp1251"), r"looks like gb18030, .* cp1251 or another: iconv -f ENCODING"),
        ("吾輩は猫である".encode("shift_jis"), r"looks like gb18030, shift_jis"),
        ("äöü ".encode() * 50 + b"\xff", r"not UTF-8 at byte 350, though UTF-8 elsewhere: iconv -c"),
        (b"\xff\xfea", r"utf-16-le by its byte-order mark, but damaged at byte 2"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary data"),
        (bytes(100), "binary data"),
        (b"find\0print0\0does\0this\0", "binary data"),
        (b"one NUL \0 in a long text " * 50, "binary data"),
        (codecs.BOM_UTF8 + b"a\0b", "binary data"),
    ],
)
def test_what_is_no_unicode_is_refused_by_name(raw, words):
    """Red when _not_utf8 is not asked, or when pairs of ASCII letters may be Chinese (ascii_only)."""
    with pytest.raises(Undecodable, match=words):
        decode_text(raw)


def test_lone_surrogates_are_named():
    """Red when check_encodable calls bytes that are no UTF-8 surrogates."""
    with pytest.raises(Undecodable, match=r"a lone surrogate, \\ud800"):
        check_encodable("ab\ud800")
    with pytest.raises(Undecodable, match="not UTF-8 at byte 2, looks like latin-1"):
        check_encodable(b"ab\xfcc".decode("utf-8", "surrogateescape"))
    check_encodable("fine")
