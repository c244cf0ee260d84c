"""Features of images and what is compared with them, on tiny random encoders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from editr2.errors import ConfigError
from editr2.rewards.features import (
    Encoder,
    FeatureError,
    background_consistency,
    cosine,
    guessed_grid,
    object_consistency,
    outside,
)
from editr2.rewards.geometry import Box


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _load("tiny_lookers")
KINDS = {
    "dinov3": lambda folder: tiny.dinov3(folder),
    "dinov2": lambda folder: tiny.dinov2(folder),
    "dinov2 with registers": lambda folder: tiny.dinov2(folder, registers=3),
}
WHOLE = Box(0, 0, 1, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: make(root / kind.replace(" ", "-")) for kind, make in KINDS.items()}


@pytest.fixture(params=KINDS)
def encoder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Encoder:
    return Encoder(str(folders[request.param]))


def _image(seed: int = 0, size: tuple[int, int] = (48, 80)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_the_grid_is_of_patches_alone(encoder: Encoder) -> None:
    """Against the model's own hidden states, of an image that has its size already."""
    height, width = encoder.sides()
    image = _image(size=(height, width))
    cls, patches = encoder.of([image, image[::-1]])
    config = encoder.model.config
    assert patches.shape == (2, 4, 4, config.hidden_size)
    assert height == width == 4 * config.patch_size
    with encoder.model.held() as (module, _):
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        mean, std = (
            torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        states = module(pixel_values=(pixels - mean) / std).last_hidden_state
    registers = getattr(config, "num_register_tokens", 0)
    assert states.shape[1] == 1 + registers + 16
    assert torch.allclose(cls[0], states[0, 0], atol=1e-5)
    assert torch.allclose(patches[0].flatten(0, 1), states[0, 1 + registers :], atol=1e-5)


def test_identical_images_are_wholly_consistent(encoder: Encoder) -> None:
    image = _image()
    boxes = [Box(0.1, 0.1, 0.4, 0.6), Box(0.5, 0.5, 0.9, 0.9)]
    for value in (
        object_consistency(encoder, image, image, boxes),
        background_consistency(encoder, image, image, boxes),
        background_consistency(encoder, image, image, []),
    ):
        assert value is not None and 1 - 1e-6 < value <= 1


def test_nothing_to_compare(encoder: Encoder) -> None:
    image, other = _image(0), _image(1)
    assert object_consistency(encoder, image, other, []) is None
    assert object_consistency(encoder, image, other, [Box(0.5, 0.5, 0.5, 0.9)]) is None
    assert background_consistency(encoder, image, other, [WHOLE]) is None
    halves = [Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)]
    assert background_consistency(encoder, image, other, halves) is None


def test_another_image_is_less_consistent(encoder: Encoder) -> None:
    image, other = np.zeros((64, 64, 3), np.uint8), _image(3, (64, 64))
    other[:, :16] = 0
    left, right = Box(0, 0, 0.25, 1), Box(0.3, 0, 1, 1)
    same = object_consistency(encoder, image, other, [left])
    changed = object_consistency(encoder, image, other, [right])
    both = object_consistency(encoder, image, other, [left, right])
    assert same is not None and changed is not None and both is not None
    assert changed < same - 1e-3 and both == pytest.approx((same + changed) / 2)
    background = background_consistency(encoder, image, other, [])
    assert background is not None and background < 1 - 1e-3


def test_the_mean_of_an_object_is_half_cls_and_half_patches(encoder: Encoder) -> None:
    image, other = _image(0, (40, 40)), _image(1, (40, 40))
    box = Box(0.25, 0.5, 0.75, 1)
    cls, patches = encoder.of([image[20:40, 10:30], other[20:40, 10:30]])
    means = patches.flatten(1, 2).mean(1)
    expected = 0.5 * F.cosine_similarity(*cls, dim=0) + 0.5 * F.cosine_similarity(*means, dim=0)
    assert object_consistency(encoder, image, other, [box]) == pytest.approx(
        max(float(expected), 0), abs=1e-5
    )


def test_the_background_is_what_the_boxes_leave(encoder: Encoder) -> None:
    """The upper half is covered, and a box over 40 % of a patch leaves 60 % of it."""
    image, other = _image(0, (64, 64)), _image(1, (64, 64))
    boxes = [Box(0, 0, 1, 0.5), Box(0, 0.75, 0.1, 1)]
    patches = F.normalize(encoder.of([image, other]).patches[:, 2:], dim=-1)
    weights = outside(boxes, 4, 4, *encoder.sides())[2:]
    assert weights[1, 0] == pytest.approx(0.6, abs=0.05) and weights[1, 1] == 1
    pooled = (patches * weights[..., None]).sum((1, 2)).float()
    expected = max(float(F.cosine_similarity(*pooled, dim=0)), 0)
    assert background_consistency(encoder, image, other, boxes) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("covered, weighs", [(0.45, True), (0.5, True), (0.55, False)])
def test_a_patch_counts_from_one_half(
    covered: float, weighs: bool, folders: dict[str, Path]
) -> None:
    """Everything but a part of one patch is covered."""
    encoder = Encoder(str(folders["dinov3"]), size=160)  # a patch of 16 pixels in a grid of 10
    patch = 0.1
    boxes = [Box(patch, 0, 1, 1), Box(0, patch, 1, 1), Box(0, 0, patch * covered, patch)]
    value = background_consistency(encoder, _image(0), _image(1), boxes)
    assert (value is not None) is weighs


def test_two_boxes_cover_no_more_than_there_is() -> None:
    box = Box(0, 0, 0.5, 0.5)
    assert outside([box, box], 2, 2, 8, 8).tolist() == [[0, 1], [1, 1]]
    assert outside([], 2, 3, 8, 9).tolist() == [[1] * 3] * 2


def test_as_released_registers_are_patches(folders: dict[str, Path]) -> None:
    image, other = _image(0), _image(1)
    right = Encoder(str(folders["dinov3"]), size=224)
    released = Encoder(str(folders["dinov3"]), size=224, released=True)
    assert right.of([image]).patches.shape[1:3] == (14, 14)
    assert released.of([image]).patches.shape[1:3] == (10, 20)
    boxes = [Box(0, 0, 1, 0.5)]
    values = [background_consistency(one, image, other, boxes) for one in (right, released)]
    assert None not in values and values[0] != values[1]
    assert background_consistency(released, image, other, []) is None
    assert background_consistency(right, image, other, []) is not None


@pytest.mark.parametrize(
    "count, aspect, grid",
    [(196, 1, (14, 14)), (200, 1, (10, 20)), (200, 2, (20, 10)), (7, 1, (1, 7)), (1, 1, (1, 1))],
)
def test_the_grid_as_the_releases_guess_it(count: int, aspect: float, grid: tuple) -> None:
    assert guessed_grid(count, aspect) == grid


@pytest.mark.parametrize(
    "a, b, expected", [((1, 0), (2, 0), 1), ((1, 0), (0, 3), 0), ((1, 1), (-2, -2), -1)]
)
def test_cosine(a: tuple, b: tuple, expected: float) -> None:
    value = cosine(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    assert value == pytest.approx(expected) and -1 <= value <= 1


def test_zeros_have_no_direction() -> None:
    with pytest.raises(FeatureError, match="zeros"):
        cosine(torch.zeros(3), torch.ones(3))


def test_opposite_features_are_0_and_no_less(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    encoder = Encoder(str(folders["dinov3"]))
    encoder.load()
    states = torch.ones(2, 1 + 4 + 16, 16) * torch.tensor([1.0, -1.0])[:, None, None]
    monkeypatch.setattr(encoder, "_states", lambda pixels: states)
    assert object_consistency(encoder, _image(), _image(), [WHOLE]) == 0
    assert background_consistency(encoder, _image(), _image(), []) == 0


def test_patches_are_pooled_by_direction_alone(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    """Half of the patches turn by a right angle; they are a hundred times as long."""
    encoder = Encoder(str(folders["dinov3"]))
    states = torch.zeros(2, 1 + 4 + 16, 16)
    states[:, 5:13, 0] = 1
    states[0, 13:, 0] = states[1, 13:, 1] = 100
    monkeypatch.setattr(encoder, "_states", lambda pixels: states)
    value = background_consistency(encoder, _image(), _image(), [])
    assert value == pytest.approx(0.5**0.5)


def _not_finite(encoder: Encoder) -> None:
    with encoder.model.held() as (module, _):
        next(module.parameters()).fill_(float("nan"))


def _another_count(encoder: Encoder) -> None:
    encoder.model.config.num_register_tokens = 2


@pytest.mark.parametrize(
    "broken, why", [(_not_finite, "not finite"), (_another_count, "18 patches")]
)
def test_features_that_cannot_be(broken, why: str, folders: dict[str, Path]) -> None:
    encoder = Encoder(str(folders["dinov3"]))
    encoder.load()
    broken(encoder)
    with pytest.raises(FeatureError, match=why):
        encoder.of([_image()])


@pytest.mark.parametrize(
    "images, why",
    [
        ([], "at least one"),
        ([np.zeros((4, 4), np.uint8)], "no RGB image"),
        ([np.zeros((4, 4, 3))], "no RGB image"),
    ],
)
def test_what_is_no_image(images: list, why: str, folders: dict[str, Path]) -> None:
    with pytest.raises(FeatureError, match=why):
        Encoder(str(folders["dinov3"])).of(images)


def test_images_of_two_sizes_are_not_compared(folders: dict[str, Path]) -> None:
    encoder = Encoder(str(folders["dinov3"]))
    for compare in (object_consistency, background_consistency):
        with pytest.raises(FeatureError, match="one size"):
            compare(encoder, _image(), _image(size=(40, 80)), [WHOLE])


def test_the_size_is_whole_patches(folders: dict[str, Path]) -> None:
    assert Encoder(str(folders["dinov3"]), size=96).of([_image()]).patches.shape[1:3] == (6, 6)
    for size in (8, 100):
        with pytest.raises(ConfigError, match="multiples of 16"):
            Encoder(str(folders["dinov3"]), size=size).load()


def test_a_detector_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a owlv2 .accepted: dinov3_vit, dinov2, "):
        Encoder(str(tiny.owlv2(tmp_path / "owl"))).load()
