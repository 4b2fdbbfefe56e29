"""Every YAML composes and validates; what cannot work is refused before anything starts, all of it
at once."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import Gemma3TextConfig, Qwen2Config

from search_r1.rewards.compose import ALWAYS, BY_TURN, WEIGHTED
from tests.configs import ROOT, composed
from tests.models import make_tiny_qwen2
from tests.templates import make_family_tokenizer
from verl.trainer.config import build_reward, validate
from verl.trainer.environment import context_problems, critic_problems, teacher_token_problems
from verl.utils.errors import ConfigError
from verl.workers.config import FrozenModelConfig, ModelConfig

EXPERIMENTS = ROOT / "configs" / "experiment"
RECIPES = sorted((EXPERIMENTS / "nq_hotpotqa").glob("*-*.yaml"))
OTHER_RECIPES = sorted(
    {*EXPERIMENTS.glob("baseline/*"), *EXPERIMENTS.glob("*/*po.yaml")}
    - {*EXPERIMENTS.glob("nq_hotpotqa/*")}
)
ALGOS = ("grpo", "ppo")
OWN = ["experiment=own_data", "setup.corpus_path=c.jsonl", "setup.questions=q.jsonl"]
OWN_MODEL = ["experiment=own_model", *OWN[1:], "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B"]


@pytest.mark.parametrize("recipe", [r.stem for r in RECIPES])
def test_paper_recipes(recipe):
    """arXiv 2503.09516, appendix B.2, and the released scripts."""
    algorithm = recipe.rsplit("-", 1)[1]
    raw = composed("ppo", f"experiment=nq_hotpotqa/{recipe}")
    assert raw == composed("grpo", f"experiment=nq_hotpotqa/{recipe}")
    config = validate(raw)
    actor = config.actor_rollout_ref.actor
    rollout = config.actor_rollout_ref.rollout
    assert (actor.optim.lr, actor.optim.lr_warmup_steps_ratio, actor.clip_ratio) == (
        1e-6,
        0.285,
        0.2,
    )
    assert (
        config.data.train_batch_size,
        actor.ppo_mini_batch_size,
        config.trainer.n_gpus_per_node,
    ) == (512, 256, 8)
    assert (rollout.temperature, rollout.top_p) == (1.0, 1.0)
    if algorithm == "ppo":
        assert config.use_critic and config.algorithm.use_kl_in_reward and not actor.use_kl_loss
        assert (config.critic.optim.lr, config.critic.optim.lr_warmup_steps_ratio) == (1e-5, 0.015)
        assert config.num_mini_batches == {"mini_batch": 2, "critic_mini_batch": 2}
    else:
        assert not config.use_critic and actor.use_kl_loss and not config.algorithm.use_kl_in_reward
        assert (rollout.n, actor.kl_loss_coef, config.num_mini_batches) == (
            5,
            0.001,
            {"mini_batch": 10},
        )


@pytest.mark.parametrize("path", OTHER_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_brings_its_algorithm_whatever_script_starts_it(path):
    recipe = f"experiment={path.parent.name}/{path.stem}"
    overrides = [recipe, "actor_rollout_ref.model.path=m", "trainer.experiment_name=e"]
    raw = composed("ppo", *overrides)
    assert raw == composed("grpo", *overrides)
    config = validate(raw)
    is_ppo = path.stem.endswith("ppo")
    assert config.use_critic == config.algorithm.use_kl_in_reward == is_ppo
    assert config.actor_rollout_ref.actor.use_kl_loss is not is_ppo


@pytest.mark.parametrize("overrides", [OWN, ["~experiment", "trainer.experiment_name=e"]])
def test_the_script_chooses_the_algorithm_where_no_recipe_does(overrides):
    given = [*overrides, "data.train_files=a", "data.val_files=b"]
    given += ["actor_rollout_ref.model.path=m"]
    ppo = composed("ppo", *given)
    grpo = composed("grpo", *given)
    assert ppo["algorithm"]["adv_estimator"] == "gae" and ppo["algorithm"]["use_kl_in_reward"]
    assert grpo["algorithm"]["adv_estimator"] == "grpo"
    assert ppo == composed("grpo", *given, "algo=ppo")
    assert grpo == composed("ppo", *given, "algo=grpo")


@pytest.mark.parametrize("script", ALGOS)
def test_the_recipe_for_a_laptop_takes_one_step_of_64_trajectories_without_a_reference(script):
    config = validate(composed(script, "experiment=smollm2_nq", "actor_rollout_ref.rollout.n=8"))
    assert config.data.train_batch_size * config.actor_rollout_ref.rollout.n == 64
    assert config.num_mini_batches["mini_batch"] == 1 and config.trainer.n_gpus_per_node == 1
    assert config.use_reference == (script == "ppo")
    assert config.algorithm.rollout_correction.corrects


@pytest.mark.parametrize(
    ("recipe", "paid"),
    [
        ("stepsearch/qwen2.5-3b-ppo", {"f1": 1.0, "new_evidence": 1.0, "redundancy": -1.0}),
        ("closed_world/stepsearch_ppo", {"em": 1.0, "new_evidence": 1.0, "redundancy": -1.0}),
        ("search_p1/qwen2.5-3b-grpo", {"soft_em": 0.6, "path": 0.3, "format": 0.1}),
        ("closed_world/search_p1_grpo", {"soft_em": 0.6, "path": 0.3, "format": 0.1}),
        ("deepresearcher/qwen2.5-7b-instruct-grpo", {"balanced_f1": 1.0}),
        ("masksearch/qwen2.5-3b-grpo", {"em": 1.0}),
    ],
)
def test_systems_are_paid_as_their_papers_say(recipe, paid):
    config = validate(composed("grpo", f"experiment={recipe}"))
    reward = build_reward(config, None)
    weights = {name: getattr(reward.config, name) for name in type(reward.config).model_fields}
    components = {*ALWAYS, *WEIGHTED, *BY_TURN}
    assert {name: weights[name] for name in components if weights[name]} == paid


@pytest.mark.parametrize("recipe", ["stepsearch/qwen2.5-3b-ppo", "search_p1/qwen2.5-3b-grpo"])
def test_rewards_of_gold_passages_are_validated_where_rows_name_them(recipe):
    """The validation sets of the paper's recipes have questions without gold passages."""
    data = validate(composed("grpo", f"experiment={recipe}")).data
    (train,) = data.train_files
    assert data.val_files == [train.replace("train.parquet", "test.parquet")]


def test_loop_is_rloo_with_the_clip_of_ppo_and_without_a_kl():
    recipe = ["experiment=closed_world/grpo", "algo=loop"]
    config = validate(composed("grpo", *recipe))
    assert config.algorithm.adv_estimator == "rloo" and not config.use_critic
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "vanilla"
    assert not config.use_reference and config.uses_groups


def test_distillation_leaves_the_reward_out_and_has_no_reference():
    recipe = ["experiment=closed_world/grpo", "algo=distillation", "teacher.model.path=/b"]
    config = validate(composed("grpo", *recipe))
    assert config.algorithm.adv_estimator == "none" and config.use_teacher
    assert not config.use_critic and not config.use_reference and not config.uses_groups


def test_both_algorithms_set_the_same_switches():
    """So that none of one is left where the other is chosen."""
    files = {name: OmegaConf.load(ROOT / "configs" / "algo" / f"{name}.yaml") for name in ALGOS}
    for key in (
        "algorithm.adv_estimator",
        "algorithm.use_kl_in_reward",
        "actor_rollout_ref.actor.use_kl_loss",
        "actor_rollout_ref.rollout.n",
    ):
        assert all(OmegaConf.select(file, key) is not None for file in files.values()), key


def test_there_is_a_recipe_for_every_model_and_algorithm():
    models = [
        "qwen2.5-3b",
        "qwen2.5-3b-instruct",
        "qwen2.5-7b",
        "qwen2.5-7b-instruct",
        "llama3.2-3b",
    ]
    models += ["qwen3-1.7b", "qwen3-4b", "qwen3-8b", "llama3.1-8b", "llama3.1-8b-instruct"]
    both = {f"{m}-{a}" for m in models for a in ("ppo", "grpo")}
    assert {r.stem for r in RECIPES} == both | {"qwen3.5-4b-grpo", "qwen3.5-9b-grpo"}


@pytest.mark.parametrize(
    ("config", "overrides"), [("ppo", []), ("grpo", []), ("grpo", OWN), ("ppo", OWN)]
)
def test_defaults_and_own_data(config, overrides):
    assert validate(composed(config, *overrides))


@pytest.mark.parametrize("algorithm", ALGOS)
def test_a_pretrained_model_on_own_data_is_trained_as_in_the_recipes(algorithm):
    config = validate(composed(algorithm, *OWN_MODEL))
    recipe = validate(composed(algorithm, f"experiment=nq_hotpotqa/qwen2.5-3b-{algorithm}"))
    section = config.actor_rollout_ref
    assert config.data.max_response_length == recipe.data.max_response_length
    assert section.actor.optim.lr == recipe.actor_rollout_ref.actor.optim.lr
    assert section.actor.fsdp_config == recipe.actor_rollout_ref.actor.fsdp_config
    assert section.ref == recipe.actor_rollout_ref.ref
    assert section.rollout.dtype == recipe.actor_rollout_ref.rollout.dtype


def test_every_problem_is_listed_with_its_key():
    raw = composed("grpo", "data.train_batch_size=47", "actor_rollout_ref.rollout.n=1")
    with pytest.raises(ConfigError) as caught:
        validate(raw)
    text = str(caught.value)
    assert "actor_rollout_ref.actor.ppo_mini_batch_size=240 does not divide" in text
    assert "adv_estimator=grpo needs actor_rollout_ref.rollout.n >= 2" in text


def test_wrong_keys_and_types_in_every_section():
    raw = composed("grpo")
    raw["trainer"]["seeed"] = 1
    raw["data"]["train_batch_size"] = "many"
    raw["agent"]["retriever"]["adress"] = "x"
    raw["reward"]["emm"] = 1
    raw["setup"]["corpus"] = "c.jsonl"
    raw["finetune"]["data"] = "foo"
    raw["surprise"] = 1
    with pytest.raises(ConfigError) as caught:
        validate(raw)
    for key in (
        "trainer.seeed",
        "data.train_batch_size",
        "agent.retriever.adress",
        "reward.emm",
        "setup.corpus",
        "finetune.data=foo: expected 'answers', 'samples' or 'traces'",
        "surprise",
    ):
        assert key in str(caught.value)


def test_a_class_that_does_not_exist_is_named():
    raw = composed("grpo")
    raw["agent"]["_target_"] = "search_r1.agent.nowhere.Loop"
    with pytest.raises(ConfigError, match=r"agent\._target_=search_r1\.agent\.nowhere\.Loop"):
        validate(raw)


@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_help_needs_no_heavy_import(flag):
    """It answers in seconds because neither torch nor ray nor vllm is loaded."""
    code = (
        f"import sys, runpy\nsys.argv = ['main_ppo', *{flag.split('=')!r}]\n"
        "try: runpy.run_module('verl.trainer.main_ppo', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "max_turns" in done.stdout


def test_missing_files_and_retriever_end_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "grpo"]
    done = subprocess.run(
        [
            *command,
            f"data.train_files={tmp_path}/no.parquet",
            "actor_rollout_ref.model.path=/nowhere",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "actor_rollout_ref.model.path=/nowhere" in done.stderr


def test_a_context_longer_than_the_model_is_refused_before_anything_starts(tmp_path):
    make_tiny_qwen2(tmp_path)
    limit = json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"]

    def config(length, **overrides):
        model = ModelConfig(path=str(tmp_path), override_config=overrides)
        main = SimpleNamespace(model=model)
        return SimpleNamespace(actor_rollout_ref=main, max_model_len=length, use_teacher=False)

    assert context_problems(config(limit)) == []
    (problem,) = context_problems(config(limit + 1))
    assert str(limit + 1) in problem and "max_position_embeddings" in problem
    assert context_problems(config(limit + 1, max_position_embeddings=limit + 1)) == []


def with_teacher(policy: Path, teacher: Path, length: int = 64) -> Any:
    """As much of a configuration as the checks of a teacher's model read."""
    return SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(model=ModelConfig(path=str(policy))),
        teacher=SimpleNamespace(model=FrozenModelConfig(path=str(teacher))),
        max_model_len=length,
        use_teacher=True,
    )


def test_a_teacher_with_a_shorter_context_is_refused(tmp_path):
    policy = tmp_path / "policy"
    teacher = tmp_path / "teacher"
    Qwen2Config(max_position_embeddings=128).save_pretrained(policy)
    Qwen2Config(max_position_embeddings=64).save_pretrained(teacher)
    assert context_problems(with_teacher(policy, teacher, 64)) == []
    (problem,) = context_problems(with_teacher(policy, teacher, 65))
    assert f"64 tokens that {teacher} can hold" in problem


def test_a_teacher_of_other_tokens_is_refused(tmp_path):
    policy = tmp_path / "policy"
    teacher = tmp_path / "teacher"
    make_family_tokenizer(policy, "qwen2.5-instruct").save_pretrained(teacher)
    assert teacher_token_problems(with_teacher(policy, teacher)) == []
    make_family_tokenizer(teacher, "llama3-instruct")
    (problem,) = teacher_token_problems(with_teacher(policy, teacher))
    assert f"teacher.model.path={teacher}: " in problem and "3 of the policy's" in problem
    (problem,) = teacher_token_problems(with_teacher(policy, tmp_path / "nothing"))
    assert "no tokenizer could be loaded" in problem


def test_a_critic_without_a_value_head_is_refused(tmp_path):
    def problems(model_config, use_critic=True):
        model_config.save_pretrained(tmp_path)
        model = ModelConfig(path=str(tmp_path))
        return critic_problems(
            SimpleNamespace(critic=SimpleNamespace(model=model), use_critic=use_critic)
        )

    assert problems(Qwen2Config()) == [] and problems(Gemma3TextConfig(), use_critic=False) == []
    (problem,) = problems(Gemma3TextConfig())
    assert "gemma3_text" in problem and "grpo" in problem


CORRECTION = "algorithm.rollout_correction"
STALE = "async_training.max_staleness=1"
BYPASS = f"{CORRECTION}.bypass_mode=true"
CORRECTED = f"{CORRECTION}.rollout_is=token"
ACTOR = "actor_rollout_ref.actor"
ONE_STEP = [
    f"{ACTOR}.ppo_mini_batch_size=240",
    "data.train_batch_size=48",
    "actor_rollout_ref.rollout.n=5",
]
ALONE = ["actor_rollout_ref.rollout.n=1", f"{ACTOR}.ppo_mini_batch_size=48"]
REINFORCE = f"{ACTOR}.policy_loss.loss_mode=reinforce"
TAUGHT = ["teacher.weight=1", "teacher.model.path=/b"]
MEAN = [f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"]
NORM = [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", f"{ACTOR}.loss_scale_factor=300"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.adv_estimator=dr_grpo", *NORM],
        ["algorithm.adv_estimator=rloo"],
        ["algorithm.adv_estimator=reinforce", REINFORCE, *ONE_STEP],
        ["algorithm.adv_estimator=reinforce_plus_plus", *ALONE],
        ["actor_rollout_ref.rollout.top_p=0.95", "algorithm.rollout_correction.rollout_is=token"],
        ["algorithm.adv_estimator=reinforce_plus_plus_baseline"],
        ["algorithm.adv_estimator=turn_level"],
        [f"{ACTOR}.policy_loss.loss_mode=gspo", f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"],
        [
            f"{ACTOR}.policy_loss.loss_mode=cispo",
            f"{ACTOR}.policy_loss.llds_coef=0.1",
            f"{ACTOR}.ppo_epochs=2",
        ],
        [f"{ACTOR}.policy_loss.llds_coef=0.1", BYPASS],
        ["algorithm.adv_estimator=none", "teacher.weight=1", "teacher.model.path=/b", *ALONE],
        ["teacher.weight=0.1"],
    ],
)
def test_algorithms_are_one_switch_each(overrides):
    config = validate(composed("grpo", *overrides))
    assert not config.use_critic


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([NORM[0]], "loss_scale_factor: name the divisor"),
        (
            ["algorithm.adv_estimator=dr_grpo"],
            "divides by lengths, which algorithm.adv_estimator=dr_grpo is to avoid",
        ),
        (
            [f"{ACTOR}.policy_loss.loss_mode=gspo"],
            "loss_mode=gspo is defined for seq-mean-token-mean",
        ),
        ([REINFORCE, *ONE_STEP, f"{ACTOR}.ppo_epochs=2"], "would take 2 optimizer steps"),
        ([REINFORCE, f"{ACTOR}.ppo_mini_batch_size=80"], "would take 3 optimizer steps"),
        (
            ["algorithm.adv_estimator=rloo", *ALONE],
            "adv_estimator=rloo needs actor_rollout_ref.rollout.n >= 2",
        ),
        (["algorithm.lam=0.95"], "algorithm.lam=0.95 has no effect with"),
        (
            ["algorithm.adv_estimator=rloo", "algorithm.norm_adv_by_std_in_grpo=false"],
            "norm_adv_by_std_in_grpo=false has no effect with algorithm.adv_estimator=rloo",
        ),
        (
            ["algorithm.adv_estimator=turn_level", f"{ACTOR}.state_masking=false"],
            "trains on tokens of no turn",
        ),
        (
            ["actor_rollout_ref.rollout.top_p=0.95"],
            "sampled from another distribution than the one that is trained",
        ),
        (
            ["actor_rollout_ref.rollout.top_k=50"],
            "set algorithm.rollout_correction.rollout_is or rollout_rs",
        ),
        (
            ["algorithm.adv_estimator=gae", *NORM],
            "critic.loss_agg_mode=seq-mean-token-sum-norm has no divisor",
        ),
        ([NORM[1]], "loss_scale_factor=300.0 has no effect with loss_agg_mode=token-mean"),
        (
            [f"{ACTOR}.policy_loss.llds_coef=0.1"],
            "llds_coef=0.1 has no effect with one optimizer step",
        ),
        (
            ["algorithm.adv_estimator=reinforce", "algorithm.filter_groups.enable=true", *ALONE],
            "filter_groups.enable",
        ),
        (
            ["algorithm.adv_estimator=reinforce", "algorithm.loss_filters=[zero_variance]", *ALONE],
            "never differs from",
        ),
        (
            ["trainer.critic_warmup=1"],
            "adv_estimator=grpo has no critic, so nothing would learn in these steps",
        ),
        (
            ["algorithm.kl_ctrl.type=adaptive"],
            "has no effect with algorithm.use_kl_in_reward=false",
        ),
        (
            ["algorithm.adv_estimator=gae", "trainer.critic_warmup=45"],
            "leaves none of the 45 training steps",
        ),
        (
            ["algorithm.use_kl_in_reward=true"],
            "the KL to the reference would count twice, in the reward and in the loss",
        ),
        (
            [BYPASS, REINFORCE, *ONE_STEP],
            "bypass_mode has no effect with actor.policy_loss.loss_mode=reinforce",
        ),
        (
            [f"{CORRECTION}.rollout_rs=token", f"{CORRECTION}.rollout_rs_threshold=0.9"],
            "no ratio is above 1.11",
        ),
        (
            [f"{CORRECTION}.rollout_rs=token", f"{CORRECTION}.rollout_rs_threshold_lower=2"],
            "and below",
        ),
        ([f"{CORRECTION}.rollout_token_veto_threshold=1.0"], "rollout_token_veto_threshold"),
        (["teacher.model.path=/b"], "teacher.model.path=/b has no effect with teacher.weight=0"),
        (["algorithm.adv_estimator=none"], "nothing would be learned"),
        (
            ["algorithm.adv_estimator=none", "teacher.weight=1"],
            "with the initial policy as its own teacher: nothing would be learned",
        ),
        *(
            (["algorithm.adv_estimator=none", *TAUGHT, setting], "by their scores, and with")
            for setting in (
                "algorithm.filter_groups.enable=true",
                "algorithm.loss_filters=[zero_variance]",
                "data.gate.rest_solved=2",
            )
        ),
        *(
            ([f"{ACTOR}.policy_loss.loss_mode=geo_mean", *MEAN, *setting], "would be averaged")
            for setting in (
                ["algorithm.adv_estimator=turn_level"],
                ["algorithm.adv_estimator=gae"],
                TAUGHT,
            )
        ),
        (
            ["algorithm.information_gain.before=So"],
            "information_gain.before='So' has no effect with algorithm.information_gain.weight=0",
        ),
    ],
)
def test_combinations_that_would_be_something_else_are_refused(overrides, reason):
    with pytest.raises(ConfigError) as caught:
        validate(composed("grpo", *overrides))
    assert reason in str(caught.value)


CUDA = "trainer.device=cuda"
APART = "actor_rollout_ref.hybrid_engine=false"
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    "overrides",
    [
        [STALE, CORRECTED],
        [STALE, "algorithm.rollout_correction.rollout_rs=sequence"],
        [STALE, BYPASS],
        [STALE, BYPASS, f"{ACTOR}.policy_loss.loss_mode=cispo"],
        [STALE, CORRECTED, CUDA, APART],
        [BYPASS],
        [BYPASS, f"{CORRECTION}.rollout_rs=geometric"],
        [CUDA, APART, f"{ROLLOUT}.n_gpus_per_node=2", f"{ROLLOUT}.num_val_replicas=1"],
        [f"{ROLLOUT}.num_val_replicas=1"],
        [STALE, CORRECTED, "async_training.partial_rollout=false"],
    ],
)
def test_asynchrony_with_what_allows_for_it(overrides):
    assert validate(composed("grpo", "trainer.device=cpu", *overrides))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([STALE], "async_training.max_staleness=1: tokens are sampled from older weights"),
        ([STALE, BYPASS, REINFORCE, *ONE_STEP], "bypass_mode has no effect with"),
        ([BYPASS, CORRECTED], "the ratio to the sampler is in the loss already"),
        (
            [STALE, CORRECTED, CUDA],
            "max_staleness=1: engines roll out while the weights are updated",
        ),
        (
            [CUDA, f"{ROLLOUT}.num_val_replicas=1"],
            "num_val_replicas=1: engines that validate during training need",
        ),
        (
            [CUDA, APART, f"{ROLLOUT}.n_gpus_per_node=2", f"{ROLLOUT}.num_val_replicas=2"],
            "do not hold 3 engines",
        ),
        (
            [
                CUDA,
                APART,
                f"{ROLLOUT}.n_gpus_per_node=2",
                f"{ROLLOUT}.num_val_replicas=1",
                f"{ROLLOUT}.tensor_model_parallel_size=2",
            ],
            "2 GPUs do not hold 2 engines of",
        ),
        (
            [CUDA, f"{ROLLOUT}.num_replicas=2"],
            "1 GPUs do not hold 2 engines of tensor_model_parallel_size=1",
        ),
    ],
)
def test_asynchrony_that_nothing_allows_for_is_refused(overrides, reason):
    with pytest.raises(ConfigError) as caught:
        validate(composed("grpo", "trainer.device=cpu", *overrides))
    assert reason in str(caught.value) and str(caught.value).count("\n") <= 1, (
        "that and nothing else"
    )


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_one_switch_makes_runs_deterministic(algorithm):
    config = validate(composed(algorithm, "+mode=deterministic"))
    assert config.trainer.deterministic and config.actor_rollout_ref.rollout.max_num_seqs == 1


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        (f"{ROLLOUT}.num_replicas=2", f"{ROLLOUT}.num_replicas=1"),
        (f"{ROLLOUT}.max_num_seqs=2", f"{ROLLOUT}.max_num_seqs=1"),
        (f"{ROLLOUT}.enable_prefix_caching=true", f"{ROLLOUT}.enable_prefix_caching=false"),
        (f"{ROLLOUT}.per_request_seed=false", f"{ROLLOUT}.per_request_seed=true"),
        (f"{ROLLOUT}.cpu_threads=null", f"{ROLLOUT}.cpu_threads=1"),
        ("trainer.threads_per_rank=null", "trainer.threads_per_rank=1"),
        (STALE, "async_training.max_staleness=0"),
    ],
)
def test_what_would_not_be_deterministic_is_refused_with_its_cure(override, cure):
    with pytest.raises(ConfigError) as caught:
        validate(composed("grpo", "trainer.device=cpu", "+mode=deterministic", CORRECTED, override))
    assert f"trainer.deterministic=true needs {cure} (+mode=deterministic sets all)" in str(
        caught.value
    )


def test_all_that_deterministic_runs_lack_is_listed():
    with pytest.raises(ConfigError) as caught:
        validate(composed("grpo", "trainer.deterministic=true"))
    for key in (
        "max_num_seqs=1",
        "enable_prefix_caching=false",
        "per_request_seed=true",
        "threads_per_rank=1",
    ):
        assert key in str(caught.value)
