"""Generating text: logits to probabilities, the loop, and what a cache is.

A decoder owns no attention: each layer hands its queries, keys and values, not yet rotated, to a Cache and gets the
attention's output back. What is kept, where, in which precision, and when it is thrown away is the cache's affair,
so chapters 07 and 08 change all of it without touching the model.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.checks import require_float, require_int


@stored
class Rope(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), pairing dimension i with i + d/2."""

    def __init__(self, head_dim: int, theta: float = 10_000.0):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def tables(self, positions: Int[Tensor, "*b n"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, in float32 until the end: a bfloat16 angle is wrong from position 256 on."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=wide) / self.head_dim
        angles = positions[..., None].to(wide) * self.theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x: Float[Tensor, "b h n d"], tables: tuple[Tensor, Tensor]) -> Float[Tensor, "b h n d"]:
        """Each pair (x1, x2) turned by its angle."""
        cos, sin = tables
        cos, sin = (cos[:, None], sin[:, None]) if cos.dim() == 3 else (cos, sin)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class Cache:
    """What attention may look back on.

    advance(n, parents)         once a pass, by the model, before the layers; returns the positions of n new tokens
    angles(dtype)               the rotary tables of these, by advance
    attend(layer, q, k, v)      once a layer; q, k not yet rotated; returns the attention's output
    truncate(n)                 forget everything from position n on; n may be one number a row
    keep(index)                 of the last pass's tokens only these stay: a branch of its tree
    length                      tokens that need not be fed again: a pass is fed ids[:, cache.length :]
    lengths                     one number a row where rows differ, `length` then being the largest; else None
    texts()                     how many rows a pass has to have, asked before it; None: any number

    parents   of each new token, the place of the one before it in the text, counted in this pass; -1: what the cache
              held already. Without them each token follows the one before it.
    """

    def __init__(self, rope: Rope):
        self.rope = rope  # the model's own, by which it knows its caches
        self.length = 0
        self.lengths: Int[Tensor, " b"] | None = None

    def advance(
        self, n: int, parents: Int[Tensor, " n"] | None = None, *, device=None, dtype=torch.float32
    ) -> Int[Tensor, "*b n"]:
        if parents is not None and self.lengths is not None:
            raise ValueError("a token tree needs rows of one length: feed it one row at a time")
        if parents is not None and len(parents) != n:
            raise ValueError(f"a token tree has a parent for each of its tokens, got {len(parents)} for {n} tokens")
        start = self.length if self.lengths is None else self.lengths.to(device)[:, None]
        self.ancestors = ancestors = None if parents is None else ancestry(parents.to(device))
        self.positions = start + (torch.arange(n, device=device) if ancestors is None else ancestors.sum(1) - 1)
        self.tables = self.angles(dtype)
        self.mask = visible(self.positions, self.length, ancestors)
        self.fed, self.length = n, self.length + n
        self.lengths = None if self.lengths is None else self.lengths + n
        return self.positions

    def texts(self) -> int | None:
        return None

    def angles(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rotary tables of the new tokens."""
        return self.rope.tables(self.positions, dtype)

    def attend(
        self, layer: int, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"]
    ) -> Float[Tensor, "b h n d"]:
        raise NotImplementedError

    def truncate(self, n: int | Int[Tensor, " b"]) -> None:
        if isinstance(n, Tensor):
            require_int("n", int(n.min()), 0, hint="it is how many tokens stay in each row")
            lengths = n.clamp(max=self.length if self.lengths is None else self.lengths.to(n.device))
            self.length = int(lengths.max())
            self.lengths = None if (lengths == self.length).all() else lengths
        else:
            require_int("n", n, 0, hint="it is how many tokens stay")
            if self.lengths is not None:
                return self.truncate(torch.full_like(self.lengths, n))
            self.length = min(self.length, n)

    def keep(self, index: Int[Tensor, " k"]) -> None:
        start = self.length - self.fed
        line = self.lengths is None and (index >= 0).all() and (self.positions[index] == start + torch.arange(len(index), device=index.device)).all()
        if not line or (self.ancestors is not None and not self.ancestors[index[1:], index[:-1]].all()):
            raise ValueError(f"keep takes a branch of the last pass's tree, root first, of one row; got {index.tolist()}")
        self.move(start, index)
        self.length = start + len(index)

    def move(self, start: int, index: Int[Tensor, " k"]) -> None:
        """Brings the tokens in slots start + index to the slots from start on; what lies behind them is forgotten."""
        raise ValueError(f"{type(self).__name__} cannot keep a branch of a token tree: generate with proposals in one line, or another cache")

    def nbytes(self) -> int:
        """Bytes held for keys and values."""
        raise NotImplementedError


def ancestry(parents: Int[Tensor, " n"]) -> Bool[Tensor, "n n"]:
    """Of each token of a tree, which of its tokens it follows, itself among them."""
    ancestors = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    for child, parent in enumerate(parents.tolist()):
        if not -1 <= parent < child:
            raise ValueError(f"token {child} of the tree has parent {parent}: it must come before it, or be -1")
        if parent >= 0:
            ancestors[child] |= ancestors[parent]
    return ancestors


def visible(
    positions: Int[Tensor, "*b n"], held: int, ancestors: Bool[Tensor, "n n"] | None = None
) -> Bool[Tensor, "*b n m"] | None:
    """Which of the `held` tokens and of the n new ones each new one sees; None where attention is simply causal."""
    if ancestors is not None:
        return F.pad(ancestors, (held, 0), value=True)
    n = positions.shape[-1]
    if positions.dim() == 1 and (n == 1 or not held):
        return None
    mask = torch.arange(held + n, device=positions.device) <= positions[..., None]
    return mask if mask.dim() == 2 else mask[:, None]


class NoCache(Cache):
    """Keeps nothing: one pass over the whole text, as in training; the quadratic cost that chapter 07 begins with."""

    def advance(self, n, parents=None, *, device=None, dtype=torch.float32):
        positions = super().advance(n, parents, device=device, dtype=dtype)
        self.length = 0
        return positions

    def attend(self, layer, q, k, v):
        return attention(self.rope(q, self.tables), self.rope(k, self.tables), v, self.mask)

    def keep(self, index):
        """Nothing was kept."""

    def nbytes(self) -> int:
        return 0


class ConcatCache(Cache):
    """Keys, rotated, and values of all tokens so far, grown by concatenation: every step copies everything once."""

    def __init__(self, rope: Rope):
        super().__init__(rope)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, q, k, v):
        q, k = self.rope(q, self.tables), self.rope(k, self.tables)
        if layer == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[layer] = torch.cat((self.keys[layer], k), dim=2)
            self.values[layer] = torch.cat((self.values[layer], v), dim=2)
        return attention(q, self.keys[layer], self.values[layer], self.mask)

    def texts(self):
        return len(self.keys[0]) if self.keys else None

    def truncate(self, n) -> None:
        if isinstance(n, Tensor) and (stay := n.clamp(max=self.length)).unique().numel() > 1:
            how = "a cache that is written in place has room for that: Preallocated()(model, task)"
            raise ValueError(f"rows of {stay.tolist()} tokens cannot be concatenated: {how}")
        super().truncate(n)
        self._map(lambda t: t[:, :, : self.length])

    def move(self, start, index):
        self._map(lambda t: torch.cat((t[:, :, :start], t[:, :, start + index]), dim=2))

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def _map(self, f: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = [f(k) for k in self.keys], [f(v) for v in self.values]


def attention(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m d"],
    mask: Bool[Tensor, "*b n m"] | None = None,
) -> Float[Tensor, "b h n d"]:  # fmt: skip
    """Attention of n queries to m keys; h query heads share g key-value heads. A mask says what a query sees; without
    one, the n queries are the last of the m tokens, and each sees itself and those before it."""
    n, m, shared = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if mask is None and n == m and n > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared > 1)
    if mask is None and n > 1:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    # the heads that share a key read it once, as rows of one product
    rows = q.unflatten(1, (-1, shared)).flatten(2, 3)
    mask = mask if mask is None or shared == 1 else mask.repeat(*[1] * (mask.dim() - 2), shared, 1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).unflatten(2, (shared, n)).flatten(1, 2)


@dataclass(frozen=True)
class Sampler:
    """From logits to the distribution that is sampled; temperature 0 is greedy. One function for plain and for
    speculative decoding: that both draw from the same distribution is what makes exactness provable."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        require_float("temperature", self.temperature, 0.0, hint="0 is greedy")
        if self.top_k is not None:
            require_int("top_k", self.top_k, 1)
        if self.top_p is not None:
            require_float("top_p", self.top_p, 0.0, 1.0, open_low=True)

    def probabilities(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """The distribution, in float32 at least."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature == 0:
            return F.one_hot(checked(logits).argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[..., -1:], -torch.inf)
        probabilities = checked(logits.softmax(-1))
        return probabilities if self.top_p is None else nucleus(probabilities, self.top_p)

    def draw(self, logits: Float[Tensor, "... vocab"], rng: torch.Generator | None) -> Int[Tensor, "..."]:
        return checked(logits).argmax(-1) if self.temperature == 0 else sample(self.probabilities(logits), rng)


def checked(values: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
    """Logits, or chances made of them. Raises ValueError where one is no number: greedily, NaN would be the likeliest token,
    and of an infinite logit a softmax makes NaN."""
    if values.isnan().any():
        how = "look for NaN or infinity in its weights; where it is float16, take bfloat16; where the temperature is next to 0, take 0"
        raise ValueError(f"the model's logits hold NaN or infinity: {how}")
    return values


def nucleus(probabilities: Float[Tensor, "... vocab"], top_p: float) -> Float[Tensor, "... vocab"]:
    """The smallest set of most probable tokens with top_p of the mass (Holtzman et al. 2019, arXiv:1904.09751)."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities).scatter(-1, index, torch.where(before < top_p, ordered, 0.0))
    return kept / kept.sum(-1, keepdim=True)


def sample(probabilities: Float[Tensor, "... vocab"], rng: torch.Generator | None) -> Int[Tensor, "..."]:
    """One token from each distribution."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=rng).reshape(probabilities.shape[:-1])


@torch.no_grad()
def generate(
    model: nn.Module, ids: Int[Tensor, "b n"], max_new_tokens: int, *, sampler: Sampler = Sampler(),
    stop: int | Collection[int] | None = None, rng: torch.Generator | None = None,
) -> Int[Tensor, "b m"]:  # fmt: skip
    """Prompt and continuation, token by token with the model's own cache. Ends early once every row has produced a
    stop token; a row that has goes on repeating it."""
    check_prompt(model, ids, max_new_tokens)
    stops = stop_tensor(stop, ids.device)
    cache = model.new_cache(capacity=ids.shape[1] + max_new_tokens)  # type: ignore[operator]
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    read_prompt(model, ids, cache)
    for _ in range(max_new_tokens):
        token = torch.where(done, ids[:, -1], sampler.draw(model(ids[:, cache.length :], cache)[:, -1], rng))
        ids = torch.cat((ids, token[:, None]), dim=1)
        done = done | torch.isin(token, stops)
        if done.all():
            break
    return ids


def read_prompt(model: nn.Module, ids: Int[Tensor, "b n"], cache: Cache) -> Float[Tensor, "b n-1 d"] | None:
    """Feeds the prompt but for its last token, which the first step of writing is fed; so all steps are alike, and the
    prompt's logits, which nobody asks for, are not computed. Returns its features where the model offers them."""
    if ids.shape[1] == 1 or isinstance(cache, NoCache):
        return None
    if not hasattr(model, "features"):
        model(ids[:, :-1], cache)
        return None
    return model.features(ids[:, :-1], cache)  # type: ignore[operator]


def check_prompt(model: nn.Module, ids: Tensor, max_new_tokens: int) -> None:
    """Raises ValueError for an empty prompt, a wrong shape, or a text longer than the model's context."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        how = "begin with a start-of-text token; texts of unequal length go one by one, or through speculative_batch"
        raise ValueError(f"ids must be (batch, tokens) with at least one token, got {got}; {how}")
    require_int("max_new_tokens", max_new_tokens, 0)
    context = getattr(model, "context", None)
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise ValueError(f"{ids.shape[1]} tokens and {max_new_tokens} new ones exceed the model's context of {context}; shorten the prompt or ask for less")


def stop_tensor(stop: int | Collection[int] | None, device) -> Int[Tensor, " s"]:
    stops = [] if stop is None else [stop] if isinstance(stop, Integral) else list(stop)  # type: ignore[arg-type]
    return torch.tensor(stops, dtype=torch.long, device=device)


@stored
class Concatenating(nn.Module):
    """The decoder's default: a cache that grows by concatenation."""

    def new(self, model: nn.Module, *, capacity: int) -> Cache:
        return ConcatCache(model.rope)  # type: ignore[arg-type]


@stored
class Autoregressive(nn.Module):
    """The decoder's default way to generate: one token a pass."""

    def forward(self, model: nn.Module, ids: Tensor, max_new_tokens: int, **settings) -> Tensor:
        return generate(model, ids, max_new_tokens, **settings)
