"""What `caldera inspect --report` writes: each number on the page against one found in another way."""

import base64
import dataclasses
import html
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from caldera_jax import CalderaConfig, Decomposition, codebooks, incoherence, linear
from caldera_jax.jobs import artifact, evaluate, explain, facts, markup
from caldera_jax.jobs import page as module
from caldera_jax.jobs.compress import compress, texts
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.lplr import LowRank
from caldera_jax.models import convert, files, llama, weights
from caldera_jax.models.data import Tokens

CALDERA = CalderaConfig(rank=3, outer_iterations=1, inner_iterations=1, quantizer="uniform", q_bits=3,
                        factor_quantizer="uniform")
EPS, EPS32 = (float(np.finfo(dtype).eps) for dtype in (np.float64, np.float32))
TITLES = ["Summary", "Where the bits went", "Spectra", "Share of the error", "Input channels that L R took over",
          "Text: tokens that lost most"]
VOID = {"meta", "img"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What a run of the tiny model is told; its text is full of markup."""
    directory = tmp_path_factory.mktemp("tiny")
    text = tiny.write_text(directory / "text.txt")
    text.write_text(text.read_text().replace(": ", ": <i>&amp; "))
    return RunConfig(str(tiny.write_model(directory / "model", tiny.SQUARE)), CALDERA, Tokens(str(text), 4, 32),
                     Tokens(str(text), 3, 32))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Directory of a finished run, and of its Moments."""
    directory = tmp_path_factory.mktemp("run")
    compress(base, directory / "out", directory / "moments")
    return directory / "out", directory / "moments"


@pytest.fixture(scope="module")
def measured(run):
    return facts.measure(*run)


@pytest.fixture(scope="module")
def read(run):
    return facts.read_text(run[0])


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "page.html"
    module.write(run[0], target, run[1])
    return target.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Attributes of every tag, headings, tables by caption or first head, and the passage; tags must be balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.tables, self.passage = [], [], [], {}, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))
        if tag == "table":
            self.name, self.rows = None, []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "h2":
            self.headings.append("")
        if tag == "caption":
            self.name = ""

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        if tag == "table":
            self.tables[self.name or self.rows[0][0]] = self.rows

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "td" in inside or "th" in inside:
            self.rows[-1][-1] += data
        elif "caption" in inside:
            self.name += data
        elif "h2" in inside:
            self.headings[-1] += data
        if any(attributes.get("class") == "passage" for _, attributes in self.open):
            self.passage += data


def pictures(text):
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', text)]


# ---- the page


def test_the_page_is_one_whole_file_that_asks_for_nothing_outside_it(page):
    reader = Reader(page)
    assert reader.headings == [f"{i}. {title}" for i, title in enumerate(TITLES, 1)]
    assert not re.search("https?:|//|@import|url\\(", re.sub("base64,[^\"]*", "", page))
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "base"}
    sources = [attributes["src"] for _, attributes in reader.tags if "src" in attributes]
    assert sources and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert all(attributes["alt"] for tag, attributes in reader.tags if tag == "img")
    ids = {attributes.get("id") for _, attributes in reader.tags}
    links = [attributes["href"] for _, attributes in reader.tags if "href" in attributes]
    assert len(links) == 6 and all(link[0] == "#" and link[1:] in ids for link in links)
    for picture in pictures(page):
        links = [value for element in ET.fromstring(picture).iter() for name, value in element.items()
                 if name.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
    assert len(pictures(page)) == 3 + 3 + 2 + 7 + 3 + 1  # bits, spectra, maps, directions, channels, bins


def test_the_summary_says_what_the_report_says(run, page):
    report = explain.report_of(run[0])
    for shown in (f"{report['base_perplexity']:.3f}", f"{report['compressed_perplexity']:.3f}",
                  f"{report['bits_per_weight']:.4f}", f"{report['stored_bytes'] / 1e6:.2f}"):
        assert f"<b>{shown}</b>" in page
    settings = dict(Reader(page).tables["setting"][1:])
    assert settings["caldera.rank"] == "3" and settings["evaluation.windows"] == "3" and settings["blocks"] == "none"


def test_the_bits_are_those_on_the_disk_and_sum_to_all_that_is_stored(run, page):
    out, _ = run
    tables = Reader(page).tables
    numbers = {name: {row[0]: [int(cell.replace(",", "")) for cell in row[1:-1]] for row in tables[name][1:]}
               for name in ("Stored bits by kind of layer", "Stored bits by block")}
    ends = {"q.codes": 0, "left_t.codes": 1, "right.codes": 2, "scale": 3, "side": 4, "trained": 5}
    expected = {"all": [0] * 7}
    for index in range(2):
        for name, array in files.read_arrays(out / artifact.block_file(index)).items():
            kind, _, field = name.partition(".")
            if field:
                place = next(i for end, i in ends.items() if field.endswith(end))
                for key in (kind, str(index), "all"):
                    row = expected.setdefault(key, [0] * 7)
                    row[place] += 8 * array.nbytes
                    row[6] += 8 * array.nbytes
    by_kind, by_block = numbers.values()
    assert by_kind == {key: expected[key] for key in (*llama.LINEARS, "all")}
    assert by_block == {key: expected[key] for key in ("0", "1", "all")}
    model, report = artifact.load(out), explain.report_of(out)
    stored = sum(block[name].stored_bits for block in model.params["blocks"] for name in llama.LINEARS)
    assert by_kind["all"][-1] == sum(by_kind["all"][:-1]) == stored == 8 * report["stored_bytes"]
    assert tables["Stored bits by kind of layer"][-1][-1] == f"{report['bits_per_weight']:.4f}"


def test_shares_of_the_error_sum_to_one_and_are_of_the_reported_errors(run, measured, page):
    rows = explain.report_of(run[0])["layers"]
    assert [f.path for f in measured] == [row["path"] for row in rows]
    for f, row in zip(measured, rows, strict=True):
        assert f.error == pytest.approx(row["error"], rel=1e-4)
    table = Reader(page).tables["layer"][1:]
    assert len(table) == 14 and sum(float(row[2]) for row in table) == pytest.approx(1, abs=14 * 0.5e-8)
    losses = {f.path: f.loss.sum() for f in measured}
    for path, error, share in table:
        assert float(share) == pytest.approx(losses[path] / sum(losses.values()), abs=0.51e-8)
        assert float(error) == pytest.approx(next(f.error for f in measured if f.path == path), abs=0.51e-6)


def test_shares_along_the_directions_sum_to_one(measured):
    for f in measured:
        for values in (f.loss, f.energy):
            n = len(values)  # two sums of n numbers, each off by at most n eps of the sum of their magnitudes
            tolerance = 2 * n * EPS * np.abs(values).sum() / values.sum()
            assert module.cumulative(values)[-1] == pytest.approx(1, rel=0, abs=tolerance)
    assert not module.cumulative(np.zeros(5)).any()


def test_no_layer_has_spectra_but_the_examples(run, measured):
    rows = explain.report_of(run[0])["layers"]
    chosen = facts.examples(rows)
    assert {f.path for f in measured if f.spectra} == set(chosen) and len(chosen) == 3
    reasons = {why: path for path, why in chosen.items()}
    assert reasons["the largest"] == max(rows, key=lambda row: row["error"])["path"]
    assert reasons["the smallest"] == min(rows, key=lambda row: row["error"])["path"]
    assert len(facts.examples(rows[:1])) == 1 and len(facts.examples(rows[:2])) == 2


def test_the_same_directory_gives_the_same_bytes_and_nothing_else(run, page, tmp_path):
    before = sorted(run[0].rglob("*"))
    module.write(run[0], tmp_path / "again.html", run[1])
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"]
    assert sorted(run[0].rglob("*")) == before


# ---- one layer


def stored(m, n, rank, kind="hadamard"):
    """W, a layer that stands for it, and Q and L R in W's basis."""
    config = dataclasses.replace(CALDERA, rank=rank)
    w = matrices.gaussian(m, n)
    layer = jax.jit(_stored, static_argnums=(1, 2))(jnp.asarray(w), config, kind)
    q = dataclasses.replace(layer, left_t=None, right=None).dense()
    return w, layer, np.asarray(q), np.asarray(layer.dense() - q)


def _stored(w, config, kind):
    rest, _, rotation = incoherence.rotate(jax.random.key(0), w, jnp.eye(w.shape[1]), kind)
    q, low_rank = codebooks.quantize(config.q_grid, rest), None
    if config.rank:
        factors = (rest - q.values)[:, :config.rank].T, jnp.eye(config.rank, w.shape[1], dtype=w.dtype)
        low_rank = LowRank(*(codebooks.quantize(grid, factor)
                             for grid, factor in zip(config.factor_grids, factors, strict=True)))
    return linear.pack(Decomposition(q, low_rank), rotation, config, jnp.ones((), w.dtype))


@pytest.mark.parametrize("m, n, rank, kind", [(12, 20, 3, "hadamard"), (21, 13, 2, "orthogonal"), (9, 14, 0, "none")])
def test_directions_channels_and_spectra_are_those_of_known_eigenvectors(m, n, rank, kind):
    w, layer, q, low_rank = stored(m, n, rank, kind)
    values, basis = 100.0 ** (-np.arange(n) / n), matrices.orthogonal(n, 4)
    values[-3:] = 0  # singular
    h = (basis * values) @ basis.T
    h = (h + h.T) / 2
    found, vectors = np.linalg.eigh(h)
    f = facts.of_layer("blocks.7.up", layer, w, h, (found[::-1], vectors[:, ::-1]), True)
    e = q + low_rank - w
    assert (f.block, f.kind, f.weights, f.rank) == (7, "up", m * n, rank)
    # neighbouring eigenvalues are 4/n of their size apart, so eigenvectors are known to about n eps cond = 1e3 n eps;
    # the stored parts are sums of n numbers, decoded by other products in the same float64
    for along, a in ((f.loss, e), (f.energy, w)):
        np.testing.assert_allclose(along, values * np.sum((a @ basis) ** 2, axis=0), rtol=1e4 * n * EPS,
                                   atol=1e3 * n * EPS * along.sum())
        assert along.sum() == pytest.approx(np.trace(a @ h @ a.T), rel=100 * n * EPS)
    np.testing.assert_allclose(f.diagonal, np.diag(h) / np.median(np.diag(h)), rtol=4 * EPS)
    np.testing.assert_allclose(f.taken, np.sum(low_rank**2, 0) / np.sum(w**2, 0), rtol=1e3 * n * EPS, atol=n * EPS)
    assert set(f.spectra) == {"W", "Q", "E"} | ({"L R"} if rank else set())
    for name, a in (("W", w), ("Q", q), ("L R", low_rank), ("E", e)):
        squares = np.linalg.eigvalsh(a @ h @ a.T)[::-1][:min(m, n)] / np.trace(w @ h @ w.T)
        if name in f.spectra:
            np.testing.assert_allclose(f.spectra[name] ** 2, squares, rtol=0, atol=100 * n * EPS * squares.max())


def test_a_dead_layer_and_dead_channels_are_drawn_as_nothing():
    w, layer, *_ = stored(9, 14, 2)
    w[:, 3] = 0
    dead = [facts.of_layer(f"blocks.{i}.q", layer, w, np.zeros((14, 14)), (np.zeros(14), np.eye(14)), True)
            for i in range(2)]
    assert dead[0].error == 0 and np.isnan(dead[0].taken[3]) and np.isfinite(dead[0].taken).sum() == 13
    chosen = {"blocks.1.q": "all"}
    few = np.diag(np.arange(14) > 9).astype(np.float64)
    f = facts.of_layer("blocks.0.q", layer, w, few, (np.ones(14), np.eye(14)), False)
    assert np.array_equal(f.diagonal, np.diag(few))  # the median is of what is active
    content = module.bits(dead, {}) + module.errors(dead, {})
    assert "nan" not in re.sub("base64,[^\"]*", "", content) and len(pictures(content)) == 6
    assert module.spectra(dead, chosen).count("has no energy") == 1
    assert not pictures(module.spectra(dead, chosen) + module.channels(dead, chosen))


def test_the_outliers_are_the_largest_of_all_inputs_each_with_the_layers_that_share_it(measured, page):
    rows = Reader(page).tables["The channels with the largest Hⱼⱼ"][1:]
    found = {(f.block, f.kind): f for f in measured}
    ratios = np.sort(np.concatenate([found[block, kind].diagonal for block in range(2) for kind in ("q", "o", "up",
                                                                                                   "down")]))[::-1]
    assert [row[3] for row in rows] == [f"{ratio:.1f}" for ratio in ratios[:15]]
    for block, kinds, channel, ratio, taken in rows:
        assert kinds in ("q, k, v", "o", "gate, up", "down")
        for kind, part in zip(kinds.split(", "), taken.split(", "), strict=True):
            f = found[int(block), kind]
            assert f"{f.diagonal[int(channel)]:.1f}" == ratio and part == f"{kind} {f.taken[int(channel)]:.3f}"


def test_many_blocks_get_a_wide_map_that_scrolls(measured):
    many = [f._replace(block=block, path=f"blocks.{block}.{f.kind}") for block in range(30) for f in measured[:7]]
    content = module.errors(many, {})
    assert content.count("class=scroll><img") == 2 and content.count("class=wide") == 2


def test_a_model_of_rank_0_has_no_channels_and_says_so(base, tmp_path):
    config = dataclasses.replace(base, caldera=dataclasses.replace(CALDERA, rank=0), blocks=1)
    compress(config, tmp_path / "out")
    module.write(tmp_path / "out", tmp_path / "page.html")  # without kept Moments
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    section = content.split('<section id="s5">')[1].split("</section>")[0]
    assert "rank 0: there is no L R" in section and not pictures(section) and "<table" not in section
    reader = Reader(content)
    assert [title.split(". ")[1] for title in reader.headings] == TITLES
    assert reader.tables["Stored bits by kind of layer"][-1][2:4] == ["0", "0"]


def test_a_plan_is_drawn_and_its_damage_is_beside_every_layer(measured):
    rows = [{"path": f.path, "predicted_loss": 0.1 * i, "loss": 0.2 * i} for i, f in enumerate(measured)]
    report = {"allocation": "gradient", "budget_bits_per_weight": 3.25, "predicted_loss": 9.1, "loss": 18.2,
              "layers": rows}
    content = module.bits(measured, report)
    assert len(pictures(content)) == len(pictures(module.bits(measured, {}))) + 1
    assert "budget of 3.2500 bits" in content and "predicted 9.10000, achieved 18.20000 (nats a token" in content
    (head, *table) = Reader(module.errors(measured, report)).tables["layer"]
    assert head[3:] == ["damage predicted, nats a token", "damage achieved, nats a token"]
    assert sorted(row[0] for row in table) == sorted(f.path for f in measured)
    for row in table:
        i = [f.path for f in measured].index(row[0])
        assert row[3:] == [f"{0.1 * i:.8f}", f"{0.2 * i:.8f}"]
    many = [f._replace(block=block) for block in range(30) for f in measured[:7]]
    assert "class=wide" in module.heat(many, [1.0] * 210, "", "", low=1.0)  # of one colour


def test_a_map_colours_values_and_writes_what_it_is_told(measured, monkeypatch):
    drawn = []

    def keep(draw, alt, size):
        from matplotlib.figure import Figure

        figure = Figure(size)
        draw(figure.add_subplot())
        drawn.append(figure.axes[0])
        return ""

    monkeypatch.setattr(module, "panel", keep)
    values = [2.0 + i for i in range(14)]
    module.heat(measured, values, "", "", [str(i) for i in range(14)], low=2.0)
    (image,), texts = drawn[0].images, drawn[0].texts
    assert (image.norm.vmin, image.norm.vmax) == (2, 15)
    for i, (f, text) in enumerate(zip(measured, texts, strict=True)):
        place = f.block, llama.LINEARS.index(f.kind)
        assert text.get_position() == place and text.get_text() == str(i)
        assert image.get_array()[place[1], place[0]] == values[i]
        assert text.get_color() == ("black" if i / 13 > 0.6 else "white")


# ---- tokens


@pytest.fixture(scope="module")
def by_forward(run, base):
    """Windows, and the losses of both models from whole forward passes."""
    def losses(model):
        logits = forward(model.config, weights.whole(model.params), windows)
        chosen = np.take_along_axis(np.asarray(logits, np.float64)[:, :-1], windows[:, 1:, None], -1)[..., 0]
        return np.log(np.exp(np.asarray(logits, np.float64)[:, :-1]).sum(-1)) - chosen

    forward = jax.jit(llama.forward, static_argnums=0)
    model = convert.load(base.model)
    _, windows = texts(base, model)
    return windows, losses(model), losses(artifact.load(run[0]))


def test_losses_of_tokens_are_those_of_whole_forward_passes(read, by_forward, base, run):
    windows, *expected = by_forward
    for found, wanted in zip((read.base, read.compressed), expected, strict=True):
        assert found.shape == (3, 31)
        # some 20 products in float32, each of sums of at most 24 numbers near 1, feed logits of that size
        np.testing.assert_allclose(found, wanted, rtol=0, atol=20 * 24 * EPS32 * max(1, wanted.max()))
    model = convert.load(base.model)
    each = evaluate.token_losses(model.config, model.params, windows)
    assert evaluate.perplexity(model.config, model.params, windows) == np.exp(each.astype(np.float64).mean())
    assert each.dtype == np.float32
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        evaluate.token_losses(model.config, model.params, windows[:, :1])


def test_the_table_lists_the_tokens_that_rose_most_after_their_context(page, by_forward, base):
    windows, before, after = by_forward
    tokenizer, rise = convert.load(base.model).tokenizer, after - before
    rows = Reader(page).tables["The 20 tokens whose loss rose most"][1:]
    assert len(rows) == 20
    order = np.argsort(-rise, axis=None)[:20]
    tolerance = 0.51e-4 + 2 * 20 * 24 * EPS32 * max(1, after.max())
    assert [float(row[1]) for row in rows] == pytest.approx(rise.ravel()[order].tolist(), abs=tolerance)
    marked = re.findall("<mark>(.*?)</mark>", page)
    for row, mark in zip(rows, marked, strict=True):
        gaps = np.abs(rise - float(row[1])) + np.abs(np.exp(-before) - float(row[2]))
        window, at = np.unravel_index(np.argmin(gaps), rise.shape)
        assert float(row[2]) == pytest.approx(np.exp(-before[window, at]), rel=1e-3)
        assert float(row[3]) == pytest.approx(np.exp(-after[window, at]), rel=1e-3)
        first = max(at + 1 - module.BEFORE, 0)
        shown = tokenizer.decode(windows[window, first:at + 2].tolist())
        assert row[0] == shown.replace("\n", "↵") and html.unescape(mark) == shown[-1].replace("\n", "↵")


def test_tokens_that_look_like_markup_are_shown_and_not_obeyed(page, by_forward, base):
    windows, *_ = by_forward
    shown = convert.load(base.model).tokenizer.decode(windows[0].tolist())
    assert "<i>&amp;" in shown and Reader(page).passage == shown
    assert "<i>" not in page and ">&lt;</span>" in page and ">&amp;</span>" in page
    assert markup.table(("<a>",), [("<b> & c",)]).count("<") == markup.table(("a",), [("b",)]).count("<")


def test_a_token_is_shaded_by_its_rise():
    text = facts.TextFacts([["a", "b", "c", "d"]], np.asarray([[1.0, 4.0, 2.0]]), np.asarray([[4.0, 2.5, 2.05]]))
    shown = module.tokens(text)
    passage = shown.split("<div class=passage>")[1]
    assert passage.startswith('a<span style="background:rgba(213,94,0,0.75)" title="base 0.368, compressed 0.0183">b<')
    assert 'rgba(0,114,178,0.38)" title="base 0.0183, compressed 0.0821">c<' in passage
    assert '<span title="base 0.135, compressed 0.129">d<' in passage


def test_every_token_is_in_one_bin(read, page):
    rows = Reader(page).tables["p base"][1:]
    assert sum(int(row[1]) for row in rows) == read.base.size
    rise, probability = read.compressed - read.base, np.exp(-read.base)
    for row, (low, high) in zip(rows, module.BINS, strict=True):
        inside = (probability > low) & (probability <= high)
        assert int(row[1]) == inside.sum() and (not inside.any() or row[2] == f"{rise[inside].mean():.4f}")
    shares = [float(row[3].removesuffix(" %")) for row in rows if row[3] != "–"]
    assert sum(shares) == pytest.approx(100, abs=0.051 * len(rows))
    never = facts.TextFacts([["a", "b", "c"]], np.asarray([[800.0, 0.0]]), np.asarray([[800.0, 0.0]]))
    bins = Reader(module.tokens(never)).tables["p base"][1:]  # p = 0 and p = 1
    assert [int(row[1]) for row in bins] == [1, 0, 0, 0, 1]


def test_pieces_are_the_text_with_its_blanks(base):
    tokenizer = convert.load(base.model).tokenizer
    encode = lambda tokenizer, text: np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)
    assert facts.pieces(tokenizer, encode(tokenizer, " ab <")) == [" ", "a", "b", " ", "<"]
    assert facts.pieces(tokenizer, encode(tokenizer, "xé!")) == ["x", "\ufffd", "é", "!"]
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁code": 1, "?": 2}, unk_token="?"))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert facts.pieces(words, encode(words, "the code the code")) == ["the", " code", " the", " code"]


# ---- refusals


def test_a_target_that_cannot_be_the_page_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_text", None)
    for target, said in ((tmp_path, "is a directory"), (tmp_path / "page.txt", "ends in .html"),
                         (tmp_path / "no" / "page.html", "make it first")):
        with pytest.raises(ValueError, match=said):
            module.write(run[0], target)
    assert not list(tmp_path.iterdir())


def test_no_finished_model_no_page(tmp_path):
    with pytest.raises(ValueError, match="no compressed model"):
        module.write(tmp_path, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_page_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'caldera-jax\[plots\]'"):
        module.write(run[0], tmp_path / "page.html")


def test_another_model_or_text_than_the_runs_is_refused(run, base, tmp_path, monkeypatch):
    load = convert.load
    other = lambda name: load(name)._replace(params=llama.init(jax.random.key(1), tiny.SQUARE))
    monkeypatch.setattr(convert, "load", other)
    with pytest.raises(ValueError, match="is not the model that"):
        module.write(run[0], tmp_path / "page.html")
    monkeypatch.setattr(convert, "load", load)
    monkeypatch.setattr(facts.data, "load_text", lambda name: ["Another.\n\ntext " * 300])
    with pytest.raises(ValueError, match="evaluation text .* has changed since"):
        module.write(run[0], tmp_path / "page.html")
