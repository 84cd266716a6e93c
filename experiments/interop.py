"""What other programs make of the same model: the same tokens, probabilities and perplexity, and fewer bits.

    python experiments/interop.py [DIR]                   # llama.cpp, of an exported model; left out: smollm2-135m
    python experiments/interop.py --dense MODEL           # transformers, of a built-in's own GGUF file
    python experiments/interop.py --quantize MODEL TYPE   # llama.cpp's own compression, as IQ2_XXS

Writes results/interop.json (interop_level.json, interop_fixed.json of a compressed DIR), results/interop_MODEL.json,
results/interop_MODEL_TYPE.json.  Needs llama-cpp-python, best in an environment of its own beside this package: pip
install llama-cpp-python; or torch and transformers.  Keys and values are float32, and weights but those in Q8_0, so
that what differs is the rounding of two programs.
"""

import ctypes
import importlib.util
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caldera_jax.jobs import artifact, calibration, evaluate, export, generate, report
from caldera_jax.levels import Levelled
from caldera_jax.linear import CompressedLinear
from caldera_jax.models import convert, data, files, llama, tokenizer

RESULT = Path(__file__).parent / "results" / "interop.json"
TEXTS = ("The capital of France is", "Once upon a time", "The quick brown fox jumps over the lazy dog.",
         "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.",
         "def f(x):\n    return 3.14159 * x  # 1234567\n", "It's  spaced\t\tout ,\n\n\nisn't it?",
         "日本語のテキスト 🙂 και ελληνικά",
         "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\n")
MOST = 1e-3  # difference of a probability in float32; with Q8_0 llama.cpp rounds what enters a layer to 8 bits, too
GREEDY = 32  # tokens behind each text


def dense(name: str, windows: int = 2) -> None:
    """Losses of every window of both built-in texts, as read and computed by either program."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as version

    path, model = data.fetch_model(name), convert.load(name)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    found = {}
    for text in ("enwiki", "python"):
        tokens = data.windows_beside(model, data.Tokens(text, windows, 512), "", "evaluation")
        ours = evaluate.token_losses(model.config, model.params, tokens).mean(1)
        with torch.no_grad():
            others = [float(theirs(input_ids=one, labels=one).loss) for one in torch.tensor(tokens).long()[:, None]]
        found[text] = {"ours": ours.tolist(), "theirs": others, "perplexity": float(np.exp(ours.mean())),
                       "their_perplexity": float(np.exp(np.mean(others)))}
        print(f"{text}: perplexity {found[text]['perplexity']:.5f}, transformers {np.exp(np.mean(others)):.5f}")
    files.write_json(RESULT.with_name(f"interop_{name}.json"), {
        **report.provenance({"model": name, "windows": windows, "window": 512, "transformers": version}, 0), **found})
    if any(abs(one["perplexity"] / one["their_perplexity"] - 1) > 1e-3 for one in found.values()):
        raise SystemExit(f"transformers computes another perplexity of {name}")


def quantize(name: str, kind: str, windows: int = 64) -> None:
    """A built-in's own GGUF file at fewer bits by llama.cpp, with an importance matrix of the text that `compress`
    calibrates on, all linear layers of one type ("pure") and mixed as llama.cpp does; each evaluated here, with the
    embedding and head of the model."""
    llama_cpp = _llama_cpp()
    if not hasattr(llama_cpp, of := f"LLAMA_FTYPE_MOSTLY_{kind}"):
        raise SystemExit(f"llama.cpp knows no type {kind!r}: choose from " + ", ".join(
            name.rpartition("MOSTLY_")[2] for name in dir(llama_cpp) if name.startswith("LLAMA_FTYPE_MOSTLY_")))
    path, model = data.fetch_model(name), convert.load(name)
    importance = squares(model, data.windows_beside(model, data.Tokens("enwiki", windows, 512), "", "calibration"))
    held_out = {text: data.windows_beside(model, data.Tokens(text, 32, 512), "enwiki", "evaluation")
                for text in ("enwiki", "python")}
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last, without a name, ends them
    for entry, (tensor, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = tensor.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    config = {"model": name, "type": kind, "windows": windows, "window": 512,
              "llama_cpp_python": llama_cpp.__version__}
    found = {}
    for mixed in (False, True):
        asked = llama_cpp.llama_model_quantize_default_params()
        asked.ftype, asked.pure = getattr(llama_cpp, of), not mixed
        asked.allow_requantize, asked.imatrix = True, entries
        asked.output_tensor_type = asked.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0  # read, and not used
        with TemporaryDirectory() as folder:
            out = Path(folder) / "model.gguf"
            if llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), asked):
                raise SystemExit(f"llama.cpp could not write {name} as {kind}")
            tensors = {tensor.name: tensor for tensor in convert.read_gguf(out).tensors}
            linear = [tensors[tensor] for tensor in importance]
            bits = 8 * sum(int(t.n_bytes) for t in linear) / sum(int(t.n_elements) for t in linear)
            params = model.params | {"blocks": convert.load(out).params["blocks"]}
            rows = {}
            for text, tokens in held_out.items():
                compared = evaluate.compare(model.config, model.params, params, tokens, title=text)
                base, loss, divergence = (evaluate.mean(x)[0] for x in (compared.base_loss, compared.loss,
                                                                        compared.divergence))
                rows[text] = {"base_perplexity": math.exp(base), "perplexity": math.exp(loss), "lost": loss - base,
                              "divergence": divergence}
                print(f"{'mixed' if mixed else 'pure'}, {bits:.4f} bits, {text}: {rows[text]}")
            found["mixed" if mixed else "pure"] = {
                "bits_per_weight": bits, "file_bytes": out.stat().st_size,
                "types": Counter(sorted(t.tensor_type.name for t in linear)), **rows}
        files.write_json(RESULT.with_name(f"interop_{name}_{kind}.json"), {**report.provenance(config, 0), **found})


def squares(model: convert.Model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The mean square of each input of each linear layer, by the name of its tensor; not from Moments, whose products
    would take longer than the rest."""
    @partial(jax.jit, static_argnums=0)
    def forward(config, block, x):
        y, inputs = llama.block(config, block, x, jnp.arange(x.shape[1]))
        return y, {key: jnp.sum(value * value, axis=(0, 1)) for key, value in inputs.items()}

    streams, found = calibration.embed(model.config, model.params, tokens), {}
    for index in tqdm(range(model.config.layers), "importance matrix", unit="block"):
        block, total = jax.device_put(dict(model.params["blocks"][index])), {}
        for shard in (shard for device in streams for shard in device):
            for i in range(0, len(shard), 4):
                shard[i:i + 4], one = forward(model.config.at(index), block, shard[i:i + 4])
                total = {key: total.get(key, 0) + np.asarray(value, np.float64) for key, value in one.items()}
        found |= {convert.GGUF[layer].format(index): np.float32(total[llama.INPUT_OF[layer]] / tokens.size)
                  for layer in llama.LINEARS}
    return found


def _llama_cpp():
    if importlib.util.find_spec("llama_cpp") is None:
        raise SystemExit("interop.py needs llama.cpp: pip install llama-cpp-python")
    return importlib.import_module("llama_cpp")


def forward(config: llama.LlamaConfig, params: llama.Params, ids: list[int]) -> np.ndarray:
    """Logits at every place; padded on the right, so that like lengths share one compiled block."""
    tokens = np.pad(ids, (0, -len(ids) % generate.ROUND))
    x = llama.embed(config, params, tokens[None])
    for index, weights in enumerate(params["blocks"]):
        x, _ = block(config.at(index), weights, x, jnp.arange(len(tokens)))
    return llama.head(config, params, x)[0, :len(ids)]


block = jax.jit(llama.block, static_argnums=0)


def compared(llama_cpp, model: convert.Model, dtype: str, adapter: bool = False, own: bool = False) -> dict[str, Any]:
    """Tokens and next-token probabilities of every text, and greedy tokens behind it, by either program; ``own``:
    llama.cpp makes the Q8_0 file from the float32 export."""
    placed, rows = generate.place(model.params), []
    with TemporaryDirectory() as folder:
        path, beside = Path(folder) / "model.gguf", Path(folder) / "adapter.gguf"
        written = export.export(model, "gguf", path, "float32" if own else dtype, beside if adapter else None)
        if own:
            asked, exported = llama_cpp.llama_model_quantize_default_params(), path
            asked.ftype, path = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, Path(folder) / "own.gguf"
            if llama_cpp.llama_model_quantize(str(exported).encode(), str(path).encode(), asked):
                raise SystemExit(f"llama.cpp could not write {path.name} as Q8_0 from {exported.name} of {model.name}")
        # Keys and values in float32; token by token, as llama.cpp's AMX product of several rows of Q8_0 crashes on some
        # machines, with any file.
        theirs = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, type_k=0, type_v=0, n_batch=1, n_ubatch=1,
                                 verbose=False, **({"lora_path": str(beside)} if adapter else {}))
        for text in TEXTS:
            ids = tokenizer.prompt(model.tokenizer, text)
            same = ids == theirs.tokenize(text.encode(), add_bos=True, special=True)
            theirs.reset()
            theirs.eval(ids)
            logits = np.asarray(forward(model.config, placed, ids))
            logs = [np.asarray(jax.nn.log_softmax(jnp.asarray(one, jnp.float32)))
                    for one in (logits, theirs.scores[:len(ids)])]
            ours, others = map(np.exp, logs)
            behind, asked = [], generate.Sampling(GREEDY)
            [greedy] = generate.complete(model.config, placed, [ids], asked, kept="float32")
            for _ in greedy:
                behind.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
                theirs.eval(behind[-1:])
            rows.append({"text": text, "tokens": len(ids), "same_tokens": same,
                         "largest_difference": float(np.abs(ours - others).max()),
                         "divergence": float(np.mean(np.sum(ours * (logs[0] - logs[1]), axis=1))),
                         "same_likeliest": float(np.mean(ours.argmax(1) == others.argmax(1))),
                         "greedy": len(greedy), "same_greedy": int(np.cumprod(np.array(behind) == greedy).sum())})
            print(f"{dtype}, {text!r}: {len(ids)} tokens, {'the same' if same else 'OTHERS'}; probabilities differ by "
                  f"at most {rows[-1]['largest_difference']:.1e}, divergence {rows[-1]['divergence']:.1e}; the "
                  f"likeliest is the same in {rows[-1]['same_likeliest']:.0%}; of {len(greedy)} greedy tokens the "
                  f"first {rows[-1]['same_greedy']} are the same")
    layers = [one for name, one in written.items() if "." in name]
    kept = {"kept": sum(one.kept for one in layers) / sum(one.of for one in layers)} if layers else {}
    mean = float(np.average([row["divergence"] for row in rows], weights=[row["tokens"] for row in rows]))
    return {"dtype": dtype, "adapter": adapter, "own": own, **kept, "divergence": mean, "texts": rows}


def main(directory: str | None = None) -> None:
    """A built-in as it is; or a compressed model in float32, in Q8_0 where it is of one level, beside llama.cpp's own
    Q8_0 of the dense model, and L R as an adapter beside either where it has any."""
    llama_cpp = _llama_cpp()
    model = convert.load("smollm2-135m") if directory is None else artifact.load(directory)
    layers = [weight for weight in dict(model.params["blocks"][0]).values() if isinstance(weight, CompressedLinear)]
    adapters = [False, True] if any(weight.rank for weight in layers) else [False]
    levelled = any(isinstance(weight.q, Levelled) for weight in layers)
    found = [compared(llama_cpp, model, dtype, adapter) for dtype in ("float32", *(("q8_0",) if levelled else ()))
             for adapter in adapters]
    if levelled:
        found.append(compared(llama_cpp, artifact.base(directory), "q8_0", own=True))
    config = {"model": model.name, "compressed": directory is not None, "llama_cpp_python": llama_cpp.__version__}
    out = RESULT if directory is None else RESULT.with_name(
        f"interop_{'level' if levelled else 'fixed'}{'_low_rank' if len(adapters) > 1 else ''}.json")
    files.write_json(out, {**report.provenance(config, 0), "exports": found})
    for one in found:
        print(f"{one['dtype']}{', L R as an adapter' * one['adapter']}{', llama.cpp of the dense model' * one['own']}: "
              f"divergence {one['divergence']:.1e}, {sum(row['same_greedy'] for row in one['texts'])} of "
              f"{sum(row['greedy'] for row in one['texts'])} greedy tokens the same before the first other one")
    if bad := [(one["dtype"], row["text"]) for one in found for row in one["texts"] if not row["same_tokens"] or (
            one["dtype"] == "float32" and row["largest_difference"] > MOST)]:
        raise SystemExit(f"llama.cpp differs from the model that was exported on {bad}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dense"]:
        dense(*sys.argv[2:])
    elif sys.argv[1:2] == ["--quantize"]:
        quantize(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
