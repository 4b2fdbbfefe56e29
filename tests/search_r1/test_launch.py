"""What is made around a run: the closed world by its options, and a retrieval server that lasts as
long as the run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from search_r1.config import SetupConfig
from search_r1.data.made import RECORD
from search_r1.data.prepare import TEST, TRAIN
from search_r1.launch import (
    MAX_SERVER_RESTARTS,
    RetrievalServer,
    composed,
    prepare,
    prepare_base,
    prepare_questions,
    prepare_world,
    read_setup,
    values_of_small_base,
)
from search_r1.launch import launch as launch_command
from search_r1.world.generate import FILES, OPTIONS_FILE, WorldConfig
from tests.processes import PATIENCE_S, family, wait_for
from tests.retrieval import write_corpus
from verl.trainer.compose import as_plain
from verl.trainer.config import validate
from verl.utils.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
SURROUNDED = ROOT / "tests" / "programs" / "surrounded.py"
SMALL = WorldConfig(
    train_people=20,
    test_people=20,
    spare_people=0,
    train_questions=20,
    test_questions=10,
    filler=10,
)


def test_a_world_is_made_with_its_options_and_refused_with_others(tmp_path):
    prepare_world(tmp_path, SMALL)
    passages = [json.loads(line)["contents"] for line in (tmp_path / "corpus.jsonl").open()]
    assert min(text.count(".") for text in passages) >= 11
    prepare_world(tmp_path, SMALL)
    with pytest.raises(
        SystemExit, match=r"was made with filler=10; setup\.world_options asks for filler=2"
    ):
        prepare_world(tmp_path, SMALL.model_copy(update={"filler": 2}))
    (tmp_path / "options.json").unlink()
    with pytest.raises(SystemExit, match=r"was made with train_people=400, .*, filler=0; "):
        prepare_world(tmp_path, SMALL)


def test_what_is_missing_of_a_world_is_made_again_unless_that_would_replace_what_a_user_changed(
    tmp_path,
):
    prepare_world(tmp_path, SMALL)
    passages = (tmp_path / "corpus.jsonl").read_text()
    (tmp_path / "test.parquet").unlink()
    prepare_world(tmp_path, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*FILES, OPTIONS_FILE, RECORD])
    assert (tmp_path / "corpus.jsonl").read_text() == passages
    (tmp_path / "corpus.jsonl").write_text("mine\n")
    prepare_world(tmp_path, SMALL)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(
        DataError, match=r"corpus\.jsonl would be made anew, because files .* changed by hand"
    ):
        prepare_world(tmp_path, SMALL)
    assert (tmp_path / "corpus.jsonl").read_text() == "mine\n"


def test_no_base_has_learned_both_kinds_of_questions(tmp_path):
    both = {"arithmetic": True, "deep": True}
    setup = SetupConfig(world=str(tmp_path / "world"), world_options=WorldConfig(**both))
    config = OmegaConf.create(
        {"actor_rollout_ref": {"model": {"path": str(tmp_path / "world" / "base")}}}
    )
    with pytest.raises(SystemExit, match="no base model has learned both"):
        prepare(setup, config)
    assert not (tmp_path / "world").exists()


def test_a_part_of_a_base_model_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(
        DataError, match=r"lacks model\.safetensors, tokenizer\.json: remove the folder"
    ):
        prepare_base(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    prepare_base(tmp_path)


def ask(folder, *rows, **settings):
    """What the launcher makes of these questions: the training and test questions."""
    (folder / "q.jsonl").write_text(
        "".join(json.dumps({"question": q, "answer": "a"}) + "\n" for q in rows)
    )
    setup = SetupConfig(
        questions=str(folder / "q.jsonl"), **{"test_size": 1, "template": "short", **settings}
    )
    files = {
        "train_files": str(folder / "data/train.parquet"),
        "val_files": [str(folder / "data/test.parquet")],
    }
    prepare_questions(setup, OmegaConf.create({"data": files}))
    tables = [pq.read_table(folder / "data" / name).to_pylist() for name in (TRAIN, TEST)]
    return [[row["extra_info"]["question"] for row in table] for table in tables]


def test_training_files_follow_their_questions(tmp_path, capfd):
    assert ask(tmp_path, "1?", "2?", "3?") == [["1?", "2?"], ["3?"]]
    assert "2 training and 1 test questions" in capfd.readouterr().out
    assert ask(tmp_path, "1?", "2?", "3?") == [["1?", "2?"], ["3?"]]
    assert capfd.readouterr().out == ""
    assert ask(tmp_path, "1?", "2?", "4?") == [["1?", "2?"], ["4?"]]
    assert ask(tmp_path, "1?", "2?", "4?", test_size=2) == [["1?"], ["2?", "4?"]]
    (tmp_path / "data" / TEST).unlink()
    assert ask(tmp_path, "1?", "2?", "4?", test_size=2) == [["1?"], ["2?", "4?"]]


def test_training_files_of_a_user_are_never_replaced(tmp_path):
    ask(tmp_path, "1?", "2?")
    train = tmp_path / "data" / TRAIN
    pq.write_table(pq.read_table(tmp_path / "data" / TEST), train)
    mine = train.read_bytes()
    assert ask(tmp_path, "1?", "2?") == [["2?"], ["2?"]]
    with pytest.raises(
        DataError,
        match=r"train\.parquet would be made anew, because its questions changed.* by hand",
    ):
        ask(tmp_path, "1?", "3?")
    (tmp_path / "data" / RECORD).unlink()
    with pytest.raises(
        DataError, match=r"nothing beside it .* says what it was made from.*setup\.questions=null"
    ):
        ask(tmp_path, "1?", "2?")
    assert train.read_bytes() == mine


def test_questions_that_would_be_made_into_files_that_nobody_reads_are_refused(tmp_path):
    files = {"train_files": str(tmp_path / "mine.parquet"), "val_files": str(tmp_path / TEST)}
    setup = SetupConfig(questions=str(tmp_path / "q.jsonl"))
    with pytest.raises(DataError, match=r"but data\.train_files=.*mine\.parquet"):
        prepare_questions(setup, OmegaConf.create({"data": files}))
    files["train_files"] = str(tmp_path / TRAIN)
    with pytest.raises(DataError, match=r"setup\.questions: .*q\.jsonl: no such file"):
        prepare_questions(setup, OmegaConf.create({"data": files}))


def test_an_unknown_option_is_named():
    with pytest.raises(
        ConfigError,
        match=r"setup\.world_options\.fillers: .*did you mean setup\.world_options\.filler",
    ):
        read_setup({"setup": {"world_options": {"fillers": 10}}})


@pytest.fixture
def launch(tmp_path):
    """`launch(behaviour)`: tests/programs/searches.py, launched with a server over one passage."""
    write_corpus(tmp_path, [{"id": "0", "contents": '"Torvel"\nTorvel lies in Marna.'}])
    with family() as (env, alive):
        env.update(PYTHONPATH=str(ROOT))

        def begin(behaviour: str) -> "subprocess.Popen[str]":
            begin.alive = alive
            return subprocess.Popen(
                [sys.executable, str(SURROUNDED), behaviour, str(tmp_path)],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        yield begin


def server_of(folder: Path) -> int:
    """The process of the retrieval server."""
    wait_for((folder / "ready").exists)
    return int((folder / "server").read_text().split()[1])


def test_a_killed_server_comes_back_at_its_address(tmp_path, launch):
    launcher = launch("searches_until_answered")
    os.kill(server_of(tmp_path), signal.SIGKILL)
    (tmp_path / "killed").touch()
    output, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0
    assert "the retrieval server ended (status 137): restart 1 of 10" in output


def test_a_signal_reaches_the_program_once_and_the_server_stays_until_its_end(tmp_path, launch):
    launcher = launch("searches_after_a_signal")
    server_of(tmp_path)
    os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
    output, _ = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 130, output
    assert "Traceback" not in output


def test_nothing_outlives_a_killed_launcher(tmp_path, launch):
    launcher = launch("works")
    server_of(tmp_path)
    assert len(launch.alive()) == 3
    launcher.kill()
    wait_for(lambda: not launch.alive())


def test_a_server_that_ends_again_and_again_is_given_up(caplog, tmp_path):
    server = RetrievalServer(tmp_path / "absent", str(tmp_path / "absent.jsonl"), 1)
    server.command = [sys.executable, "-c", "raise SystemExit(3)"]
    server.process = server.start()
    for _ in range(MAX_SERVER_RESTARTS + 3):
        server.process.wait()
        server.revive()
    assert (
        caplog.text.count("the retrieval server ended (status 3): restart") == MAX_SERVER_RESTARTS
    )
    assert caplog.text.count("given up") == 1


def test_paths_are_relative_to_where_the_user_stands(tmp_path):
    """The script of another folder is called from one that has packages of the same names, as the
    original's has."""
    for package in ("search_r1", "verl"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "model").mkdir()
    overrides = [
        "setup.questions=mine/q.jsonl",
        "data.val_files=[a.parquet,/b.parquet]",
        "actor_rollout_ref.model.path=model",
        "actor_rollout_ref.model.tokenizer_path=org/not-a-folder",
    ]
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    command = ["bash", str(ROOT / "train_grpo.sh"), "--cfg", "job", *overrides]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.partition("\n")[2]  # the first line is of setup.sh
    config = OmegaConf.create(shown)
    assert config.setup.questions == f"{tmp_path}/mine/q.jsonl"
    assert config.data.val_files == [f"{tmp_path}/a.parquet", "/b.parquet"]
    model = config.actor_rollout_ref.model
    assert (model.path, model.tokenizer_path) == (f"{tmp_path}/model", "org/not-a-folder")
    assert config.data.train_files == "data/closed_world/train.parquet", (
        "a default, of the repository"
    )


def test_wrong_configurations_are_refused_before_a_world_is_made(tmp_path):
    world = tmp_path / "world"
    with pytest.raises(ConfigError) as caught:
        launch_command(
            [
                f"setup.world={world}",
                "setup.test_size=0",
                "finetune.data=foo",
                "data.train_batch_size=0",
            ]
        )
    assert caught.value.problems == [
        "data.train_batch_size=0: expected a number above 0",
        "setup.test_size=0: expected a number above 0",
        "finetune.data=foo: expected 'answers', 'samples' or 'traces'",
    ]
    assert not world.exists()


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["experiment=own_data"], []),
        (
            ["experiment=own_data", "actor_rollout_ref.model.path=M"],
            ["actor.optim.lr=0.0001", "max_response_length=64", "fsdp_config.dtype=float32"],
        ),
        (
            [
                "experiment=own_data",
                "actor_rollout_ref.model.path=M",
                "actor_rollout_ref.actor.optim.lr=1e-6",
                "data.max_response_length=500",
            ],
            ["fsdp_config.dtype=float32"],
        ),
        (["experiment=own_model", "actor_rollout_ref.model.path=M"], []),
    ],
)
def test_a_larger_model_with_the_values_of_the_small_base_is_refused(overrides, kept):
    config, complete = composed("grpo", overrides)
    found = values_of_small_base(config, complete)
    assert len(found) == len(kept)
    assert all(text.endswith(end) for text, end in zip(found, kept, strict=True))
    if kept:
        with pytest.raises(ConfigError, match="take experiment=own_model, or give your own for"):
            launch_command(overrides)


def test_what_the_small_base_became_goes_on_with_its_values():
    trained = ["experiment=own_data", "actor_rollout_ref.model.path=data/closed_world/deep/base"]
    config, complete = composed("grpo", trained)
    assert values_of_small_base(config, complete) == []


def test_a_corpus_that_is_not_named_is_asked_for():
    with pytest.raises(
        ConfigError, match=r"setup\.index_dir=.*: name the corpus .* by setup\.corpus_path"
    ):
        launch_command(["experiment=own_data"])


def test_the_launcher_makes_one_run():
    with pytest.raises(ConfigError, match="--multirun"):
        launch_command(["-m", "trainer.seed=0,1"])


def test_the_launcher_reads_no_configuration_but_its_own(tmp_path):
    with pytest.raises(ConfigError, match=r"--config-path.*verl\.trainer\.main_ppo takes them"):
        launch_command(["--config-path", str(tmp_path), "--config-name", "grpo"])


def test_experiments_of_ppo_are_whole_whatever_they_start_from():
    """`evaluate` and `infer` start from grpo."""
    config, _ = composed("grpo", ["experiment=closed_world/ppo"])
    assert validate(as_plain(config)).use_critic
