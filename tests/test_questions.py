"""What intents are asked for with: a mode's own question, and a user's in place of ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from editr2.config import Config, PolicyConfig, replace_nested
from editr2.config.yaml import dump_yaml
from editr2.errors import ConfigError
from editr2.policies.load import load_policy
from editr2.policies.recorded import EXPORT, RUN, read_settings, write_questions, write_settings
from editr2.policies.unified.questions import MODES, PLACES, wording_of
from editr2.run.identity import loaded_weights

# As the release has it: one function, an f-string of the same two expressions for each mode.
RELEASED = """
raise RuntimeError("this was run")
class Inferencer:
    def _build_pe_question(self, history_prompts, current_prompt):
        lines = (f"Round {k+1}: {p.strip()}" for k, p in enumerate(history_prompts))
        history_text = "\\n".join(lines)
        if self.nonmarkov_mode == 'cm':
            pe_question = (
                f"Said:\\n{history_text}\\n\\n"
                f"Now: \\"{current_prompt.strip()}\\". Put rules in."
            )
        elif self.nonmarkov_mode == 'cu':
            pe_question = f"Said:\\n{history_text}\\n\\nNow: {current_prompt.strip()}. Name it."
        else:
            pe_question = f"Said:\\n{history_text}\\n\\nNow: {current_prompt.strip()}. Alone."
        return pe_question
"""


def test_a_question_is_the_modes_own():
    ask = wording_of("bagel", None)
    said = {mode: ask(["add {a} hat", "paint it"], "move {current} up", mode) for mode in MODES}
    assert len(set(said.values())) == 3 and ask(["a"], "b") == ask(["a"], "b", "rewrite")
    for mode, words in {"cm": "such rule", "cu": "pronoun", "rewrite": "followed by"}.items():
        assert "Round 1: add {a} hat\nRound 2: paint it\n" in said[mode] and words in said[mode]
        assert "Current instruction: move {current} up\n" in said[mode]  # filled in once
        assert said[mode].endswith("then write the instruction and nothing else.")


@pytest.mark.parametrize(
    ("files", "given", "cm", "cu"),
    [
        ({"my.yaml": 'cm: "{history} then {current}"'}, "my.yaml", "Round 1: a then b", None),
        ({"my.json": '{"cu": "Who is {current}?"}'}, "my.json", None, "Who is b?"),
        ({"mine/cu.md": "Who is\n{current}?\n"}, "mine", None, "Who is\nb?"),
        (
            {PLACES["cm"].file: RELEASED},
            ".",
            'Said:\nRound 1: a\n\nNow: "b". Put rules in.',
            "Said:\nRound 1: a\n\nNow: b. Name it.",
        ),
    ],
)
def test_questions_of_ones_own(tmp_path, files, given, cm, cu):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ours, theirs = wording_of("bagel", None), wording_of("bagel", str(tmp_path / given))
    for mode, expected in {"cm": cm, "cu": cu}.items():
        assert theirs(["a"], "b", mode) == (expected or ours(["a"], "b", mode))
    if cm and cu:
        assert theirs(["a"], "b").endswith("Now: b. Alone.")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cm: '{history}'", r"my\.yaml: cm \(accepted: a text with \{current\}"),
        ("cm: '{current} {answer}'", r"my\.yaml: cm \(accepted: .* no \{answer\}"),
        ("cm: '{current} {past}'", r"cm: \{past\} is no field \(accepted: .*\{history\}"),
        ("cn: '{current}'", r"'cn' \(accepted: cm, cu, rewrite\)"),
        (None, r"my\.yaml: none there \(accepted: a folder with some of cm\.md"),
        ("cm: '{current} ; rewrite politely'", r"my\.yaml: cm: .*politely.*policy's words"),
    ],
)
def test_what_is_no_question_is_one_line(tmp_path, text, says):
    if text is not None:
        (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"^policy\.questions: .*{says}"):
        load_policy(PolicyConfig(questions=str(tmp_path / "my.yaml")))


def test_they_are_part_of_a_runs_identity_and_of_its_export(tmp_path):
    """By content: a file may be elsewhere, and an export has them with it."""
    texts = {"cm": "{history}now : {current} ; rewrite", "cu": "{current} ; rewrite"}
    known = []
    for name, said in (("a", texts["cm"]), ("b", texts["cm"]), ("c", texts["cu"])):
        (tmp_path / f"{name}.yaml").write_text(f"cm: '{said}'")
        policy = PolicyConfig(questions=str(tmp_path / f"{name}.yaml"))
        known.append(loaded_weights(policy)["questions"])
    assert known[0] == known[1] != known[2] and "questions" not in loaded_weights(PolicyConfig())
    config = replace_nested(Config(), {"policy": {"questions": "gone.yaml"}})
    policy = SimpleNamespace(wording=wording_of("embedded", str(tmp_path / "a.yaml")))
    out = tmp_path / "out"
    (out / "run").mkdir(parents=True)
    write_settings(out, config, None, whole=True, policy=policy)
    # So does a run, whose configuration names the file as it was called from its folder.
    write_questions(out / "run", policy, config.policy)
    (out / "run" / RUN).write_text(dump_yaml(config))
    out = out.rename(tmp_path / "moved")
    for file in (out / EXPORT, out / "run" / RUN):
        asked = read_settings(file)["policy"]["questions"]
        assert wording_of("embedded", asked)(["a"], "b", "cm") == "a ; now : b ; rewrite"
