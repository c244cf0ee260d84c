"""A run's settings from a command line: defaults, `--preset`, `--config`, then flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from editr2.cli.flags import Arguments, Flags, values_of
from editr2.config.fields import Wrong, field_problems
from editr2.config.presets import PRESETS, preset_config, replace_nested
from editr2.config.settings import Config
from editr2.errors import ConfigError

C = TypeVar("C", bound=Config)


def run_config(
    prog: str,
    description: str,
    arguments: Arguments,
    extra: Sequence[tuple[str, dict]] = (),
    *,
    strict: bool = True,
) -> tuple[Config, dict[str, Any]]:
    """(Config, the values of `extra` flags) from defaults, `--preset`, `--config` and flags, in
    this order.

    strict: raises `ConfigError` for the first value that its field does not accept, with the file's
    line where it is from one. Otherwise such values are left as they are, for `config_problems` to
    say all of them.
    """
    return schema_config(Config, prog, description, arguments, extra, strict=strict)


def schema_config(
    schema: type[C],
    prog: str,
    description: str,
    arguments: Arguments,
    extra: Sequence[tuple[str, dict]] = (),
    *,
    strict: bool = True,
) -> tuple[C, dict[str, Any]]:
    """As `run_config`, of settings that have more fields."""
    from editr2.config.yaml import check_keys, load_yaml, place_of

    description += " `--data PATH` is short for `--data.path PATH`."
    flags = Flags(prog, description)
    flags.add("--preset", help=f"start from a preset: {', '.join(PRESETS)}")
    flags.add("--config", path=True, help="a YAML file with any of the fields below")
    for name, options in extra:
        flags.add(name, **options)
    flags.settings(schema)
    found = flags.given(
        [
            f"--data.path{w[6:]}" if w == "--data" or w.startswith("--data=") else w
            for w in arguments
        ]
    )
    beside = values_of(flags.own(), [(option, text) for option, text in found if not option.group])
    config = _as(schema, preset_config(beside.pop("preset")))
    file = beside.pop("config")
    if file is not None:
        values, lines = load_yaml(file)
        check_keys(values, lines, schema, file)
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
