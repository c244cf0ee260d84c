"""What the command line says of itself: lists, pages of `--help`, completion. All of it comes from
the flags that commands read, and none of it waits for a library."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from editr2.cli.completion import script
from editr2.cli.flags import Command, Flags, described
from editr2.cli.main import COMMANDS, GROUPS, main
from editr2.config import Config
from editr2.config.fields import Table, leaves

ROOT = Path(__file__).parent.parent
WIDTH = 80
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "peft", "rich")


def walked(commands: dict[str, Command], *above: str) -> Iterator[tuple[tuple[str, ...], Command]]:
    for name, command in commands.items():
        found = described(command)
        if isinstance(found, dict):
            yield from walked(found, *above, name)
        else:
            yield (*above, name), command


ALL = dict(walked(COMMANDS))
LISTS = [(), *dict.fromkeys(words[:-1] for words in ALL if len(words) > 1)]


@pytest.fixture(autouse=True)
def _columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def flags_of(words: tuple[str, ...]) -> Flags:
    found = described(ALL[words])
    assert isinstance(found, Flags)
    return found


class Accepted(Exception):
    """Raised in place of what a command would do with words that it understands."""


def accepts(command: Command, words: list[str], monkeypatch) -> bool:
    real = Flags.given

    def given(self, given):
        real(self, given)
        raise Accepted

    with monkeypatch.context() as patched, pytest.raises(Accepted):
        patched.setattr(Flags, "given", given)
        command(words)
    return True


def asked(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_command_is_in_a_group_and_has_a_line():
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(COMMANDS), "cli/main.py: GROUPS"


@pytest.mark.parametrize("words", LISTS, ids=" ".join)
def test_a_list_of_commands_fits_the_terminal(words, capsys):
    for said in (["help"], ["--help"]):
        assert main([*words, *said]) == 0
    out = capsys.readouterr().out
    half = out[: len(out) // 2]
    assert out == half * 2 and max(map(len, half.splitlines())) <= WIDTH
    for name, command in (COMMANDS if not words else described(COMMANDS[words[0]])).items():
        (line,) = [line for line in half.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(command.__doc__), "one line each"


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_page_begins_with_examples_that_are_accepted(words, capsys, monkeypatch):
    flags = flags_of(words)
    page = asked(capsys, *words, "--help")
    lines = page.splitlines()
    assert lines[0].startswith(f"usage: editr2 {' '.join(words)}") and "\nexamples:\n" in page
    assert len(lines) <= 90 and max(map(len, lines)) <= WIDTH
    assert [line[:2] for line in lines if line.startswith("  editr2")]
    for line, why in flags.examples:
        assert accepts(ALL[words], shlex.split(line.partition(" > ")[0]), monkeypatch) and why
    pasted = page.split("examples:\n")[1].split("\n\n")[0].replace("\\\n", "")
    for line, _ in flags.examples:
        assert f"{flags.prog} {line}".strip() in " ".join(pasted.split())
    for option in flags.own():
        assert any(
            row.startswith(
                f"  {option.name.upper() if option in flags.positional else option.name}"
            )
            for row in lines
        )
    assert asked(capsys, "help", *words) == page


@pytest.mark.parametrize("words", [w for w in ALL if flags_of(w).options], ids=" ".join)
def test_nothing_is_lost_and_what_most_people_change_is_there(words, capsys):
    flags = flags_of(words)
    everything, page = asked(capsys, *words, "--help", "all"), asked(capsys, *words, "--help")
    settings = [option for option in flags.options.values() if option.group]
    for option in settings:
        assert f"  {option.name} " in everything
    sections = dict.fromkeys(option.section for option in settings if option.section)
    listed = page.split(" settings (")[-1] if " settings (" in page else ""
    for section in sections if listed else ():
        assert f"  {section} " in listed
        of = asked(capsys, *words, "--help", section)
        assert all(f"  {o.name} " in of for o in settings if o.section == section)
    known = {option.key for option in settings}
    assert not settings or known & set(flags.common) or not listed
    assert max(map(len, everything.splitlines())) <= WIDTH + 40  # a long choice has its own line


def test_a_setting_may_be_asked_about_alone(capsys):
    said = asked(capsys, "train", "--help", "train.lr")
    assert (
        said
        == asked(capsys, "train", "--help=train.lr")
        == asked(capsys, "help", "train", "train.lr")
    )
    assert "AdamW learning rate" in said and len(said.splitlines()) <= 4
    assert main(["train", "--help", "train.lrr"]) == 2
    assert (
        "error: --help: 'train.lrr' (accepted: all, data, policy, reward, rollout, credit, train, "
        "eval, checkpoint, or a setting; did you mean train.lr?)" in capsys.readouterr().err
    )


def test_what_help_does_not_look_up_stands_in_the_settings_line(capsys):
    late = {key: slot.accepts.among for key, slot in leaves(Config)}
    tables = {key: among for key, among in late.items() if isinstance(among, Table)}
    assert set(tables) == {"rollout.dynamics", "credit.preset", "train.loss"}
    options = flags_of(("train",)).options
    for key, table in tables.items():
        assert all(name in options[f"--{key}"].help for name in table()), key


def test_no_help_loads_a_library():
    """Nor does `import editr2`, nor a slip in a flag's name: by what is loaded, not by time."""
    pages = [*([*words, "--help"] for words in ALL), *([*words, "--help"] for words in LISTS)]
    pages += [["train", "--help", "all"], ["train", "--trian.lr", "1"], ["--version"], ["help"]]
    code = (
        "import os, sys, editr2; from editr2.cli.main import main; said = sys.stderr\n"
        "sys.stdout = sys.stderr = open(os.devnull, 'w')\n"
        f"for words in {pages!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        f"    found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    if found: sys.exit(print(f'{words} loads {found}', file=said) or 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_the_distributions(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"editr2 {version('editr2')}\n"


COMPLETED = [
    ("editr2 tra", ["train"]),
    ("editr2 verifier s", ["select", "sft"]),
    (
        "editr2 train --train.l",
        ["--train.loss", "--train.loss_options", "--train.lr", "--train.lr_decay"],
    ),
    ("editr2 train --rollout.window_schedule p", ["progressive"]),
    ("editr2 train --rollout.dynamics dp", ["dpm++sde"]),
    ("editr2 train --help che", ["checkpoint"]),
    ("editr2 train --config pypr", ["pyproject.toml"]),
    ("editr2 data import mag", ["magicbrush"]),
]


def test_bash_completes_commands_flags_choices_and_files(tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    (tmp_path / "editr2.bash").write_text(script(COMMANDS, "bash"))
    tried = "source $0/editr2.bash\n" + "\n".join(
        f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=(); "
        f"_shtab_editr2; echo ${{COMPREPLY[@]}}"
        for line, _ in COMPLETED
    )
    done = subprocess.run(
        ["bash", "-c", tried, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert [sorted(line.split()) for line in done.stdout.splitlines()] == [e for _, e in COMPLETED]


@pytest.mark.exhaustive
@pytest.mark.parametrize("shell", ["zsh", "tcsh", "fish"])
def test_the_other_shells_have_every_command(shell):
    said = script(COMMANDS, shell)
    assert all(name in said for name in COMMANDS) and "--policy.model" in said.replace("\\", "")


def test_without_shtab_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "error: completion needs shtab, which is not installed: pip install shtab\n"
    )


def test_what_trains_nothing_has_a_folder_of_its_own():
    """`out` of a file of settings is a training's folder: nobody writes into it by that."""
    own = {name: flags_of((name,)).options["--out"] for name in ("eval", "rollout")}
    for name, option in own.items():
        assert option.default is None and f"else runs/{name}, or runs/{name}-2" in option.help
    assert not any(option.group for option in own.values())
