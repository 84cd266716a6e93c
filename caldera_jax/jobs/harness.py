"""The models of this package in lm_eval, the harness that the field's zero-shot numbers come from (extra ``eval``)."""

import difflib
import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from caldera_jax.jobs import calibration, generate, report
from caldera_jax.models import llama, tokenizer, weights
from caldera_jax.models.convert import Model
from caldera_jax.models.llama import LlamaConfig, Params

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ValueError(f"tasks need lm_eval 0.4.12 or newer: pip install 'caldera-jax[eval]' ({error})") from error

SHORTEST = 16  # tokens that a row is padded to at least
TOKENS = 4096  # of a batch
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")  # of what lm_eval finds


@dataclass(frozen=True)
class TaskConfig:
    """What is asked: names of tasks, groups or patterns, a folder of further task files, the first ``limit`` documents
    of each (None: all), and the context in tokens (None: the model's)."""

    tasks: tuple[str, ...]
    task_files: str | None = None
    limit: int | None = None
    context: int | None = None

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("no task is named: give one or more, e.g. winogrande,piqa")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"a limit of {self.limit} documents leaves none: give 1 or more")
        if self.task_files is not None and not Path(self.task_files).is_dir():
            raise ValueError(f"{self.task_files}: no such folder; task files are .yaml files in a folder")


def run(config: TaskConfig, model: Model) -> dict[str, Any]:
    """What lm_eval finds of the model on these tasks, with configuration, versions and machine: a record for JSON.

    Raises ValueError for an unknown task, one whose data cannot be read or are empty, and as ``CalderaLM``.
    """
    manager, lm = _Tasks(config), CalderaLM(model, config.context)
    found = simple_evaluate(lm, tasks=manager.names, task_manager=manager, limit=config.limit, log_samples=False)
    origin = report.provenance(config, seed=0)
    origin["versions"]["lm_eval"] = importlib.metadata.version("lm_eval")
    return {"model": model.name, "context": lm.max_length, **origin,
            "lm_eval": {key: report.plain(found[key]) for key in KEPT if key in found}}


def table(record: dict[str, Any]) -> str:
    """A record for people: a line for each metric of each task, with its standard error."""
    lines = []
    for task, found in record["lm_eval"]["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")  # kind: how answers were read, mostly "none"
            if kind and not metric.endswith("_stderr"):
                error, name = found.get(f"{metric}_stderr,{kind}"), metric if kind == "none" else f"{metric} ({kind})"
                more = f" ± {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"  {task:24s} {name:24s} {value:.4f}{more}")
    return "\n".join(lines)


class _Tasks(TaskManager):
    """lm_eval's own tasks and those of the folder; what goes wrong with their data is told in one line."""

    def __init__(self, config: TaskConfig):
        folder = config.task_files
        if folder is not None:  # alone, as looking through lm_eval's own takes seconds
            super().__init__(include_path=folder, include_defaults=False)
        if folder is None or not all(self.match_tasks([name]) for name in config.tasks):
            super().__init__(include_path=folder)
        for name in config.tasks:
            if not self.match_tasks([name]):
                near = difflib.get_close_matches(name, self.all_tasks)
                where = "among lm_eval's" if folder is None else f"in {folder} or among lm_eval's"
                raise ValueError(f"unknown task {name!r}: it is not {where} {len(self.all_tasks)} tasks"
                                 + (f"; did you mean {', '.join(near)}?" if near else ""))
        self.names = self.match_tasks(list(config.tasks))

    def load(self, task_list):
        try:
            return super().load(task_list)
        except Exception as error:  # many kinds: no network, no such file, no document in it, another split
            said = " ".join(str(error.__cause__ or error).split()) or "nothing in a file"
            raise ValueError(f"the data of {', '.join(self.names)} cannot be read ({type(error).__name__}: {said}): "
                             "lm_eval fetches them on first use, and seeks files named in a .yaml from where you are"
                             ) from error


class CalderaLM(TemplateLM):
    """A model as lm_eval takes it: dense or compressed, its weights in memory, packed.

    The conventions are those of lm_eval's own ``HFLM``, so that numbers compare: context and continuation are encoded
    as one text and split at the length of the context's code; what exceeds the model's context is cut off on the left;
    an empty context, and a rolling log-likelihood, begin with BOS, or EOS where there is no BOS; rolling windows
    overlap by one token; whatever the tokenizer adds by itself is left.  Sums are of float32 log-probabilities.
    Differs in: 1. generation is greedy only; 2. it stops at the first stop sequence in each text, where HFLM goes on
    until all texts of a batch have one, so that what stands behind a special token may differ; 3. every token of
    ``generate.end_tokens`` ends it, and none is part of it, where HFLM cuts at the tokenizer's eos_token alone.
    Raises ValueError where a task needs BOS or EOS and the model's files name none, where one samples or generates more
    than the context holds, for a continuation that does not fit the context, and for a text with a token that has no
    embedding.  Works in this process, on one device.
    """

    def __init__(self, model: Model, context: int | None = None):
        super().__init__()
        if context is not None and not 2 <= context <= model.config.context:
            raise ValueError(f"a context of {context} tokens: give 2 to the model's {model.config.context}")
        self.config, self.encoding = model.config, model.tokenizer
        self.special = {role: text for role, text in model.special.items()
                        if model.tokenizer.token_to_id(text) is not None}
        self.named = tokenizer.end_ids(model.tokenizer, model.special, model.ends)
        self.ends = generate.end_tokens(model)
        self.params = jax.device_put(weights.whole(model.params))
        self.max_length = context or model.config.context

    @property
    def eot_token_id(self) -> int:
        if not self.named:
            raise ValueError("the tasks need a token that begins or ends a text, and the model's files name no "
                             "eos_token of its vocabulary: name it in the tokenizer_config.json of the dense model, "
                             "and compress that again")
        return self.named[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.special.get("bos_token")
        return self.eot_token_id if bos is None else self.encoding.token_to_id(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:  # a text that begins with BOS gets no second one
            prefix = self.special.get("bos_token", self.special.get("eos_token"))
            add_special_tokens = prefix is None or not string.startswith(prefix)
        ids = self.encoding.encode(string, add_special_tokens=add_special_tokens).ids
        tokenizer.check(self.encoding, ids, self.config.vocab)
        return ids

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens: it must have one, and at most the "
                                 f"{self.max_length} of the context")
            context = context or [self.prefix_token_id]  # blanks alone, which lm_eval gives to the continuation
            rows.append((context + continuation)[-self.max_length - 1:])
        found = score(self.config, self.params, rows, self.max_length, disable_tqdm)
        counts = [len(continuation) for _, _, continuation in requests]
        return [(float(values[-n:].sum(dtype=np.float64)), bool(likeliest[-n:].all()))
                for n, (values, likeliest) in zip(counts, found, strict=True)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [[(None, *make_disjoint_window(pair)) for pair in
                    get_rolling_token_windows(text, self.prefix_token_id, self.max_length, context_len=1)]
                   for text in texts]
        found = iter(self._loglikelihood_tokens([one for text in windows for one in text], disable_tqdm))
        return [sum((next(found)[0] for _ in text), 0.0) for text in windows]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        asked = [self._asked(*request.args) for request in requests]  # before the first takes its time
        return [self._generate(*one) for one in tqdm(asked, "generate", disable=disable_tqdm)]

    def _asked(self, context: str, options: dict[str, Any]) -> tuple[list[int], int, list[str]]:
        """Prompt, most tokens, stop sequences."""
        options = normalize_gen_kwargs(options)
        count, until = options["max_gen_toks"], options["until"]
        if options["do_sample"]:
            raise ValueError("a task wants to sample (do_sample, temperature), and generation is greedy here: set "
                             "do_sample: false in its generation_kwargs")
        if count >= self.max_length:
            raise ValueError(f"a task generates up to {count} tokens, and the context holds {self.max_length} with the "
                             "prompt: set a smaller max_gen_toks in its generation_kwargs")
        prompt = self.tok_encode(context)[count - self.max_length:] or [self.prefix_token_id]
        return prompt, count, list(filter(None, until))

    def _generate(self, prompt: list[int], count: int, until: list[str]) -> str:
        def stopped(new):
            text = self.encoding.decode(new, skip_special_tokens=False)
            return any(stop in text for stop in until)

        text = self.encoding.decode(greedy(self.config, self.params, prompt, count, stopped, self.ends))
        for stop in until:
            text = text.split(stop)[0]
        return text


def score(config: LlamaConfig, params: Params, rows: Sequence[Sequence[int]], longest: int, quiet: bool = True
          ) -> list[tuple[Float[np.ndarray, " t"], np.ndarray]]:
    """(log-probability in nats, whether it is the likeliest) of tokens 2 … of each row, given those before them.

    Rows may differ in length, up to ``longest`` + 1; ``params`` in memory.  Padding on the right changes nothing, as
    attention is causal.  Raises ValueError for logits that are not finite.
    """
    last, found = weights.last(params), [None] * len(rows)
    with tqdm(total=len(rows), desc="score", disable=quiet) as progress:
        for members, tokens in batches(rows, longest):
            x = _hidden(config, params, tokens[:, :-1])
            values, likeliest = map(np.asarray, _scores(config, last, x, tokens[:, 1:]))
            if not np.isfinite(values).all():
                raise ValueError("the model's logits are not finite: its weights overflow or are damaged")
            for i, member in enumerate(members):
                count = len(rows[member]) - 1
                found[member] = values[i, :count], likeliest[i, :count]
            progress.update(len(members))
    return found


def batches(rows: Sequence[Sequence[int]], longest: int) -> Iterator[tuple[list[int], Int[np.ndarray, "b s"]]]:
    """(indices, tokens) of rows of like length, the longest first, padded with zeros to few shapes, as each compiles.

    All but the last token of a row, the inputs, are padded to a power of two or ``longest``; the number of rows is a
    power of two, too, of up to TOKENS tokens, and one for each length.
    """
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[min(longest, _power_of_two(max(SHORTEST, len(row) - 1)))].append(i)
    for length, members in sorted(groups.items(), reverse=True):
        size = min(_power_of_two(len(members)), max(1, TOKENS // length))
        for start in range(0, len(members), size):
            part = members[start:start + size]
            tokens = np.zeros((size, length + 1), np.int32)
            for row, i in zip(tokens, part, strict=False):
                row[:len(rows[i])] = rows[i]
            yield part, tokens


def greedy(config: LlamaConfig, params: Params, prompt: Sequence[int], count: int,
           stopped: Callable[[list[int]], bool], ends: Collection[int] = ()) -> list[int]:
    """Up to ``count`` likeliest tokens behind the prompt, one by one, until ``stopped(those so far)`` or before one of
    ``ends``."""
    new: list[int] = []
    for step in generate.stream(config, params, [prompt], generate.Sampling(count), ends, "float32"):
        new.append(int(step[0]))
        if stopped(new):
            break
    return new


def _power_of_two(least):
    return 1 << (least - 1).bit_length()


def _hidden(config, params, tokens):
    """The residual streams that leave the last block."""
    x = _embed(config, weights.rest(params), tokens)
    for index, block in enumerate(params["blocks"]):
        x = calibration.forward(config.at(index), block, x)
    return x


_embed = jax.jit(llama.embed, static_argnums=0)


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _scores(config, last, x: Float[Array, "b s d"], targets: Int[Array | np.ndarray, "b s"]):
    """Log-probability of each target and whether it is the likeliest token, [b, s] each; one row's logits at a time,
    or some of them."""

    def score(x, targets):
        logits = jax.nn.log_softmax(llama.head(config, last, x))
        found = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return found, jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets

    row = lambda pair: llama.in_tiles(score, config.vocab, *(part[None] for part in pair))
    return jax.tree.map(lambda a: a[:, 0], jax.lax.map(row, (x, targets)))
