"""`editr2 quickstart`: the examples that ship, edited and trained on, from the package alone."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
from PIL import Image

from editr2.cli import quickstart
from editr2.cli.main import main
from editr2.editing import Step
from editr2.policies.rules import check_config

ROOT = Path(__file__).parent.parent


def test_it_edits_trains_on_the_examples_and_edits_again(tmp_path, monkeypatch, capsys):
    done, out = [], tmp_path / "first"

    def edit(image, told, *, mode, policy=None):
        done.append((policy, mode, told))
        return [Step(image, turn + 1, text) for turn, text in enumerate(told)]

    monkeypatch.setattr("editr2.editing.edit", edit)
    monkeypatch.setattr("editr2.training.train", done.append)
    assert main(["quickstart", "--out", str(out), "--iterations", "3"]) == 0
    (base, mode, told), config, (trained, *again) = done
    assert (base, trained) == (None, out / "run") and again == [mode, told] and len(told) == 3
    check_config(config)
    assert config.out == str(out / "run") and config.train.iterations == 3
    assert config.data.path == str(out / "sessions") and config.data.heldout == str(out / "heldout")
    shipped = filecmp.dircmp(out / "sessions", ROOT / "examples" / "shapes")
    assert shipped.same_files == ["sessions.jsonl"] and shipped.common_dirs == ["images"]
    assert not (shipped.left_only or shipped.right_only or shipped.diff_files)
    images = shipped.subdirs["images"]
    assert len(images.same_files) == quickstart.EXAMPLES and not images.left_only
    assert Image.open(out / "edited.png").size == (4 * quickstart.CELL, 2 * quickstart.CELL)
    said = capsys.readouterr().out
    assert all(text in said for text in (*told, str(out / "edited.png"), "report.html"))


@pytest.mark.exhaustive
def test_whole_and_again(tmp_path, capsys):
    out = ["quickstart", "--out", str(tmp_path), "--iterations", "1"]
    assert main(out) == 0 and "iter 1/1" in capsys.readouterr().out
    edited = (tmp_path / "edited.png").read_bytes()
    assert (tmp_path / "run" / "report.html").is_file()
    assert main(out) == 0  # what is there stands
    assert "iter 1/1" not in capsys.readouterr().out
    assert (tmp_path / "edited.png").read_bytes() == edited


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--iterations", "0"], "--iterations: 0 (accepted: "),
        (["--out", "{file}/x"], "(accepted: a folder; {file} is a file)"),
        (["runs/first"], "'runs/first': not understood"),
    ],
)
def test_bad_input_is_a_line(words, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    *words, said = (text.replace("{file}", str(tmp_path / "file")) for text in (*words, said))
    assert main(["quickstart", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
