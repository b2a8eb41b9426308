"""The paged cache: keys and values in pages, as an operating system keeps memory.

Problem   Nobody knows how long an answer will be. Room for the longest is reserved and mostly never used; and two texts
          that begin alike hold the same keys twice.
Idea      Cut the room into pages of a few tokens. A text holds a table of pages, in any order, wherever one was free:
          token i lies in page table[i // page_size], at i % page_size. A page knows how many tables name it, so texts
          can share it until one of them has to write into it and takes a copy.
Bound     Only a text's last page is partly empty: at most page_size - 1 tokens of waste a text, however long it gets. That is
          said of the pages that texts name: a pool that grows doubles, so that it may be half empty, and never shrinks.
Cost      Attention wants keys in one piece: here the pages of a pass are copied together before each layer's attention,
          all that was kept written once more and read once more. GPUs have kernels that read through the table instead.
Left out  Swapping pages out to slower memory; sharing of equal pages that were not forked (prefix.py finds them).
Source    Kwon et al. 2023, arXiv:2309.06180, section 4.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effkit.caching.kv import held_per_token, set_kv
from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.generation import Cache, Rope, attention
from effkit.core.report import Reading
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import DECODER

MOST = 1024  # tokens in a page: a larger one is a reservation again


class PagesExhausted(ValueError):
    """No page was free; nothing has changed."""


def pages_for(tokens: int, page_size: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // page_size)


def waste(lengths: Sequence[int], *, page_size: int) -> float:
    """Reserved tokens that hold nothing, over those that hold something; at most len(lengths) * (page_size - 1) of them.
    Reserving for the longest text is a page as large as that: page_size=max(lengths)."""
    return sum(pages_for(n, page_size) * page_size - n for n in lengths) / max(1, sum(lengths))


class Keeper(Protocol):
    """Who holds pages that nobody reads at the moment."""

    def evict(self, pages: int) -> int:
        """Gives back so many and says how many these were: 0, and nothing is given back, where it has fewer."""


class Pool:
    """Pages for all layers and all texts of a model; page p is the p-th slice of every layer's one tensor.

    pages       how many there are; None: twice as many whenever they run out
    references  of each page, how many tables and prefix caches name it
    """

    def __init__(self, *, page_size: int = 16, pages: int | None = None):
        require_int("page_size", page_size, 1, MOST, hint="it is how many tokens a page holds")
        if pages is not None:
            require_int("pages", pages, 1, hint="all texts together find room in them")
        self.page_size, self.grows = page_size, pages is None
        self.references: list[int] = []
        self.free: list[int] = []
        self.layers: list[Float[Tensor, "2 pages page_size g d"]] = []
        self.keeper: Keeper | None = None
        self._add(pages or 0)

    def require(self, n: int) -> None:
        """Sees to it that n pages are free, or raises PagesExhausted."""
        if self.grows and n > len(self.free):
            self._add(max(n, len(self.references)))
        short = n - len(self.free)
        if short > 0 and (self.keeper is None or self.keeper.evict(short) < short):
            how = "let other texts end first, or make the pool larger"
            raise PagesExhausted(f"{n} pages are needed, {len(self.free)} of {len(self.references)} are free: {how}")

    def take(self, n: int) -> list[int]:
        """n pages, zero throughout: what a mask hides in them must not be another text's NaN."""
        self.require(n)
        pages = [self.free.pop() for _ in range(n)]
        for page in pages:
            self.references[page] = 1
        for layer in self.layers:
            layer[:, pages] = 0
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One table more names these pages."""
        for page in pages:
            self.references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One table fewer names these pages; those that none names any more are free."""
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free.append(page)

    def own(self, page: int) -> int:
        """The page itself where nobody else names it, else a copy of it: copy on write."""
        if self.references[page] == 1:
            return page
        (mine,) = self.take(1)
        for layer in self.layers:
            layer[:, mine] = layer[:, page]
        self.release([page])
        return mine

    def fit(self, k: Float[Tensor, "b g n d"]) -> None:
        """Raises ValueError where the pages hold another kind of keys; pages that nobody uses are made anew."""
        like = (k.shape[1], k.shape[3], k.dtype, k.device)
        held = [(*layer.shape[3:], layer.dtype, layer.device) for layer in self.layers[:1]]
        if held and held[0] != like:
            if len(self.free) < len(self.references):
                raise ValueError(f"this pool holds keys of {held[0]} and got {like}: make a new pool, or end its texts first")
            self.layers.clear()

    def layer(self, index: int, k: Float[Tensor, "b g n d"]) -> Float[Tensor, "2 pages page_size g d"]:
        """A layer's pages, keys and values; made at its first token."""
        if index == len(self.layers):
            self.layers.append(k.new_zeros(2, len(self.references), self.page_size, k.shape[1], k.shape[3]))
        return self.layers[index]

    def page_bytes(self) -> int:
        return sum(layer[:, :1].nbytes for layer in self.layers)

    def _add(self, n: int) -> None:
        first = len(self.references)
        self.references += [0] * n
        self.free[:0] = range(first + n - 1, first - 1, -1)  # the lowest is taken first
        self.layers = [torch.cat((old, old.new_zeros(2, n, *old.shape[2:])), dim=1) for old in self.layers]


class Table:
    """One text's pages in order. It gives them back when it is dropped.

    rope   of the model whose keys lie in them; None: of nobody's yet
    """

    def __init__(self, pool: Pool, pages: list[int] | None = None, length: int = 0, rope: Rope | None = None):
        self.pool, self.pages, self.length, self.rope = pool, pages or [], length, rope

    def fork(self) -> "Table":
        """A second text that so far is the same; no page is copied."""
        self.pool.share(self.pages)
        return Table(self.pool, list(self.pages), self.length, self.rope)

    def truncate(self, n: int) -> None:
        """Forgets from token n on and gives back the pages behind."""
        self.length = min(max(n, 0), self.length)
        stay = pages_for(self.length, self.pool.page_size)
        gone, self.pages = self.pages[stay:], self.pages[:stay]
        self.pool.release(gone)

    def missing(self, length: int) -> int:
        """How many pages more a text of this length takes."""
        return max(0, pages_for(length, self.pool.page_size) - len(self.pages))

    def __del__(self):
        self.truncate(0)


def reserve(tables: Sequence[Table], n: int) -> None:
    """Room for n tokens more in each table, its own to write; raises PagesExhausted before anything has changed."""
    if not tables:
        return
    pool = tables[0].pool
    half = Counter(t.pages[-1] for t in tables if t.length % pool.page_size)
    # of those that are about to write into a page, the last finds it its own where nobody else reads it
    copies = sum(min(writers, pool.references[page] - 1) for page, writers in half.items())
    pool.require(copies + sum(t.missing(t.length + n) for t in tables))
    for table in tables:
        if table.length % pool.page_size:
            table.pages[-1] = pool.own(table.pages[-1])
        table.pages += pool.take(table.missing(table.length + n))
        table.length += n


class PagedCache(Cache):
    """Rows whose keys (rotated) and values lie in a pool's pages; they may share pages and differ in length.

    rows   a table each; None: empty ones, as many as the first pass has
    """

    def __init__(self, rope: Rope, pool: Pool, rows: list[Table] | None = None):
        super().__init__(rope)
        if any(table.pool is not pool for table in rows or []):
            raise ValueError("a row's pages lie in another pool than this cache's: make the cache with the pool of its tables")
        self.pool, self.rows = pool, rows or []
        self._count()

    def advance(self, n, parents=None, *, device=None, dtype=torch.float32):
        positions = super().advance(n, parents, device=device, dtype=dtype)
        self.slots: Int[Tensor, "b n"] | None = None  # where this pass writes
        return positions

    def attend(
        self, layer: int, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"]
    ) -> Float[Tensor, "b h n d"]:
        slots = self.slots = self._begin(k) if self.slots is None else self.slots
        q, k = self.rope(q, self.tables), self.rope(k, self.tables)
        store = self.pool.layer(layer, k)
        store.flatten(1, 2)[:, slots.flatten()] = torch.stack((k, v)).transpose(2, 3).flatten(1, 2)
        pages = store.index_select(1, self.blocks.flatten()).unflatten(1, self.blocks.shape)
        keys, values = pages.flatten(2, 3)[:, :, : self.length].transpose(2, 3)
        return attention(q, keys, values, self.mask)

    def texts(self):
        return len(self.rows) or None

    def fork(self, row: int) -> int:
        """One row more that so far is the same as this one, and its number."""
        self.rows.append(self.rows[row].fork())
        self._count()
        return len(self.rows) - 1

    def drop(self, row: int) -> None:
        """Ends a row; those behind it move up."""
        self.rows.pop(row).truncate(0)
        self._count()

    def truncate(self, n) -> None:
        super().truncate(n)
        lengths = [self.length] * len(self.rows) if self.lengths is None else self.lengths.tolist()
        for table, length in zip(self.rows, lengths, strict=True):
            table.truncate(length)
        self._count()

    def keep(self, index: Int[Tensor, " k"]) -> None:
        super().keep(index)
        self.truncate(self.length)

    def move(self, start: int, index: Int[Tensor, " k"]) -> None:
        to, origin = self.slots[:, : len(index)].flatten(), self.slots[:, index].flatten()  # type: ignore[index]
        for store in self.pool.layers:
            slots = store.flatten(1, 2)
            slots[:, to] = slots[:, origin]

    def nbytes(self) -> int:
        """Bytes of the pages that its rows name, each once, full or not; the pool's free pages are nobody's."""
        return len({page for table in self.rows for page in table.pages}) * self.pool.page_bytes()

    def _begin(self, k: Float[Tensor, "b g n d"]) -> Int[Tensor, "b n"]:
        """Reserves what the pass will write and says where that is; where it is refused, the pass has not happened."""
        rows = self.rows or [Table(self.pool) for _ in k]
        try:
            if len(rows) != len(k):
                raise ValueError(f"this cache holds {len(rows)} rows and got {len(k)}: make a new one for another batch")
            if torch.is_grad_enabled() and k.requires_grad:
                raise ValueError("pages outlive a pass and keep no gradients: call the model under torch.no_grad()")
            if any(table.length and table.rope not in (None, self.rope) for table in rows):
                raise ValueError("a row's pages hold keys of another model: give every model tables, and prefix caches, of its own")
            self.pool.fit(k)
            reserve(rows, self.fed)
        except ValueError:
            self._count()
            raise
        self.rows, most = rows, max(len(table.pages) for table in rows)
        for table in rows:
            table.rope = self.rope
        # short rows repeat a page of their own, which the mask hides
        padded = [table.pages + table.pages[-1:] * (most - len(table.pages)) for table in rows]
        self.blocks = torch.tensor(padded, device=k.device)
        start = torch.tensor([[table.length - self.fed] for table in rows], device=k.device)
        places = start + torch.arange(self.fed, device=k.device)
        size = self.pool.page_size
        return self.blocks.gather(1, places // size) * size + places % size

    def _count(self) -> None:
        lengths = [table.length for table in self.rows]
        self.length = max(lengths, default=0)
        self.lengths = None if len(set(lengths)) <= 1 else torch.tensor(lengths)


@stored
class Paging(nn.Module):
    """As a decoder's `kv`: its caches take their pages from one pool, which grows with its texts and which neither
    copies of the model nor its file contain."""

    def __init__(self, page_size: int):
        super().__init__()
        self.page_size = page_size
        self.pool = Pool(page_size=page_size)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"pool": Pool(page_size=self.page_size)}

    def new(self, model: nn.Module, *, capacity: int) -> Cache:
        return PagedCache(model.rope, self.pool)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Paged(Technique):
    """The decoder keeps keys and values in pages of one pool, taken when a text reaches them.

    page_size   tokens in a page
    """

    page_size: int = 16

    needs = frozenset({DECODER})
    paper = Paper("Kwon et al.", 2023, "Efficient memory management for large language model serving with PagedAttention",
                  "arXiv:2309.06180", "section 4")  # fmt: skip

    def __post_init__(self):
        require_int("page_size", self.page_size, 1, MOST, hint="it is how many tokens a page holds")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        return set_kv(model, Paging(self.page_size), by="Paged")

    def claim(self, model: nn.Module) -> Reading:
        """Counted on one full page."""
        return held_per_token(model, tokens=model.kv.page_size)  # type: ignore[union-attr, arg-type]
