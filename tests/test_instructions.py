"""Instructions as policies read them: the stock pipelines' ids, marks of a tokenizer as text,
lengths known at once.

What the text encoders are given is caught at their door, for ours and for the stock pipeline alike.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import split_quotation
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from editr2.check import preflight
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.errors import ConfigError, DataError
from editr2.policies.base import ReadingPolicy
from editr2.policies.configured import policy_class
from editr2.policies.qwen_edit import BUCKET
from editr2.policies.tokens import TextCodec, Words, marks_of, without_marks
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.rl.metrics import _Intents
from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
from editr2.rl.sampler import make_sampler
from editr2.rl.sessions import sessions_for
from editr2.sessions import Session, Turn, save_sessions
from editr2.worlds import shapes

MODELS = ("kontext", "klein", "klein-kv", "qwen-edit", "qwen-edit-plus", "flux2", "longcat-edit")
MODELS += ("qwen-image-2.1",)
SIZE = (64, 96)


@pytest.fixture(scope="module")
def pipelines(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """The tiny pipeline of a model, made once."""
    beside: Callable[[str], ModuleType] = request.getfixturevalue("beside")
    made: dict[str, Any] = {}

    def get(model: str) -> Any:
        if model not in made:
            if model == "qwen-image-2.1":
                made[model] = beside("tiny_qwen").qwen_image_pipeline()
            elif model.startswith("qwen"):
                made[model] = beside("tiny_qwen").qwen_pipeline(plus=model.endswith("plus"))
            elif model == "longcat-edit":
                made[model] = beside("tiny_qwen").longcat_pipeline()
            else:
                made[model] = getattr(
                    beside("tiny_editors"), f"{model.replace('-', '_')}_pipeline"
                )()
        return made[model]

    return get


@pytest.fixture
def policy(pipelines: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda model, **settings: policy_class(model)(
        pipelines(model), PolicyConfig(**({"model": model, "resolution": SIZE} | settings))
    )


# -------------------------------------------------------------------------- what encoders are given


class Read(Exception):
    pass


@contextmanager
def caught(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The ids that the text encoders are asked about, one list each; none of them runs, but
    CLIP."""
    rows: list[list[int]] = []
    last = getattr(pipe, "text_encoder_2", None) or pipe.text_encoder
    with monkeypatch.context() as patch:

        def watch(encoder: Any, stop: bool) -> None:
            forward = encoder.forward

            def call(input_ids: torch.Tensor | None = None, *args: Any, **given: Any) -> Any:
                assert input_ids is not None
                rows.append(input_ids[0].tolist())
                if stop:
                    raise Read
                return forward(input_ids, *args, **given)

            patch.setattr(encoder, "forward", call)

        watch(last, stop=True)
        if last is not pipe.text_encoder:
            watch(pipe.text_encoder, stop=True)
        if hasattr(
            pipe.text_encoder, "model"
        ):  # Qwen's, which we ask for the last states without their logits
            watch(pipe.text_encoder.model, stop=True)
        yield rows


def ours(policy: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of each text encoder."""
    found = []
    image = torch.zeros(1, *policy.text_image_size, 3, dtype=torch.uint8)
    for encoder in policy.text_encoders:
        other = [name for name in policy.text_encoders if name != encoder]
        with caught(policy.pipe, monkeypatch) as rows, monkeypatch.context() as patch:
            for name in other:  # let through, with nothing to say
                patch.setattr(getattr(policy.pipe, name), "forward", lambda *a, **k: _Nothing())
            with pytest.raises(Read):
                policy.embed([text], [image] if policy.text_sees_images else [])
        found += rows
    return found


class _Nothing:
    pooler_output = torch.zeros(1, 16)

    def __getitem__(self, at: int) -> torch.Tensor:
        return torch.zeros(1, 1, 32)


def stock(policy: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the pipeline gives its encoders, asked as its own `__call__` asks."""
    pipe, found = policy.pipe, []
    image = Image.new("RGB", policy.text_image_size[::-1])
    given = (
        {"image": [image] if policy.model in ("qwen-edit-plus", "qwen-image-2.1") else image}
        if policy.text_sees_images
        else {}
    )
    for encoder in policy.text_encoders:
        with caught(pipe, monkeypatch) as rows, monkeypatch.context() as patch:
            for name in policy.text_encoders:
                if name != encoder:
                    patch.setattr(getattr(pipe, name), "forward", lambda *a, **k: _Nothing())
            with pytest.raises((Read, AttributeError)):
                if "device" in inspect.signature(pipe.encode_prompt).parameters:
                    given["device"] = torch.device("cpu")
                pipe.encode_prompt(text, **given)
        found += rows
    return found


ORDINARY = (
    "make it red",
    "",
    " ",
    "  two  spaces,  and one behind ",
    "\n\nlines\r\n before\n",
    "\ttabs\t",
    "é, e\u0301, ＡＢ, ﬁ",
    "日本語 🎨",
    "a {b} {} {{c}} %s \\n",
    "a < b > c | d </ <| |> <b>bold</b>",
    "im_end image_pad endoftext pad unk s",
    "more " * 30,
    "write 'OPEN it' and \"now\", don't move ‘that’, “or this”, and 'never",
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_words_are_the_stock_pipeline_s_ids(
    model: str, text: str, policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = policy(model)
    given = ours(made, text, monkeypatch)
    assert len(given) == len(made.text_encoders) and given == stock(made, text, monkeypatch)


def core(ids: list[int], pad: int) -> list[int]:
    """Without what fills the row up, on either side."""
    said = [i for i, token in enumerate(ids) if token != pad]
    return ids[said[0] : said[-1] + 1] if said else []


@pytest.mark.parametrize("model", MODELS)
def test_marks_in_an_instruction_are_text(
    model: str, policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mark of every tokenizer, in every one: those that the template brings are there, and no
    more."""
    made = policy(model)
    behind = len(made._around[1]) if model == "longcat-edit" else 0  # of what is filled up

    def given(text: str) -> list[list[int]]:
        return [ids[: len(ids) - behind] for ids in ours(made, text, monkeypatch)]

    tokenizers = [made.tokenizer, *([made.pipe.tokenizer_2] if model == "kontext" else [])]
    every = [
        "<pad>",
        "</s>",
        "<unk>",
        "<extra_id_0>",
        "<|startoftext|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    every += ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[IMG]", "<s>"]
    every += [
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<think>",
        "<tool_call>",
    ]
    plain = given("a b")
    tried = 0
    for mark in every:
        for text in (f"a {mark} b", f"{mark}", f"a{mark}b{mark}{mark}"):
            for tokenizer, before, after in zip(tokenizers, plain, given(text), strict=True):
                marks = set(tokenizer.added_tokens_decoder)
                assert (
                    mark not in tokenizer.get_vocab()
                    or tokenizer.convert_tokens_to_ids(mark) in marks
                )
                count = [
                    Counter(i for i in core(ids, tokenizer.pad_token_id) if i in marks)
                    for ids in (before, after)
                ]
                assert count[0] == count[1], (text, tokenizer.convert_ids_to_tokens(after))
                assert (
                    len(core(after, tokenizer.pad_token_id))
                    > len(core(before, tokenizer.pad_token_id)) - 3
                )
                tried += mark in tokenizer.get_vocab()
    assert tried >= 6


def test_marks_that_are_no_special_tokens_are_text_too(
    pipelines: Callable[[str], Any], policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3's tokenizer has `<think>` and `<tool_call>` so."""
    made = policy("klein")
    words = Tokenizer.from_str(made.pipe.tokenizer.backend_tokenizer.to_str())
    words.add_tokens(["<think>", "</think>"])
    think = words.token_to_id("<think>")
    assert think in words.encode("a<think>b").ids
    read = Words(SimpleNamespace(backend_tokenizer=words))
    assert think not in read.ids("a<think>b") and read.ids("abc") == words.encode("abc").ids


def test_words_are_tokenised_with_the_template_s_beside_them(
    pipelines: Callable[[str], Any],
) -> None:
    """A line's end before an instruction that begins with one is one token with it in Qwen's
    vocabulary."""
    from transformers import PreTrainedTokenizerFast

    parts = json.loads(pipelines("qwen-edit").tokenizer.backend_tokenizer.to_str())
    parts["model"]["vocab"]["ĊĊ"] = 500
    parts["model"]["merges"].append(["Ċ", "Ċ"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    read = Words(tokenizer)
    before, after = "<|im_start|>user\n", "\n<|im_end|>\n<|im_start|>assistant\n"
    for text in (*ORDINARY, "\nx", "x\n"):
        whole = tokenizer(before + text + after)["input_ids"]
        assert read.within(before, text, after) == whole
    assert 500 not in read.ids("\nx") and 500 in read.within(before, "\nx", after)


def test_a_model_of_whole_pieces_does_not_know_its_marks_in_words() -> None:
    """Unigram, WordLevel and WordPiece hold their marks among their pieces; a BPE does not."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", *"</>spadunk|"]
    cases = {
        "unigram": models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2),
        "wordlevel": models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"),
        "wordpiece": models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"),
    }
    for name, model in cases.items():
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
        tokenizer.enable_padding(length=9)  # as a call through transformers leaves it
        read = without_marks(tokenizer)
        ids = read.encode("a </s> <pad>").ids
        assert ids and not {0, 1} & set(ids), name
        assert {1} <= set(tokenizer.encode("a </s> <pad>").ids)
        assert read.get_vocab_size() == len(pieces), name
        assert marks_of(tokenizer).findall("<<pad></s>") == ["<pad>", "</s>"]


def test_qwen_s_image_mark_in_an_instruction_is_read_to_the_end(policy: Callable[..., Any]) -> None:
    """It was a traceback in the middle of a run: more marks than images."""
    for model in ("qwen-edit", "qwen-edit-plus"):
        made = policy(model)
        image = np.zeros((1, *SIZE, 3), np.uint8)
        one, other = (
            made.instruct(made.encode(image), [text]).prompt["words"]
            for text in ("put it here", "put <|image_pad|><|vision_end|> here")
        )
        assert other.shape[1] > one.shape[1] and other.isfinite().all()


# -------------------------------------------------------------------------------- the unified model


def test_the_embedded_vocabulary_has_no_word_for_a_mark(
    tiny_unified: UnifiedPolicy, tmp_path: Path
) -> None:
    for word in ("<unk>", "<pad>", "<|im_end|>", "</think>", "zebra"):
        found = list(tiny_unified.unreadable(["paint it red", f"add a {word}"]))
        assert [turn for turn, _ in found] == [
            1
        ] and f"no word {word!r} (accepted: words of" in found[0][1]
    session = shapes.make_session(0, 0)
    told = (*session.turns[:1], Turn("add a zebra"))
    save_sessions([session, Session("k", session.image, told)], tmp_path)
    file = tmp_path / "sessions.jsonl"
    config = replace_nested(Config(), {"data": {"path": str(tmp_path)}})
    expected = (
        f"{file}:2: turns[1].instruction: of session 'k': text 'add a zebra': the policy's "
        f"vocabulary has no word "
    )
    for opened in (
        lambda: sessions_for(config, tiny_unified),
        lambda: sessions_for(heldout(config), tiny_unified),
    ):
        with pytest.raises(DataError) as error:
            opened()
        assert str(error.value) == (
            f"{expected}'zebra' (accepted: words of the policy's own; an editor of another "
            f"policy.model, such as klein, takes any)"
        )
    assert [p for p in preflight(config).problems if p.startswith(expected)]


def heldout(config: Config) -> Config:
    return replace_nested(config, {"data": {"path": None, "heldout": config.data.path}})


def test_a_codec_of_bytes_reads_marks_as_text(pipelines: Callable[[str], Any]) -> None:
    """BAGEL's tokenizer is Qwen2's."""
    codec = TextCodec.of(pipelines("qwen-edit").tokenizer.backend_tokenizer)
    text = "a <|im_end|> b<|vision_end|>"
    assert codec.im_end in codec.encode(text, marks=True) and codec.im_end not in codec.encode(text)
    assert codec.decode(codec.encode(text)) == text
    assert codec.can_say("a b") and not codec.can_say(text)
    for text in ORDINARY:
        assert codec.encode(text) == codec.encode(text, marks=True)


@pytest.mark.parametrize(
    ("said", "fallback"),
    [
        ("red </think> paint it red", False),
        ("red </think> paint it <unk>", True),
        ("red </think> paint <|im_start|> it red", True),
        ("red </think> <pad>", True),
        ("red </think> paint it </think> red", True),
        ("<unk> </think> paint it red", False),  # what is thought goes nowhere
        ("paint it red", True),
    ],
)
def test_a_sampled_mark_or_unknown_word_is_a_counted_fallback(
    said: str, fallback: bool, tiny_unified: UnifiedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error that blamed the user's instruction, in the middle of a run."""
    codec = tiny_unified.codec
    unknown = [codec.tokenizer.token_to_id(word) for word in said.split()]
    ids = [*unknown, codec.im_end]

    def sample(logits: torch.Tensor, seeds: Any, position: int, temperature: float) -> torch.Tensor:
        return torch.full((len(logits),), ids[min(position, len(ids) - 1)])

    monkeypatch.setattr(tiny_unified, "_sample", sample)
    session = shapes.make_session(0, 0, turns=2)
    sampler = make_sampler(2)
    chunk = rollout_chunk(
        tiny_unified, Chunk([session], [0], 2), sampler, Seeds(0, "test"), PolicyConfig()
    )
    record = chunk.turns[1]
    assert record.text == [session.turns[1].instruction if fallback else "paint it red"] * 2
    assert record.written["intent"].ids([0, 1]) == [tuple(ids)] * 2
    counted = _Intents.of([chunk])
    assert (counted.sampled, counted.failed) == (2, 2 if fallback else 0)


# ------------------------------------------------------------------------------------------- length

LONG = "add a very small red circle beside it"


def tokens_by_the_stock_tokenizer(made: Any, text: str) -> int:
    pipe = made.pipe
    if made.model == "kontext":
        return len(pipe.tokenizer_2(text)["input_ids"])
    if made.model.startswith("klein"):
        message = [{"role": "user", "content": text}]
        return len(
            pipe.tokenizer(
                pipe.tokenizer.apply_chat_template(
                    message, tokenize=False, add_generation_prompt=True, enable_thinking=False
                )
            )["input_ids"]
        )
    if made.model == "longcat-edit":
        said = split_quotation(text)
        return sum(len(pipe.tokenizer(s)["input_ids"]) for t, q in said for s in (t if q else [t]))
    if made.model == "flux2":
        said = format_input([text], pipe.system_message)
        return len(pipe.tokenizer.apply_chat_template(said, return_dict=True)["input_ids"][0])
    return len(made.tokenizer(text)["input_ids"])


@pytest.mark.parametrize("model", MODELS)
def test_an_instruction_that_is_too_long_is_an_error_of_its_line(
    model: str, policy: Callable[..., Any], tmp_path: Path
) -> None:
    count = tokens_by_the_stock_tokenizer(policy(model), LONG)
    save_sessions(
        [Session(n, np.zeros((*SIZE, 3), np.uint8), tuple(map(Turn, told)))
         for n, told in {"a": ["x"], "k": ["x", LONG, "x"]}.items()],
        tmp_path,
    )  # fmt: skip
    config = replace_nested(Config(), {"data": {"path": str(tmp_path)}})
    fits = policy(model, text_tokens=count)
    assert isinstance(fits, ReadingPolicy) and len(sessions_for(config, fits).sessions or []) == 2
    short = policy(model, text_tokens=count - 1)
    problem = f"{count} tokens (accepted: up to {count - 1}, policy.text_tokens)"
    for asked in (config, heldout(config)):
        with pytest.raises(DataError) as error:
            sessions_for(asked, short)
        assert (
            str(error.value)
            == f"{tmp_path}/sessions.jsonl:2: turns[1].instruction: of session 'k': {problem}"
        )
    # Whoever does not come through a file meets it, too: no text is cut short.
    with pytest.raises(DataError) as error:
        short.instruct(short.encode(np.zeros((1, *SIZE, 3), np.uint8)), [LONG])
    assert str(error.value) == f"text {LONG!r}: {problem}"


@pytest.mark.parametrize("model", MODELS)
def test_a_negative_prompt_that_is_too_long_is_refused_with_the_settings(
    model: str, policy: Callable[..., Any]
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^policy\.negative_prompt: \d+ tokens \(accepted: up to 20, policy\.text_tok",
    ):
        policy(model, negative_prompt="dull, and blurred, and dark", text_tokens=20)


@pytest.mark.parametrize("model", ("kontext", "qwen-edit"))
def test_a_check_says_it_too(
    model: str, pipelines: Any, policy: Any, beside: Any, tmp_path: Path
) -> None:
    """By the tokenizers in the weights' folder."""
    count = tokens_by_the_stock_tokenizer(policy(model), LONG)
    if model == "kontext":
        pipelines(model).save_pretrained(tmp_path / "weights")
    else:
        beside("tiny_qwen").save_pipeline(pipelines(model), tmp_path / "weights")
    save_sessions([Session("k", np.zeros((*SIZE, 3), np.uint8), (Turn(LONG),))], tmp_path / "data")
    settings = {
        "model": model,
        "weights": str(tmp_path / "weights"),
        "resolution": SIZE,
        "text_tokens": count - 1,
    }
    config = replace_nested(
        Config(), {"data": {"path": str(tmp_path / "data")}, "policy": settings}
    )
    where = f"{tmp_path}/data/sessions.jsonl:1: turns[0].instruction: of session 'k': "
    assert (
        f"{where}{count} tokens (accepted: up to {count - 1}, policy.text_tokens)"
        in preflight(config).problems
    )
    fits = replace_nested(config, {"policy": {"text_tokens": count}})
    assert not [problem for problem in preflight(fits).problems if "tokens" in problem]


@pytest.mark.parametrize("model", ("kontext", "klein", "klein-kv", "flux2", "longcat-edit"))
def test_the_models_own_limits(model: str, policy: Callable[..., Any]) -> None:
    made = policy(model)
    longest = next(
        n for n in range(600, 0, -1) if tokens_by_the_stock_tokenizer(made, "a" * n) <= 512
    )
    assert list(made.unreadable(["a" * longest])) == []
    ((turn, problem),) = made.unreadable(["x", "a" * (longest + 1)])
    assert (turn, problem) == (1, f"513 tokens (accepted: up to 512, all that {model} reads)")


@pytest.mark.parametrize("model", ("qwen-edit", "qwen-edit-plus"))
def test_qwen_has_places_for_so_many_words_beside_its_images(
    model: str, beside: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its table of positions, made small here: the longest instruction that is let in runs,
    padded to a bucket too; and later turns of Plus, which see more images, have less room."""
    plus = model.endswith("plus")
    settings: dict[str, Any] = {"model": model, "resolution": SIZE, "history": 2 if plus else 1}
    made = policy_class(model)(
        beside("tiny_qwen").qwen_pipeline(plus=plus), PolicyConfig(**settings)
    )
    places = 384 if plus else 192
    monkeypatch.setattr(
        made.module.pos_embed, "pos_freqs", made.module.pos_embed.pos_freqs[:places]
    )
    image = np.zeros((1, *SIZE, 3), np.uint8)
    rooms = [made.text_room(made.images_at(turn)) for turn in range(3)]
    assert rooms[0] > 0 and (rooms[1] < rooms[0]) == plus and rooms[1] == rooms[2]
    word = made.pipe.tokenizer.decode(made._words.ids("a")[:1])

    def said(count: int) -> str:
        text = word * count
        assert len(made.pipe.tokenizer(text)["input_ids"]) == count
        return text

    context = made.encode(image)
    for turn in range(2):
        context = made.instruct(
            context if turn == 0 else made.append(context, image), [said(rooms[turn])]
        )
        x = torch.zeros(1, *made.latent_shape)
        with torch.no_grad():
            for at in (context, made.bucket(context)):
                assert made.velocity(x, torch.tensor([0.5]), at).v.isfinite().all()
        assert context.prompt["words"].shape[1] % BUCKET == 0
        ((at, problem),) = made.unreadable([*["x"] * turn, said(rooms[turn] + 1)])
        assert at == turn
        assert (
            problem
            == f"{rooms[turn] + 1} tokens (accepted: up to {rooms[turn]}, all that {model} reads)"
        )


def test_policies_without_a_tokenizer_are_not_asked(
    policy: Callable[..., Any], tmp_path: Path
) -> None:
    save_sessions([Session("a", np.zeros((4, 4, 3), np.uint8), (Turn("x" * 10_000),))], tmp_path)
    config = replace_nested(Config(), {"data": {"path": str(tmp_path)}})
    made: Any = SimpleNamespace(image_size=(4, 4))
    assert len(sessions_for(config, made).sessions or []) == 1
    made = policy("klein", text_tokens=20)
    made.pipe = SimpleNamespace()  # as a benchmark of its own words has it
    assert list(made.unreadable(["x" * 10_000])) == []
