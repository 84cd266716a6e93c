"""A random Llama of two blocks on disk, with a byte tokenizer, and text for it."""

import dataclasses
from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from caldera_jax.models import convert, llama

CONFIG = llama.LlamaConfig(vocab=256, dim=24, layers=2, heads=2, kv_heads=1, head_dim=12, ffn_dim=40, context=64)
SQUARE = dataclasses.replace(CONFIG, kv_heads=2, ffn_dim=24)  # every layer of one shape: one compilation
_BASE = llama.LlamaConfig(vocab=256, dim=42, layers=4, heads=6, kv_heads=2, head_dim=10, ffn_dim=52, norm_eps=1e-6,
                          context=64)
FAMILIES = {  # beyond Llama's: every number that one has is not what others compute with
    "qwen3": dataclasses.replace(_BASE, family="qwen3", rope_theta=500.0),
    "gemma2": dataclasses.replace(_BASE, family="gemma2", tied=True, attention_scale=20**-0.5, attention_cap=3.0,
                                  logit_cap=5.0, sliding_window=7, local=(True, False, True, False)),
    "gemma3": dataclasses.replace(_BASE, family="gemma3", tied=True, attention_scale=20**-0.5, sliding_window=7,
                                  local=(True, True, False, True), rope_theta=500.0, local_theta=50.0,
                                  rope_scaling=llama.LinearRopeScaling(4.0)),
    "phi3": dataclasses.replace(_BASE, family="phi3", sliding_window=9),
    "olmo2": dataclasses.replace(_BASE, family="olmo2"),
    "granite": dataclasses.replace(_BASE, family="granite", attention_scale=0.2, embed_scale=3.0, residual_scale=0.4,
                                   logit_divisor=1.7),
    "mixtral": dataclasses.replace(_BASE, family="mixtral", layers=2, dim=44, sliding_window=9, experts=4,
                                   experts_per_token=2, renormalised=True),
    "olmoe": dataclasses.replace(_BASE, family="olmoe", layers=2, dim=60, experts=5, experts_per_token=2),
    "qwen3_moe": dataclasses.replace(_BASE, family="qwen3_moe", layers=2, dim=44, experts=4, experts_per_token=3,
                                     renormalised=True),
}
WORDS = "the lattice code of each layer rounds its weights and feeds the error back into columns yet to come".split()


def write_model(directory: Path, config: llama.LlamaConfig = CONFIG, params: llama.Params | None = None) -> Path:
    """A Hugging Face directory that ``convert.load`` reads."""
    convert.save_hf(directory, config, params or llama.init(jax.random.key(0), config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_text(path: Path, paragraphs: int = 40) -> Path:
    """Paragraphs that all differ."""
    turn = lambda i: WORDS[i % len(WORDS):] + WORDS[:i % len(WORDS)]
    path.write_text("\n\n".join(f"{i}: {' '.join(turn(i) + turn(3 * i))}" for i in range(paragraphs)))
    return path
