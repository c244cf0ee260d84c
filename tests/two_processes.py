"""One iteration's rollout and gradient, gathered and written by the main process. Under torchrun:

torchrun --nproc_per_node N tests/two_processes.py OUT.pt
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from editr2.config import Config, replace_nested
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.rewards.base import merge_scores
from editr2.rewards.world import WorldReward
from editr2.rl.credit import assign_credit
from editr2.rl.gradient import Batch, accumulate_gradient
from editr2.rl.judging import judge
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.sampler import make_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import State
from editr2.run.processes import Processes


def main(out: Path) -> None:
    processes = Processes(Accelerator(cpu=True))
    torch.set_num_threads(1)
    config = replace_nested(
        Config(),
        {
            "rollout": {"sessions": 3, "siblings": 3, "steps": 4, "groups_per_batch": 2},
            "eval": {"sessions": 2},
        },
    )
    policy = UnifiedPolicy.load()
    source, r = sessions_for(config, policy), config.rollout
    sampler = make_sampler(r.steps, dynamics=r.dynamics, noise_level=r.noise_level, window=r.window)
    mine, seeds = processes.share(r.sessions), Seeds(config.seed, "train")
    done = [
        rollout_chunk(policy, chunk, sampler, seeds, config.policy)
        for chunk in chunks(
            [source[o] for o in range(3)[mine]], range(3)[mine], r.siblings, r.groups_per_batch
        )
    ]
    scores = merge_scores(processes.gather([judge(WorldReward(), done, r.turns)]))
    group = torch.arange(r.sessions).repeat_interleave(r.siblings)
    credit = assign_credit(scores, group, config.credit)
    local = slice(mine.start * r.siblings, mine.stop * r.siblings)
    state = State(policy, torch.optim.SGD(policy.module.parameters(), lr=0.0))
    trained = int(credit.mask.sum())
    batch = Batch(
        done, credit.advantage[local], credit.mask[local], trained, sampler, seeds, config.policy, r
    )
    accumulate_gradient(config.train, state, batch, 0, 0, processes)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    gradient = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    )
    gradient = processes.sum(gradient)

    def noise(chunk, record, turn):
        """The noise that reached the samples: x_next - mu over S would round, so the seeds and the
        first latent."""
        return seeds.window(chunk, record.rollout, turn), seeds.initial(chunk, record.rollout, turn)

    mine_out = [
        {
            "ids": [chunk.session_of(i).id for i in record.rollout.tolist()],
            "text": record.text,
            "seeds": noise(chunk, record, turn),
            "step_index": record.step_index,
            "images": torch.from_numpy(record.images),
            "turn": turn,
        }
        for chunk in done
        for turn, record in enumerate(chunk.turns)
    ]
    gathered = processes.gather(mine_out)
    if processes.main:
        torch.save(
            {
                "processes": processes.count,
                "records": gathered,
                "scores": scores.values,
                "advantage": credit.advantage,
                "mask": credit.mask,
                "gradient": gradient,
            },
            out,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
