"""The READMEs: short, their example prints what they say, their links lead somewhere, their commands exist."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

from caldera_jax.jobs import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "caldera_jax/README.md", "experiments/README.md", "theory/README.md")


def test_the_readme_is_of_one_screen_and_a_half_with_an_example_in_the_first_sixty_lines():
    assert len(README.encode()) <= 8192
    assert "```python" in "\n".join(README.splitlines()[:60])


def test_the_example_prints_what_stands_beside_it():
    code, = re.findall(r"```python\n(.*?)```", README, re.S)
    wanted, = re.findall(r"It prints `(.*?)`", README)
    with contextlib.redirect_stdout(io.StringIO()) as printed, jax.enable_x64(False), \
            jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, {})
    assert printed.getvalue().strip() == wanted


def _anchor(heading):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in map(_anchor, headings), target


@pytest.mark.parametrize("page", PAGES[:3])
def test_every_record_that_is_named_is_there(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"`((?:experiments/)?(?:results|figures)/[\w./*-]+)`", text):
        found = list((ROOT / "experiments").glob(name.removeprefix("experiments/")))
        assert found, name


def test_every_command_of_the_readme_is_one_and_none_is_left_out(monkeypatch, capsys):
    named = set(re.findall(r"^caldera (\w+)", README, re.M))
    monkeypatch.setattr("sys.argv", ["caldera", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert named == set(re.findall(r"• (\w+)", capsys.readouterr().out))
