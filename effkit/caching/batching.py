"""Continuous batching: a server's passes, filled anew after every token.

Problem   Reading the weights once can write a token for many texts. But requests come when they come, and answers end
          when they end: a batch that starts together runs until its longest answer is done, ever more of its rows
          writing tokens that nobody wants, while others wait outside.
Idea      Decide before each pass who takes part: whoever is done leaves, whoever waits gets the place. Prompts are read
          in chunks between the others' tokens. Keys and values lie in pages (paged.py), so that rows of any length go
          together; where the pages run out, the youngest row gives its own back and is computed again later.
Law       Greedy answers are what `generate` writes for each request alone. For answers of n_1, n_2, ... tokens that are
          all there at the start, r rows need at least sum(n) / r passes; whoever fills every place as soon as it is free
          needs at most max(n) more (Graham 1969, doi:10.1137/0117039); batches of r need the sum of their maxima.
Time      A clock goes on by what each pass took, measured or by a formula, and jumps to the next arrival where nothing
          is to be done: a stream of an hour is served as quickly as its passes run.
Left out  Time outside the passes; prompts and answers in one pass (Sarathi, arXiv:2308.16369); sampling; stop tokens. Under
          either policy each prompt is read in passes of its own; a static server pads its prompts and reads them together.
Source    Yu et al. 2022, "Orca: a distributed serving system for transformer-based generative models", OSDI.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from effkit.caching.paged import PagedCache, PagesExhausted, Pool, Table, pages_for
from effkit.caching.prefix import PrefixCache
from effkit.caching.streams import Request
from effkit.core.checks import require_choice, require_float, require_int
from effkit.core.generation import Cache, check_prompt
from effkit.measure.latency import synchronize

POLICIES, NO_TOKEN = ("continuous", "static"), -1
NO_NUMBERS = "the model's logits hold NaN for this request: look for NaN or infinity in the weights, an embedding's among them"
Run = Callable[[], Tensor]
#: runs a pass over so many rows with so many tokens each; its result, and the seconds that it took
Clock = Callable[[Run, int, int], tuple[Tensor, float]]


def measured(run: Run, rows: int, tokens: int) -> tuple[Tensor, float]:
    """The clock on the wall."""
    start = time.perf_counter()
    result = run()
    synchronize()
    return result, time.perf_counter() - start


def modelled(*, pass_s: float, token_s: float) -> Clock:
    """A clock by formula: a pass reads the weights, in pass_s seconds, and takes token_s for each of its tokens."""
    return lambda run, rows, tokens: (run(), pass_s + token_s * rows * tokens)


@dataclass(frozen=True)
class Reply:
    """What a request got, and when, in seconds; refused: why it got nothing; reused: tokens of its prompt that were not
    computed, because others had begun alike. What it computed itself before it gave its pages back is not among them."""

    arrival: float
    tokens: tuple[int, ...] = ()
    first: float = math.nan
    done: float = math.nan
    refused: str = ""
    reused: int = 0


@dataclass(frozen=True)
class Served:
    """Replies in the order of the requests; preempted: how many times a row gave its pages back before it was done."""

    replies: tuple[Reply, ...]
    passes: int
    preempted: int

    @property
    def answered(self) -> list[Reply]:
        return [reply for reply in self.replies if not reply.refused]

    def latency(self, percent: float = 50.0) -> float:
        """Seconds from arrival to the last token that so many percent of the answers stay under."""
        seconds = torch.tensor([reply.done - reply.arrival for reply in self.answered], dtype=torch.float64)
        return seconds.quantile(percent / 100).item() if len(seconds) else math.nan

    @property
    def throughput(self) -> float:
        """Tokens a second from the first arrival to the last token."""
        written = sum(len(reply.tokens) for reply in self.answered)
        ends = [reply.done for reply in self.answered]
        return written / (max(ends) - min(r.arrival for r in self.answered)) if written else 0.0


@dataclass
class Row:
    """A request on its way: prompt and answer so far, where it is kept, and when it shall end."""

    number: int
    request: Request
    ids: list[int]
    table: Table
    first: float = math.nan
    done: float = math.nan
    reused: int = 0
    found: int = 0  # tokens that its table held when it was let in
    refused: str = ""

    @property
    def end(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.request.prompt) + self.request.new

    @property
    def complete(self) -> bool:
        return bool(self.refused) or len(self.ids) == self.end

    @property
    def behind(self) -> int:
        """Tokens yet to be fed."""
        return len(self.ids) - self.table.length

    def reply(self) -> Reply:
        if self.refused:
            return Reply(self.request.arrival, done=self.done, refused=self.refused)
        answer = tuple(self.ids[len(self.request.prompt) :])
        return Reply(self.request.arrival, answer, self.first, self.done, reused=self.reused)


def serve(
    model: nn.Module, requests: Sequence[Request], *, pages: int, page_size: int = 16, most_rows: int = 8,
    policy: str = "continuous", prefill_chunk: int | None = None, prefix: bool = False, clock: Clock = measured,
) -> Served:  # fmt: skip
    """Greedy answers to all requests, over one pool of pages, whatever cache the model would make for itself.

    policy         "continuous", or "static": a batch of those that are there, computed as one until its longest answer
                   is done; each gets its answer as soon as it is complete
    prefill_chunk  tokens of prompts that are read between two passes over the answers; None: all there are
    prefix         whether prompts share what they begin with

    A request that is empty, too long for the model or the pool, has unknown tokens, or comes to logits that are no numbers,
    is refused in its reply. Raises ValueError for settings that are none.
    """
    if not hasattr(model, "rope"):
        how = "take one that generates, such as effkit.zoo.load('gpt-small')"
        raise ValueError(f"serve needs a decoder that asks a cache for its attention, got {type(model).__name__}: {how}")
    require_choice("policy", policy, POLICIES)
    require_int("most_rows", most_rows, 1)
    if prefill_chunk is not None:
        require_int("prefill_chunk", prefill_chunk, 1)
    engine = Engine(model, Pool(page_size=page_size, pages=pages), most_rows, policy, prefill_chunk, prefix, clock)
    with torch.no_grad():
        return engine.serve(requests)


class Engine:
    """Who waits, who is computed, what time it is."""

    def __init__(self, model, pool, most_rows, policy, prefill_chunk, prefix, clock):
        self.model, self.pool, self.most_rows, self.clock = model, pool, most_rows, clock
        self.static, self.chunk = policy == "static", prefill_chunk or sys.maxsize
        self.prefix = PrefixCache(pool) if prefix else None
        self.device = next(model.parameters()).device
        self.rows: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.now, self.passes, self.preempted = 0.0, 0, 0

    def serve(self, requests: Sequence[Request]) -> Served:
        replies = [Reply(r.arrival, done=r.arrival, refused=self.refusal(r)) for r in requests]
        rows = [Row(i, r, list(map(int, r.prompt)), Table(self.pool))
                for i, r in enumerate(requests) if not replies[i].refused and r.new]  # fmt: skip
        coming = deque(sorted(rows, key=lambda row: row.request.arrival))
        with tqdm(total=len(rows), desc="serving", unit="request", leave=False, delay=2) as bar:
            while coming or self.waiting or self.rows:
                if not (self.rows or self.waiting):
                    self.now = max(self.now, coming[0].request.arrival)
                while coming and coming[0].request.arrival <= self.now:
                    self.waiting.append(coming.popleft())
                self.admit()
                self.step()
                for row in self.leaving():
                    replies[row.number] = row.reply()
                    bar.update()
        return Served(tuple(replies), self.passes, self.preempted)

    def refusal(self, request: Request) -> str:
        """Why a request cannot be served; empty where it can."""
        try:
            ids, size, pages = torch.as_tensor(request.prompt), self.pool.page_size, len(self.pool.references)
            check_prompt(self.model, ids[None], request.new)
            require_float("arrival", request.arrival, 0.0)
            most = getattr(getattr(self.model, "config", None), "vocab_size", math.inf)
            if ids.is_floating_point() or not 0 <= ids.min() <= ids.max() < most:
                span = f"{ids.min().item()} to {ids.max().item()}"
                return f"tokens must be whole numbers from 0 to {most - 1}, got {span}: encode with the model's own tokenizer"
            if (needed := pages_for(len(ids) + request.new, size)) > pages:
                asked = f"{len(ids)} tokens and {request.new} new ones take {needed} pages of {size}"
                return f"{asked}, and there are {pages}: ask for less, or serve with more pages"
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
        return ""

    def admit(self) -> None:
        """Lets in who waits, in order, while there is room; into a static batch only when it is made."""
        if self.static and self.rows:
            return
        while self.waiting and len(self.rows) < self.most_rows and self.fits(self.waiting[0]):
            self.rows.append(self.waiting.popleft())

    def fits(self, row: Row) -> bool:
        """Whether there are pages for this row beside the others: for its whole answer in a static batch, else for what
        it has so far and one more."""
        self.recall(row)
        ends = [r.end if self.static else min(r.end, len(r.ids) + self.pool.page_size) for r in (*self.rows, row)]
        try:
            self.pool.require(sum(r.table.missing(end) for r, end in zip((*self.rows, row), ends, strict=True)))
        except PagesExhausted:
            row.table.truncate(0)
            return False
        return True

    def step(self) -> None:
        """Reads prompts, as much of them as may be, then writes one token in each row that has read its own."""
        budget = self.chunk
        while budget > 0 and (row := next((r for r in self.rows if r.behind > 1), None)):
            if row.table.length == row.found:  # others may have begun alike since it was let in
                self.recall(row)
            budget -= self.feed([row], min(row.behind, budget))
        ready = [row for row in self.rows if row.behind == 1 and (self.static or not row.complete)]
        if not all(row.complete for row in ready):
            self.feed(ready, 1)

    def feed(self, rows: list[Row], n: int) -> int:
        """One pass over the next n tokens of these rows; 0 where the pages ran out before it."""
        cache = PagedCache(self.model.rope, self.pool, [row.table for row in rows])
        ids = torch.tensor([row.ids[row.table.length :][:n] for row in rows], device=self.device)
        try:
            tokens, seconds = self.clock(lambda: next_tokens(self.model, ids, cache), len(rows), n)
        except PagesExhausted:
            self.preempt()
            return 0
        self.now, self.passes = self.now + seconds, self.passes + 1
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row.behind == 0:
                self.write(row, token)
        return n

    def write(self, row: Row, token: int) -> None:
        if not row.complete:
            row.done, row.refused = self.now, NO_NUMBERS if token == NO_TOKEN else ""
        if row.complete:  # but its batch goes on: computed for nothing
            row.table.truncate(len(row.ids) - 1)
            return
        if math.isnan(row.first):
            row.first = self.now
            self.remember(row)
        row.ids.append(token)

    def leaving(self) -> list[Row]:
        """Takes out the rows that are complete; of a static batch all at once, or none."""
        gone = [row for row in self.rows if row.complete]
        if self.static and len(gone) < len(self.rows):
            return []
        self.rows = [row for row in self.rows if not row.complete]
        for row in gone:
            if not row.refused:
                self.remember(row)
            row.table.truncate(0)
        return gone

    def preempt(self) -> None:
        """The row that came last gives its pages back, keeps its tokens, and waits in front."""
        row = self.rows.pop()
        row.table.truncate(0)
        self.waiting.appendleft(row)
        self.preempted += 1

    def recall(self, row: Row) -> None:
        if self.prefix:
            row.table = self.prefix.match(row.ids[:-1])
            row.found = row.table.length
            if math.isnan(row.first):  # from then on the tree knows the row's own prompt
                row.reused = row.found

    def remember(self, row: Row) -> None:
        if self.prefix:
            self.prefix.insert(row.ids[: row.table.length], row.table)


def next_tokens(model: nn.Module, ids: Int[Tensor, "b n"], cache: Cache) -> Int[Tensor, " b"]:
    """What each row greedily goes on with, NO_TOKEN where its logits hold NaN; the logits behind its other tokens are not
    computed where the model lets them be."""
    able = hasattr(model, "features") and hasattr(model, "logits")
    logits = (model.logits(model.features(ids, cache)[:, -1:]) if able else model(ids, cache))[:, -1]  # type: ignore[operator]
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), NO_TOKEN)


def throughput_at_latency(
    served_at: Callable[[float], Served], *, bound_s: float, slowest: float, fastest: float, percent: float = 95.0,
    halvings: int = 12,
) -> tuple[float, Served]:  # fmt: skip
    """The largest arrival rate, between two, at which so many percent of the answers take at most bound_s seconds, and
    what was served at it. Latency is taken to grow with the rate; the interval is halved in the rate's logarithm.

    Raises ValueError where already the slowest is too fast."""
    best = served_at(slowest)
    if best.latency(percent) > bound_s:
        seen = f"{best.latency(percent):.3g} s at {slowest} requests a second, and {bound_s} s are allowed"
        raise ValueError(f"{percent:g} % of the answers take up to {seen}: allow more, or begin with a slower rate")
    low, high, rate = slowest, fastest, fastest
    for _ in range(halvings):
        served = served_at(rate)
        if served.latency(percent) <= bound_s:
            low, best = rate, served
        else:
            high = rate
        if low == high:
            break
        rate = math.sqrt(low * high)
    return low, best
