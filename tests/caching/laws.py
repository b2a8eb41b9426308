"""What caches owe to a decoder, the exact ones and, at the end, the lossy ones. A maker is (model, capacity) -> an empty cache."""

import pytest
import torch

from tests.caching.decoders import assert_equal_logits, chunked, decoder, text


def equals_recomputed(maker, length=12, sizes=(4, 1, 3), kv_heads=2, dtype=torch.float64, rows=2):
    model, ids = decoder(dtype=dtype, kv_heads=kv_heads), text(length, rows=rows)
    assert_equal_logits(chunked(model, maker(model, length), ids, sizes), model(ids))


def taken_back_leaves_no_trace(maker, length=9, keep=5, sizes=(4, 1), dtype=torch.float64):
    model, first, second = decoder(dtype=dtype), text(length, seed=1), text(length + 8, seed=2)
    keep, cache = min(keep, length), maker(model, length)
    chunked(model, cache, first, sizes)
    cache.truncate(keep)
    assert cache.length == keep
    regrown = torch.cat((first[:, :keep], second[:, keep:]), dim=1)
    assert_equal_logits(chunked(model, cache, regrown, sizes), model(regrown)[:, keep:])


def branches(parents: list[int]) -> list[list[int]]:
    """For each token of a tree the places of those on the way to it, itself last."""
    ways: list[list[int]] = []
    for place, parent in enumerate(parents):
        ways.append([*(ways[parent] if parent >= 0 else []), place])
    return ways


@torch.no_grad()
def a_tree_says_what_its_branches_say(maker, parents=(-1, 0, 0, 2, -1, 4), held=5, dtype=torch.float64, kv_heads=2):
    """And a branch that is kept leaves the cache as if it had been fed in a line."""
    model, before, tokens = decoder(dtype=dtype, kv_heads=kv_heads), text(held, seed=1), text(len(parents), seed=2)
    after = text(3, seed=3)
    for way in branches(list(parents)):
        cache = maker(model, held + len(parents) + 3)
        chunked(model, cache, before, [2])
        logits = model(tokens, cache, torch.tensor(parents))
        line = torch.cat((before, tokens[:, way], after), dim=1)
        assert_equal_logits(logits[:, way], model(line)[:, held : held + len(way)])
        cache.keep(torch.tensor(way))
        assert cache.length == (0 if cache.nbytes() == 0 else held + len(way))
        assert_equal_logits(model(line[:, cache.length :], cache)[:, -3:], model(line)[:, -3:])


@torch.no_grad()
def rows_of_unequal_length_equal_one_by_one(maker, lengths=(3, 7, 1), new=4, back=(1, 2, 1), dtype=torch.float64):
    """Padded on the right and cut to their lengths; grown; taken back by different amounts; grown again."""
    model = decoder(dtype=dtype)
    lines = [text(n + 2 * new, seed=i) for i, n in enumerate(lengths)]
    cache, at = maker(model, max(lengths) + 2 * new), torch.tensor(lengths)
    model(torch.cat([torch.cat((line[:, :n], line[:, :1].expand(1, max(lengths) - n)), 1) for line, n in zip(lines, lengths, strict=True)]), cache)
    cache.truncate(at)
    for stage in range(2):
        for step in range(new):
            tokens = torch.stack([line[0, n + step] for line, n in zip(lines, at, strict=True)])
            seen = model(tokens[:, None], cache)
            for row, line, n in zip(seen, lines, at.tolist(), strict=True):
                assert_equal_logits(row[None], model(line[:, : n + step + 1])[:, -1:])
        if stage == 0:
            at = at + new - torch.tensor(back)
            cache.truncate(at)


def passes_do_not_matter(maker, length=60, sizes=(1, 7, 3, 20), first=0, kv_heads=2, dtype=torch.float64, rows=2):
    """Behind a first pass, a prompt, however the text is cut."""
    model, ids = decoder(dtype=dtype, kv_heads=kv_heads), text(length, rows=rows)
    whole = chunked(model, maker(model, length), ids, [first])
    assert_equal_logits(chunked(model, maker(model, length), ids, [first, *sizes]), whole)
    assert_equal_logits(chunked(model, maker(model, length), ids, [first, *[1] * length]), whole)


def what_a_draft_takes_back_leaves_no_trace(maker, length=40, sizes=(9, 1, 1, 1), back=3, first=0, dtype=torch.float64):
    """Wherever passes ended; and emptied altogether, it is as new."""
    model, one, other = decoder(dtype=dtype), text(length, seed=1), text(length + 9, seed=2)
    cache = maker(model, length)
    chunked(model, cache, one, [first, length - first - sum(sizes), *sizes])
    cache.truncate(length - back)
    assert cache.length == length - back
    regrown = torch.cat((one[:, : length - back], other[:, length - back :]), dim=1)
    wanted = chunked(model, maker(model, length), regrown, [first])
    assert_equal_logits(chunked(model, cache, regrown, [2, 1]), wanted[:, length - back :])
    cache.truncate(0)
    assert cache.length == 0
    assert_equal_logits(chunked(model, cache, regrown, [first, 4]), wanted)


def taken_back_as_far_as_may_be(maker, least, length=60, first=0, dtype=torch.float64):
    """To the very token from which all that is seen is still held, and not to the one before it."""
    model, one, other = decoder(dtype=dtype), text(length, seed=1), text(length + 9, seed=2)
    cache = maker(model, length)
    chunked(model, cache, one, [first, *[1] * length])
    assert cache.least() == least
    with pytest.raises(ValueError, match=f"can be taken back to {least} tokens and not to {least - 1}"):
        cache.truncate(least - 1)
    cache.truncate(least)
    regrown = torch.cat((one[:, :least], other[:, least:]), dim=1)
    assert_equal_logits(chunked(model, cache, regrown, [1] * 5), chunked(model, maker(model, length), regrown, [first])[:, least:])


@torch.no_grad()
def a_refused_pass_has_not_happened(maker, length=60, first=0, rows=2, dtype=torch.float64):
    """Of another number of rows, or with a tree that is none: the text goes on as beside it, taken back in between."""
    model, ids = decoder(dtype=dtype), text(length, rows=rows)
    caches = [maker(model, length) for _ in range(2)]
    for cache in caches:
        chunked(model, cache, ids[:, : length - 9], [first, length - 20 - first])
    for wrong, parents, why in ((text(3, rows=rows - 1), None, f"this cache holds {rows} rows and got {rows - 1}: make a new one for another batch"),
                                (text(3, rows=rows), torch.tensor([-1, 1, 0]), "must come before it, or be -1|cannot follow|larger than")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            model(wrong, caches[0], parents)
        assert (caches[0].length, caches[0].lengths) == (caches[1].length, caches[1].lengths)
        assert_equal_logits(*(chunked(model, cache, ids[:, : length - 5], [1]) for cache in caches))
        for cache in caches:
            cache.truncate(length - 8)
    assert_equal_logits(*(chunked(model, cache, ids, [2, 1]) for cache in caches))


@torch.no_grad()
def a_line_of_which_the_first_are_kept(maker, length=40, first=0, n=6, keep=2):
    """Is as if they alone had been fed; and all of them may be."""
    model, ids = decoder(), text(length + 9)
    for stay in (0, keep, n):
        cache, wanted = maker(model, length), chunked(model, maker(model, length), ids, [first])
        chunked(model, cache, ids[:, : length - n], [first])
        model(torch.cat((ids[:, length - n : length - n + stay], text(n - stay, seed=5)), 1), cache)
        cache.keep(torch.arange(stay))
        assert cache.length == length - n + stay
        assert_equal_logits(chunked(model, cache, ids, [1, 1, 5]), wanted[:, length - n + stay :])


@torch.no_grad()
def a_tree_says_what_its_lines_say(maker, parents=(-1, 0, 0, 2, -1, 4), held=40, first=0, dtype=torch.float64):
    """Over a cache of its own kind, since what is recomputed sees more."""
    model, before, tokens, after = decoder(dtype=dtype), text(held, seed=1), text(len(parents), seed=2), text(9, seed=3)
    for way in branches(list(parents)):
        cache = maker(model, held)
        chunked(model, cache, before, [first, 9])
        logits = model(tokens, cache, torch.tensor(parents))
        cache.keep(torch.tensor(way))
        line = torch.cat((before, tokens[:, way], after), dim=1)
        wanted = chunked(model, maker(model, held), line, [first])[:, held:]
        assert_equal_logits(logits[:, way], wanted[:, : len(way)])
        assert_equal_logits(chunked(model, cache, line, [2]), wanted[:, len(way) :])
