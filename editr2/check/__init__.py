"""Before a run: is anything wrong with it, what will it do, does it fit, how long does it take.
`editr2 check`.

No weights of an editor are loaded and nothing is downloaded; rewards are asked for real, but for
large models in process that a GPU is needed for. The rules are the trainer's own; `editors` runs
the policies' own code over tensors without data and `meter` counts it; `estimate` sums up, with
`devices` for the speed.

Error seen (2026-11-21). Floating-point operations are exact (tests/test_check.py). Tensors alive in
a training step of a tiny kontext, against the profiler: 0.03 % off, 0.5 % with checkpointing.
Seconds of the embedded model's iteration on one CPU thread, estimated and measured: rollout 4.2 and
4.3, without intents 2.2 and 3.1; training 6.7 and 2.8 (the estimate replays every turn, the trainer
only those with an advantage). A klein of full size on one busy CPU thread (`python -m bench
full_size`): seconds 1.2 times the estimate (1.6 at tiny sizes), memory 0.99 in rollout and 1.13 in
training. A layer of BAGEL at full width in bfloat16 (`python -m bench full_layer`, 512 x 512, two
turns, LoRA of rank 64, guidance 4 and 2): floating-point operations exact in every step, memory of
training and of a velocity 0.3 % off, of an intent's scoring 1.27 and of decoding 1.25 times the
estimate (workspaces of a CPU's kernels). Bytes of compiled blocks, against what Inductor says of
its own kernels (2026-11-28, torch 2.13 for a CPU, FLUX's two kinds of block at full width with
adapters of rank 64, what 96 + 48 more tokens add): forward -11 and +7 %, forward and backward 0 and
+19 %. Of FLUX at 1024 x 1024 with a LoRA on an H100 that makes compiling 1.53 times as fast;
published is 1.55. At 512 x 512 and with adapters that cast it promises more, since more of the time
is elementwise: no one has published that. No GPU was measured here: what FSDP2 holds whole at once
is from reading torch 2.13's code, what gathering takes from the sheets. Published models' settings
and the sheets' figures are written down here, not read from their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from editr2.config import Config
from editr2.config.fields import mended
from editr2.errors import UserError
from editr2.policies.configured import settled_branches
from editr2.rewards.load import load_eval_reward, load_reward
from editr2.rewards.panel import Panel
from editr2.rl.compiled_step import check_capture
from editr2.rl.credit import credit_notes
from editr2.rl.rules import check_pruning, run_problems
from editr2.rl.sampler import eval_sampler, rollout_sampler
from editr2.rl.sessions import demands, sessions_for
from editr2.run.checkpoint import recorded_settings
from editr2.sessions import validate
from editr2.sessions.source import SessionSource

if TYPE_CHECKING:
    from editr2.check.devices import Device
    from editr2.check.editors import Editor
    from editr2.check.judges import Measured
    from editr2.check.levers import Case

LOOKED_AT = 256
"""Sessions of an endless source that stand for all of them."""


@dataclass(frozen=True)
class Report:
    """problems: a line each; lines: what will run, empty with problems. fits: whether the device
    has the memory."""

    problems: list[str]
    lines: list[str]
    fits: bool = False


def preflight(config: Config, gpu: str = "h100", processes: int = 1) -> Report:
    """Everything that would stop the run before its first iteration, or else what it will be on
    `processes` devices called `gpu` (`editr2.check.devices`). Raises `ConfigError` for an
    unknown device."""
    from editr2.check.devices import find_device

    device = find_device(gpu)
    given, config = (
        config,
        mended(config),
    )  # what is wrong by itself is said once, and not met again
    problems: list[str] = []

    def found(make: Any) -> Any:
        try:
            return make()
        except UserError as error:
            problems.append(str(error))
        return None

    def opened() -> Editor:
        from editr2.check.editors import open_editor

        return open_editor(settled_branches(config.policy, processes))

    def looked_at(panel: Panel) -> bool:
        before = len(problems)
        found(panel.quick_look)
        return len(problems) == before

    reward = found(lambda: load_reward(config.reward))
    apart = found(lambda: load_eval_reward(config.eval))
    sound = [panel for panel in (reward, apart) if panel and looked_at(panel)]
    editor = found(opened)
    own, cannot_pack = (editor.own, editor.cannot_pack) if editor else (None, None)
    names = reward.names if reward else None
    problems += run_problems(
        given,
        names,
        own,
        cannot_pack=cannot_pack,
        processes=processes,
        command="check",
        apart=apart.names if apart else (),
    )
    if reward:
        found(lambda: check_pruning(config, reward))
    found(
        lambda: check_capture(config.rollout.capture, torch.device("cuda" if device.gpu else "cpu"))
    )
    source = None
    if editor:
        data = found(lambda: _data_problems(config, editor))
        problems += data or []
        if data == []:
            wants = {name for panel in (reward, apart) if panel for name in panel.wants}
            source = found(lambda: sessions_for(config, editor.policy, wants=wants))
    from editr2.check.judges import measured

    judges = (
        found(lambda: measured(reward, source[0], device)) if source and reward in sound else None
    )
    evaluators = (
        found(lambda: measured(apart, source[0], device)) if source and apart in sound else None
    )
    if problems or not (source and editor and reward):
        return Report(list(dict.fromkeys(problems)), [])
    from editr2.check.levers import settle
    from editr2.check.text import levers, render

    case = _case(config, editor, source, device, processes, judges or (), evaluators or ())
    config, settled = settle(config, device.gpu, lambda _: case, processes=processes)
    option = case.of(config, compared=True)
    lines = render(config, case, option, settled)
    notes = [
        *reward.lacking(source.sessions or [source[i] for i in range(LOOKED_AT)]),
        *credit_notes(config.credit, reward.names),
    ]
    if device.gpu:
        notes += levers(case, option)
    return Report([], [*lines[:-1], *notes, *lines[-1:]], option.fits())


def _case(
    config: Config,
    editor: Editor,
    source: SessionSource,
    device: Device,
    processes: int,
    judges: Sequence[Measured] = (),
    apart: Sequence[Measured] = (),
) -> Case:
    """What is estimated; the editor's instructions are as long as the sessions'."""
    from editr2.check.levers import Case

    sessions = source.sessions or [source[i] for i in range(LOOKED_AT)]
    editor.see(sessions)
    own = editor.own
    samplers = rollout_sampler(config.rollout, own), eval_sampler(config.rollout, config.eval, own)
    turns = [len(s.turns) for s in sessions], [len(s.turns) for s in source.shown]
    return Case(editor, device, samplers, turns, processes, judges, sessions, apart)


def settled_for_device(
    config: Config, device: torch.device, processes: int, insist: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """The configuration without `auto` for a run on this device, and what is to be said of it. A
    run that goes on in its folder keeps what it recorded, but for settings that are insisted on, by
    name or section. Raises the `UserError` of an editor or of data that cannot be opened, where an
    estimate is needed."""
    from editr2.check.levers import PLAIN, autos, settle

    if not autos(config):
        return config, []
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else device.type
    recorded, where = {}, ""
    if found := recorded_settings(Path(config.out) / "checkpoints"):
        settings, before = found
        flat = {
            f"{section}.{key}": value
            for section, values in settings.items()
            if isinstance(values, dict)
            for key, value in values.items()
        }
        kept = {key for key in PLAIN if not {key, key.partition(".")[0]} & set(insist)}
        recorded = {key: PLAIN[key] for key in kept} | {
            key: value for key, value in flat.items() if key in kept
        }
        where = "" if before == name else f" (on {before}; this is {name})"

    def case(plain: Config) -> Case:
        from editr2.check.devices import device_at_hand
        from editr2.check.editors import open_editor
        from editr2.check.judges import unmeasured

        editor = open_editor(settled_branches(plain.policy, processes))
        memory = torch.cuda.get_device_properties(device).total_memory
        panels = [load_reward(plain.reward), load_eval_reward(plain.eval)]
        wants = {name for panel in panels if panel for name in panel.wants}
        source = sessions_for(plain, editor.policy, wants=wants)
        here = device_at_hand(name, memory)
        judges = [unmeasured(panel, source[0]) if panel else [] for panel in panels]
        return _case(plain, editor, source, here, processes, *judges)

    return settle(config, gpu, case, recorded, where, processes)


_SHOWN = 8


def _data_problems(config: Config, editor: Editor) -> list[str]:
    """Of all session files, the first few of each; those past `data.limit` count, too."""
    paths = dict.fromkeys(path for path in (config.data.path, config.data.heldout) if path)
    wanted = demands(config, editor.policy)
    shown: list[str] = []
    for path in paths:
        problems = validate(path, resize=config.data.resize, **wanted)
        shown += problems[:_SHOWN]
        if (
            len(problems) > _SHOWN
        ):  # one missing setting is a problem of every image, and a set may have 50,000
            shown.append(f"{path}: {len(problems) - _SHOWN} more problems after these {_SHOWN}")
    return shown


__all__ = ["Report", "preflight", "settled_for_device"]
