"""What other programs make of the same model: the same tokens, probabilities and perplexity.

    python experiments/interop.py [DIR]             # llama.cpp, of an exported model; left out: smollm2-135m, dense
    python experiments/interop.py --dense MODEL     # transformers, of a built-in's own GGUF file

Writes results/interop.json, or results/interop_MODEL.json.  Needs llama-cpp-python, best in an environment of its own
beside this package: pip install llama-cpp-python; or torch and transformers.  Weights, keys and values are float32, so
what differs is the rounding of two programs.
"""

import importlib.util
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

from caldera_jax.jobs import artifact, evaluate, export, report
from caldera_jax.models import convert, data, files, llama, tokenizer

RESULT = Path(__file__).parent / "results" / "interop.json"
TEXTS = ("The quick brown fox jumps over the lazy dog.", "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.",
         "def f(x):\n    return 3.14159 * x  # 1234567\n", "It's  spaced\t\tout ,\n\n\nisn't it?",
         "日本語のテキスト 🙂 και ελληνικά",
         "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\n")
MOST = 1e-3  # difference of a probability, and relative one of a perplexity


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
    if any(abs(one["perplexity"] / one["their_perplexity"] - 1) > MOST for one in found.values()):
        raise SystemExit(f"transformers computes another perplexity of {name}")


def main(directory: str | None = None) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        raise SystemExit("interop.py needs llama.cpp: pip install llama-cpp-python")
    from llama_cpp import Llama
    from llama_cpp import __version__ as version

    model = convert.load("smollm2-135m") if directory is None else artifact.load(directory)
    rows = []
    with TemporaryDirectory() as folder:
        export.export(model, "gguf", Path(folder) / "model.gguf", "float32")
        theirs = Llama(str(Path(folder) / "model.gguf"), n_ctx=512, logits_all=True, type_k=0, type_v=0,
                       verbose=False)  # keys and values in float32
        for text in TEXTS:
            ids = tokenizer.prompt(model.tokenizer, text)
            same = ids == theirs.tokenize(text.encode(), add_bos=True, special=True)
            theirs.reset()
            theirs.eval(ids)
            logits = np.asarray(llama.forward(model.config, model.params, jnp.asarray(ids)[None]))[0]
            ours, others = (np.asarray(jax.nn.softmax(jnp.asarray(one, jnp.float32)))
                            for one in (logits, theirs.scores[:len(ids)]))
            rows.append({"text": text, "tokens": len(ids), "same_tokens": same,
                         "largest_difference": float(np.abs(ours - others).max()),
                         "same_likeliest": float(np.mean(ours.argmax(1) == others.argmax(1)))})
            print(f"{text!r}: {len(ids)} tokens, {'the same' if same else 'OTHERS'}; probabilities differ by at most "
                  f"{rows[-1]['largest_difference']:.1e}, the likeliest is the same in "
                  f"{rows[-1]['same_likeliest']:.0%}")
    config = {"model": model.name, "compressed": directory is not None, "llama_cpp_python": version}
    files.write_json(RESULT, {**report.provenance(config, 0), "texts": rows})
    if bad := [row["text"] for row in rows if not row["same_tokens"] or row["largest_difference"] > MOST]:
        raise SystemExit(f"llama.cpp differs from the model that was exported on {bad}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--dense"]:
        dense(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
