"""The words that a model is asked with: ours, a user's, or those of the project that published the
judge or the policy, read from a checkout of it at run time.

Prompts are the files of a folder, with fields in braces: `{edit}`. Where a file ends in `{answer}`,
a line that says how to answer is put there, which differs by the way in which an answer is read
(a judge's `ask`); one without it says so itself. A setting replaces them:

- a folder with files of these names (`.md` or `.txt`), all or some of them;
- a file, where there is one prompt; or a YAML or JSON file, name -> text;
- a checkout of the published project, for those of which is known where its prompts are (`Place`),
  or the one file of it that has them all. Its Python files are parsed and never run; only the
  texts are taken.

None of the projects' texts is in this package. A judge that was tuned on its own prompt says other
things to another one: scores by other prompts than the published ones are not comparable with
published scores, which `facts` says.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from editr2.errors import ConfigError, one_line, shown

_ENDINGS = (".md", ".txt")
_FIELD = re.compile(r"\{([a-z_]+)\}")
ANSWER = "{answer}"
_SAME = {"answer", "high"}
"""Fields that are the same for every edit."""

OURS = "ours"


@dataclass(frozen=True)
class Place:
    """Where a project keeps a prompt.

    file: in its checkout. names: of constants of that module, or keys of a JSON file's object,
    joined by line feeds. function, parts, call, nth: instead of names, the nth f-string in a
    function that has exactly these expressions and stands in a call of this name, or without one is
    assigned. fields: what stands in the text -> the field it is for us. doubled: whether
    braces are written twice, as `str.format` has it. swaps: texts to replace, as the project does
    before it asks.
    """

    file: str
    names: tuple[str, ...] = ()
    function: str = ""
    parts: tuple[str, ...] = ()
    call: str = ""
    nth: int = 0
    fields: Mapping[str, str] = field(default_factory=dict)
    doubled: bool = True
    swaps: tuple[tuple[str, str], ...] = ()

    def text(self, checkout: Path) -> str:
        """The prompt, with our fields. Raises `ConfigError` where it is not there."""
        path = checkout / self.file
        try:
            said = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                found = self._joined(json.loads(said))
            else:
                tree = ast.parse(said)
                found = self._constants(tree) if self.names else self._inline(tree)
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(
                f"prompts: {shown(str(path))}: {one_line(error)} (accepted: the checkout's file)"
            ) from error
        if found is None:
            wanted = ", ".join(self.names) or f"{self.function}()"
            raise ConfigError(
                f"prompts: {shown(str(path))}: no prompt in {wanted} (accepted: a checkout of the "
                f"commit that the documentation names, or a folder of files)"
            )
        for old, new in self.swaps:
            found = found.replace(old, new)
        for theirs, ours in self.fields.items():
            found = found.replace(theirs, "{" + ours + "}")
        return found.replace("{{", "{").replace("}}", "}") if self.doubled else found

    def _constants(self, tree: ast.Module) -> str | None:
        texts = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                texts[node.targets[0].id] = _text(node.value)
        return self._joined(texts)

    def _joined(self, texts: object) -> str | None:
        given = texts if isinstance(texts, dict) else {}
        found = [text for name in self.names if isinstance(text := given.get(name), str)]
        return "\n".join(found) if len(found) == len(self.names) else None

    def _inline(self, tree: ast.Module) -> str | None:
        """Of an f-string, `{expression}` is a field of the expression's text."""
        found = [
            one
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == self.function
            for node in ast.walk(function)
            for given in self._given(node)
            for one in ast.walk(given)
            if isinstance(one, ast.JoinedStr) and _parts(one) == self.parts
        ]
        return _text(found[self.nth]) if self.nth < len(found) else None

    def _given(self, node: ast.AST) -> list[ast.expr]:
        if self.call:
            called = isinstance(node, ast.Call) and _called(node) == self.call
            return node.args if isinstance(node, ast.Call) and called else []
        return [node.value] if isinstance(node, ast.Assign) else []


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _parts(text: ast.JoinedStr) -> tuple[str, ...]:
    return tuple(ast.unparse(v.value) for v in text.values if isinstance(v, ast.FormattedValue))


def _text(node: ast.expr) -> str | None:
    """A text that stands in code: a constant, an f-string, or a sum of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        pieces = []
        for value in node.values:
            if isinstance(value, ast.Constant):
                pieces.append(str(value.value))
            elif isinstance(value, ast.FormattedValue):
                pieces.append("{" + ast.unparse(value.value) + "}")
        return "".join(pieces)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    return None


@dataclass(frozen=True)
class Prompts:
    """The prompts of a reward or a policy. texts: by name. origin: `ours`, or whose they are."""

    texts: Mapping[str, str]
    origin: str

    @property
    def digest(self) -> str:
        """Of all texts; of other ones, another."""
        said = json.dumps(dict(self.texts), sort_keys=True)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    @property
    def facts(self) -> dict[str, str]:
        """For the header of a run."""
        facts = {"prompts": f"{self.origin} ({self.digest})"}
        if not self.origin.startswith("of the checkout"):
            facts["comparable"] = "not with published scores, which other prompts were asked for"
        return facts

    def __call__(self, name: str, **fields: object) -> tuple[str, str | None]:
        """A prompt with its fields filled in, and what `Asker` is told as its `tail`: None where
        ours belongs behind it, "" where it says itself how to answer."""
        text = self.texts[name].rstrip()
        tail = "" if not text.endswith(ANSWER) else None
        text = text.removesuffix(ANSWER).rstrip()
        return _FIELD.sub(lambda m: _filled(m, fields), text), tail


def _filled(match: re.Match[str], fields: Mapping[str, object]) -> str:
    name = match[1]
    return str(fields[name]) if fields.get(name) is not None else match[0]


@cache
def ours(folder: Path) -> Prompts:
    """The prompts that ship, of a folder."""
    files = sorted(folder.glob("*.md"))
    return Prompts({file.stem: file.read_text(encoding="utf-8") for file in files}, OURS)


def prompts_of(
    folder: Path,
    given: str | None,
    *,
    places: Mapping[str, Place] | None = None,
    fields: Mapping[str, str] | None = None,
) -> Prompts:
    """The prompts to ask with.

    Args:
        folder: of ours.
        given: what replaces them, as a user named it, or None for ours.
        places: where a published project keeps them.
        fields: what any of them may have in braces, beside what ours have.

    Raises `ConfigError`, naming what is wrong and what is accepted.
    """
    shipped = ours(folder)
    if given is None:
        return shipped
    path = Path(given).expanduser()
    checkout = _checkout(path, places or {})
    if path.is_dir():
        texts = _of_folder(path, shipped)
        if not texts and places and checkout is not None:
            texts, origin = _of_checkout(checkout, places)
        else:
            origin = "replaced" if set(texts) == set(shipped.texts) else _some(texts)
    elif places and checkout is not None:
        texts, origin = _of_checkout(checkout, places)
    elif path.is_file():
        texts = _of_file(path, shipped)
        origin = "replaced" if set(texts) == set(shipped.texts) else _some(texts)
    else:
        texts = {}
    if not texts:
        names = ", ".join(f"{key}.md" for key in shipped.texts)
        theirs = ", or a checkout of the published project" if places else ""
        raise ConfigError(
            f"prompts: {shown(given)}: none there (accepted: a folder with some of {names}; a YAML "
            f"or JSON file, name -> text{theirs})"
        )
    known = {one for text in shipped.texts.values() for one in _FIELD.findall(text)}
    known |= set(fields or ()) | {"answer"}
    for key, text in texts.items():
        _check(key, text, shipped.texts[key], known)
    return Prompts({**shipped.texts, **texts}, origin)


def _checkout(path: Path, places: Mapping[str, Place]) -> Path | None:
    """The checkout that a folder is, or that a file is the only one with prompts of."""
    files = {Path(place.file) for place in places.values()}
    if path.is_dir():
        return path if any((path / file).exists() for file in files) else None
    if len(files) == 1 and path.is_file():
        (file,) = files
        depth, whole = len(file.parts), path.absolute()
        if whole.parts[-depth:] == file.parts:
            return whole.parents[depth - 1]
    return None


def _of_checkout(path: Path, places: Mapping[str, Place]) -> tuple[dict[str, str], str]:
    texts = {key: place.text(path) for key, place in places.items()}
    return texts, f"of the checkout {path.name or 'here'}"


def _some(texts: Mapping[str, str]) -> str:
    return f"ours, with {', '.join(sorted(texts))} replaced"


def _check(key: str, text: str, shipped: str, known: set[str]) -> None:
    has = set(_FIELD.findall(text))
    if wrong := sorted(has - known):
        raise ConfigError(
            f"prompts: {key}: {{{wrong[0]}}} is no field (accepted: "
            f"{', '.join('{' + one + '}' for one in sorted(known))})"
        )
    if ANSWER in text.rstrip().removesuffix(ANSWER):
        raise ConfigError(f"prompts: {key}: {ANSWER} (accepted: at the end, once)")
    if set(_FIELD.findall(shipped)) - _SAME and not has - _SAME:
        said = ", ".join("{" + one + "}" for one in sorted(known - _SAME))
        raise ConfigError(
            f"prompts: {key}: no field, so it asks the same of every edit (accepted: {said})"
        )


def _of_folder(path: Path, shipped: Prompts) -> dict[str, str]:
    found = {}
    for key in shipped.texts:
        for ending in _ENDINGS:
            if (path / f"{key}{ending}").is_file():
                found[key] = _read(path / f"{key}{ending}")
    return found


def _of_file(path: Path, shipped: Prompts) -> dict[str, str]:
    text = _read(path)
    if path.suffix in _ENDINGS:
        if len(shipped.texts) > 1:
            raise ConfigError(
                f"prompts: {shown(str(path))}: one text for {', '.join(shipped.texts)} (accepted: "
                f"a folder of files, or a YAML or JSON file, name -> text)"
            )
        return dict.fromkeys(shipped.texts, text)
    import yaml

    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"prompts: {shown(str(path))}: {one_line(error)}") from error
    if not isinstance(said, dict) or not all(isinstance(one, str) for one in said.values()):
        raise ConfigError(f"prompts: {shown(str(path))} (accepted: name -> text)")
    for key in said:
        if key not in shipped.texts:
            raise ConfigError(
                f"prompts: {shown(str(path))}: {key!r} (accepted: {', '.join(shipped.texts)})"
            )
    return said


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: {shown(str(path))}: {one_line(error)}") from error
