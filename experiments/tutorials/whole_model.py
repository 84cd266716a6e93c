"""Tutorial 4 of 4: a whole model through the functions behind the commands: compress, evaluate, generate, export.

1. ``compress``: calibrate, compress every linear layer of the chosen blocks, write the artifact and its report.
2. ``evaluate``: perplexity on held-out text, and how far the model's predictions are from those of the dense one.
3. ``generate``: text from the packed weights, beside that of the dense model.
4. ``export``: dense files for other programs, which compute the same.

    python experiments/tutorials/whole_model.py [folder]
"""

import sys
from dataclasses import replace
from pathlib import Path

from caldera_jax.jobs import artifact, compress, evaluate, export, generate
from caldera_jax.jobs.presets import PRESETS
from caldera_jax.models import convert

# What ``caldera compress smollm2-135m --preset smoke`` runs: the first two blocks, few tokens, few iterations.  With
# PRESETS["default"] it is all blocks, which takes minutes.  A RunConfig holds all that decides the result.
CONFIG = replace(PRESETS["smoke"], model="smollm2-135m")


def main(config=CONFIG, folder=Path("out/whole_model"), prompt="The capital of France is", tokens=24):
    """Returns the report, the compressed model, and the exported one read again."""
    # Killed and started again, this goes on with the unfinished layers.  Finished, it returns the report at once.
    packed, dense = Path(folder) / "packed", Path(folder) / "dense"
    report = compress.compress(config, packed)
    print(f"{len(report['layers'])} layers, {report['bits_per_weight']:.3f} bits a weight; relative error: mean "
          f"{report['mean_layer_error']:.3f}, most {report['max_layer_error']:.3f}")
    for layer in (layer for layer in report["layers"] if layer["path"].startswith("blocks.0.")):
        steps = " ".join(f"{error:.3f}" for error in layer["half_step_errors"])
        print(f"  {layer['path']:14} {str(layer['shape']):12} error {layer['error']:.3f}   half steps {steps}")

    # Both models on the windows that the run held out from calibration.  D_KL(dense ‖ compressed) is summed over the
    # whole vocabulary at every token, so that few tokens tell more of it than of perplexity.
    base, model = convert.load(config.model), artifact.load(packed)
    _, windows = compress.texts(config, base)
    found = evaluate.compare(base.config, base.params, model.params, windows)
    ppl = evaluate.perplexity(model.config, model.params, windows)
    (divergence, error), (agree, _) = evaluate.mean(found.divergence), evaluate.mean(found.agree)
    print(f"\nperplexity {report['base_perplexity']:.3f} -> {ppl:.3f} on {found.loss.size} tokens; "
          f"D_KL {divergence:.4f} ± {error:.4f} nats; same likeliest token {100 * agree:.1f} %")

    # Greedy text.  The packed layers stay packed on the device, and are applied as in tutorial 1.
    print(f"\n{prompt!r} goes on")
    for name, source in (("dense", config.model), ("compressed", packed)):
        result = generate.run(source, [prompt], generate.Sampling(tokens))
        print(f"  {name:10}  {result.texts[0]!r}  ({result.layer_bytes / 1e6:.1f} MB of layers)")

    # Q + L R put together, in float32, as a Hugging Face directory.  It refuses to overwrite one.
    if not dense.exists():
        export.export(model, "hf", dense)
    again = convert.load(dense)
    same, _ = evaluate.mean(evaluate.compare(model.config, model.params, again.params, windows).divergence)
    size = sum(file.stat().st_size for file in dense.iterdir())
    ppl = evaluate.perplexity(again.config, again.params, windows)
    print(f"\nexported: {dense}, {size / 1e6:.1f} MB, perplexity {ppl:.3f}, D_KL to the compressed {same:.1e} nats")
    return report, model, again


if __name__ == "__main__":
    main(folder=Path(sys.argv[1] if len(sys.argv) > 1 else "out/whole_model"))
