"""The loop that Flow-GRPO's users run on SD3.5-M, as a plain loop, beside pave_grpo.py.

diffusers' own pipeline, scheduler and network with LoRA under bf16 autocast: not compiled, not
checkpointed, 8 images a call. `compare` measures it, then throughput.py's case "flow-grpo" on the
same weights, eager and as its flags say. Both take guidance in one call, a stochastic step
everywhere but at the end, and no KL. An update is one gradient step on all stochastic steps.
"""

import torch
from real_sizes import PROMPT

BATCH = 8  # images a call of Flow-GRPO's loop


def prompt_embeddings(model, batch: int) -> list[torch.Tensor]:
    """Context and pooled embeddings of a guided call: `batch` times "", then as often PROMPT."""
    pairs = zip(model.cache[""], model.cache[PROMPT], strict=True)
    return [torch.cat([empty] * batch + [full] * batch).to(model.device) for empty, full in pairs]


def velocity(pipe, x, timestep, embeddings, scale: float):
    """Guided v(x) of the pipeline's network, fp32; timestep: of the scheduler, 0 to 1000."""
    context, pooled = embeddings
    with torch.autocast(x.device.type, torch.bfloat16, context.dtype == torch.bfloat16):
        v = pipe.transformer(torch.cat([x, x]), context, pooled, timestep.expand(2 * len(x))).sample
    empty, full = v.float().chunk(2)
    return empty + scale * (full - empty)


def sde_step(x, v, sigmas, i: int, eta: float, x_next=None):
    """Flow-GRPO's stochastic step i, or a given outcome of it, and its log-density, a mean.
    g = eta sqrt(sigma / (1 - sigma));  drift = v + g^2 / (2 sigma) (x + (1 - sigma) v)
    x_next ~ N(x + dt drift, g^2 |dt|)   [2505.05470]; g takes sigma_1 for sigma = 1"""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    g = eta * (sigma / (1 - sigmas[max(i, 1)])).sqrt()
    mean = x + dt * (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v))
    std = g * (-dt).sqrt()
    if x_next is None:
        x_next = mean + std * torch.randn_like(mean)
    density = torch.distributions.Normal(mean, std, validate_args=False).log_prob(x_next)
    return x_next, density.mean(dim=(1, 2, 3))


@torch.no_grad()
def rollout(pipe, x, embeddings, args):
    """States of the paths from x on, log-densities of their stochastic steps, and their images."""
    pipe.scheduler.set_timesteps(args.steps, device=x.device)
    sigmas, states, logps = pipe.scheduler.sigmas, [x], {}
    for i, timestep in enumerate(pipe.scheduler.timesteps):
        v = velocity(pipe, x, timestep, embeddings, args.guidance_scale)
        if i in args.sde_steps:
            x, logps[i] = sde_step(x, v, sigmas, i, args.eta)
        else:
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        states.append(x)
    z = x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    images = pipe.image_processor.postprocess(pipe.vae.decode(z).sample, output_type="pt")
    return states, logps, images


def train(pipe, optimizer, states, logps, embeddings, adv, args) -> None:
    """One gradient step on all stochastic steps, by PPO's clipped objective."""
    sigmas, clip = pipe.scheduler.sigmas, args.clip_range
    for i, logp_old in logps.items():
        v = velocity(pipe, states[i], pipe.scheduler.timesteps[i], embeddings, args.guidance_scale)
        _, logp = sde_step(states[i], v, sigmas, i, args.eta, states[i + 1])
        ratio = torch.exp(logp - logp_old)
        objective = torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
        (-objective.mean() / len(logps)).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def their_stages(model, args):
    """Flow-GRPO's: (images, function) to sample and to update."""
    optimizer = torch.optim.AdamW(model.trainable.values(), args.lr)
    embeddings = prompt_embeddings(model, BATCH)
    x = torch.randn(BATCH, *model.latent_shape, device=model.device)
    adv, sampled = torch.randn(BATCH, device=model.device), []

    def sample():
        sampled[:] = rollout(model.pipe, x, embeddings, args)

    def update():
        train(model.pipe, optimizer, *sampled[:2], embeddings, adv, args)

    return (BATCH, sample), (BATCH, update)


def rates(sampling, updating, args, timed, theirs=None) -> dict:
    """Images and trained transitions a second, what they come from, and ratios to `theirs`."""
    (images, sample), (paths, update) = sampling, updating
    found = {"sample": timed(sample), "update": timed(update)}
    found["images_per_s"] = images / found["sample"]["s"]
    found["transitions_per_s"] = paths * len(args.sde_steps) / found["update"]["s"]
    for key in ("images_per_s", "transitions_per_s") if theirs else ():
        found[f"ratio_{key}"] = found[key] / theirs[key]
    return found


def compare(model, args, stages: dict, timed):
    """Yields what is known after their loop, ours eager, and ours. stages: as throughput.py's."""
    (images, sample), (_, score), updating = stages.values()

    def sample_and_decode():
        sample()
        score()

    model.transformer.disable_gradient_checkpointing()
    with torch.compiler.set_stance("force_eager"):
        found = {"theirs": rates(*their_stages(model, args), args, timed)}
        yield found
        if args.grad_checkpointing:
            model.transformer.enable_gradient_checkpointing()
        ours = (images, sample_and_decode), updating, args, timed, found["theirs"]
        found["ours_eager"] = rates(*ours)
        yield found
    found["ours"] = rates(*ours)
    yield found
