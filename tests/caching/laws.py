"""What caches owe to a decoder, the exact ones and, at the end, the lossy ones. A maker is (model, capacity) -> an empty cache."""

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
