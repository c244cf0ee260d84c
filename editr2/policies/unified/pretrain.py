"""Supervised pretraining of the embedded policy on ground-truth sessions of the shapes world.

One packed sequence a session holds everything there is to learn: the images so far (clean), the
instructions, one noisy block a turn (velocity loss) and one question-and-answer branch for every
turn from the second on (cross-entropy):

    image_0 text_1 [noisy_1] image_1 [ask_2] text_2 [noisy_2] image_2 [ask_3] text_3 [noisy_3]

The context's images are ground truth here; at run time they are the policy's own outputs, which is
why a pretrained policy still fails by turn three and has something left for reinforcement learning
to mend.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from editr2.errors import NonFiniteError
from editr2.policies.tokens import THINK_END
from editr2.policies.unified.codecs import patchify
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.packed import Segment, pack, run_packed
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.policies.unified.settings import PretrainConfig
from editr2.sessions import Session
from editr2.worlds import shapes

TEXT_TOKENS = 10  # <|im_start|>, at most eight words, <|im_end|>


def _answer(policy: UnifiedPolicy, session: Session, turn: int) -> list[int]:
    thought, intent = session.turns[turn].meta["reasoning"], session.turns[turn].intent
    return [
        *policy.codec.encode(f"{thought} {THINK_END} {intent}", marks=True),
        policy.codec.im_end,
    ]


def training_loss(
    policy: UnifiedPolicy, sessions: list[Session], raw: np.ndarray, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(velocity loss, intent cross-entropy) of one batch of sessions with ground-truth intents.

    raw: bool [B], True where the context holds raw instructions.
    """
    b, turns = len(sessions), len(sessions[0].turns)
    marks = policy.marks.expand(b, -1)
    both = torch.ones(b, 2, dtype=torch.bool)
    frames = []
    for s in sessions:
        scenes = [
            state.scene for state in shapes.meanings(s.image, [t.instruction for t in s.turns])
        ]
        frames.append(np.stack([shapes.render(scene) for scene in scenes]))
    latents = [patchify(np.stack([f[t] for f in frames]), policy.patch) for t in range(turns + 1)]
    segments, targets, answers = [], [], []
    for t in range(turns):
        segments.append(Segment(marks, both, latents[t]))
        if t > 0:
            asks = [
                policy.question_ids([u.instruction for u in s.turns[:t]], s.turns[t].instruction)
                for s in sessions
            ]
            replies = [_answer(policy, s, t) for s in sessions]
            length = 27 + 9 * (t - 1) + 9
            ids, valid = policy.codec.pad(
                [a + r for a, r in zip(asks, replies, strict=True)], max(length, 42)
            )
            answers.append((len(segments), [len(a) for a in asks], replies))
            segments.append(Segment(ids, valid, private=True))
        said = [
            s.turns[t].instruction if t == 0 or raw[i] else str(s.turns[t].intent)
            for i, s in enumerate(sessions)
        ]
        segments.append(Segment(*policy.codec.pad([policy.text_ids(c) for c in said], TEXT_TOKENS)))
        noise = torch.randn(latents[t + 1].shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(b, generator=generator) + 0.5)
        noisy = torch.lerp(latents[t + 1], noise, sigma[:, None, None])
        targets.append((len(segments), noise - latents[t + 1]))
        segments.append(Segment(marks, both, noisy, sigma, private=True))
    packed = pack(policy.module, segments, policy.grid)
    hidden = run_packed(policy.module, packed)
    image_loss = torch.stack(
        [
            F.mse_loss(policy.module.llm2vae(hidden[:, packed.latent_slices[i]]).float(), target)
            for i, target in targets
        ]
    ).mean()
    flat, gold = [], []
    for i, starts, replies in answers:
        block = hidden[:, packed.text_slices[i]]
        for row, (start, reply) in enumerate(zip(starts, replies, strict=True)):
            flat.append(block[row, start - 1 : start - 1 + len(reply)])
            gold.extend(reply)
    logits = policy.module.logits(torch.cat(flat)).float()
    return image_loss, F.cross_entropy(logits, torch.tensor(gold))


def sample_sessions(config: PretrainConfig, step: int) -> list[Session]:
    """The training batch of a step; modes cm, cu and plain in equal parts."""
    first = step * config.batch
    modes = ("cm", "cu", "plain")
    return [
        shapes.make_session(
            config.seed + 1_000_003, first + i, turns=config.turns, mode=modes[i % 3]
        )
        for i in range(config.batch)
    ]


def learning_rate(config: PretrainConfig, step: int) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.decay_steps - config.warmup)
    return config.lr * 0.5 * (1 + float(np.cos(np.pi * min(1.0, progress))))


def pretrain(
    config: PretrainConfig, out: Path, model_config: UnifiedConfig | None = None
) -> UnifiedPolicy:
    """Trains from random weights and writes `out`: config, tokenizer, fp16 weights (averaged) and
    `pretrain.jsonl`."""
    policy = new_embedded_policy(model_config or UnifiedConfig(), config.seed)
    model = policy.module
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(config.seed + 1)
    chooser = np.random.default_rng(config.seed + 2)
    if config.compile:
        model.run = torch.compile(model.run, dynamic=False)  # type: ignore[method-assign]
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (out / "pretrain.jsonl").open("w") as log:
        log.write(json.dumps({"config": asdict(config), "torch": torch.__version__}) + "\n")
        sums = np.zeros(3)
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            raw = chooser.random(config.batch) < config.raw_fraction
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                image_loss, text_loss = training_loss(
                    policy, sample_sessions(config, step), raw, generator
                )
            (image_loss + config.text_weight * text_loss).backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable, config.grad_norm)
            if not bool(torch.isfinite(norm)):
                raise NonFiniteError(
                    f"step {step + 1}: gradient: {float(norm)} (accepted: finite numbers)"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 1 - decay)
            sums += [float(image_loss), float(text_loss), float(norm)]
            if (step + 1) % 25 == 0 or step + 1 == config.steps:
                n = (step % 25) + 1
                velocity, intent, size = (sums / n).round(5).tolist()
                row = {
                    "step": step + 1,
                    "velocity_loss": velocity,
                    "intent_loss": intent,
                    "grad_norm": size,
                }
                row["elapsed_s"] = round(time.monotonic() - start, 1)
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
                sums[:] = 0
            if (step + 1) % 250 == 0 or step + 1 == config.steps:
                live = {k: v.clone() for k, v in model.state_dict().items()}
                model.load_state_dict(average)
                policy.save(out, torch.float16)
                model.load_state_dict(live)
    return UnifiedPolicy.load(out)
