"""The pictures of the pages in docs/: the committed files are what the code draws, and can be read."""

import re
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from docs.pictures import __main__ as pictures
from docs.pictures.attention import LENGTHS, assign_splits
from docs.pictures.svg import Drawing
from fastllama.kernels.attention.decode import attention_decode
from fastllama.kernels.attention.scratch import AttentionScratch
from fastllama.kernels.paged_cache import LayerCache

LETTER = 0.62  # of its size, the width of an average letter of a wide font


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_committed_picture_is_what_the_code_draws(name: str) -> None:
    kept = (pictures.FOLDER / name).read_text(encoding="utf-8")
    assert kept == pictures.PICTURES[name](), "run `make docs`"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_texts_are_large_enough_and_inside(name: str) -> None:
    root = ElementTree.fromstring(pictures.PICTURES[name]())
    texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
    assert texts
    for text in texts:
        size, x, content = float(text.attrib["font-size"]), float(text.attrib["x"]), text.text or ""
        begin = x - len(content) * LETTER * size * {"start": 0, "middle": 0.5, "end": 1}[text.attrib["text-anchor"]]
        assert size >= 12
        assert begin >= 0 and begin + len(content) * LETTER * size <= float(root.attrib["width"]), content
        assert float(text.attrib["y"]) < float(root.attrib["height"]), content


def test_the_pages_show_every_picture_with_an_alternative_text() -> None:
    names = ("kernels.md", "engine.md", "speculation.md")
    pages = [(pictures.FOLDER.parent / name).read_text(encoding="utf-8") for name in names]
    shown = {name: alt for alt, name in re.findall(r"!\[([^]]*)\]\(pictures/([^)]*)\)", "\n".join(pages))}
    assert sorted(shown) == sorted(pictures.PICTURES) == sorted(path.name for path in pictures.FOLDER.glob("*.svg"))
    assert all(len(alt) > 40 for alt in shown.values())


def test_splits_are_those_of_the_kernel(device: torch.device) -> None:
    """With q = 0 every p is 1, so the sum of p that a split leaves is its number of keys."""
    rows, head_dim = len(LENGTHS), 16
    scratch = AttentionScratch.of(rows, 1, 1, head_dim, device)
    scratch.p_sum.fill_(-1)
    cache = LayerCache.of(rows, max(LENGTHS), 1, head_dim, torch.float32, device)
    positions = torch.tensor(LENGTHS, device=device) - 1
    attention_decode(torch.zeros(rows, 1, head_dim, device=device), cache, positions, scratch)
    expected = [-1.0] * scratch.p_sum.shape[0]
    for _, group in groupby(enumerate(assign_splits(LENGTHS, 64)), key=lambda numbered: numbered[1].row):
        splits = list(group)
        for index, split in splits if len(splits) > 1 else []:
            expected[index] = float(split.end - split.begin)
    assert scratch.p_sum.flatten().tolist() == expected


def test_check_fails_on_another_picture_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    path = tmp_path / "layer.svg"
    path.write_text("another")
    result = CliRunner().invoke(pictures.main, ["--check"])
    assert result.exit_code == 1 and "is not what the code draws" in result.output and path.read_text() == "another"
    assert CliRunner().invoke(pictures.main, []).exit_code == 0
    assert sorted(made.name for made in tmp_path.iterdir()) == sorted(pictures.PICTURES)
    assert CliRunner().invoke(pictures.main, ["--check"]).output == ""


def test_a_drawing_escapes_its_texts() -> None:
    drawing = Drawing(20, 'a "title" & more')
    drawing.text(0, 10, "a < b & c")
    root = ElementTree.fromstring(drawing.svg())
    assert root.attrib["aria-label"] == 'a "title" & more'
    assert [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")] == ["a < b & c"]
