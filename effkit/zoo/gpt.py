"""GPT: a decoder of the Llama kind, whose parameters map one to one to transformers.LlamaForCausalLM.

RMSNorm before each half of a block, rotary positions, SwiGLU, no biases (Touvron et al. 2023, arXiv:2302.13971), and
grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245). Parents store no sizes: heads and widths are read from
the layers, so a narrowed layer is all it takes to narrow the model. Attention itself belongs to the cache
(core/generation.py).
"""

from dataclasses import asdict, dataclass, fields, replace

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.generation import Autoregressive, Cache, Concatenating, NoCache, Rope, Sampler
from effkit.core.surgery import dense_weight
from effkit.zoo import hf


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 1024
    d_model: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = None  # type: ignore[assignment]  # d_model // heads
    d_ff: int = 704
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the embedding is also the output layer
    context: int = 1024  # longest text, in tokens

    def __post_init__(self):
        if self.heads % self.kv_heads:
            why = "each key-value head serves the same number of queries"
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}): {why}")
        if self.head_dim is None:
            if self.d_model % self.heads:
                raise ValueError(f"d_model ({self.d_model}) is no multiple of heads ({self.heads}); pass head_dim")
            object.__setattr__(self, "head_dim", self.d_model // self.heads)


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.q = nn.Linear(c.d_model, c.heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.d_model, c.kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.d_model, c.kv_heads * c.head_dim, bias=False)
        self.o = nn.Linear(c.heads * c.head_dim, c.d_model, bias=False)

    def forward(self, x: Float[Tensor, "b n d_model"], cache: Cache, layer: int) -> Float[Tensor, "b n d_model"]:
        q, k, v = (split(p(x), cache.rope.head_dim) for p in (self.q, self.k, self.v))
        return self.o(cache.attend(layer, q, k, v).transpose(1, 2).flatten(2))


def split(x: Float[Tensor, "b n hd"], head_dim: int) -> Float[Tensor, "b h n d"]:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.up = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Float[Tensor, "b n d_model"]) -> Float[Tensor, "b n d_model"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.attention = Attention(c)
        self.ff_norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.ff = FeedForward(c)

    def forward(self, x: Float[Tensor, "b n d_model"], cache: Cache, layer: int) -> Float[Tensor, "b n d_model"]:
        x = x + self.attention(self.attention_norm(x), cache, layer)
        return x + self.ff(self.ff_norm(x))


@stored
class InOrder(nn.Module):
    """As a decoder's `running`: one block after another, the last norm, and the output layer."""

    def forward(self, model: nn.Module, x: Float[Tensor, "b n d_model"], cache: Cache) -> Float[Tensor, "b n d_model"]:
        for layer, block in enumerate(model.blocks):  # type: ignore[arg-type]
            x = block(x, cache, layer)
        return model.norm(x)  # type: ignore[operator]

    def logits(self, model: nn.Module, features: Float[Tensor, "b n d_model"]) -> Float[Tensor, "b n vocab"]:
        tied = model.head is None
        return F.linear(features, dense_weight(model.embedding)) if tied else model.head(features)  # type: ignore[arg-type, operator]


@stored
class GPT(nn.Module):
    """Tokens in, logits out; `kv` makes its caches, `running` runs its blocks and last norm, `decoding` generates, so chapters replace
    any of them."""

    def __init__(self, **settings):
        super().__init__()
        self.config = c = GPTConfig(**settings)
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.head = None if c.tied else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.rope = Rope(c.head_dim, c.rope_theta)
        self.kv = Concatenating()
        self.running = InOrder()
        self.decoding = Autoregressive()
        self.apply(self._initialize)

    def numbers(self) -> dict:
        return asdict(self.config)

    @property
    def context(self) -> int:
        return self.config.context

    def forward(
        self, ids: Int[Tensor, "b n"], cache: Cache | None = None, parents: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "b n vocab"]:
        """Logits after every token; `parents` where the tokens are a tree (core/generation.py, Cache)."""
        return self.logits(self.features(ids, cache, parents))

    def features(
        self, ids: Int[Tensor, "b n"], cache: Cache | None = None, parents: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "b n d_model"]:
        """The last layer's normalized state, which the output layer turns into logits."""
        cache = NoCache(self.rope) if cache is None else cache
        if cache.rope is not self.rope:
            raise ValueError("this cache was made by another model; make one with new_cache of the model that reads it")
        if (rows := cache.texts()) not in (None, len(ids)):
            raise ValueError(f"this cache holds {rows} rows and got {len(ids)}: make a new one for another batch")
        x = self.embedding(ids)
        cache.advance(ids.shape[1], parents, device=ids.device, dtype=x.dtype)
        return self.running(self, x, cache)

    def logits(self, features: Float[Tensor, "b n d_model"]) -> Float[Tensor, "b n vocab"]:
        return self.running.logits(self, features)

    def new_cache(self, *, capacity: int) -> Cache:
        """An empty cache for texts of up to `capacity` tokens."""
        return self.kv.new(self, capacity=capacity)

    def generate(self, ids: Int[Tensor, "b n"], max_new_tokens: int, **settings) -> Int[Tensor, "b m"]:
        """Prompt and continuation; settings as in effkit.generate, and a Sampler's own: temperature, top_k, top_p."""
        if own := {f.name: settings.pop(f.name) for f in fields(Sampler) if f.name in settings}:
            settings["sampler"] = replace(settings.get("sampler", Sampler()), **own)
        return self.decoding(self, ids, max_new_tokens, **settings)

    @classmethod
    def from_hf(cls, model: nn.Module) -> "GPT":
        """The same decoder as a transformers.LlamaForCausalLM."""
        return hf.from_hf(model)

    def to_hf(self) -> nn.Module:
        """The same decoder as a transformers.LlamaForCausalLM."""
        return hf.to_hf(self)

    def _initialize(self, module: nn.Module) -> None:
        """Normal(0, 0.02); the projections back into the residual stream shrink with depth (Radford et al. 2019)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Block):
            for layer in (module.attention.o, module.ff.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * self.config.layers) ** 0.5)
