"""What differs between families of decoders: the one table that ``llama``'s forward pass and ``configuration``,
which reads and writes config.json by it, have in common.

A new family is a row here, where it computes nothing that no other row does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Key(NamedTuple):
    """A number of config.json, or a ``flag``, and how it becomes a field of LlamaConfig and comes back."""

    name: str
    whole: bool = False
    flag: bool = False
    null: bool = False
    read: Callable[[float], float] = lambda value: value
    write: Callable[[float], float] = lambda value: value


class Family(NamedTuple):
    """An architecture of Hugging Face's.

    name: of its forward pass, ``LlamaConfig.family``.
    norms: a block's gains -> the modules that hold them; before the layers (``attn_norm``, ``ffn_norm``), on what they
    put out (``attn_post_norm``, ``ffn_post_norm``), and on queries and keys (``q_norm``, ``k_norm``).
    qk_norm: whether the latter are over each "head", or over the whole "projection".
    gain: added to every gain.  root_scale: embeddings are multiplied by sqrt(dim), rounded to their own type.
    fused: parts -> the module that holds the rows of several, one part below the other.
    experts: the router, and an expert's layers -> their modules, with ``{}`` for its number; none: a dense MLP.
    width: key of ``ffn_dim``, of the MLP or of each expert.
    defaults: what the configuration class assumes where config.json is silent.
    numbers: fields of LlamaConfig that Llama lacks -> their keys.  fixed: fields that the architecture tells.
    window: which blocks have the sliding window: "all", or "local", those that ``layer_types`` says; "": none.
    pattern: where nothing tells the kinds, one block in so many, the last of them, sees all.
    idle: keys that are refused but where they are null, false or one of these values.  rope: known kinds of scaling.
    aliases: another name of a key -> the key.
    """

    architecture: str
    model_type: str
    name: str
    norms: dict[str, str]
    defaults: dict[str, Any]
    qk_norm: str = ""
    gain: float = 0.0
    root_scale: bool = False
    activation: str = "silu"
    activation_key: str = "hidden_act"
    fused: dict[str, str] = {}
    experts: dict[str, str] = {}
    width: str = "intermediate_size"
    numbers: dict[str, Key] = {}
    fixed: dict[str, Any] = {}
    window: str = ""
    pattern: int = 1
    idle: dict[str, tuple] = {}
    rope: tuple[str, ...] = ("default", "linear", "llama3")
    aliases: dict[str, str] = {}


_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_AFTER = {"attn_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
_BOTH = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"} | _AFTER
_QK = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

_LLAMA = Family("LlamaForCausalLM", "llama", "llama", _BEFORE, {"max_position_embeddings": 2048})
_GEMMA = {  # of both
    "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
}  # fmt: skip
_SCALAR = Key("query_pre_attn_scalar", whole=True, read=lambda n: n**-0.5, write=lambda scale: round(scale**-2))
_CAP = Key("final_logit_softcapping", null=True)
_GEMMA_2 = Family(
    "Gemma2ForCausalLM", "gemma2", "gemma2", _BOTH, gain=1.0, root_scale=True, activation="gelu_pytorch_tanh",
    activation_key="hidden_activation", window="local", pattern=2,
    defaults=_GEMMA | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
                       "final_logit_softcapping": 30.0},
    numbers={"attention_scale": _SCALAR, "attention_cap": Key("attn_logit_softcapping", null=True),
             "logit_cap": _CAP},
    idle={"hidden_act": ("gelu_pytorch_tanh",), "sliding_window_pattern": (2,)},
)  # fmt: skip
_EXPERTS = {"router": "mlp.gate"} | {name: f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}
_ROUTED = {"experts_per_token": Key("num_experts_per_tok", whole=True)}
_SCALED = {"renormalised": Key("norm_topk_prob", flag=True)}
_SHARED = dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"), ())

TABLE = (
    _LLAMA,
    _LLAMA._replace(
        architecture="MistralForCausalLM", model_type="mistral", window="all",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}),
    _LLAMA._replace(
        architecture="Qwen2ForCausalLM", model_type="qwen2", fixed={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768}),
    Family(
        "Qwen3ForCausalLM", "qwen3", "qwen3", _BEFORE | _QK, qk_norm="head",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}),
    _GEMMA_2,
    _GEMMA_2._replace(
        architecture="Gemma3ForCausalLM", model_type="gemma3_text", name="gemma3", norms=_BOTH | _QK, qk_norm="head",
        pattern=6, defaults=_GEMMA | {"max_position_embeddings": 131072, "rope_theta": 1e6,
                                      "rope_local_base_freq": 1e4, "final_logit_softcapping": None},
        numbers={"attention_scale": _SCALAR, "logit_cap": _CAP,
                 "local_theta": Key("rope_local_base_freq")},
        idle={"hidden_act": ("gelu_pytorch_tanh",), "attn_logit_softcapping": ()}),  # which transformers do not apply
    Family(
        "Phi3ForCausalLM", "phi3", "phi3", _BEFORE, window="all", rope=("default",),
        fused={**dict.fromkeys("qkv", "self_attn.qkv_proj"), "gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"},
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None}),
    Family(
        "Olmo2ForCausalLM", "olmo2", "olmo2", _AFTER | _QK, qk_norm="projection",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}, idle={"clip_qkv": ()}),
    Family(
        "GraniteForCausalLM", "granite", "granite", _BEFORE,
        defaults={"max_position_embeddings": 2048, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
                  "attention_multiplier": 1.0, "logits_scaling": 1.0},
        numbers={"embed_scale": Key("embedding_multiplier"), "residual_scale": Key("residual_multiplier"),
                 "attention_scale": Key("attention_multiplier"), "logit_divisor": Key("logits_scaling")}),
    Family(
        "MixtralForCausalLM", "mixtral", "mixtral", _BEFORE, window="all", fixed={"renormalised": True},
        experts={"router": "block_sparse_moe.gate", "gate": "block_sparse_moe.experts.{}.w1",
                 "up": "block_sparse_moe.experts.{}.w3", "down": "block_sparse_moe.experts.{}.w2"},
        numbers={"experts": Key("num_local_experts", whole=True)} | _ROUTED, idle=_SHARED,
        aliases={"num_experts": "num_local_experts"},
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
                  "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2}),
    Family(
        "OlmoeForCausalLM", "olmoe", "olmoe", _BEFORE | _QK, qk_norm="projection", experts=_EXPERTS,
        numbers={"experts": Key("num_experts", whole=True)} | _ROUTED | _SCALED,
        idle=_SHARED | {"clip_qkv": (), "sliding_window": ()}, aliases={"num_local_experts": "num_experts"},
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
                  "norm_topk_prob": False}),
    Family(
        "Qwen3MoeForCausalLM", "qwen3_moe", "qwen3_moe", _BEFORE | _QK, qk_norm="head", experts=_EXPERTS,
        width="moe_intermediate_size", numbers={"experts": Key("num_experts", whole=True)} | _ROUTED | _SCALED,
        idle=_SHARED | {"mlp_only_layers": (), "decoder_sparse_step": (1,)},
        aliases={"num_local_experts": "num_experts"},
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "moe_intermediate_size": 768,
                  "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False}),
)  # fmt: skip

ARCHITECTURES = {row.architecture: row for row in TABLE}
FORWARD = {row.name: row for row in TABLE}  # rows of one name compute the same


def tensors(row: Family, experts: int = 0) -> dict[str, str]:
    """Part of the params -> its tensor in Hugging Face's files, with ``{}`` for the block's index.

    Parts with one tensor are its rows, one after the other.  The parts of expert e end on ``_e``.
    """
    layer = "model.layers.{}."
    names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    names |= {name: f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"}
    names |= {f"{name}_bias": f"{layer}self_attn.{name}_proj.bias" for name in "qkv"}
    names |= {name: f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    of_experts = {part if part == "router" else f"{part}_{e}": module.format(e)
                  for e in range(experts) for part, module in row.experts.items()}
    return names | {part: f"{layer}{module}.weight" for part, module in (row.norms | row.fused | of_experts).items()}
