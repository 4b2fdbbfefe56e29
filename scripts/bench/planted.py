"""Faults that a reader would fear: where functions are wired to the configuration and to each
other.

`mutants.py` plants them beside its own. Each is a file, a text that stands in it once, and what
takes its place.
"""

LOSSES = "verl/trainer/ppo/core_algos/losses.py"
ADVANTAGES = "verl/trainer/ppo/core_algos/advantages.py"
ADVANTAGE = "verl/trainer/ppo/advantage.py"
KL = "verl/trainer/ppo/core_algos/kl.py"
FILTERS = "verl/trainer/ppo/filters.py"
BATCHING = "verl/trainer/ppo/batching.py"
BALANCING = "verl/utils/seqlen_balancing.py"
AHEAD = "verl/trainer/ppo/ahead.py"
TRAINER = "verl/trainer/ppo/ray_trainer.py"
ACTOR = "verl/workers/actor.py"
UPDATE = "verl/workers/update.py"
FORWARD = "verl/workers/forward.py"
SYNC = "verl/rollout/weight_sync.py"
LOOP = "search_r1/agent/loop.py"

PLANTED: tuple[tuple[str, str, str], ...] = (
    (LOSSES, "ratio = p.log_ratio.detach().exp()", "ratio = p.log_ratio.exp()"),
    (
        LOSSES,
        "weight = ratio.clamp(1 - p.low, 1 + p.high)",
        "weight = ratio.clamp(1 - p.high, 1 + p.low)",
    ),
    (LOSSES, "weight = ratio.clamp(1 - p.low, 1 + p.high)", "weight = ratio"),
    (LOSSES, "axis=-1).unsqueeze(-1).detach()", "axis=-1).unsqueeze(-1)"),
    (LOSSES, "else cliprange_low\n", "else cliprange_high\n"),
    (LOSSES, "else cliprange_high\n", "else cliprange_low\n"),
    (LOSSES, "earned, mask, low, high, clip_ratio_c", "earned, mask, high, low, clip_ratio_c"),
    (LOSSES, "bound = -p.advantages * p.clip_ratio_c", "bound = -p.advantages"),
    (
        LOSSES,
        "values - cliprange_value, values + cliprange_value",
        "-cliprange_value, cliprange_value",
    ),
    (ADVANTAGES, "delta + gamma * lam * advantage", "delta + gamma * advantage"),
    (ADVANTAGES, "delta + gamma * lam * advantage", "delta + lam * advantage"),
    (ADVANTAGES, "+ gamma * next_value", "+ next_value"),
    (ADVANTAGES, "values[:, t], next_value)", "values[:, t], 0.0)"),
    (ADVANTAGE, "mask, config.gamma, config.lam)", "mask, config.lam, config.gamma)"),
    (ADVANTAGE, "by_std = config.norm_adv_by_std_in_grpo", "by_std = True"),
    (ADVANTAGE, "index, norm_adv_by_std_in_grpo=False)", "index, norm_adv_by_std_in_grpo=True)"),
    (
        ADVANTAGE,
        "reinforce_advantage(rewards, mask, config.gamma)",
        "reinforce_advantage(rewards, mask, 1)",
    ),
    (ADVANTAGE, "n_steps=len(data)", "n_steps=1"),
    (ADVANTAGE, "    controller.update(kl, n_steps=len(data))\n", ""),
    (ADVANTAGE, "beta = controller.value", "beta = config.kl_ctrl.kl_coef"),
    (
        ADVANTAGE,
        "ctrl.kl_coef, ctrl.target_kl, ctrl.horizon",
        "ctrl.kl_coef, ctrl.target_kl, 10_000",
    ),
    (ADVANTAGE, "        controller.value = value\n", "        pass\n"),
    (ADVANTAGE, "and same_start:", "or same_start:"),
    (KL, "error * n_steps / self.horizon", "error / self.horizon"),
    (KL, "-0.2), 0.2)", "-0.2), 2.0)"),
    (FILTERS, "for job in jobs))[:count])", "for job in jobs))[-count:])"),
    (FILTERS, "for job in jobs))[:count])", "for job in jobs)))"),
    (FILTERS, 'data.batch["void_turns"] > 0', 'data.batch["void_turns"] > 1'),
    (FILTERS, "if len(values[job.uid]) > 1", "if len(values[job.uid]) > 0"),
    (FILTERS, "if config.bypass_mode:", "if False:"),
    (BATCHING, "place * number // len(lengths)", "place % number"),
    (BATCHING, "parts[first:] + parts[:first]", "parts"),
    (
        BATCHING,
        "balance([lengths[row] for row in rows], world_size)",
        "balance([1 for row in rows], world_size)",
    ),
    (BATCHING, "torch.from_numpy(index[order])", "torch.from_numpy(index)"),
    (BATCHING, "    if not state_masking:\n", "    if state_masking:\n"),
    (BATCHING, "sizes[job.uid] >= min_group", "sizes[job.uid] >= 1"),
    (
        BALANCING,
        "pairs = zip(one, reversed(two), strict=True)",
        "pairs = zip(one, two, strict=True)",
    ),
    (AHEAD, "max_staleness + 1, steps_left", "max_staleness, steps_left"),
    (AHEAD, "max_staleness + 1, steps_left", "max_staleness + 1, 10**9"),
    (AHEAD, "seed=seed + 1_000_000 * self.sampler.drawn", "seed=seed"),
    (AHEAD, "        if not self.config.async_training.partial_rollout:\n", "        if False:\n"),
    (AHEAD, "        self.under_way.clear()\n", ""),
    (
        TRAINER,
        "self.step <= self.config.trainer.critic_warmup",
        "self.step < self.config.trainer.critic_warmup",
    ),
    (TRAINER, "            self.ahead.settle()\n", "            pass\n"),
    (
        TRAINER,
        "batch, kl = apply_kl_penalty(batch, self.config.algorithm, self.kl_ctrl)\n            "
        "batch, shares = compute_advantage(batch, self.config.algorithm)",
        "batch, shares = compute_advantage(batch, self.config.algorithm)\n            "
        "batch, kl = apply_kl_penalty(batch, self.config.algorithm, self.kl_ctrl)",
    ),
    (TRAINER, 'self.rollout.version = state["version"] - 1', "self.rollout.version = -1"),
    (TRAINER, "        restore_kl(self.kl_ctrl,", "        (self.kl_ctrl,"),
    (TRAINER, 'self.collapse_watch.load_state_dict(state["watch"])', "pass"),
    (TRAINER, 'self.ahead.load_state_dict(state["sampler"])', "pass"),
    (TRAINER, 'self.skipped_in_a_row = state["skipped_in_a_row"]', "self.skipped_in_a_row = 0"),
    (TRAINER, "min_group = 2 if config.compares else 1", "min_group = 1"),
    (TRAINER, "        self.rollout.version += 1", "        pass  #"),
    (
        TRAINER,
        "batch, shares = filter_loss(batch, self.config.algorithm.loss_filters)",
        "shares = {}",
    ),
    (TRAINER, "                self.sleep()\n", ""),
    (ACTOR, "cliprange_low=config.clip_ratio_low", "cliprange_low=config.clip_ratio_high"),
    (ACTOR, "cliprange_high=config.clip_ratio_high", "cliprange_high=config.clip_ratio_low"),
    (ACTOR, "clip_ratio_c=config.clip_ratio_c", "clip_ratio_c=3.0"),
    (ACTOR, "loss_mode=config.policy_loss.loss_mode", 'loss_mode="vanilla"'),
    (ACTOR, "loss = loss - config.entropy_coeff", "loss = loss + config.entropy_coeff"),
    (ACTOR, "loss = loss + config.kl_loss_coef", "loss = loss - config.kl_loss_coef"),
    (ACTOR, 'batch["ref_log_prob"], config.kl_loss_type', 'batch["ref_log_prob"], "kl"'),
    (ACTOR, "epochs=self.config.ppo_epochs", "epochs=1"),
    (ACTOR, "grad_clip=self.config.grad_clip", "grad_clip=1e9"),
    (ACTOR, 'rollout_is_weights=batch.get("rollout_is_weights")', "rollout_is_weights=None"),
    (ACTOR, "temperature=rollout.temperature)", "temperature=1.0)"),
    (UPDATE, "(loss * dist.get_world_size()).backward()", "loss.backward()"),
    (UPDATE, "    if finite:\n", "    if True:\n"),
    (UPDATE, " & has_tokens", ""),
    (UPDATE, "            if counts.num_tokens == 0:\n                continue\n", ""),
    (UPDATE, "    lr = state.lr\n    state.tick()\n", "    state.tick()\n    lr = state.lr\n"),
    (FORWARD, "chosen_at=whole.nonzero()[:, 0] - 1", "chosen_at=whole.nonzero()[:, 0]"),
    (FORWARD, "(real.cumsum(1) - 1)[real][None]", "real.cumsum(1)[real][None]"),
    (SYNC, "            dist.barrier()\n", "            pass\n"),
    (
        LOOP,
        "if len(context) > self.config.max_prompt_length:",
        "if len(context) >= self.config.max_prompt_length:",
    ),
    (LOOP, "trajectory.truncated = True", "trajectory.truncated = False"),
    (LOOP, "        trajectory.void_turns += isinstance(action, Invalid)\n", ""),
    (
        LOOP,
        "may_call=data.turns < self.max_calls",
        "may_call=data.turns <= self.max_calls",
    ),
    (LOOP, "neutralise(response.text, self.tag)", "response.text"),
    (LOOP, "        counts.valid_calls += response.valid\n", "        counts.valid_calls += 1\n"),
    (
        LOOP,
        "max_tokens=self.config.max_response_length",
        "max_tokens=self.config.max_prompt_length",
    ),
    (
        LOOP,
        "token_ids=completion.token_ids[:-1], log_probs=completion.log_probs[:-1]",
        "token_ids=completion.token_ids, log_probs=completion.log_probs",
    ),
    (
        LOOP,
        "        trajectory.add_observation(ids, **facts)",
        "        trajectory.add_completion(Completion(ids, [0.0] * len(ids), 'stop'), **facts)",
    ),
)
