"""`editr2 rollout`"""

from __future__ import annotations

import json
from pathlib import Path

from editr2.cli import settings
from editr2.cli.flags import Arguments
from editr2.errors import counted
from editr2.run.folder import numbered

EXAMPLES = [
    ("--data examples/shapes --out runs/edited", "by the shipped small editor"),
    ("--policy runs/demo --data examples/shapes --out runs/edited", "by one that you trained"),
    (
        "--policy black-forest-labs/FLUX.1-Kontext-dev --data my_sessions --data.resize crop",
        "by a stock editor, on pictures of any size",
    ),
]

COMMON = (
    "data.path",
    "data.limit",
    "data.resize",
    "policy.model",
    "policy.intent",
    "policy.guidance",
    "eval.sessions",
    "eval.sampler",
    "eval.steps",
)
"""Settings that most people change of how an editor edits."""


def command(arguments: Arguments) -> int:
    """edit sessions and write the images"""
    config, given = settings.run_config(
        "editr2 rollout",
        "Edit sessions turn by turn and write images and outputs.jsonl into --out.",
        arguments,
        [settings.out_flag("runs/rollout", "folder of images/ and outputs.jsonl")],
        named=True,
        examples=EXAMPLES,
        common=COMMON,
    )
    from editr2.policies.rules import check_config

    config = check_config(config, "rollout")
    from editr2.sessions.source import check_sessions_there

    check_sessions_there(config.data, config.eval)
    from PIL import Image

    from editr2.policies.load import open_policy
    from editr2.rl.rollout import Seeds, chunks, in_evaluation, rollout_chunk
    from editr2.rl.rules import check_run
    from editr2.rl.sampler import eval_sampler, own_schedule
    from editr2.rl.sessions import sessions_for
    from editr2.run.processes import open_processes

    processes = open_processes()
    settings.tell(given["notes"], processes.main)
    policy = open_policy(config.policy, processes, trains=False)
    own = own_schedule(policy)
    check_run(config, None, own, processes=processes.count, command="rollout")
    sessions = sessions_for(config, policy).heldout
    sampler = eval_sampler(config.rollout, config.eval, own).to(processes.device)
    out, mine = processes.on_main(lambda: _folder(given["out"])), processes.share(len(sessions))
    (out / "images").mkdir(parents=True, exist_ok=True)
    parts = [
        out / "outputs.jsonl",
        *(out / f"outputs.{i}.jsonl" for i in range(1, processes.count)),
    ]
    options, how = in_evaluation(config)
    lines: dict[int, str] = {}  # of sessions before which another is yet to come
    written = 0
    with parts[processes.index].open("w") as file:
        for chunk in chunks(
            sessions[mine], range(len(sessions))[mine], 1, 4 * config.rollout.groups_per_batch
        ):
            rollout_chunk(
                policy,
                chunk,
                sampler,
                Seeds(config.seed, "rollout"),
                options,
                rollout=how,
                greedy=True,
            )
            for i, session in enumerate(chunk.sessions):
                turns = []
                for t, image in enumerate(chunk.images_of(i)):
                    name = f"images/{chunk.ordinals[i]:05d}_t{t + 1}.png"
                    Image.fromarray(image).save(out / name)
                    record = chunk.turns[t]
                    at = int((record.rollout == i).nonzero()[0, 0])
                    intent, thought = (record.sample(k, at) for k in ("intent", "thought"))
                    turns.append(
                        {
                            "instruction": session.turns[t].instruction,
                            "intent": intent.text if intent else None,
                            **({"thought": thought.text} if thought else {}),
                            "image": name,
                        }
                    )
                row = int(chunk.rows[i])
                lines[row] = json.dumps({"id": session.id, "turns": turns}) + "\n"
            while written in lines:
                file.write(lines.pop(written))
                written += 1
    processes.wait()
    if processes.main:
        with parts[0].open("a") as file:
            for part in parts[1:]:
                file.write(part.read_text())
                part.unlink()
        print(f"{counted(len(sessions), 'session')}: {parts[0]}")
    return 0


def _folder(asked: str | None) -> Path:
    """Where to; what an earlier call wrote is only written over where somebody says so."""
    if asked is not None:
        return Path(asked)
    for out in numbered(Path("runs/rollout")):
        try:
            out.mkdir(parents=True)  # at once: another call may look for one, too
        except FileExistsError:
            if not out.parent.is_dir():
                raise
        else:
            return out
    raise AssertionError
