"""What ``--preset`` stands for: the settings of compressions and of trainings by name."""

from caldera_jax.decompose import CalderaConfig
from caldera_jax.jobs.finetune import FinetuneConfig
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.jobs.student import TrainConfig
from caldera_jax.models.data import Tokens

PRESETS = {
    # About a minute: the first two blocks, few tokens, few iterations.
    "smoke": RunConfig("", CalderaConfig(rank=16, outer_iterations=2, inner_iterations=3, svd="randomized"),
                       Tokens(windows=8, window=256), Tokens(windows=4, window=256), blocks=2),
    # The whole model in minutes on two cores.
    "default": RunConfig("", CalderaConfig(rank=64, outer_iterations=15, inner_iterations=10, svd="randomized")),
    # The settings of the authors' scripts since November 2025.
    "paper": RunConfig("", CalderaConfig(rank=64, outer_iterations=20, inner_iterations=50, downdate=True,
                                         refine_passes=10, svd="exact"), Tokens(windows=256, window=1024), seed=42,
                       token_cap=0.0),
}

TRAININGS = {
    # Two steps of a few windows of a few tokens: most of the time is compiling.
    "smoke": FinetuneConfig("", TrainConfig(validate=2), Tokens(windows=12, window=64), aside=4),
    # The authors' RHT stage: signs alone, to the dense model's soft targets; how many epochs is not known.
    "signs": FinetuneConfig("", TrainConfig(sign_rate=1e-3), Tokens(windows=256, window=512), aside=64),
    # Their low-rank stage on a text: factors alone.
    "factors": FinetuneConfig("", TrainConfig(signs=False, ranks=64, goal="text", factor_rate=3e-6, epochs=3,
                                              weight_decay=1e-3, schedule="linear", warmup=0.02),
                              Tokens(windows=256, window=512), aside=64),
    # Signs and factors together, to the soft targets, at the rates that experiments/recovery.py found.
    "both": FinetuneConfig("", TrainConfig(ranks=16), Tokens(windows=256, window=512), aside=64),
    # Their settings for classes of texts: RTE and Winogrande.
    "rte": FinetuneConfig("", TrainConfig(signs=False, ranks=64, goal="labels", factor_rate=3e-5, epochs=15,
                                          weight_decay=1e-3, schedule="linear", warmup=0.02),
                          Tokens(windows=256, window=256)),
    "winogrande": FinetuneConfig("", TrainConfig(signs=False, ranks=64, goal="labels", factor_rate=1e-5, epochs=1,
                                                 weight_decay=1e-3, schedule="linear", warmup=0.02),
                                 Tokens(windows=256, window=128)),
}
