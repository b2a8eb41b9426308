"""To and from transformers' Llama: the only place where effkit touches another library's models."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from effkit.zoo.gpt import GPT

_NAMES = {
    "model.embed_tokens.": "embedding.", "model.layers.": "blocks.", "model.norm.": "norm.", "lm_head.": "head.",
    ".self_attn.q_proj.": ".attention.q.", ".self_attn.k_proj.": ".attention.k.", ".self_attn.v_proj.": ".attention.v.",
    ".self_attn.o_proj.": ".attention.o.", ".mlp.gate_proj.": ".ff.gate.", ".mlp.up_proj.": ".ff.up.", ".mlp.down_proj.": ".ff.down.",
    ".input_layernorm.": ".attention_norm.", ".post_attention_layernorm.": ".ff_norm.",
}  # fmt: skip
_FIELDS = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings", "context": "max_position_embeddings",
}  # fmt: skip


def from_hf(model: nn.Module) -> "GPT":
    """A GPT with the weights of a transformers.LlamaForCausalLM. Raises ValueError for what GPT does not compute."""
    from effkit.zoo.gpt import GPT

    c: Any = model.config
    _refuse(c)
    with torch.device("meta"):
        gpt = GPT(**{ours: getattr(c, theirs) for ours, theirs in _FIELDS.items()}, rope_theta=_rope(c)["rope_theta"])
    state = {_translate(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if c.tie_word_embeddings:
        state.pop("head.weight", None)
    gpt.load_state_dict(state, assign=True)
    return gpt.train(model.training)


def to_hf(gpt: "GPT") -> nn.Module:
    """The transformers.LlamaForCausalLM with this GPT's weights; they must be float and of the original sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = gpt.config
    sizes = {theirs: getattr(c, ours) for ours, theirs in _FIELDS.items()}
    config = LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta})
    model: nn.Module = LlamaForCausalLM(config)
    model = model.to(gpt.embedding.weight.dtype)
    state = {_translate(name, back=True): tensor for name, tensor in gpt.state_dict().items()}
    if c.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.train(gpt.training)


def _translate(name: str, back: bool = False) -> str:
    for theirs, ours in _NAMES.items():
        old, new = (ours, theirs) if back else (theirs, ours)
        name = f"^{name}".replace(old if old[0] == "." else f"^{old}", new if old[0] == "." else f"^{new}")[1:]
    return name


def _rope(config) -> dict:
    """transformers 5 keeps rope settings in `rope_parameters`, 4 in two fields."""
    old, new = (getattr(config, name, None) or {} for name in ("rope_scaling", "rope_parameters"))
    return {"rope_theta": getattr(config, "rope_theta", 10_000.0)} | old | new


def _refuse(config) -> None:
    problems = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (getattr(config, "attention_bias", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "rope_type": (_rope(config).get("rope_type", "default"), "default"),
    }
    for name, (value, allowed) in problems.items():
        if value != allowed:
            raise ValueError(f"{name} is {value!r}, and GPT computes only {allowed!r}: choose a Llama-family checkpoint without it")
