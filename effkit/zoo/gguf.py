"""Reading a Llama-family model from a GGUF file with the `gguf` package alone; no transformers needed.

GGUF stores the rows of q and k in the order of the original interleaved rotary layout (pairs 2i, 2i + 1), while
GPT pairs i with i + d/2, so each head's rows are put back.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from effkit.zoo.gpt import GPT

_NAMES = {
    "attn_q": "attention.q", "attn_k": "attention.k", "attn_v": "attention.v", "attn_output": "attention.o",
    "ffn_gate": "ff.gate", "ffn_up": "ff.up", "ffn_down": "ff.down", "attn_norm": "attention_norm", "ffn_norm": "ff_norm",
}  # fmt: skip
_FIELDS = {
    "d_model": "embedding_length", "layers": "block_count", "heads": "attention.head_count", "context": "context_length",
    "kv_heads": "attention.head_count_kv", "d_ff": "feed_forward_length", "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
ROWS = 512


def read_gguf(path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer; the floats of one tensor's rows at a time stand beside it. Raises ValueError for another
    architecture."""
    reader = gguf.GGUFReader(str(path))
    if (kind := field(reader, "general.architecture")) != "llama":
        raise ValueError(f"{path} holds the architecture {kind!r}; only 'llama' is read here")
    sizes = {ours: field(reader, f"llama.{theirs}") for ours, theirs in _FIELDS.items()}
    coder = tokenizer(reader)
    reader.fields.clear()  # a hundred megabytes: every token of the vocabulary is an array
    weights = {t.name: floats(t, dtype) for t in reader.tensors}
    with torch.device("meta"):
        model = GPT(vocab_size=len(weights["token_embd.weight"]), tied="output.weight" not in weights, **sizes)
    state = {}
    for name, tensor in weights.items():
        tensor = half_layout(tensor, sizes["heads"]) if "attn_q.weight" in name else tensor
        tensor = half_layout(tensor, sizes["kv_heads"]) if "attn_k.weight" in name else tensor
        state[our_name(name)] = tensor
    model.load_state_dict(state, assign=True)
    return model.eval(), coder


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer alone."""
    return tokenizer(gguf.GGUFReader(str(path)))


def field(reader: gguf.GGUFReader, key: str):
    """A metadata value as a plain Python object."""
    if key not in reader.fields:
        raise ValueError(f"the GGUF file has no field {key}: it is damaged, or not a language model")
    return reader.fields[key].contents()


def floats(stored: gguf.ReaderTensor, dtype: torch.dtype) -> Tensor:
    """A stored tensor as numbers, some rows at a time: the package dequantizes through several copies in float32."""
    rows = [stored.data] if stored.data.ndim < 2 else np.array_split(stored.data, -(-len(stored.data) // ROWS) or 1)
    return torch.cat([torch.tensor(dequantize(part, stored.tensor_type)).to(dtype) for part in rows])


def our_name(name: str) -> str:
    """blk.3.attn_q.weight -> blocks.3.attention.q.weight"""
    top = {"token_embd.weight": "embedding.weight", "output_norm.weight": "norm.weight", "output.weight": "head.weight"}
    if name in top:
        return top[name]
    _, number, part, kind = name.split(".")
    return f"blocks.{number}.{_NAMES[part]}.{kind}"


def half_layout(weight: Float[Tensor, "hd d_model"], heads: int) -> Float[Tensor, "hd d_model"]:
    """Rows of each head from (pair, side) order to (side, pair) order."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The byte-level BPE in the file's metadata; control tokens are matched whole."""
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in field(reader, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, fuse_unk=False))
    # SmolLM's pre-tokenizer splits single digits, then words as GPT-2 does
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(splits)
    made.decoder = decoders.ByteLevel()
    control = int(gguf.TokenType.CONTROL)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made
