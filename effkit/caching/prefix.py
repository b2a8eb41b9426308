"""The prefix cache: what many texts begin with is computed once.

Problem   A system prompt, the examples before a question, the file that is being edited: requests begin alike, and each
          pays for all of its prompt again.
Idea      Keys and values of a token depend on nothing behind it, so those of a common beginning can be shared. A radix
          tree remembers which texts lie in which pages of the pool (paged.py): edges are whole pages, a prompt walks
          down as far as it is known, takes those pages and computes the rest. Without room, the leaf goes that was not
          used for longest.
Exact     A page is found by all tokens before its end, never by its own alone.
Theory    How good is that? A page is of use only with all before it. Least recently used (LRU) respects that by itself:
          whoever uses a page uses those before it. So does the optimum (Belady: the page goes whose next use is farthest
          away), for the same reason, and is the best of all ways, those included that keep pages without their
          beginnings. And LRU of every size is read off one pass: a page is found by a cache of c pages if fewer than c
          others were used since, its reuse distance being at most c (Mattson).
Left out  Half pages; sharing between texts that meet in the middle; an order of requests that suits the cache.
Source    Zheng et al. 2023, arXiv:2312.07104, section 3; Belady 1966, doi:10.1147/sj.52.0078; Mattson et al. 1970,
          doi:10.1147/sj.92.0078.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import takewhile

from effkit.caching.paged import Pool, Table
from effkit.core.checks import require_choice, require_int
from effkit.core.generation import Rope

Block = tuple[int, ...]  # the tokens of one page
POLICIES = ("lru", "fifo", "belady")


def blocks(ids: Sequence[int], page_size: int) -> list[Block]:
    """The text's whole pages; what is left behind them is left out."""
    return [tuple(map(int, ids[i : i + page_size])) for i in range(0, len(ids) - page_size + 1, page_size)]


class Node:
    """An edge of the tree, with the pages along it, and what goes on behind it."""

    def __init__(self, parent: "Node | None", edge: list[Block], pages: list[int], used: int):
        self.parent, self.edge, self.pages, self.used = parent, edge, pages, used
        self.children: dict[Block, Node] = {}

    def split(self, n: int) -> "Node":
        """Cuts the edge behind its first n pages; returns the upper part."""
        upper = Node(self.parent, self.edge[:n], self.pages[:n], self.used)
        upper.parent.children[upper.edge[0]] = upper  # type: ignore[union-attr]
        self.parent, self.edge, self.pages = upper, self.edge[n:], self.pages[n:]
        upper.children[self.edge[0]] = self
        return upper

    def path(self) -> list[int]:
        """The pages from the root to its end."""
        node, pages = self, list[int]()
        while node.parent:  # no recursion: a chat of a thousand turns is a thousand nodes deep
            pages[:0], node = node.pages, node.parent
        return pages

    def needed(self, references: Sequence[int]) -> int:
        """How many pages of its edge and behind it are read by a text, or lie before one that is."""
        found: dict[Node, int] = {}
        for node in reversed([*self.all()]):
            behind = sum(found[child] for child in node.children.values())
            read = max((i for i, page in enumerate(node.pages, 1) if references[page] > 1), default=0)
            found[node] = behind + (len(node.pages) if behind else read)
        return found[self]

    def all(self) -> "Iterator[Node]":
        """Itself and all behind it, each after its parent."""
        waiting = [self]
        while waiting:
            yield (node := waiting.pop())
            waiting += node.children.values()


class PrefixCache:
    """What is known of the texts that were inserted, in a pool's pages.

    policy   which leaf goes first where the pool is short of pages: "lru", the one not used for longest, or "fifo", the
             one that was inserted first
    """

    def __init__(self, pool: Pool, *, policy: str = "lru"):
        require_choice("policy", policy, POLICIES[:2], hint="Belady's optimum knows the future: see `hits`")
        if pool.keeper is not None:
            raise ValueError("this pool has a prefix cache already: use that one, or make a pool of its own")
        self.pool, self.policy = pool, policy
        self.root, self.now = Node(None, [], [], 0), 0
        self.rope: Rope | None = None  # of the model whose keys it remembers
        pool.keeper = self

    def match(self, ids: Sequence[int]) -> Table:
        """A text that begins with the longest known prefix of whole pages, sharing them."""
        node, _ = self._walk(blocks(ids, self.pool.page_size))
        pages = node.path()
        self.pool.share(pages)
        return Table(self.pool, pages, len(pages) * self.pool.page_size, self.rope)

    def insert(self, ids: Sequence[int], table: Table) -> None:
        """Remembers the whole pages of a text that lies in this table. Of what was known already the table gives its own
        copies back and shares the tree's."""
        if len(ids) > table.length or table.pool is not self.pool:
            raise ValueError(f"the table of this pool holds {table.length} tokens, and {len(ids)} are to be remembered: feed them first")
        if self.root.children and table.rope not in (None, self.rope):
            raise ValueError("the table holds keys of another model than this prefix cache: give every model one of its own")
        self.rope = self.rope if table.rope is None else table.rope
        whole = blocks(ids, self.pool.page_size)
        node, known = self._walk(whole)
        path = node.path()
        self.pool.share(path)
        self.pool.release(table.pages[:known])
        table.pages[:known] = path
        if known < len(whole):
            pages = table.pages[known : len(whole)]
            self.pool.share(pages)
            node.children[whole[known]] = Node(node, whole[known:], pages, self.now)

    def evict(self, pages: int) -> int:
        """Gives so many pages back to the pool, from the ends of leaves; none where fewer are idle, which is to say that
        no text reads them or one behind them. (A text that was forked before the other half was inserted may read a
        page of the tree behind copies of its own.)"""
        if pages > self.pages() - self.root.needed(self.pool.references):
            return 0
        for _ in range(pages):
            ends = [n for n in self.root.all() if n.pages and not n.children and self.pool.references[n.pages[-1]] == 1]
            leaf = min(ends, key=lambda node: node.used)
            self.pool.release([leaf.pages.pop()])
            last = leaf.edge.pop()
            if not leaf.edge:
                del leaf.parent.children[last]  # type: ignore[union-attr]
        return pages

    def pages(self) -> int:
        """How many it holds."""
        return sum(len(node.pages) for node in self.root.all())

    def _walk(self, whole: list[Block]) -> tuple[Node, int]:
        """Down the tree as far as the text is known; the edges on the way have been used now."""
        self.now += 1
        node, at = self.root, 0
        while at < len(whole) and (child := node.children.get(whole[at])):
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(child.edge, whole[at:], strict=False)))
            node, at = child.split(same) if same < len(child.edge) else child, at + same
            node.used = self.now if self.policy == "lru" else node.used
        return node, at


def chains(prompts: Sequence[Sequence[int]], *, page_size: int) -> list[list[int]]:
    """Each prompt as numbers of its pages, the last token left out, which has to be computed whatever is known. A page's
    number stands for it and all before it."""
    numbers: dict[tuple[int, Block], int] = {}
    result = []
    for prompt in prompts:
        chain = [-1]
        for block in blocks(prompt[:-1], page_size):
            chain.append(numbers.setdefault((chain[-1], block), len(numbers)))
        result.append(chain[1:])
    return result


def hits(requests: Sequence[Sequence[int]], pages: int, *, policy: str = "lru") -> int:
    """How many pages of these chains are found, one request after another, by a cache that keeps so many in between.

    After each request, its pages and those that were kept compete. One after another goes a page that no kept page
    follows: the one not used for longest (lru), the one kept for longest (fifo), the one whose next use lies farthest
    in the future (belady)."""
    require_int("pages", pages, 0)
    require_choice("policy", policy, POLICIES)
    kept: dict[int, float] = {}  # the smallest goes first
    ends: list[tuple[float, int]] = []  # a heap of pages that may end a chain; the others are skipped
    before: dict[int, int] = {}
    followers: Counter[int] = Counter()
    found = 0
    for now, (request, later) in enumerate(zip(requests, next_uses(requests), strict=True)):
        found += sum(page in kept for page in request)
        for page, parent, use in zip(request, [-1, *request], later, strict=False):
            if page not in kept:
                before[page] = parent
                followers[parent] += 1
            if page not in kept or policy != "fifo":
                kept[page] = -use if policy == "belady" else now
        for page in request[-1:]:
            heappush(ends, (kept[page], page))
        while len(kept) > pages:
            value, page = heappop(ends)
            if kept.get(page) == value and not followers[page]:
                del kept[page]
                parent = before[page]
                followers[parent] -= 1
                if parent in kept:
                    heappush(ends, (kept[parent], parent))
    return found


def next_uses(requests: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each page of each request, the number of the next request that has it; infinite where none does."""
    seen: dict[int, float] = {}
    result = []
    for now in reversed(range(len(requests))):
        result.append([seen.get(page, math.inf) for page in requests[now]])
        seen |= dict.fromkeys(requests[now], now)
    return result[::-1]


def reuse_distances(requests: Sequence[Sequence[int]]) -> list[float]:
    """Of each page of each request, its place among all pages ordered by last use, 1 for the latest; infinite where it is
    new. LRU with c pages finds those of a distance of at most c, for all c at once."""
    stack: list[int] = []
    distances: list[float] = []
    for request in requests:
        place = {page: i for i, page in enumerate(stack, 1)}
        distances += [place.get(page, math.inf) for page in request]
        used = set(request)
        stack = [*request, *(page for page in stack if page not in used)]
    return distances


def hit_rate(prompts: Sequence[Sequence[int]], *, pages: int, page_size: int = 16, policy: str = "lru") -> float:
    """Share of the prompts' tokens that need not be computed."""
    found = hits(chains(prompts, page_size=page_size), pages, policy=policy)
    return found * page_size / max(1, sum(map(len, prompts)))
