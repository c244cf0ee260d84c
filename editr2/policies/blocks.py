"""How the repeated blocks of a transformer run: which of them are computed again in the
backward pass, and whether they are compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from editr2.config import PolicyConfig
from editr2.errors import ConfigError, one_line

FORMS = 64
"""Compiled forms of a block at most. One is made for each shape, and shapes are few: batches of a
rollout, of training and what is left over of either, with and without gradient. torch's own limit
is 8, behind which it silently runs plainly."""


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """What repeats, by the class's own list (as diffusers has it), of all kinds, in the order in
    which they run."""
    names = set(getattr(module, "_repeated_blocks", None) or ())
    # Where weights are shared out FSDP2 has put its own name before a block's.
    return [part for part in module.modules() if type(part).__name__.removeprefix("FSDP") in names]


def recomputed(how: int | str, blocks: int) -> int:
    """How many of so many blocks `policy.gradient_checkpointing` computes again. `auto` that nobody
    settled is all of them, which certainly takes least. Raises `ConfigError` for more than there
    are."""
    if isinstance(how, str):
        return 0 if how == "off" else blocks
    if how > blocks:
        raise ConfigError(
            f"policy.gradient_checkpointing: {how} (accepted with these weights: at most {blocks}, "
            f"the blocks of the transformer)"
        )
    return how


def recompute_blocks(module: Any, how: int | str) -> None:
    """Sets which blocks' activations are computed again.

    A number means the first so many. The backward pass comes to them last, when it has freed
    all that the later blocks kept: what is computed again of one block then never lies on top of
    what others keep, as it would with any other choice.
    """
    if how in ("off", 0):
        return
    blocks = repeated_blocks(module)
    first = recomputed(how, len(blocks))
    if first == len(blocks):
        module.enable_gradient_checkpointing()
        return
    for place, block in enumerate(blocks):  # on the block, which a copy of the module copies
        vars(block)["computed_again"] = place < first

    def again(block: Any, *args: Any) -> Any:
        if block.computed_again:
            return torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=False)
        return block(*args)

    module.enable_gradient_checkpointing(again)


def compiles(config: PolicyConfig, cuda: bool) -> bool:
    """What `policy.compile: auto` is on a device. Off where bitsandbytes' layers break every
    graph."""
    if config.compile != "auto":
        return config.compile == "on"
    return cuda and config.quantize != "4bit"


def compile_errors() -> tuple[type[Exception], ...]:
    exc = torch._dynamo.exc
    # More recompilations than dynamo allows are no TorchDynamoException, and not in every torch an
    # error of their own.
    return exc.TorchDynamoException, getattr(
        exc, "FailOnRecompileLimitHit", exc.TorchDynamoException
    )


@dataclass
class _Together:
    """The compiled blocks of one transformer. strict: a failure is an error. cuda: only what lies
    on a CUDA device is compiled."""

    blocks: list[Any]
    strict: bool
    cuda: bool

    def give_up(self, error: BaseException) -> None:
        if self.strict:
            raise ConfigError(
                f"policy.compile: on (accepted here: off, auto; torch.compile: {one_line(error)})"
            ) from error
        for block in self.blocks:
            block._compiled_call_impl = None
            for name in _parts(block):
                vars(block).pop(name, None)
        warnings.warn(
            f"policy.compile: auto: blocks run plainly; torch.compile: {one_line(error)}",
            stacklevel=2,
        )


class _Compiled:
    """The compiled form of a block's call, or of a part of it; the plain one from the first failure
    on."""

    def __init__(
        self, plain: Callable[..., Any], run: Callable[..., Any], together: _Together
    ) -> None:
        self.plain, self.run, self.together = plain, run, together

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.together.cuda and not any(x.is_cuda for x in _tensors((*args, *kwargs.values()))):
            return self.plain(*args, **kwargs)
        try:
            return self.run(*args, **kwargs)
        except compile_errors() as error:
            self.together.give_up(error)
        return self.plain(*args, **kwargs)


def _tensors(given: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in given:
        if isinstance(x, dict):
            yield from _tensors(x.values())
        elif isinstance(x, torch.Tensor):
            yield x


def _parts(block: Any) -> Sequence[str]:
    """Methods of a block that are compiled in place of all of it, by its class's own list."""
    return getattr(type(block), "compiled_parts", ())


def compile_blocks(module: nn.Module, *, strict: bool, cuda: bool = False) -> None:
    """Compiles every repeated block, one form for each shape: were sizes to become symbols after a
    second one, a block could be computed again in another form than it ran in (sharded blocks meet
    idle forwards of one token between the two). A block that names `compiled_parts`
    is one whose sequences have any length: these parts are compiled with sizes that are symbols
    from the first on, so that a form never changes. strict: what cannot be compiled is a
    `ConfigError` at the first forward; else blocks run plainly from then on, with a warning. cuda:
    only what lies on a CUDA device is compiled, else it runs plainly."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, FORMS)
    together = _Together(repeated_blocks(module), strict, cuda)
    for block in together.blocks:
        if names := _parts(block):
            for name in names:
                plain = MethodType(getattr(type(block), name), block)
                vars(block)[name] = _Compiled(plain, torch.compile(plain, dynamic=True), together)
            continue
        block.compile(dynamic=False)
        block._compiled_call_impl = _Compiled(block._call_impl, block._compiled_call_impl, together)


def run_as_configured(module: Any, config: PolicyConfig) -> None:
    """Blocks computed again and compiled by the policy's settings. The last thing that is done to a
    module before it is brought to its device."""
    recompute_blocks(module, config.gradient_checkpointing)
    if compiles(config, torch.cuda.is_available()):
        auto = config.compile == "auto"
        compile_blocks(module, strict=not auto, cuda=auto)


def may_run_plainly(module: nn.Module) -> None:
    """From here on a block that cannot be compiled is no error."""
    for block in repeated_blocks(module):
        for compiled in vars(block).values():
            if isinstance(compiled, _Compiled):
                compiled.together.strict = False
