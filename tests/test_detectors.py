"""Detectors: tiny random ones of transformers against transformers' own processors, broken folders,
and a detector behind an address that does all that servers do."""

from __future__ import annotations

import base64
import email.utils
import importlib.util
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from editr2.errors import ConfigError
from editr2.rewards.detect import DetectorError, GroundingDino, Owlv2, RemoteDetector
from editr2.rewards.geometry import Box, Found
from editr2.rewards.models import LookingModel


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _load("tiny_lookers")
IMAGE = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.grounding_dino(tmp_path_factory.mktemp("detectors") / "dino")


@pytest.fixture(scope="module")
def owl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.owlv2(tmp_path_factory.mktemp("detectors") / "owl")


@pytest.fixture(scope="module")
def dino(dino_folder: Path) -> GroundingDino:
    return GroundingDino(str(dino_folder))


def _as_array(found: list[Found]) -> np.ndarray:
    return np.array([[*one.box, one.score] for one in found])


# Grounding DINO


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (64, 64), (20, 200), (300, 181)])
def test_grounding_dino_as_its_own_processor(dino_folder: Path, dino: GroundingDino, shape) -> None:
    from transformers import (
        AutoTokenizer,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
    )

    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessorPil(size=dino.model.settings["size"]),
        AutoTokenizer.from_pretrained(dino_folder),
    )
    module = GroundingDinoForObjectDetection.from_pretrained(dino_folder).eval()
    inputs = processor(images=image, text="red cup .", return_tensors="pt")
    assert dino.size(*shape) == tuple(inputs["pixel_values"].shape[-2:])
    with torch.no_grad():
        said = processor.post_process_grounded_object_detection(
            module(**inputs), inputs["input_ids"], threshold=0.0, target_sizes=[(1, 1)]
        )[0]
    order = said["scores"].argsort(descending=True, stable=True)
    expected = torch.cat([said["boxes"].clamp(0, 1), said["scores"][:, None]], 1)[order].numpy()
    (found,) = dino.find(image, ["Red  cup."], threshold=0.0)
    assert np.allclose(_as_array(found), expected, atol=1e-5)


def test_every_name_is_asked_by_itself(dino: GroundingDino) -> None:
    together = dino.find(IMAGE, ["red cup", "dog"], threshold=0.0)
    assert together == [dino.find(IMAGE, [name], threshold=0.0)[0] for name in ("red cup", "dog")]
    assert together[0] != together[1] and dino.find(IMAGE, []) == []


def test_names_in_one_text_share_the_boxes(dino_folder: Path) -> None:
    names = ["red cup", "dog", "hat"]
    found = GroundingDino(str(dino_folder), together=True).find(IMAGE, names, threshold=0.0)
    assert sum(map(len, found)) == 20  # its queries: each box is one name's
    boxes = [one.box for row in found for one in row]
    assert len(set(boxes)) > 10


def test_a_box_is_of_the_name_that_it_answers_most(dino_folder: Path, monkeypatch) -> None:
    """Three boxes that answer a token each of `[CLS] a b . c . [SEP]`, and the mark of the end
    more."""
    detector = GroundingDino(str(dino_folder), together=True)
    detector.load()
    logits = torch.full((1, 3, 32), -5.0)
    for box, token in enumerate((2, 4, 1)):
        logits[0, box, token] = 1.0 + box
    logits[0, :, 6] = 4.0
    logits[..., 7:] = -torch.inf
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]]])

    def forward(**inputs: torch.Tensor) -> SimpleNamespace:
        assert inputs["input_ids"].shape == (1, 7)
        return SimpleNamespace(logits=logits, pred_boxes=boxes)

    monkeypatch.setattr(detector.model, "_module", forward)
    found = detector.find(IMAGE, ["a b", "c"])
    assert [[round(one.box.x0, 1) for one in row] for row in found] == [[0.1, 0.7], [0.4]]
    # The score is the text's, marks included, as the benchmarks count it.
    assert {round(one.score, 4) for row in found for one in row} == {0.9820}


def test_a_text_too_long_for_the_model_is_several(dino_folder: Path) -> None:
    detector = GroundingDino(str(dino_folder), together=True)
    detector.load()
    names = ["abcdefghij", "klmnopqrst", "uvwxyz", "ab"]  # a token a letter, and 32 for a text
    prompts = detector._prompts(names)
    assert [prompt.names for prompt in prompts] == [[0, 1, 2], [3]]
    assert len(detector.find(IMAGE, names, threshold=0.0)) == 4
    with pytest.raises(DetectorError, match="tokens .accepted: up to 32"):
        detector.find(IMAGE, ["a" * 40])


def test_the_threshold_is_exclusive_and_the_surest_first(dino: GroundingDino) -> None:
    (found,) = dino.find(IMAGE, ["cup"], threshold=0.0)
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True) and len(scores) == 20
    middle = scores[len(scores) // 2]
    (fewer,) = dino.find(IMAGE, ["cup"], threshold=middle)
    assert fewer == [one for one in found if one.score > middle]
    assert dino.find(IMAGE, ["cup"], threshold=1.0) == [[]]


def test_many_threads_find_the_same(dino: GroundingDino) -> None:
    alone = dino.find(IMAGE, ["cup"], threshold=0.0)
    said: list[Any] = [None] * 6

    def find(i: int) -> None:
        said[i] = dino.find(IMAGE, ["cup"], threshold=0.0)

    threads = [threading.Thread(target=find, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [alone] * 6


# OWLv2


def test_owlv2_boxes_are_of_the_image_and_not_of_its_filling(owl_folder: Path) -> None:
    """Its image is filled up to a square; the reference does so by hand."""
    detector = Owlv2(str(owl_folder))
    found = detector.find(IMAGE, ["cup", "dog"], threshold=0.0)
    square = np.zeros((80, 80, 3), np.uint8)
    square[:50] = IMAGE
    of_square = detector.find(square, ["cup", "dog"], threshold=0.0)
    assert any(len(row) < 16 for row in found) or found != of_square
    for here, there in zip(found, of_square, strict=True):
        taller = [[x0, y0 * 1.6, x1, y1 * 1.6] for (x0, y0, x1, y1), _ in there]
        scaled = [Found(Box.of(box), one.score) for box, one in zip(taller, there, strict=True)]
        kept = [one for one in scaled if one.box.area > 0]
        assert np.allclose(_as_array(here), _as_array(kept), atol=1e-5)


def test_owlv2_as_its_own_processor(owl_folder: Path) -> None:
    pytest.importorskip("scipy", reason="transformers' processor of OWLv2 needs scipy")
    from transformers import (
        AutoTokenizer,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessorPil,
        Owlv2Processor,
    )

    detector = Owlv2(str(owl_folder))
    settings = {k: detector.model.settings[k] for k in ("size", "image_mean", "image_std")}
    processor = Owlv2Processor(
        Owlv2ImageProcessorPil(**settings), AutoTokenizer.from_pretrained(owl_folder)
    )
    module = Owlv2ForObjectDetection.from_pretrained(owl_folder).eval()
    image = IMAGE[:40, :64]  # as wide as the model's: the ways to resize differ a little
    text = [["a photo of a cup"]]
    inputs = processor(
        images=image, text=text, return_tensors="pt", max_length=24, padding="max_length"
    )
    with torch.no_grad():
        outputs = module(**inputs)
    said = processor.image_processor.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[(40, 64)]
    )[0]
    boxes = (said["boxes"] / torch.tensor([64, 40, 64, 40])).clamp(0, 1)
    expected = torch.cat([boxes, said["scores"][:, None]], 1)
    expected = expected[said["scores"].argsort(descending=True, stable=True)]
    area = (expected[:, 2] - expected[:, 0]) * (expected[:, 3] - expected[:, 1])
    (found,) = detector.find(image, ["cup"], threshold=0.0)
    assert np.allclose(_as_array(found), expected[area > 0].numpy(), atol=1e-5)


def test_owlv2_refuses_a_name_too_long(owl_folder: Path) -> None:
    with pytest.raises(DetectorError, match="tokens .accepted: up to 24"):
        Owlv2(str(owl_folder)).find(IMAGE, ["a" * 30])


@pytest.mark.parametrize("prompt", ["a photo", "{} and {}"])
def test_the_prompt_has_one_place(prompt: str, owl_folder: Path) -> None:
    with pytest.raises(ConfigError, match="accepted: a text with one {}"):
        Owlv2(str(owl_folder), prompt=prompt)


# Both


@pytest.mark.parametrize("names", [["cup", " . "], [""]])
def test_a_blank_name_is_not_looked_for(dino: GroundingDino, names: list[str]) -> None:
    for detector in (dino, RemoteDetector("http://localhost:9")):
        with pytest.raises(DetectorError, match="is no name"):
            detector.find(IMAGE, names)


@pytest.mark.parametrize("image", [IMAGE[..., 0], IMAGE.astype(np.float32), IMAGE[:0]])
def test_what_is_no_image(dino: GroundingDino, image: np.ndarray) -> None:
    for detector in (dino, RemoteDetector("http://localhost:9")):
        with pytest.raises(DetectorError, match="^detector: [^:]*no RGB image"):
            detector.find(image, ["cup"])


@pytest.mark.parametrize("where", ["boxes", "logits"])
def test_a_failure_is_not_an_object_not_found(dino_folder: Path, where: str) -> None:
    detector = GroundingDino(str(dino_folder))
    detector.load()
    with detector.model.held() as (module, _):
        embeddings = module.model.query_position_embeddings.weight
        part = module.bbox_embed[-1].layers[-1].bias if where == "boxes" else embeddings
        part.fill_(float("nan"))
    with pytest.raises(DetectorError, match="not finite"):
        detector.find(IMAGE, ["cup"])


def test_what_the_model_raises_is_one_line(dino_folder: Path, monkeypatch) -> None:
    detector = GroundingDino(str(dino_folder))

    def broken(*args: object) -> None:
        raise RuntimeError("out of memory\n  tried to allocate")

    monkeypatch.setattr(detector, "_tokens", broken)
    with pytest.raises(DetectorError, match="^detector: RuntimeError: out of memory tried[^\n]*$"):
        detector.find(IMAGE, ["cup"])


# Loading


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _fewer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.level_embed")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def _no_json(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{")


@pytest.mark.parametrize(
    "broken, why",
    [
        (_without("config.json"), "config.json: "),
        (_without("model.safetensors"), "weights: "),
        (_cut, "weights: "),
        (_fewer, "model.level_embed and 0 more are not there"),
        (_another_kind, "is a bert .accepted: grounding-dino"),
        (_without("tokenizer.json"), "tokenizer: "),
        (_no_json, "preprocessor_config.json: "),
    ],
)
def test_a_broken_folder(broken, why: str, dino_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dino_folder, tmp_path / "model")
    (folder / "vocab.txt").unlink()  # what the tokenizer was made from
    broken(folder)
    before = torch.random.get_rng_state()
    with pytest.raises(ConfigError, match=why) as caught:
        GroundingDino(str(folder)).load()
    told = str(caught.value)
    assert told.startswith("detector: ") and "\n" not in told and len(told) < 700
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "given, why",
    [
        ({"name": "no/such/folder"}, "no such folder"),
        ({"name": "nowhere"}, "no such folder"),
        ({"device": "gpu"}, "device gpu .accepted: cpu, cuda:0"),
        ({"revision": "main"}, "revision main of a folder"),
    ],
)
def test_what_a_model_accepts(given: dict, why: str, dino_folder: Path) -> None:
    name = given.pop("name", str(dino_folder))
    with pytest.raises(ConfigError, match=why):
        GroundingDino(name, **given)


def test_an_id_of_the_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from editr2.rewards import models

    monkeypatch.setattr(models, "offline", lambda: "the hub cannot be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="nobody/nothing: config.json: .*cannot be reached"):
        GroundingDino("nobody/nothing").load()


def test_loading_is_once_and_moves_no_random_numbers(dino_folder: Path, monkeypatch) -> None:
    import transformers

    calls = []
    load = transformers.GroundingDinoForObjectDetection.from_pretrained

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(args)
        time.sleep(0.05)
        return load(*args, **named)

    monkeypatch.setattr(transformers.GroundingDinoForObjectDetection, "from_pretrained", counted)
    detector = GroundingDino(str(dino_folder))
    before = torch.random.get_rng_state()
    threads = [threading.Thread(target=detector.find, args=(IMAGE, ["cup"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and torch.equal(torch.random.get_rng_state(), before)


def test_lent_to_training(dino_folder: Path) -> None:
    detector = GroundingDino(str(dino_folder), device="trainer")
    found = detector.find(IMAGE, ["cup"])
    detector.lend()
    with pytest.raises(DetectorError, match="^detector: lent to training"):
        detector.find(IMAGE, ["cup"])
    detector.take()
    assert detector.find(IMAGE, ["cup"]) == found
    # On a device of its own it has nothing to give back.
    other = GroundingDino(str(dino_folder), device="cpu")
    other.lend()
    assert other.find(IMAGE, ["cup"]) == found


@pytest.mark.gpu
def test_on_the_trainers_gpu(dino_folder: Path) -> None:
    detector = GroundingDino(str(dino_folder), device="trainer")
    (found,) = detector.find(IMAGE, ["cup"], threshold=0.0)
    (host,) = GroundingDino(str(dino_folder)).find(IMAGE, ["cup"], threshold=0.0)
    assert np.allclose(_as_array(found)[:, 4], _as_array(host)[:, 4], atol=1e-3)

    def device() -> str:
        assert detector.model._module is not None
        return next(detector.model._module.parameters()).device.type

    assert device() == "cuda"
    detector.lend()
    assert device() == "cpu"
    detector.take()
    assert device() == "cuda"


def test_under_autocast_and_gradients_it_is_the_same(dino: GroundingDino) -> None:
    found = dino.find(IMAGE, ["cup"], threshold=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        assert dino.find(IMAGE, ["cup"], threshold=0.0) == found
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert isinstance(dino.model, LookingModel)


# Behind an address


class Server:
    """Answers POSTs with what `answers` holds, one after the other, the last one for ever: a status
    and a body, and perhaps headers and a delay."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = [{"body": {"found": [[[0.1, 0.2, 0.3, 0.4, 0.9]]]}}]
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with server.lock:
                    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                    server.bodies.append(body)
                    answer = server.answers[0]
                    if len(server.answers) > 1:
                        server.answers.pop(0)
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                time.sleep(answer.get("delay", 0))
                with server.lock:
                    server.busy -= 1
                if answer.get("status") is None and "body" not in answer:
                    self.close_connection = True
                    return  # breaks off
                said = answer.get("body", "")
                data = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(answer.get("status", 200))
                for name, value in answer.get("headers", {}).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/detect"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(RemoteDetector, "PAUSE", 0.01)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_the_protocol(server: Server) -> None:
    cups = [[0.1, 0.2, 0.3, 0.4, 0.5], [-0.1, 0, 1, 1.2, 0.9], [0, 0, 1, 1, 0.3]]
    server.answers = [{"body": {"found": [cups, []]}}]
    found = RemoteDetector(server.url).find(IMAGE, ["Red cup.", "dog"], threshold=0.3)
    assert found == [[Found(Box(0, 0, 1, 1), 0.9), Found(Box(0.1, 0.2, 0.3, 0.4), 0.5)], []]
    (body,) = server.bodies
    assert (body["names"], body["threshold"]) == (["red cup", "dog"], 0.3)
    sent = Image.open(io.BytesIO(base64.b64decode(body["image"])))
    assert np.array_equal(np.asarray(sent), IMAGE)


@pytest.mark.parametrize(
    "answers, tries",
    [
        ([{"status": 503, "headers": {"retry-after": "0"}}, {}], 2),
        ([{"status": 429, "headers": {"retry-after": "soon"}}, {"status": 500}, {}], 3),
        ([{"status": 408, "headers": {"retry-after": "nan"}}, {}], 2),
        ([{"breaks": True}, {}], 2),
    ],
)
def test_it_asks_again(server: Server, answers: list[dict], tries: int) -> None:
    good = server.answers[0]
    server.answers = [answer or good for answer in answers]
    assert RemoteDetector(server.url).find(IMAGE, ["cup"])[0][0].score == 0.9
    assert len(server.bodies) == tries


@pytest.mark.parametrize(
    "answer, tries, why",
    [
        ({"status": 503}, 3, "status 503 after 3 tries"),
        ({"status": 404}, 1, "status 404 after 1 tries"),
        ({"breaks": True}, 3, "after 3 tries"),
        ({"delay": 1.0, "body": {}}, 3, "Timeout.* after 3 tries"),
        ({"body": "no json"}, 1, "no JSON"),
        ({"body": []}, 1, "the answer: "),
        ({"body": {"boxes": []}}, 1, "the answer: KeyError"),
        ({"body": {"found": []}}, 1, "0 lists for 1 names"),
        ({"body": {"found": [[], []]}}, 1, "2 lists for 1 names"),
        ({"body": {"found": [[[0, 0, 1, 1]]]}}, 1, "the answer: "),
        ({"body": {"found": [[[0, 0, 1, 1, 1.5]]]}}, 1, "score 1.5 is not in"),
        ({"body": {"found": [[[0, 0, 1, 1, True]]]}}, 1, "score True is not in"),
        ({"body": {"found": [[[0.5, 0, 0.1, 1, 0.5]]]}}, 1, "box: "),
        ({"body": '{"found": [[[0, NaN, 1, 1, 0.5]]]}'}, 1, "box: "),
        ({"body": {"found": [None]}}, 1, "the answer: "),
    ],
)
def test_another_answer_is_a_failure(server: Server, answer: dict, tries: int, why: str) -> None:
    server.answers = [answer]
    with pytest.raises(DetectorError, match=why) as caught:
        RemoteDetector(server.url, timeout=0.2, retries=2).find(IMAGE, ["cup"])
    assert len(server.bodies) == tries and "\n" not in str(caught.value)


def test_nobody_listens(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DetectorError, match="after 2 tries"):
        RemoteDetector(server.url, retries=1).find(IMAGE, ["cup"])


def test_retry_after_is_waited_for(server: Server) -> None:
    server.answers = [{"status": 503, "headers": {"retry-after": "0.3"}}, server.answers[0]]
    begin = time.perf_counter()
    RemoteDetector(server.url).find(IMAGE, ["cup"])
    assert time.perf_counter() - begin >= 0.3


def test_as_many_calls_at_once_as_allowed(server: Server) -> None:
    server.answers[0]["delay"] = 0.05
    detector = RemoteDetector(server.url, concurrency=3)
    threads = [threading.Thread(target=detector.find, args=(IMAGE, ["cup"])) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.most == 3 and len(server.bodies) == 9


def test_retry_after_may_be_a_date(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a pause of its own ever is: the server knows."""
    waited: list[float] = []
    monkeypatch.setattr("editr2.rewards.detect.time.sleep", waited.append)
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    server.answers = [{"status": 503, "headers": {"retry-after": date}}, server.answers[0]]
    RemoteDetector(server.url).find(IMAGE, ["cup"])
    (seconds,) = filter(None, waited)  # the server itself sleeps for 0
    assert 50 < seconds <= 60


@pytest.mark.parametrize(
    "given",
    [
        {"url": "localhost:8000"},
        {"url": "http://ann:s3cret@localhost:9"},
        {"url": "http://localhost:9/find?key=s3cret"},
        {"timeout": 0},
        {"retries": -1},
        {"concurrency": 0},
    ],
)
def test_what_a_remote_detector_accepts(given: dict) -> None:
    with pytest.raises(ConfigError, match="accepted: ") as caught:
        RemoteDetector(**{"url": "http://localhost:9", **given})
    assert "s3cret" not in str(caught.value)
