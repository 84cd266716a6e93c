"""config.json of Hugging Face <-> LlamaConfig, both ways by the table of ``families``.

Nothing is guessed: a value that ``llama`` does not compute is a ValueError that names its key.
"""

from typing import Any

from caldera_jax.models import files
from caldera_jax.models.families import ARCHITECTURES, TABLE, Family
from caldera_jax.models.llama import LinearRopeScaling, Llama3RopeScaling, LlamaConfig

# What all configuration classes assume where config.json is silent.
_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
_IDLE = dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention",
                       "quantization_config"), ())
_LOCAL, _ALL = "sliding_attention", "full_attention"


def config_from_hf(raw: dict[str, Any]) -> LlamaConfig:
    """The content of a config.json as a LlamaConfig. ValueError for what ``llama`` does not compute."""
    architecture = files.checked(raw.get("architectures") or ["none named"], list[str], "config.json: architectures")[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    row = ARCHITECTURES[architecture]
    for alias, key in row.aliases.items():
        if raw.get(key, raw.get(alias)) != raw.get(alias, raw.get(key)):
            raise ValueError(f"config.json: {alias} = {raw[alias]} and {key} = {raw[key]} differ: correct whichever is "
                             "wrong")
        raw = raw | ({key: raw[alias]} if alias in raw else {})
    raw = _DEFAULTS | row.defaults | raw
    for key, values in (_IDLE | row.idle).items():
        if raw.get(key) and raw[key] not in values:
            raise ValueError(f"config.json: {key} = {raw[key]!r} is not supported; a model without it is needed")
    if (activation := raw[row.activation_key]) != row.activation:
        raise ValueError(f"config.json: {row.activation_key} {activation!r} is not supported, only {row.activation!r}")
    dim, heads, layers = (size(raw, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    windowed = row.window == "all" and raw["sliding_window"] is not None
    local = _kinds(row, raw, layers, windowed)
    return LlamaConfig(
        vocab=size(raw, "vocab_size"),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=size(raw, "num_key_value_heads", heads),
        head_dim=size(raw, "head_dim", dim // heads),
        ffn_dim=size(raw, row.width),
        norm_eps=number(raw, "rms_norm_eps"),
        tied=files.checked(raw["tie_word_embeddings"], bool, "config.json: tie_word_embeddings"),
        context=size(raw, "max_position_embeddings"),
        sliding_window=size(raw, "sliding_window") if windowed or any(local) else None,
        family=row.name,
        local=local,
        **row.fixed | _numbers(row, raw) | _rope(row, raw),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of ``config_from_hf``; ValueError for a mixture that no supported architecture describes."""
    rows = [row for row in TABLE if row.name == config.family]
    for row in rows:
        if config_from_hf(raw := _written(row, config)) == config:
            return raw
    raise ValueError(f"no Hugging Face architecture among {', '.join(row.architecture for row in rows)} describes "
                     f"{config}")


def _written(row: Family, config: LlamaConfig) -> dict[str, Any]:
    scaling = None
    if isinstance(s := config.rope_scaling, LinearRopeScaling):
        scaling = {"rope_type": "linear", "factor": s.factor}
    elif s is not None:
        scaling = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor}
        scaling |= {"high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_context}
    raw = {
        "architectures": [row.architecture],
        "model_type": row.model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        row.width: config.ffn_dim,
        row.activation_key: row.activation,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        "sliding_window": config.sliding_window,
    }
    for name, key in row.numbers.items():
        value = getattr(config, name)
        raw[key.name] = None if value is None else key.write(value)
    if row.window == "local":
        raw["layer_types"] = [_LOCAL if local else _ALL for local in config.local]
    if row.name != "llama":
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # or the class's, of other vocabularies
    return raw


def _kinds(row, raw, layers, windowed):
    """Which blocks have a window of their own; () where all are alike."""
    told = files.checked(raw.get("layer_types") or [], list[str], "config.json: layer_types")
    if row.window != "local":
        if others := set(told) - {_LOCAL if windowed else _ALL}:
            raise ValueError(f"config.json: layer_types has {', '.join(sorted(others))}, which is not supported beside "
                             "the other settings")
        return ()
    if layers > 2**16:
        raise ValueError(f"config.json: num_hidden_layers = {layers}, more than any model has; download it again")
    by = lambda every: [_LOCAL if (i + 1) % every else _ALL for i in range(layers)]
    kinds = told or by(size(raw, "sliding_window_pattern", row.pattern))
    if others := set(kinds) - {_LOCAL, _ALL}:
        raise ValueError(f"config.json: layer_types has {', '.join(sorted(others))}, and supported are {_LOCAL} and "
                         f"{_ALL}")
    if len(kinds) != layers:
        raise ValueError(f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers = {layers}")
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if raw.get(key) is not None and by(size(raw, key)) != kinds:
            raise ValueError(f"config.json: {key} = {raw[key]} and layer_types differ: correct whichever is wrong")
    return tuple(kind == _LOCAL for kind in kinds)


def _numbers(row: Family, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that a family has beyond Llama's."""
    def read(key):
        if key.flag:
            return files.checked(raw[key.name], bool, f"config.json: {key.name}")
        return key.read(size(raw, key.name) if key.whole else number(raw, key.name))

    return {name: None if key.null and raw.get(key.name) is None else read(key) for name, key in row.numbers.items()}


def _rope(row: Family, raw: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling from ``rope_parameters`` (transformers 5) or from ``rope_theta`` and
    ``rope_scaling`` (before), and where local blocks have their own, theirs."""
    old, new = (files.checked(raw.get(key) or {}, dict, f"config.json: {key}")
                for key in ("rope_scaling", "rope_parameters"))
    own = {}
    if "local_theta" in row.numbers:
        nested = {kind: files.checked(new.get(kind) or {}, dict, f"config.json: rope_parameters: {kind}")
                  for kind in (_ALL, _LOCAL)}
        if flat := new.keys() - nested.keys():
            raise ValueError(f"config.json: rope_parameters has {', '.join(sorted(flat))}; needed: {_ALL} and {_LOCAL}")
        theta, scaling = _rope_of(row, {"rope_theta": raw["rope_local_base_freq"]}, nested[_LOCAL])
        if scaling is not None:
            raise ValueError(f"config.json: rope_parameters: {scaling} of {_LOCAL} is not supported, only 'default'")
        own, new = {"local_theta": theta}, nested[_ALL]
    if differ := [key for key in old if (old | new)[key] != old[key]]:
        raise ValueError(f"config.json: rope_scaling and rope_parameters differ in {', '.join(differ)}: remove one")
    theta, scaling = _rope_of(row, raw, old | new)
    return {"rope_theta": theta, "rope_scaling": scaling, **own}


def _rope_of(row, raw, rope):
    """(theta, scaling)."""
    if parts := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f"config.json: a rope scaling of its own for {', '.join(parts)} is not supported")
    theta = number(raw | rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (partial := (raw | rope).get("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"config.json: partial_rotary_factor {partial} is not supported, only 1")
    if kind not in row.rope:
        raise ValueError(f"config.json: rope scaling {kind!r} is not supported; supported: "
                         f"{', '.join(map(repr, row.rope))}")
    if kind == "default":
        if rope.get("factor") not in (None, 1):
            raise ValueError(f"config.json: a rope scaling by {rope['factor']} without a rope_type that uses it: name "
                             "the type, or remove the factor")
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(number(rope, "factor"))
    original = size(rope, "original_max_position_embeddings", size(raw, "max_position_embeddings"))
    factor, low, high = (number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    return theta, Llama3RopeScaling(factor, low, high, original)


def number(raw: dict[str, Any], key: str) -> float:
    """A finite number of a configuration; ValueError naming the key where there is none."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ValueError(f"the model's configuration needs {key} as a number, got {value!r}")
    return float(value)


def size(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of a configuration, ``default`` where it is null or not there; ValueError naming the key."""
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
        raise ValueError(f"the model's configuration needs {key} as a positive integer, got {value!r}")
    return value
