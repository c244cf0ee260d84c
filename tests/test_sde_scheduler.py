"""`FlowMatchSDEScheduler` in a stock Flux pipeline of random weights, and by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

import editr2_kernels as ek
from editr2.integrations.diffusers import ACCEPTED, FlowMatchSDEScheduler

STEPS = 4
SEEDS = [7, 2**40 + 1]
NO_TEXT_ENCODERS = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        shift_factor=0.06,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **NO_TEXT_ENCODERS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipeline():
    return make_pipeline()


def run(pipe, **more):
    """Two images; latents [2, 16, 16], packed."""
    dtype = pipe.transformer.dtype
    return pipe(
        prompt_embeds=torch.randn(1, 4, 32, generator=generator(1)).to(dtype),
        pooled_prompt_embeds=torch.randn(1, 32, generator=generator(2)).to(dtype),
        num_inference_steps=STEPS,
        height=8,
        width=8,
        num_images_per_prompt=2,
        generator=generator(3),
        output_type="latent",
        **more,
    ).images


def with_ours(pipe, **options):
    pipe.scheduler = FlowMatchSDEScheduler.from_config(pipe.scheduler.config, **options)
    return pipe.scheduler


def begin(scheduler):
    """A trajectory, as pipelines begin one: no step looks for its timestep."""
    scheduler.set_timesteps(STEPS, mu=0.8)
    scheduler.set_begin_index(0)


def recorded(pipe, seeds=SEEDS):
    """The steps the pipeline took, and what it called the transformer with at each."""
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, a, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    pipe.scheduler.set_seeds(seeds)
    with pipe.scheduler.record() as taken:
        last = run(pipe)
    hook.remove()
    return taken, calls, last


@pytest.mark.parametrize(
    "options", [dict(dynamics="ode"), dict(noise_level=0.0), dict(window=(0, 0))]
)
def test_without_noise_it_is_the_stock_scheduler(pipeline, options):
    """In fp32 to the bit: both multiply once and add once."""
    stock = run(pipeline)
    with_ours(pipeline, **options)
    assert torch.equal(run(pipeline), stock)


@pytest.mark.parametrize(
    "dynamics, dtype",
    [*((name, torch.float32) for name in ACCEPTED if name != "ode"), ("flow-sde", torch.bfloat16)],
)
def test_a_replay_of_a_stock_pipeline_has_ratio_one(pipeline, dynamics, dtype):
    pipeline.to(dtype)
    level = 1.0 if dynamics == "wan-sde" else 0.6
    scheduler = with_ours(pipeline, dynamics=dynamics, noise_level=level, window=(0, 3))
    taken, calls, last = recorded(pipeline)
    assert [step.step_index for step in taken] == list(range(STEPS)) and torch.equal(
        taken[-1].prev_sample, last
    )
    table = ek.transition_table(
        scheduler.sigmas, dynamics=dynamics, noise_level=level, window=(0, 3)
    )
    for step, call in zip(taken, calls):
        v = pipeline.transformer(**call)[0]
        assert v.requires_grad and v.dtype == step.prev_sample.dtype == dtype
        out = scheduler.step(v, step.timestep, step.sample, prev_sample=step.prev_sample)
        assert torch.equal(torch.exp(out.log_prob - step.log_prob), torch.ones(2))
        noisy = step.step_index < 3
        assert (step.log_prob != 0).all() == noisy
        if noisy:
            (grad,) = torch.autograd.grad(out.log_prob.sum(), pipeline.transformer.proj_out.weight)
            assert grad.abs().max() > 0
        index = torch.full((2,), step.step_index)
        reference = ek.sde_step_ref(
            step.sample, v.detach(), table, index, torch.tensor(SEEDS), store_dtype=dtype
        )
        torch.testing.assert_close(step.prev_sample, reference.x_next, rtol=0, atol=0)
        torch.testing.assert_close(step.log_prob, reference.log_prob, rtol=1e-6, atol=1e-6)
    assert scheduler.step_index == STEPS  # replays do not move the trajectory


def test_samples_at_different_steps_are_replayed_together(pipeline):
    scheduler = with_ours(pipeline)
    taken, _, _ = recorded(pipeline)
    v = torch.randn(2, 16, 16, generator=generator(4))
    x, x_next = (torch.stack([getattr(taken[k], name)[i] for i, k in enumerate((2, 0))]) for name in
                 ("sample", "prev_sample"))  # fmt: skip
    at = torch.stack([taken[2].timestep, taken[0].timestep])
    mixed = scheduler.step(v, at, x, prev_sample=x_next).log_prob
    alone = [
        scheduler.step(v[i : i + 1], t, x[i : i + 1], prev_sample=x_next[i : i + 1]).log_prob
        for i, t in enumerate(at)
    ]
    assert torch.equal(mixed, torch.cat(alone))


def test_noise_belongs_to_the_seed_and_the_step(pipeline):
    """Not to the batch, the place in it, the window or the noise level's other steps."""
    scheduler = with_ours(pipeline, noise_level=0.5)
    begin(scheduler)
    x, v = torch.randn(2, 3, 16, 16, generator=generator(4))
    scheduler.set_seeds([1, 2, 3])
    both = [scheduler.step(v, None, x).prev_sample for _ in range(STEPS)]
    begin(scheduler)
    scheduler.set_window((1, 3))
    scheduler.set_seeds(torch.tensor([3]))
    alone = [scheduler.step(v[2:], None, x[2:]) for _ in range(STEPS)]
    assert torch.equal(alone[1].prev_sample, both[1][2:]) and torch.equal(
        alone[2].prev_sample, both[2][2:]
    )
    assert not alone[0].log_prob.any() and not alone[3].log_prob.any()
    begin(scheduler)
    other = scheduler.step(v[2:], None, x[2:], seed=torch.tensor([4]), noise_level=0.5).prev_sample
    begin(scheduler)
    scheduler.set_window(None)
    assert not torch.equal(scheduler.step(v[2:], None, x[2:]).prev_sample, other)


def test_seeds_nobody_set_come_from_a_generator(pipeline):
    scheduler = with_ours(pipeline)

    def drawn(seed, **more):
        torch.manual_seed(seed)
        return run(pipeline, **more)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    x = torch.zeros(2, 16, 16)

    def stepped(gen):
        begin(scheduler)
        first = scheduler.step(x, None, x, generator=gen).prev_sample
        assert torch.equal(scheduler._drawn, torch.randint(2**63 - 1, (2,), generator=generator(5)))
        return first

    assert torch.equal(stepped(generator(5)), stepped(generator(5)))


def test_a_list_of_generators_has_one_a_sample(pipeline):
    """As diffusers takes them: a sample's noise is its own generator's; a list of one serves
    all."""
    scheduler = with_ours(pipeline)
    x = torch.zeros(3, 16, 16)

    def stepped(generators, x=x):
        begin(scheduler)
        return scheduler.step(x, None, x, generator=generators).prev_sample

    three = stepped([generator(5), generator(6), generator(7)])
    turned = stepped([generator(7), generator(5), generator(6)])
    assert torch.equal(three, turned[[1, 2, 0]]) and not torch.equal(three[0], three[1])
    assert torch.equal(three[1:2], stepped([generator(6)], x[:1]))
    assert torch.equal(stepped([generator(5)]), stepped(generator(5)))
    with pytest.raises(
        ValueError, match="generator must be one, or a list of 3, one a sample; got a list of 2"
    ):
        stepped([generator(5), generator(6)])


@pytest.mark.parametrize("dynamic", [False, True])
def test_schedules_are_the_base_classs(dynamic):
    options = dict(shift=2.5, use_dynamic_shifting=dynamic, shift_terminal=0.05)
    stock, ours = FlowMatchEulerDiscreteScheduler(**options), FlowMatchSDEScheduler(**options)
    for given in (
        dict(num_inference_steps=7),
        dict(sigmas=np.linspace(1.0, 0.2, 5)),
        dict(sigmas=[1.0, 0.7, 0.4]),
    ):
        for scheduler in (stock, ours):
            scheduler.set_timesteps(mu=0.9 if dynamic else None, device="cpu", **given)
        assert torch.equal(ours.sigmas, stock.sigmas) and torch.equal(
            ours.timesteps, stock.timesteps
        )


def test_configuration_is_saved_and_loaded(pipeline, tmp_path):
    scheduler = with_ours(pipeline, dynamics="cps", noise_level=0.8, window=(1, 3))
    assert scheduler.config.shift == 3.0 and scheduler.config.use_dynamic_shifting
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["window"] == [1, 3]
    loaded = FlowMatchSDEScheduler.from_pretrained(tmp_path)
    taken, _, last = recorded(pipeline)
    pipeline.scheduler = loaded
    again, _, same = recorded(pipeline)
    assert torch.equal(last, same)
    assert [step.log_prob.any().item() for step in again] == [False, True, True, False]
    stock = FlowMatchEulerDiscreteScheduler.from_config(loaded.config)
    assert stock.config.shift == 3.0 and type(stock) is FlowMatchEulerDiscreteScheduler


def test_a_saved_pipeline_finds_the_scheduler_again(pipeline, tmp_path):
    with_ours(pipeline, window=(0, 2))
    _, _, last = recorded(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(
        tmp_path, image_encoder=None, feature_extractor=None, **NO_TEXT_ENCODERS
    )
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is FlowMatchSDEScheduler
    torch.testing.assert_close(
        recorded(loaded)[2], last
    )  # weights at other addresses may be multiplied otherwise


def test_a_rollout_under_inference_mode_can_be_trained_on(pipeline):
    scheduler = with_ours(pipeline)
    with torch.inference_mode():
        taken, _, _ = recorded(pipeline)
    step = taken[1]
    v = torch.randn(2, 16, 16, generator=generator(4), requires_grad=True)
    x, x_next = step.sample.clone(), step.prev_sample.clone()
    scheduler.step(v, step.timestep.clone(), x, prev_sample=x_next).log_prob.sum().backward()
    assert v.grad.abs().max() > 0


def test_recording_ends_and_tuples_begin_with_the_sample(pipeline):
    scheduler = with_ours(pipeline)
    with scheduler.record() as taken:
        pass
    run(pipeline)
    assert taken == []
    begin(scheduler)
    x = torch.randn(2, 16, 16, generator=generator(4))
    sample, log_prob = scheduler.step(x, None, x, return_dict=False)
    assert sample.shape == x.shape and log_prob.shape == (2,)


def test_errors_name_the_argument():
    for options, message in (
        (dict(dynamics="dpm++sde"), r"dynamics must be one of flow-sde, .* got 'dpm\+\+sde'"),
        (dict(stochastic_sampling=True), "stochastic_sampling must be False"),
        (dict(invert_sigmas=True), "invert_sigmas must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowMatchSDEScheduler(**options)
    scheduler = FlowMatchSDEScheduler(window=(2, 9))
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="set_timesteps must be called"):
        scheduler.step(x, 1.0, x)
    with pytest.raises(ValueError, match=r"window must satisfy .* got \(2, 9\)"):
        scheduler.set_timesteps(4)
    scheduler.set_window((0, 2))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"set_seeds must be given one seed a sample, 2; got 3"):
        scheduler.set_seeds([1, 2, 3])
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="per_token_timesteps must be None"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=x)
    with pytest.raises(ValueError, match="timestep must be one of the scheduler's timesteps, got"):
        scheduler.step(x, 123.0, x, prev_sample=x)
    with pytest.raises(
        ValueError,
        match="timestep must be one of the schedule's timesteps, or 2, one a sample; got 1",
    ):
        scheduler.step(x, 1, x, prev_sample=x)


@pytest.mark.gpu
def test_steps_and_replays_never_wait_for_the_gpu():
    scheduler = FlowMatchSDEScheduler(window=(0, 3))
    scheduler.set_timesteps(STEPS, device="cuda")
    scheduler.set_begin_index(0)
    scheduler.set_seeds(SEEDS)
    x, v = torch.randn(2, 2, 16, 16, device="cuda")
    for mode in (
        "default",
        "error",
    ):  # the first time loads the kernels and copies tables and seeds
        scheduler.set_begin_index(0)
        scheduler._step_index = None
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for t in scheduler.timesteps:
                out = scheduler.step(v, t, x)
                replay = scheduler.step(v, t, x, prev_sample=out.prev_sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(replay.log_prob, out.log_prob)
