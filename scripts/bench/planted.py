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
AHEAD = "verl/trainer/ppo/rollout_queue.py"
SOURCE = "verl/trainer/ppo/batch_source.py"
GUARD = "verl/trainer/ppo/collapse_guard.py"
GROUPS = "verl/trainer/ppo/groups.py"
TRAINER = "verl/trainer/ppo/ray_trainer.py"
ACTOR = "verl/workers/actor.py"
UPDATE = "verl/workers/update.py"
FORWARD = "verl/workers/forward.py"
SYNC = "verl/rollout/weight_sync.py"
LOOP = "search_r1/agent/loop.py"
DIALECTS = "search_r1/agent/dialects.py"
COUNTS = "search_r1/agent/agent_data.py"

PLANTED: tuple[tuple[str, str, str], ...] = (
    (LOSSES, "ratio = inputs.log_ratio.detach().exp()", "ratio = inputs.log_ratio.exp()"),
    (
        LOSSES,
        "ratio.clamp(1 - self.clip_ratio_low, 1 + self.clip_ratio_high)",
        "ratio.clamp(1 - self.clip_ratio_high, 1 + self.clip_ratio_low)",
    ),
    (
        LOSSES,
        "ratio = inputs.log_ratio.detach().exp()\n    clipped_ratio = inputs.clip(ratio)",
        "ratio = inputs.log_ratio.detach().exp()\n    clipped_ratio = ratio",
    ),
    (LOSSES, "axis=-1).unsqueeze(-1).detach()", "axis=-1).unsqueeze(-1)"),
    (LOSSES, "clip_ratio_low=clip_ratio_low,", "clip_ratio_low=clip_ratio_high,"),
    (LOSSES, "clip_ratio_high=clip_ratio_high,", "clip_ratio_high=clip_ratio_low,"),
    (LOSSES, "pg_losses3 = -advantages * inputs.clip_ratio_c", "pg_losses3 = -advantages"),
    (
        LOSSES,
        "values - cliprange_value, values + cliprange_value",
        "-cliprange_value, cliprange_value",
    ),
    (ADVANTAGES, "delta + gamma * lam * advantage", "delta + gamma * advantage"),
    (ADVANTAGES, "delta + gamma * lam * advantage", "delta + lam * advantage"),
    (ADVANTAGES, "+ gamma * next_value", "+ next_value"),
    (ADVANTAGES, "values[:, t], next_value)", "values[:, t], 0.0)"),
    (ADVANTAGE, "lam=config.lam", "lam=config.gamma"),
    (ADVANTAGE, "gamma=config.gamma", "gamma=1"),
    (ADVANTAGE, "by_std_in_grpo=config.norm_adv_by_std_in_grpo", "by_std_in_grpo=True"),
    (ADVANTAGES, "index, norm_adv_by_std_in_grpo=False", "index, norm_adv_by_std_in_grpo=True"),
    (ADVANTAGE, "n_steps=len(mask[one_of_each(data)])", "n_steps=1"),
    (ADVANTAGE, "    controller.update(kl, n_steps=len(mask[one_of_each(data)]))\n", ""),
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
    (GROUPS, "set(in_order[:count])", "set(in_order[-count:])"),
    (GROUPS, "set(in_order[:count])", "set(in_order)"),
    (FILTERS, 'data.batch["void_turns"] > 0', 'data.batch["void_turns"] > 1'),
    (GROUPS, "if not are_equal(torch.tensor(found))", "if len(found) > 0"),
    (FILTERS, "if config.bypass_mode:", "if False:"),
    (BATCHING, "position * number // len(trajectories)", "position % number"),
    (BATCHING, "parts[first:] + parts[:first]", "parts"),
    (
        BATCHING,
        "balance([lengths[row] for row in rows], world_size)",
        "balance([1 for row in rows], world_size)",
    ),
    (BATCHING, "torch.from_numpy(index[order])", "torch.from_numpy(index)"),
    (BATCHING, "    if not state_masking:\n", "    if state_masking:\n"),
    (GROUPS, "sizes[job.uid] >= min_group", "sizes[job.uid] >= 1"),
    (
        BALANCING,
        "pairs = zip(one, reversed(two), strict=True)",
        "pairs = zip(one, two, strict=True)",
    ),
    (AHEAD, "max_staleness + 1, steps_left", "max_staleness, steps_left"),
    (AHEAD, "max_staleness + 1, steps_left", "max_staleness + 1, 10**9"),
    (
        AHEAD,
        "seed=self.config.trainer.seed + 1_000_000 * self.sampler.drawn",
        "seed=self.config.trainer.seed",
    ),
    (AHEAD, "        if not self.config.async_training.partial_rollout:\n", "        if False:\n"),
    (AHEAD, "        self.under_way.clear()\n", ""),
    (
        TRAINER,
        "self.step <= self.config.trainer.critic_warmup",
        "self.step < self.config.trainer.critic_warmup",
    ),
    (TRAINER, "            self.batches.drain_before_sync()\n", "            pass\n"),
    (
        TRAINER,
        "batch, kl_metrics = apply_kl_penalty(batch, self.config.algorithm, self.kl_ctrl)\n"
        "            batch, metrics = compute_advantage(batch, self.config.algorithm)",
        "batch, metrics = compute_advantage(batch, self.config.algorithm)\n"
        "            batch, kl_metrics = apply_kl_penalty("
        "batch, self.config.algorithm, self.kl_ctrl)",
    ),
    (TRAINER, 'self.policy_version = state["version"] - 1', "self.policy_version = -1"),
    (TRAINER, "        restore_kl(self.kl_ctrl,", "        (self.kl_ctrl,"),
    (TRAINER, 'self.guard.load_state_dict(state["watch"])', "pass"),
    (TRAINER, 'self.batches.load_state_dict(state["sampler"])', "pass"),
    (TRAINER, 'self.skipped_in_a_row = state["skipped_in_a_row"]', "self.skipped_in_a_row = 0"),
    (SOURCE, "self.min_group = 2 if config.uses_groups else 1", "self.min_group = 1"),
    (TRAINER, "        self.rollout.announce_version(self.policy_version)\n", ""),
    (
        TRAINER,
        "batch, shares = filter_loss(batch, self.config.algorithm.loss_filters)",
        "shares = {}",
    ),
    (TRAINER, "                self.sleep()\n", ""),
    (ACTOR, "else config.clip_ratio_low\n", "else config.clip_ratio_high\n"),
    (ACTOR, "else config.clip_ratio_high\n", "else config.clip_ratio_low\n"),
    (ACTOR, "clip_ratio_c=config.clip_ratio_c", "clip_ratio_c=3.0"),
    (ACTOR, "POLICY_LOSSES[config.policy_loss.loss_mode]", 'POLICY_LOSSES["vanilla"]'),
    (ACTOR, "loss = loss - config.entropy_coeff", "loss = loss + config.entropy_coeff"),
    (ACTOR, "loss = loss + config.kl_loss_coef", "loss = loss - config.kl_loss_coef"),
    (ACTOR, 'batch["ref_log_prob"], config.kl_loss_type', 'batch["ref_log_prob"], "kl"'),
    (ACTOR, 'if "rollout_is_weights" in batch:', "if False:"),
    (ACTOR, "epochs=self.config.ppo_epochs", "epochs=1"),
    (ACTOR, "grad_clip=self.config.grad_clip", "grad_clip=1e9"),
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
    (LOOP, "        trajectory.void_turns += turn.is_void\n", ""),
    (
        LOOP,
        "may_call=data.turns < data.max_calls",
        "may_call=data.turns <= data.max_calls",
    ),
    (DIALECTS, "neutralise(response.text, self.tag)", "response.text"),
    (COUNTS, "if error := executed.response.error:", "if error := executed.response.text:"),
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
        "        data.trajectory.add_observation("
        "observation.token_ids, observation.images, **facts)",
        "        ids = observation.token_ids\n"
        "        said = Completion(ids, [0.0] * len(ids), 'stop', None, 0, 0)\n"
        "        data.trajectory.add_completion(said, **facts)",
    ),
)
