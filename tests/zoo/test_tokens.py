"""The tokenizer's streams: whole, in order, and remembered."""

import pytest
import torch

from effkit.zoo import tokens
from effkit.zoo.data import Windows
from effkit.zoo.tokens import END, encode, encode_once, shipped_tokenizer

TEXTS = tuple(f"def f{n}(x):\n    return x + {n}\n" for n in range(70))  # more than two batches of encode


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFKIT_CACHE", str(tmp_path))
    return tmp_path / "tokens"


def test_a_stream_is_its_texts_with_an_end_after_each():
    coder = shipped_tokenizer()
    ids = encode(coder, TEXTS)
    assert coder.decode(ids.tolist(), skip_special_tokens=False) == "".join(text + END for text in TEXTS)


def test_the_second_time_nothing_is_encoded(kept, monkeypatch):
    coder = shipped_tokenizer()
    first = encode_once(coder, TEXTS)
    assert torch.equal(first, encode(coder, TEXTS))
    monkeypatch.setattr(tokens, "encode", None)
    assert torch.equal(encode_once(coder, TEXTS), first) and first.dtype == torch.long


def test_other_texts_are_not_taken_for_these(kept):
    coder = shipped_tokenizer()
    one, other = encode_once(coder, ("ab", "c")), encode_once(coder, ("a", "bc"))
    assert len(list(kept.iterdir())) == 2 and not torch.equal(one, other)


def test_a_damaged_file_is_written_anew(kept):
    coder = shipped_tokenizer()
    first = encode_once(coder, TEXTS)
    (path,) = kept.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert torch.equal(encode_once(coder, TEXTS), first)
    assert torch.equal(tokens.load_file(path)["ids"].long(), first)


def test_where_nothing_can_be_written_it_works_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("EFFKIT_CACHE", str(tmp_path / "file"))
    assert torch.equal(encode_once(shipped_tokenizer(), TEXTS), encode(shipped_tokenizer(), TEXTS))


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_first_windows_are_as_many_as_asked_for(shuffle):
    text = Windows(torch.arange(1000), length=10, size=4, shuffle=shuffle)
    for n in (1, 2, 7):
        assert sum(len(x) for x, _ in text.first(n)) == n
