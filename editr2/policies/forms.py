"""The forms in which a trained policy is exported, each with the loader that its users call.

Adapters are written at strength 1, alpha / rank being part of B, so that loaders that do not read
alpha apply them as trained (`editr2.policies.adapters`).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from editr2.config import PolicyConfig
from editr2.policies.adapters import TRANSFORMER, fold_strength
from editr2.policies.base import Policy, device_of, with_module
from editr2.policies.libraries import quiet_libraries, stock_pipeline
from editr2.policies.recorded import without_adapters
from editr2.policies.tensor_files import write_tensors
from editr2.policies.weights import merge_lora


class Form(Protocol):
    """A way to write a policy. library: that its users load it with, as the hub calls it."""

    @property
    def library(self) -> str: ...

    def write(self, policy: Any, folder: Path) -> float:
        """Fills a folder and leaves the policy with exactly the numbers that a reload will have.
        Returns the largest relative change of a number of a LoRA's B by taking alpha / rank into
        it; 0 where that is a power of two."""

    def load(self, base: Any, folder: Path) -> Policy:
        """The policy of that folder by the loader that its users call, on the base weights where
        the folder does not hold them."""

    def code(self, this: str, origin: str | None, dtype: str) -> list[str]:
        """Lines of Python that load it. this: the folder. origin: the base weights. dtype: torch's
        name of the one that it was trained in."""

    def also(self, this: str) -> str:
        """Another way, in words; empty where there is none."""


@dataclass(frozen=True)
class OwnFolder:
    """What `policy.weights` takes. make: `from_config` of the policy's class, with these
    settings."""

    make: Callable[[PolicyConfig], Any]
    config: PolicyConfig
    lines: Callable[[str], Sequence[str]]
    library: ClassVar[str] = "editr2"

    def write(self, policy: Any, folder: Path) -> float:
        merge_lora(policy.module)
        policy.save(folder)
        return 0.0

    def load(self, base: Any, folder: Path) -> Policy:
        loaded: Policy = self.make(without_adapters(self.config, str(folder)))
        loaded.module.to(device_of(base.module))
        return loaded

    def code(self, this: str, origin: str | None, dtype: str) -> list[str]:
        return list(self.lines(this))

    def also(self, this: str) -> str:
        return f"or `--policy.weights {this}` of `editr2`."


@dataclass(frozen=True)
class PeftAdapter:
    """`adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained(module,
    folder)`. lines: of Python that make `policy`, from the base weights. around: a module of others
    that has ours and more, in words; its layers are then named one by one, since an expression may
    match what is beside ours there."""

    lines: Sequence[str]
    around: str = ""
    library: ClassVar[str] = "peft"

    def write(self, policy: Any, folder: Path) -> float:
        from peft import get_peft_model_state_dict

        folding = fold_strength(policy.module)
        layers = get_peft_model_state_dict(policy.module)
        tensors = {
            f"base_model.model.{name}": p.detach().cpu().contiguous() for name, p in layers.items()
        }
        write_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(policy.module.peft_config["default"])
        if self.around:
            config.target_modules = sorted({name.partition(".lora_")[0] for name in layers})
        config.save_pretrained(folder)
        return folding

    def load(self, base: Any, folder: Path) -> Policy:
        from peft import PeftModel

        PeftModel.from_pretrained(
            base.module, folder
        )  # puts the adapters inside the module it is given
        return base

    def code(self, this: str, origin: str | None, dtype: str) -> list[str]:
        put_on = f'PeftModel.from_pretrained(policy.module, "{this}")'
        return ["from peft import PeftModel", *self.lines, put_on]

    def also(self, this: str) -> str:
        if not self.around:
            return ""
        return f'`PeftModel.from_pretrained(model, "{this}")` puts it on {self.around}, too.'


@dataclass(frozen=True)
class DiffusersLora:
    """`pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`, in the adapters' own
    precision. pipeline: its class in diffusers."""

    pipeline: str
    library: ClassVar[str] = "diffusers"

    def write(self, policy: Any, folder: Path) -> float:
        policy.save(folder)
        return fold_strength(policy.module)

    def load(self, base: Any, folder: Path) -> Policy:
        with quiet_libraries():  # diffusers warns that a LoRA without text encoders has none
            if self._by_pipeline:
                base.pipe.load_lora_weights(folder)
            else:
                base.pipe.transformer.load_lora_adapter(folder, use_safetensors=True)
        return base

    @property
    def _by_pipeline(self) -> bool:
        """Whether the pipeline loads adapters; its transformer does in any case."""
        return hasattr(stock_pipeline(self.pipeline), "load_lora_weights")

    def code(self, this: str, origin: str | None, dtype: str) -> list[str]:
        made = pipeline_lines(self.pipeline, origin, dtype)
        if self._by_pipeline:
            return [*made, f'pipe.load_lora_weights("{this}")']
        return [*made, f'pipe.transformer.load_lora_adapter("{this}", use_safetensors=True)']

    def also(self, this: str) -> str:
        return ""


@dataclass(frozen=True)
class DiffusersFolder:
    """All of a pipeline, for `DiffusionPipeline.from_pretrained(folder)` and `policy.weights`: the
    trained transformer, and of the base pipeline's files every other component's. pipeline: its
    class in diffusers."""

    pipeline: str
    library: ClassVar[str] = "diffusers"

    def write(self, policy: Any, folder: Path) -> float:
        merge_lora(policy.module)
        source = policy.pipe.name_or_path
        source = Path(source if Path(source).is_dir() else type(policy.pipe).download(source))
        shutil.copy(source / "model_index.json", folder)
        for name in policy.pipe.components:
            if name != TRANSFORMER and (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
        policy.module.save_pretrained(folder / TRANSFORMER)
        return 0.0

    def load(self, base: Any, folder: Path) -> Policy:
        dtypes, device = (
            {TRANSFORMER: base.module.dtype, "default": base.compute_dtype},
            base.device,
        )
        base.module.to("cpu")  # two transformers are more than a device may hold
        pipe = base.load_pipeline(str(folder), torch_dtype=dtypes)
        return with_module(base, pipe.transformer.to(device))

    def code(self, this: str, origin: str | None, dtype: str) -> list[str]:
        return pipeline_lines(self.pipeline, this, dtype)

    def also(self, this: str) -> str:
        return ""


def pipeline_lines(pipeline: str, source: str | None, dtype: str) -> list[str]:
    """Python that makes `pipe`."""
    return [
        "import torch",
        f"from diffusers import {pipeline}",
        "",
        f'pipe = {pipeline}.from_pretrained("{source}", torch_dtype=torch.{dtype})',
    ]
