"""The published editors as facts: counted again from configurations, and against the sizes of the
published weights."""

import inspect

import diffusers
import pytest
import torch

from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.configured import policy_class
from editr2.policies.models import MODELS
from editr2.policies.pipelines import PipelineModel

KINDS = [k for k in map(policy_class, MODELS) if issubclass(k, PipelineModel)]
PUBLISHED = {name: (kind, parts) for kind in KINDS for name, parts in kind.published.items()}

QWEN3 = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
ENCODERS = {
    "CLIP-L": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "T5-XXL": {
        "d_model": 4096,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    "Qwen3-4B": QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128},
    "Mistral-Small-3.2": {"tie_word_embeddings": False},
    "Qwen3-VL-8B": {
        "text_config": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
        "vision_config": {"out_hidden_size": 4096},
    },
    "Qwen2.5-VL-7B": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
        },
    },
}
"""Settings of the encoders' published configurations that decide their size, where transformers has
other defaults."""

# hub id: its encoders, width of a text token, 1e9 parameters of the transformer, parameters of the
# autoencoder
SIZES = {
    "black-forest-labs/FLUX.1-Kontext-dev": (("CLIP-L", "T5-XXL"), 4096, 11.90, 83_819_683),
    "black-forest-labs/FLUX.2-klein-4B": (("Qwen3-4B",), 3 * 2560, 3.88, 84_046_115),
    "black-forest-labs/FLUX.2-klein-base-4B": (("Qwen3-4B",), 3 * 2560, 3.88, 84_046_115),
    "black-forest-labs/FLUX.2-klein-9B": (("Qwen3-8B",), 3 * 4096, 9.08, 84_046_115),
    "black-forest-labs/FLUX.2-klein-base-9B": (("Qwen3-8B",), 3 * 4096, 9.08, 84_046_115),
    "black-forest-labs/FLUX.2-klein-9b-kv": (("Qwen3-8B",), 3 * 4096, 9.08, 84_046_115),
    "black-forest-labs/FLUX.2-dev": (("Mistral-Small-3.2",), 3 * 5120, 32.22, 84_046_115),
    "meituan-longcat/LongCat-Image-Edit": (("Qwen2.5-VL-7B",), 3584, 6.27, 83_819_683),
    "Qwen/Qwen-Image-2.1": (("Qwen3-VL-8B",), 4096, 7.12, 337_740_404),
    "Qwen/Qwen-Image-Edit": (("Qwen2.5-VL-7B",), 3584, 20.43, 126_892_531),
    "Qwen/Qwen-Image-Edit-2509": (("Qwen2.5-VL-7B",), 3584, 20.43, 126_892_531),
    "Qwen/Qwen-Image-Edit-2511": (("Qwen2.5-VL-7B",), 3584, 20.43, 126_892_531),
}


def built(kind, settings):
    with torch.device("meta"):
        return kind(**settings)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def encoder():
    """Parameters of an encoder of this name, built as this class."""
    found = {}

    def count(kind, name):
        if name not in found:
            found[name] = size(built(kind, {"config": kind.config_class(**ENCODERS[name])}))
        return found[name]

    return count


@pytest.fixture(scope="module")
def transformer():
    """A transformer of these settings: its parameters and the width of its text tokens."""
    found = {}

    def count(kind, settings, width):
        key = tuple(sorted(settings.items()))
        if key not in found:
            module = built(kind, settings)
            found[key] = size(module), module.config[width]
        return found[key]

    return count


def test_every_editor_is_checked_here():
    assert set(SIZES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_configurations_and_of_the_published_weights(
    name, encoder, transformer
):
    (kind, parts), (encoders, width, billions, autoencoder) = PUBLISHED[name], SIZES[name]
    kinds = {
        n: p.annotation
        for n, p in inspect.signature(kind.pipeline_class().__init__).parameters.items()
    }
    counted = {part: encoder(kinds[part], n) for part, n in zip(parts.text, encoders, strict=True)}
    assert parts.text == counted
    parameters, words = transformer(
        kinds["transformer"], parts.transformer, kind.text_width_setting
    )
    assert parameters / 1e9 == pytest.approx(billions, abs=0.005) and words == width
    assert size(built(kinds["vae"], parts.vae)) == autoencoder
    assert kinds["scheduler"](**parts.scheduler).config.use_dynamic_shifting


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_policy_takes_by_default_is_known(kind):
    assert kind.hub_id in kind.published
    whole = kind.blueprint(PolicyConfig(kind.model, resolution=(64, 64)))  # nothing is downloaded
    assert whole.blocks >= 20


@pytest.mark.parametrize(
    "model, name, distilled",
    [
        ("klein", "FLUX.2-klein-4B", True),
        ("klein", "FLUX.2-klein-base-4B", False),
        ("klein", "FLUX.2-klein-9B", True),
        ("klein", "FLUX.2-klein-base-9B", False),
        ("klein-kv", "FLUX.2-klein-9b-kv", True),
    ],
)
def test_distilled_weights_refuse_guidance(model, name, distilled):
    config = PolicyConfig(
        model=model, weights=f"black-forest-labs/{name}", guidance=4.0, resolution=(64, 64)
    )
    if distilled:
        with pytest.raises(ConfigError, match="policy.guidance: 4.0 .*distilled"):
            policy_class(model).blueprint(config)
    else:
        assert policy_class(model).blueprint(config).policy.config.guidance == 4.0


def test_the_latest_qwen_editor_modulates_conditions_apart():
    def apart(name):
        settings = PUBLISHED[name][1].transformer | {"num_layers": 1}
        return built(diffusers.QwenImageTransformer2DModel, settings).config.zero_cond_t

    assert [apart(f"Qwen/Qwen-Image-Edit-{when}") for when in ("2509", "2511")] == [False, True]
