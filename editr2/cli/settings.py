"""A run's settings from a command line: defaults, `--preset`, `--config`, then flags."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from editr2.cli.flags import Arguments, Flags, Option, values_of
from editr2.cli.loading import load_libraries
from editr2.config.fields import Wrong, field_problems
from editr2.config.paths import from_file
from editr2.config.presets import PRESETS, preset_config, replace_nested
from editr2.config.rules import folder_problem
from editr2.config.settings import Config, RewardConfig, RewardUse
from editr2.errors import ConfigError
from editr2.recipes import config_file

C = TypeVar("C", bound=Config)
S = TypeVar("S")

Examples = Sequence[tuple[str, str]]

CONFIG = (
    "a YAML file of settings, or a recipe's name (editr2 recipes); flags go before it, and paths "
    "of what it reads are relative to it"
)


def run_config(
    prog: str,
    description: str,
    arguments: Arguments,
    extra: Sequence[tuple[str, dict]] = (),
    *,
    strict: bool = True,
    named: bool = False,
    examples: Examples = (),
    common: Sequence[str] = (),
) -> tuple[Config, dict[str, Any]]:
    """(Config, the values of `extra` flags) from defaults, `--preset`, `--config` and flags, in
    this order.

    named: the command takes `--policy PATH|ID`, whose settings come behind `--preset`; its model,
    weights and adapters are taken before those of `--config`. The values have `policy`, the text,
    and `notes`, lines for the terminal.

    strict: raises `ConfigError` for the first value that its field does not accept, with the file's
    line where it is from one. Otherwise such values are left as they are, for `config_problems` to
    say all of them.

    examples, common: as `Flags` has them.
    """
    return schema_config(
        Config,
        prog,
        description,
        arguments,
        extra,
        strict=strict,
        named=named,
        examples=examples,
        common=common,
    )


def schema_config(
    schema: type[C],
    prog: str,
    description: str,
    arguments: Arguments,
    extra: Sequence[tuple[str, dict]] = (),
    *,
    strict: bool = True,
    named: bool = False,
    own: Sequence[str] = (),
    examples: Examples = (),
    common: Sequence[str] = (),
) -> tuple[C, dict[str, Any]]:
    """As `run_config`, of settings that have more fields. own: dotted names that the command
    decides about, whatever `--policy` comes with."""
    from editr2.config.yaml import check_keys, load_yaml, place_of

    flags = Flags(prog, description, examples, common)
    flags.short["--data"] = "--data.path"
    flags.add("--config", path=True, help=CONFIG)
    flags.add("--preset", help=f"the settings of a published method: {', '.join(PRESETS)}")
    if named:
        flags.add("--policy", path=True, help=NAMED)
    for name, options in extra:
        flags.add(name, **options)
    flags.settings(schema)
    found = flags.given(arguments)
    load_libraries()
    beside = values_of(flags.own(), [(option, text) for option, text in found if not option.group])
    file = beside.pop("config")
    file = None if file is None else config_file(file)
    values, lines = ({}, {}) if file is None else load_yaml(file)
    config = _as(schema, preset_config(beside.pop("preset"), _model(values, found)))
    if file is not None:
        check_keys(values, lines, schema, file)
        values = from_file(values, schema, file, lines, _options_of)
    if named:
        config, beside["notes"] = _edited_by(config, beside["policy"], values, found, own)
    if file is not None:
        config = replace_nested(config, values)
        for key, problem in field_problems(config) if strict else ():
            raise ConfigError(f"{place_of(file, lines, key)}: {problem}")
    for option, text in found:
        if not option.group:
            continue
        try:
            value = option.read(text, check=strict)
        except Wrong as wrong:
            if strict:
                raise ConfigError(wrong.problem) from None
            value = text
        config = _with(config, option.key.split("."), value)
    return config, beside


def _model(values: dict[str, Any], found: Sequence[tuple[Option, str]]) -> str | None:
    """The `policy.model` that flags, else a file, ask for, whatever it is; None where none does."""
    policy = values.get("policy")
    model = policy.get("model") if isinstance(policy, dict) else None
    said = {option.key: text for option, text in found}.get("policy.model", model)
    return said if isinstance(said, str) else None


def file_config(
    schema: type[S],
    prog: str,
    description: str,
    arguments: Arguments,
    extra: Sequence[tuple[str, dict]] = (),
    *,
    examples: Examples = (),
    common: Sequence[str] = (),
) -> tuple[S, dict[str, Any]]:
    """(settings, the values of `extra` flags) of a command whose settings are none of a run's, from
    defaults, `--config` and flags, in this order. Raises `ConfigError` for the first value that its
    field does not accept, with the file's line where it is from one."""
    from editr2.config.yaml import check_keys, load_yaml, place_of

    flags = Flags(prog, description, examples, common)
    flags.short["--data"] = "--data.path"
    flags.add("--config", path=True, help=CONFIG)
    for name, options in extra:
        flags.add(name, **options)
    flags.settings(schema)
    found = flags.given(arguments)
    load_libraries()
    beside = values_of(flags.own(), [(option, text) for option, text in found if not option.group])
    config, file = schema(), beside.pop("config")
    if file is not None:
        file = config_file(file)
        values, lines = load_yaml(file)
        check_keys(values, lines, schema, file)
        values = from_file(values, schema, file, lines, _options_of)
        config = replace_nested(config, values)
        for key, problem in field_problems(config):
            raise ConfigError(f"{place_of(file, lines, key)}: {problem}")
    for option, text in found:
        if option.group:
            try:
                config = _with(config, option.key.split("."), option.read(text))
            except Wrong as wrong:
                raise ConfigError(wrong.problem) from None
    return config, beside


def out_flag(default: str, holds: str) -> tuple[str, dict[str, Any]]:
    """`--out` of a command that trains nothing: what `out` of --config names is a training's. Not
    given it is None: the command takes the first of `default`, `default`-2, ... that is free."""
    how = {"path": True, "check": folder_problem, "what": "a folder"}
    text = f"{holds}; else {default}, or {default}-2, ... where that is taken"
    return "--out", {**how, "help": text}


NAMED = (
    "what edits: the folder of a run, an export, a saved policy or a diffusers pipeline, or a hub "
    "id; with it comes how it was sampled, which --config and flags change (docs/editors.md)"
)


def tell(notes: Sequence[str], main: bool) -> None:
    """Lines about what `--policy` named, on standard error, by the first of several processes."""
    for note in notes if main else ():
        print(f"note: {note}", file=sys.stderr)


def _edited_by(
    config: C,
    text: str | None,
    values: dict[str, Any],
    found: Sequence[tuple[Option, str]],
    own: Sequence[str] = (),
) -> tuple[C, list[str]]:
    """The configuration with the settings of the editor that a text names, and lines about it.
    values: of `--config`, from which what the text is in place of is taken out. found: the flags
    given."""
    if text is None:
        return config, []
    from editr2.policies.found import OF_WEIGHTS, editor_of

    given = {option.key: said for option, said in found}
    if "policy.weights" in given:
        raise ConfigError(
            f"--policy.weights: {given['policy.weights']} (accepted with --policy: none; that says "
            f"which)"
        )
    editor = editor_of(text, given.get("policy.model"))
    notes = [editor.note]
    mine = values.get("policy") or {}
    if over := [name for name in ("model", "weights") if name in mine]:
        notes.append(f"--policy is taken, not policy.{' and policy.'.join(over)} of --config")
    for name in OF_WEIGHTS & set(mine):
        del mine[name]
    settings = {
        section: {k: v for k, v in of.items() if f"{section}.{k}" not in own}
        for section, of in editor.settings.items()
    }
    return replace_nested(config, settings), notes


def _options_of(schema: Any, values: Mapping[str, Any]) -> type[Any] | None:
    """Of a reward in a file, the dataclass of its options; None of one that is not in our table,
    whose module is not imported for it."""
    from editr2.config.plugins import resolve
    from editr2.rewards.table import REWARDS

    rewards = issubclass(schema, RewardConfig | RewardUse)
    name = values.get("name") if rewards else getattr(schema, "OPTIONS_OF", None)
    if name not in REWARDS or values.get("function") is not None:
        return None
    return getattr(resolve("reward.name", name, REWARDS), "Options", None)


def _as(schema: type[C], config: Config) -> C:
    """The configuration with the fields of a schema that has more of them, or other defaults."""
    if schema is Config:
        return config  # type: ignore[return-value]
    default = vars(Config())
    return schema(**{name: v for name, v in vars(config).items() if v != default[name]})


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    """A copy with the value at a path of fields, or of a field and an entry of its mapping."""
    name, *rest = path
    if isinstance(config, dict):
        return {**config, ".".join(path): value}
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
