"""The adapter against lm_eval's own HFLM on the exported model, for local tasks of every kind."""

import dataclasses
import functools
import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # read when lm_eval is imported
pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'caldera-jax[eval]'")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from caldera_jax import CalderaConfig, compress_matrix  # noqa: E402
from caldera_jax.jobs import export, harness  # noqa: E402
from caldera_jax.jobs.harness import CalderaLM, TaskConfig  # noqa: E402
from caldera_jax.linear import CompressedLinear  # noqa: E402
from caldera_jax.models import convert, llama  # noqa: E402
from caldera_jax.models.convert import Model  # noqa: E402
from caldera_jax.models.weights import whole  # noqa: E402

pytestmark = pytest.mark.extra
TASKS = str(Path(__file__).parent / "tasks")
NAMES = ("local_blank", "local_choice", "local_pages", "local_words")
CONFIG = dataclasses.replace(tiny.SQUARE, vocab=302)
forward = jax.jit(llama.forward, static_argnums=0)
CALDERA = CalderaConfig(rank=3, outer_iterations=1, inner_iterations=1, quantizer="uniform", q_bits=4,
                        factor_quantizer="uniform")


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path):
    """Data files are named from the repository's root; what datasets keeps goes elsewhere."""
    monkeypatch.chdir(Path(TASKS).parents[1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def trained_tokenizer(bos):
    """A trained byte-level BPE, which joins letters over the end of a context; with ``bos`` it puts that first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([" ".join(tiny.WORDS)] * 2, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False), AddedToken("<|begin|>", normalized=False)])
    if bos:
        begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    assert tokenizer.get_vocab_size() <= CONFIG.vocab
    return tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function from whether there is a BOS to a compressed model, named by the directory of its export."""
    params, h = llama.init(jax.random.key(1), CONFIG), jnp.eye(CONFIG.dim, dtype=jnp.float32)
    params["head"] *= 4  # likelier tokens stand out
    for block in params["blocks"]:
        block |= {name: compress_matrix(jax.random.key(2), block[name], h, CALDERA)[0] for name in llama.LINEARS}

    @functools.cache
    def of(bos):
        directory = tmp_path_factory.mktemp("exported") / "hf"
        special = {"eos_token": "<|end|>"} | ({"bos_token": "<|begin|>"} if bos else {})
        model = Model(CONFIG, params, trained_tokenizer(bos), str(directory), special)
        export.export(model, "hf", directory)
        return model

    return of


def answers(lm):
    """lm_eval's metrics, and every answer of the model: {task: [those of a document]}."""
    tasks = harness._Tasks(TaskConfig(NAMES, TASKS))
    found = lm_eval.simple_evaluate(lm, tasks=tasks.names, task_manager=tasks, log_samples=True)
    by_document = {task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
                   for task, samples in found["samples"].items()}
    return {task: {key: value for key, value in metrics.items() if "," in key and value != "N/A"}
            for task, metrics in found["results"].items()}, by_document


@pytest.mark.parametrize("bos", [False, True])
def test_answers_and_metrics_are_those_of_lm_eval_and_transformers_on_the_exported_model(exported, bos):
    torch = pytest.importorskip("torch", reason="transformers is the other side")
    pytest.importorskip("transformers", reason="transformers is the other side")
    pytest.importorskip("accelerate", reason="lm_eval's HFLM needs accelerate")
    from lm_eval.models.huggingface import HFLM

    model = exported(bos)
    # One request a batch: in larger ones HFLM generates on behind a stop until every text has one.
    other = HFLM(pretrained=model.name, dtype=torch.float32, device="cpu", batch_size=1)
    assert other.prefix_token_id == model.tokenizer.token_to_id("<|begin|>" if bos else "<|end|>")
    lm = CalderaLM(model)
    assert isinstance(lm.params["blocks"][0]["q"], CompressedLinear)  # never put together
    metrics, found = answers(lm)
    expected_metrics, expected = answers(other)
    close = functools.partial(np.testing.assert_allclose, rtol=CONFIG.context * np.finfo(np.float32).eps)
    for task in ("local_blank", "local_choice"):
        for mine, theirs in zip(found[task], expected[task], strict=True):
            assert len(mine) == len(theirs) == 2
            close([value for value, _ in mine], [value for value, _ in theirs])
            assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    close(found["local_pages"], expected["local_pages"])
    assert found["local_words"] == expected["local_words"]
    assert any(texts[0] for texts in found["local_words"])
    for task in ("local_blank", "local_choice", "local_words"):  # shares of few documents: the same answers, or none
        assert metrics[task] == expected_metrics[task]
    bits = metrics["local_pages"]["bits_per_byte,none"], expected_metrics["local_pages"]["bits_per_byte,none"]
    close(*bits)
    blank = Instance("loglikelihood", {}, (" ", "the"), 0)  # all goes to the continuation; HFLM refuses it without BOS
    row = [*([] if bos else [lm.prefix_token_id]), *lm.tok_encode(" the")]
    close(lm.loglikelihood([blank])[0][0], log_probabilities(model, row)[range(len(row) - 1), row[1:]].sum())


def log_probabilities(model, row):
    """Of every token behind each of the row's but the last, by the whole forward pass of the exported model."""
    params = jax.tree.map(jnp.asarray, whole(convert.load(model.name).params))
    logits = np.array(forward(CONFIG, params, np.array([row], np.int32))[0, :-1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_score_of_ragged_rows_is_that_of_each_alone_and_knows_the_likeliest_token(exported):
    model, rng = exported(False), np.random.default_rng(0)
    rows = [rng.integers(0, CONFIG.vocab, length).tolist() for length in (3, 17, 18, 65)]
    oracle = [log_probabilities(model, row) for row in rows]
    for row, expected in zip(rows, oracle, strict=True):
        row[-1] = int(expected[-1].argmax())
    lm = CalderaLM(model)
    scores = harness.score(CONFIG, lm.params, rows, 64)
    for row, expected, (values, likeliest) in zip(rows, oracle, scores, strict=True):
        atol = 64 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(values, expected[np.arange(len(row) - 1), row[1:]], rtol=0, atol=atol)
        np.testing.assert_array_equal(likeliest, expected.argmax(-1) == row[1:])
    assert all(greedy for _, greedy in lm._loglikelihood_tokens([(None, row[:-1], row[-1:]) for row in rows]))
    assert not any(greedy for _, greedy in lm._loglikelihood_tokens([(None, row[:1], row[1:]) for row in rows]))


def test_scores_of_long_rows_are_found_in_tiles_of_positions(monkeypatch):
    params, (x, targets) = llama.init(jax.random.key(0), CONFIG), np.random.default_rng(0).integers(0, 302, (2, 3, 13))
    streams = llama.embed(CONFIG, params, x)
    outcome = lambda: harness._scores.__wrapped__(CONFIG, params, streams, targets)
    expected = outcome()
    monkeypatch.setattr(llama, "NUMBERS", 5 * CONFIG.vocab)
    for found, other in zip(outcome(), expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-5)


def test_a_batch_is_of_few_shapes_and_holds_every_row_once():
    rows = [[7] * length for length in range(2, 52)] * 3
    parts = list(harness.batches(rows, 50))  # no power of two: the last shape ends there
    assert {tokens.shape[1] for _, tokens in parts} == {17, 33, 51}
    assert len({tokens.shape for _, tokens in parts}) == 3
    assert sorted(i for members, _ in parts for i in members) == list(range(len(rows)))
    for members, tokens in parts:
        assert tokens.size <= harness.TOKENS + len(tokens) or len(tokens) == 1
        for i, row in zip(members, tokens, strict=False):
            assert row.tolist() == rows[i] + [0] * (len(row) - len(rows[i]))
    assert [len(tokens) for _, tokens in harness.batches([[1, 2]], 50)] == [1]


def test_greedy_takes_the_likeliest_token_of_the_whole_forward_pass_until_it_is_stopped(exported):
    model = exported(False)
    lm, prompt = CalderaLM(model), list(range(13))
    new = harness.greedy(CONFIG, lm.params, prompt, 5, lambda new: False)  # beyond SHORTEST
    assert log_probabilities(model, [*prompt, *new])[len(prompt) - 1:].argmax(-1).tolist() == new and len(new) == 5
    assert harness.greedy(CONFIG, lm.params, prompt, 5, lambda new: len(new) == 2) == new[:2]


@pytest.mark.parametrize("ends", [(), (3,)])
def test_a_text_ends_at_every_end_token_and_without_any_at_its_limit(exported, ends):
    model = exported(False)._replace(special={}, ends=())
    lm, request = CalderaLM(model), [Instance("generate_until", {}, ("the", {"until": ["no"], "max_gen_toks": 6}), 0)]
    tokens = harness.greedy(CONFIG, lm.params, lm.tok_encode("the"), 6, lambda new: False)
    assert lm.generate_until(request) == [model.tokenizer.decode(tokens)] and len(tokens) == 6
    for end in ends:
        other = CalderaLM(model._replace(ends=(0, tokens[end])))
        assert other.ends >= {0, tokens[end]}
        assert other.generate_until(request) == [model.tokenizer.decode(tokens[:tokens.index(tokens[end])])]


def test_a_request_that_cannot_be_answered_is_refused_before_the_first_is(exported, monkeypatch):
    monkeypatch.setattr(harness, "greedy", lambda *_: pytest.fail("generates"))
    requests = [Instance("generate_until", {}, ("the", {"until": [], "max_gen_toks": count}), 0) for count in (4, 64)]
    with pytest.raises(ValueError, match="up to 64 tokens"):
        CalderaLM(exported(False)).generate_until(requests)


def test_a_text_with_a_token_that_has_no_embedding_is_refused_by_name(exported):
    model = exported(False)
    beyond = Tokenizer.from_str(model.tokenizer.to_str())
    beyond.add_special_tokens([f"<{i}>" for i in range(beyond.get_vocab_size(), CONFIG.vocab)] + ["<pad>"])
    with pytest.raises(ValueError, match="the text holds '<pad>', token 302"):
        CalderaLM(model._replace(tokenizer=beyond)).loglikelihood([Instance("loglikelihood", {}, ("the<pad>", "a"), 0)])


# ---- the record


def test_a_record_names_its_configuration_versions_and_machine_and_is_shown_in_lines(exported):
    config = TaskConfig(("local_ch*", "local_words"), TASKS, limit=2, context=48)
    record = json.loads(json.dumps(harness.run(config, exported(True))))
    found = record["lm_eval"]
    assert found["results"].keys() == found["n-samples"].keys() == {"local_choice", "local_words"}
    assert found["n-samples"]["local_choice"] == {"original": 4, "effective": 2}
    assert record["config"]["limit"] == 2 and record["context"] == 48
    assert record["versions"]["lm_eval"] == lm_eval.__version__ and "processor" in record["machine"]
    lines, acc = harness.table(record).splitlines(), found["results"]["local_choice"]["acc,none"]
    assert len(lines) == 3 and re.fullmatch(rf"  local_choice +acc +{acc:.4f} ± 0\.\d{{4}}", lines[0])


# ---- bad input


def test_an_unknown_task_is_sought_in_the_folder_and_among_lm_evals_and_told_with_those_like_it():
    with pytest.raises(ValueError, match="unknown task 'winogrand': .*tasks or among.* mean .*winogrande") as error:
        harness._Tasks(TaskConfig(("local_ch*", "winogrand"), TASKS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "more", "message"), [
    ("", "", "the data of mine cannot be read .*nothing in a file"),
    ('{"goal": "x", "label": 0}', ", process_docs: !function none.of", "the data of mine cannot be read .*size 0"),
    ('{"goal": "x", "label": 0}', ", validation_split: none", "the data of mine cannot be read .*none"),
    ('{"goal": "x", "label": 0}', ", dataset_kwargs: {data_files: no_such.jsonl}",
     "the data of mine cannot be read .*no_such.jsonl"),
])
def test_data_that_are_empty_missing_or_of_another_kind_are_told_in_one_line(tmp_path, content, more, message):
    (tmp_path / "data.jsonl").write_text(content)
    (tmp_path / "none.py").write_text("def of(documents):\n    return documents.select([])\n")
    (tmp_path / "mine.yaml").write_text(
        "{task: mine, dataset_path: json, output_type: multiple_choice, validation_split: validation, "
        f"dataset_kwargs: {{data_files: {{validation: {tmp_path / 'data.jsonl'}}}}}, doc_to_text: goal, "
        f"doc_to_target: label, doc_to_choice: [a, b]{more}}}")
    tasks = harness._Tasks(TaskConfig(("mine",), str(tmp_path)))
    with pytest.raises(ValueError, match=message) as error:
        tasks.load(tasks.names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": ()}, "no task is named"), ({"limit": 0}, "a limit of 0 documents"),
    ({"task_files": "no/such"}, "no/such: no such folder"),
])
def test_a_question_that_cannot_be_asked_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**({"tasks": ("piqa",)} | changes))


def test_what_a_model_or_a_task_lacks_is_told(exported):
    model = exported(False)
    lm, blind = CalderaLM(model), CalderaLM(model._replace(special={}))
    request = lambda *arguments: [types.SimpleNamespace(args=arguments)]
    with pytest.raises(ValueError, match="name no eos_token of its vocabulary"):
        blind.loglikelihood_rolling(request("the code"))
    assert blind.loglikelihood(request("the", " code")) == lm.loglikelihood(request("the", " code"))  # needs none
    with pytest.raises(ValueError, match="continuation of 200 tokens: it must have one, and at most the 64"):
        lm.loglikelihood(request("the", "#" * 200))
    with pytest.raises(ValueError, match="continuation of 0 tokens"):
        lm.loglikelihood(request("the", ""))
    with pytest.raises(ValueError, match="wants to sample"):
        lm.generate_until(request("the", {"until": ["\n"], "temperature": 0.7}))
    with pytest.raises(ValueError, match="up to 64 tokens, and the context holds 64"):
        lm.generate_until(request("the", {"until": ["\n"], "max_gen_toks": 64}))
    with pytest.raises(ValueError, match="a context of 65 tokens: give 2 to the model's 64"):
        CalderaLM(model, 65)
    broken = lm.params | {"norm": lm.params["norm"] * np.float32(np.inf)}
    with pytest.raises(ValueError, match="logits are not finite"):
        harness.score(CONFIG, broken, [[1, 2]], 64)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "caldera_jax.jobs.harness")
    with pytest.raises(ValueError, match=r"pip install 'caldera-jax\[eval\]'"):
        importlib.import_module("caldera_jax.jobs.harness")
