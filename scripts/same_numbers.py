"""Whether this tree does what another commit does, to the last bit:

    python scripts/same_numbers.py BASE

Runs both by what stays when modules move: the command line and the public names of
`editr2_kernels`. Compared are

    presets    three iterations of every preset (and of settings that no preset has) on the embedded
               world: rows of metrics.jsonl, tensors of checkpoints and policies, film-strips,
               settings, what is printed
    tables     transition rows of every dynamics, solver, score, schedule, level and window; every
               refusal
    operators  outputs and gradients of every operator on the backends ref, cpu and triton (in the
               interpreter)
    exports    sessions of the world, training of tiny editors on diffusers from them, every form of
               export

but for clocks and for what a run says of where it ran (`NOT_COMPARED`). BASE is a commit, whose
results are kept in `--out` and used again, or the path of a checkout. The native modules of this
tree must be built.

Exit status: 0 where all is equal, 1 where anything differs, 2 where it could not be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
BITS = Path(__file__).with_name("operator_bits.py")
PIPELINES = [ROOT / "tests" / name for name in ("tiny_editors.py", "tiny_qwen.py")]
SHOWN, OF_A_FILE = 12, 2  # differences of a group, and of each of its files
ALL = ["*"]

Row = dict[str, str]
Files = dict[str, dict[str, Row]]
"""What a side gave: of every file, or case, its rows by label, and of a row the values by key, as
text."""

# --------------------------------------------------------------------------------- what is compared

TONE = "--reward.function tone:tone"
REWARD = '''"""Scores that spread widely over the outputs of untrained policies."""


def tone(session, images):
    return [float(image.mean()) * 7 / 255 % 1 for image in images]
'''

SMALL = """--train.iterations {iterations} --rollout.sessions 2 --rollout.siblings 3
    --rollout.groups_per_batch 1 --eval.sessions 2 --eval.steps 10 --eval.intent_tokens 16
    --eval.strips 1 --checkpoint.every 2"""

BESIDE_PRESETS = {
    "no-preset": "",
    "three-turns": "--preset mt-editflow-grpo",
    "packed": f"{TONE} --train.packed on --train.updates 2 --train.minibatches 2 --train.text_lr "
    f"1e-4",
    "micro-batch": f"{TONE} --train.micro_batch 5 --train.old_log_prob replay --train.warmup 2",
    "context-gradient": f"{TONE} --train.context_gradient true --train.kl_weight 0.1 --eval.every "
    f"1 --eval.sampler ode",
    "bfloat16": f"{TONE} --rollout.store_dtype bfloat16 --policy.lora_rank 4 --train.ema none "
    f"--train.weight_decay 0.1",
    "nft-updates": f"{TONE} --preset mt-editflow-nft --train.updates 2 --credit.std global",
}
"""Runs that turn on what no preset does."""

SHORTER = {"edit-r2-released": "--rollout.turns 2 --rollout.steps 6", "edit-r2": ""}
"""Changes to presets, in place of fewer turns: ten of its steps cost more than the rest
together."""

TINY = f"""{TONE} --train.iterations 2 --rollout.sessions 2 --rollout.siblings 2 --rollout.steps 4
    --eval.sessions 1 --eval.strips 1 --checkpoint.every 2"""
EDITOR = (
    "--data world --data.resize stretch --policy.resolution 32x32 --policy.weights tiny/{0} "
    "--policy.model {0}"
)

EXPORTED = {
    "unified-full": ("", ["--weights live", "--merge"]),
    "unified-lora": ("--policy.lora_rank 3", ["", "--merge"]),
    "kontext-lora": (f"{EDITOR.format('kontext')} --policy.lora_rank 3", [""]),
    "klein-lora": (
        f"{EDITOR.format('klein')} --policy.text_tokens 96 --policy.lora_rank 4",
        ["--merge"],
    ),
    "klein-nft": (
        f"{EDITOR.format('klein')} --policy.text_tokens 96 --preset mt-editflow-nft",
        [""],
    ),
    "klein-kv-lora": (
        f"{EDITOR.format('klein-kv')} --policy.text_tokens 96 --policy.lora_rank 2",
        [""],
    ),
    "qwen-edit-lora": (
        f"{EDITOR.format('qwen-edit')} --policy.lora_rank 2 --policy.guidance 3",
        [""],
    ),
    "qwen-edit-plus-lora": (
        f"{EDITOR.format('qwen-edit-plus')} --policy.lora_rank 2 --policy.history 2 "
        f"--policy.keep_source true",
        ["--merge"],
    ),
}
"""Settings of a run, and the options of each export of it; some are refused, which is compared as
well."""

WHERE_IT_RAN = "seconds|elapsed|elapsed_s|versions|commit|host|date|command|resumed|python|torch"
NOT_COMPARED = re.compile(
    rf"(^|\.)({WHERE_IT_RAN})(\.|$)|(^|\.)identity\.(?!depends\.(sessions|heldout|weights)$)"
)
"""Keys of clocks and of what a run says of where and by which code it ran."""
PRINTED = re.compile(r"  [\d.]+ s/iter \(typical [\d.]+\)  left .*|\S+\.py:\d+: ")
"""The same in what is printed: clocks, and the line of code that warns."""

# ----------------------------------------------------------------------------------- files, as rows


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested mappings, and of lists that hold some, as JSON by dotted key."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from flat(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for i, part in enumerate(value):
            yield from flat(part, f"{key}[{i}]")
    else:
        yield key, json.dumps(value, default=str)


def row(value: Any) -> Row:
    return {key: text for key, text in flat(value) if not NOT_COMPARED.search(key)}


def json_lines(path: Path) -> dict[str, Row]:
    """By event and iteration, so that a missing row moves no other."""
    rows: dict[str, Row] = {}
    for line in path.read_text("utf-8").splitlines():
        value = json.loads(line)
        label = " ".join(
            str(value[key]) for key in ("event", "name", "iteration", "id") if key in value
        )
        rows[f"{label} ({sum(name.startswith(f'{label} (') for name in rows)})"] = row(value)
    return rows


def tensors(path: Path) -> dict[str, Row]:
    """Dtype, shape and a digest of the bytes of every tensor of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    body, header = data[8 + size :], json.loads(data[8 : 8 + size])
    found = {"metadata": row(header.pop("__metadata__", {}))}
    for name, of in header.items():
        start, stop = of["data_offsets"]
        found[name] = {
            "bits": f"{of['dtype']} {of['shape']} "
            f"{hashlib.sha256(body[start:stop]).hexdigest()[:16]}"
        }
    return found


def text(path: Path) -> dict[str, Row]:
    return {"": lines(path.read_text("utf-8"))}


def lines(printed: str) -> Row:
    said = filter(str.strip, printed.splitlines())
    return {f"line {i}": PRINTED.sub("", line) for i, line in enumerate(said, 1)}


def whole(path: Path) -> dict[str, Row]:
    return {"": {"bytes": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}}


READERS: dict[str, Callable[[Path], dict[str, Row]]] = {
    "metrics.jsonl": json_lines,
    ".jsonl": json_lines,
    "manifest.json": lambda path: {
        "": dict.fromkeys(json.loads(path.read_text())["files"], "listed")
    },
    ".json": lambda path: {"": row(json.loads(path.read_text("utf-8")))},
    ".yaml": lambda path: {"": row(yaml.safe_load(path.read_text("utf-8")))},
    ".safetensors": tensors,
    ".md": text,
    ".html": lambda path: {"": {"is": "there"}},  # holds clocks, and is made of what is compared
    "": whole,
}
"""By name or by its end, the first that fits."""


def read_folder(folder: Path, name: str) -> Files:
    found: Files = {}
    for path in sorted(folder.rglob("*")):
        told = path.name == "README.md" and (path.parent / "metrics.jsonl").exists()  # has clocks
        left_out = told or path.name == ".lock" or "tensorboard" in path.parts
        if path.is_file() and not left_out:
            reader = next(reader for end, reader in READERS.items() if path.name.endswith(end))
            found[f"{name}/{path.relative_to(folder)}"] = reader(path)
    return found


# ------------------------------------------------------------------------------------------ running


class Refused(Exception):
    """Nothing can be said; the message says why, in one line."""


@dataclass(frozen=True)
class Side:
    """One tree, and a folder to run it in."""

    name: str
    tree: Path
    work: Path

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, (self.tree, self.tree / "kernels")))
        fixed = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "HF_HUB_OFFLINE": "1",
        }
        fixed |= {
            "PYTHONDONTWRITEBYTECODE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
        }
        command = [sys.executable, *arguments]
        env = {**os.environ, **fixed, **environment}
        return subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True)

    def editr2(self, name: str, arguments: str, refusable: bool = False) -> Files:
        """What a command prints, or how it is refused. Raises Refused where it fails, and is not
        to."""
        done = self.python("-m", "editr2", *arguments.split())
        if done.returncode not in ((0, 2) if refusable else (0,)):
            last = (done.stderr.strip().splitlines() or ["(nothing on stderr)"])[-1]
            raise Refused(
                f"{self.name}: editr2 {' '.join(arguments.split())}: exit {done.returncode}: {last}"
            )
        printed = {"stdout": lines(done.stdout), "stderr": lines(done.stderr)}
        return {f"{name}/printed": {**printed, "exit": {"status": str(done.returncode)}}}

    def presets(self) -> list[str]:
        """The names, from the refusal of another one."""
        done = self.python("-m", "editr2", "train", "--preset", "?")
        if not (found := re.search(r"\(accepted: (.+)\)", done.stderr)):
            raise Refused(f"{self.name}: does not list its presets: {done.stderr.strip()}")
        return found[1].split(", ")

    def ready(self) -> Side:
        """Raises Refused where another tree is imported."""
        done = self.python(
            "-c",
            "import editr2, editr2_kernels as k; print(editr2.__file__, k.__file__, sep='\\n')",
        )
        for file in done.stdout.splitlines() or [
            f"nothing: {done.stderr.strip().splitlines()[-1:]}"
        ]:
            if not Path(file).resolve().is_relative_to(self.tree.resolve()):
                raise Refused(f"{self.name} imports {file}, which is not below {self.tree}")
        (self.work / "tone.py").write_text(REWARD)
        return self


@dataclass(frozen=True)
class Options:
    """runs: patterns of the names of runs."""

    iterations: int
    pipelines: Path
    keep: bool
    runs: Sequence[str]
    workers: int


Job = Callable[[Side, Options], Files]


def train(name: str, settings: str) -> Job:
    def run(side: Side, options: Options) -> Files:
        common = SMALL.format(iterations=options.iterations)
        printed = side.editr2(name, f"train {common} {settings} --out {name}")
        return {**printed, **taken(side.work / name, name, options)}

    return run


def export(name: str, settings: str, forms: Sequence[str]) -> Job:
    def run(side: Side, options: Options) -> Files:
        found = side.editr2(name, f"train {TINY} {settings} --out {name}")
        for form in forms:
            out = f"{name}-export{form.replace(' ', '')}"
            found |= side.editr2(out, f"export {name} --out {out} {form}", refusable=True)
            found |= taken(side.work / out, out, options)
        return {**found, **taken(side.work / name, name, options)}

    return run


def taken(folder: Path, name: str, options: Options) -> Files:
    """What is in a folder, which then goes: a run holds a hundred megabytes."""
    found = read_folder(folder, name)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def bits(*arguments: str, **environment: str) -> Job:
    def run(side: Side, options: Options) -> Files:
        done = side.python(str(BITS), *arguments, **environment)
        if done.returncode:
            raise Refused(
                f"{side.name}: {BITS.name} {' '.join(arguments)}: "
                f"{done.stderr.strip().splitlines()[-1]}"
            )
        found = json.loads(done.stdout)
        if not Path(found["package"]).is_relative_to(side.tree.resolve()):
            raise Refused(f"{side.name}: {BITS.name} looked at {found['package']}")
        return {name: {"": values} for name, values in found["cases"].items()}

    return run


def preset_jobs(side: Side) -> dict[str, Job]:
    runs = {
        name: f"--preset {name} {SHORTER.get(name, '--rollout.turns 2')}" for name in side.presets()
    }
    return {name: train(name, settings) for name, settings in (runs | BESIDE_PRESETS).items()}


def operator_jobs(side: Side) -> dict[str, Job]:
    interpreted = ("operators", "--backends", "triton", "--every", "7")  # 50 ms a program
    return {
        "triton": bits(*interpreted, TRITON_INTERPRET="1"),
        "others": bits("operators", "--backends", "ref,cpu"),
    }


def export_jobs(side: Side) -> dict[str, Job]:
    return {name: export(name, settings, forms) for name, (settings, forms) in EXPORTED.items()}


GROUPS: dict[str, Callable[[Side], dict[str, Job]]] = {
    "presets": preset_jobs,
    "tables": lambda side: {"tables": bits("tables")},
    "operators": operator_jobs,
    "exports": export_jobs,
}
OF_RUNS = ("presets", "exports")


def collect(side: Side, group: str, options: Options) -> Files:
    """What a side gives of a group."""
    print(f"running {group} of {side.name}", flush=True)
    found: Files = {}
    if group == "exports":
        (side.work / "tiny").symlink_to(make_pipelines(options.pipelines))
        found |= side.editr2("world", "world make --out world --count 4 --turns 2")
        found |= read_folder(side.work / "world", "world")
    jobs = GROUPS[group](side)
    if group in OF_RUNS:
        jobs = {
            name: job
            for name, job in jobs.items()
            if any(fnmatchcase(name, p) for p in options.runs)
        }
    with ThreadPoolExecutor(options.workers) as pool:
        given = [pool.submit(job, side, options) for job in jobs.values()]
        try:
            for future in given:
                found |= future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def of_runs(files: Files, patterns: Sequence[str]) -> Files:
    """Those of some runs, with their exports."""
    runs = ["world", *patterns, *(f"{pattern}-export*" for pattern in patterns)]
    return {
        name: rows
        for name, rows in files.items()
        if any(fnmatchcase(name.split("/")[0], run) for run in runs)
    }


def make_pipelines(folder: Path) -> Path:
    """Tiny pipelines with random weights, made once by the stock library alone."""
    if folder.is_dir():
        return folder
    flux, qwen = map(load_by_path, PIPELINES)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    for name in ("kontext", "klein", "klein_kv"):
        getattr(flux, f"{name}_pipeline")().save_pretrained(made / name.replace("_", "-"))
    for name, plus in (("qwen-edit", False), ("qwen-edit-plus", True)):
        qwen.save_pipeline(qwen.qwen_pipeline(plus=plus), made / name)
    return made.rename(folder)


def load_by_path(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Difference:
    """base, here: the values, None where there is none."""

    where: str
    base: str | None
    here: str | None

    def __str__(self) -> str:
        return f"  {self.where}\n    base: {_short(self.base)}\n    here: {_short(self.here)}"


def _short(value: str | None, width: int = 220) -> str:
    return "(none)" if value is None else value if len(value) <= width else f"{value[:width]}..."


def differences(base: Files, here: Files, new: Sequence[str] = ()) -> list[Difference]:
    """All of them, a file or a row that only one side has as one.

    new: patterns of files, row labels and keys that `here` may have beside those of `base`.
    """
    found: list[Difference] = []

    def pairs(
        one: Mapping[str, Any], two: Mapping[str, Any], *place: str
    ) -> Iterator[tuple[str, Any, Any]]:
        for name in dict.fromkeys([*one, *two]):
            if name in one and name in two:
                yield name, one[name], two[name]
            elif name in one or not any(fnmatchcase(name, pattern) for pattern in new):
                found.append(
                    Difference(_where(*place, name), _there(one.get(name)), _there(two.get(name)))
                )

    for file, base_rows, here_rows in pairs(base, here):
        for label, base_row, here_row in pairs(base_rows, here_rows, file):
            for key, one, two in pairs(base_row, here_row, file, label):
                if one != two:
                    found.append(Difference(_where(file, label, key), one, two))
    return found


def to_show(found: Sequence[Difference]) -> list[Difference]:
    """Some of every file, those of metrics first: a difference in a row explains all those in
    tensors after it."""
    shown: dict[str, list[Difference]] = {}
    for difference in sorted(found, key=lambda of: "/metrics.jsonl: " not in of.where):
        shown.setdefault(difference.where.split(": ")[0], []).append(difference)
    return [difference for of_file in shown.values() for difference in of_file[:OF_A_FILE]][:SHOWN]


def _where(*place: str) -> str:
    """File, row and key; a file of one row has no label for it."""
    return ": ".join(filter(None, place))


def _there(value: str | Mapping[str, Any] | None) -> str | None:
    return f"(there, with {len(value)} entries)" if isinstance(value, Mapping) else value


def counted(files: Files) -> str:
    """How much was compared."""
    rows = [(label, row) for file in files.values() for label, row in file.items()]
    counts = {
        "runs and cases": len({name.split("/")[0] if "/" in name else name for name in files}),
        "files": sum("/" in name for name in files),
        "train rows": sum(label.startswith("train ") for label, _ in rows),
        "tensors": sum("bits" in row for _, row in rows),
        "values": sum(len(row) for _, row in rows),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def trained(files: Files) -> Iterator[str]:
    """Of runs whose weights never moved: they would be equal whatever training does."""
    moved: dict[str, bool] = {}
    for name, rows in files.items():
        if name.endswith("/metrics.jsonl"):
            norms = [
                float(row["grad_norm"]) for label, row in rows.items() if label.startswith("train ")
            ]
            moved[name.removesuffix("/metrics.jsonl")] = any(norms)
    return (name for name, any_gradient in moved.items() if not any_gradient)


# ---------------------------------------------------------------------------------------- the trees


@contextlib.contextmanager
def checkout(base: str) -> Iterator[Path]:
    """The tree of a path, or of a commit as `bench compare` unpacks and builds one."""
    if Path(base, "editr2").is_dir():
        yield Path(base).resolve()
        return
    sys.path.insert(0, str(ROOT))
    from bench import compare

    try:
        with compare.unpacked(base) as tree:
            yield tree
    except compare.Refused as refused:
        raise Refused(str(refused)) from None


def commit_of(base: str) -> str | None:
    """None for a path."""
    if Path(base, "editr2").is_dir():
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"BASE must be a commit or the path of a checkout, got {base!r}")
    return done.stdout.strip()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def of_base(
    base: str, groups: Sequence[str], options: Options, out: Path, work: Path
) -> dict[str, Files]:
    """What BASE gives: of a commit, from `out` where this script has asked it before."""
    commit = commit_of(base)
    asked = [path.read_text("utf-8") for path in (Path(__file__), BITS, *PIPELINES)]
    libraries = [
        importlib.metadata.version(name)
        for name in ("torch", "diffusers", "transformers", "peft", "numpy")
    ]
    kept = (
        out / f"{commit}-{digest(*asked, *libraries, sys.version, str(options.iterations))}"
        if commit
        else None
    )
    found: dict[str, Files] = {}
    for group in groups if kept else ():
        if (file := kept / f"{group}.json").exists():
            files = json.loads(file.read_text("utf-8"))
            found[group] = of_runs(files, options.runs) if group in OF_RUNS else files
    if missing := [group for group in groups if group not in found]:
        with checkout(base) as tree:
            side = Side(f"BASE ({base})", tree, work).ready()
            for group in missing:
                found[group] = collect(side, group, options)
                if idle := list(trained(found[group])):
                    raise Refused(
                        f"BASE: {', '.join(idle)}: no gradient in any iteration, so nothing is "
                        f"compared"
                    )
                if kept and (group not in OF_RUNS or options.runs == ALL):
                    write(kept / f"{group}.json", found[group])
    return found


def write(path: Path, files: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(files, ensure_ascii=False), "utf-8")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "base", metavar="BASE", help="a commit, or the path of a checkout that is built"
    )
    parser.add_argument(
        "--here",
        type=Path,
        default=ROOT,
        help="the other side: this tree, or another that is built",
    )
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {','.join(GROUPS)}")
    parser.add_argument(
        "--runs",
        default="*",
        help="of presets and exports, only those of these names: edit-r2*,klein*",
    )
    parser.add_argument("--iterations", type=int, default=3, help="of a preset's run")
    parser.add_argument(
        "--new",
        action="append",
        default=[],
        metavar="KEY",
        help="a key, row or file that may be new",
    )
    parser.add_argument(
        "--changed",
        action="append",
        default=[],
        metavar="PLACE",
        help="a place, as it is printed, whose value may be another: '*/README.md*'",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "same", help="where results of BASE are kept"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--keep", action="store_true", help="leave the runs' folders")
    given = parser.parse_args(arguments)
    groups = given.only.split(",")
    if unknown := [group for group in groups if group not in GROUPS]:
        parser.error(f"--only: {', '.join(unknown)} (accepted: {', '.join(GROUPS)})")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    pipelines = out / f"pipelines-{digest(*(path.read_text('utf-8') for path in PIPELINES))}"
    options = Options(given.iterations, pipelines, given.keep, given.runs.split(","), given.jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made goes, as on Ctrl-C
    work = Path(tempfile.mkdtemp(prefix="editr2-same-"))
    try:
        for side in ("base", "here"):
            (work / side).mkdir()
        base = of_base(given.base, groups, options, out, work / "base")
        side = Side(str(given.here), given.here.resolve(), work / "here").ready()
        here = {group: collect(side, group, options) for group in groups}
    except Refused as refused:
        print(f"not compared: {refused}", file=sys.stderr)
        return 2
    finally:
        if given.keep:
            print(f"the runs: {work}")
        else:
            shutil.rmtree(work)
    different = 0
    for group in groups:
        write(out / "here" / f"{group}.json", here[group])
        every = differences(base[group], here[group], given.new)
        found = [d for d in every if not any(fnmatchcase(d.where, p) for p in given.changed)]
        meant = f", {len(every) - len(found)} changed as told" if len(found) < len(every) else ""
        what = f"{len(found)} DIFFERENT" if found else "equal"
        print(f"{group}: {counted(here[group])}, {what}{meant}")
        print("".join(f"{difference}\n" for difference in to_show(found)), end="")
        different += len(found)
    print(
        f"{'equal' if not different else 'different'}, {sum(os.times()[:4]):.0f} s of processor "
        f"time"
    )
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
