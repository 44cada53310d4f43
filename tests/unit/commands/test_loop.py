"""`aligner loop` starts the shell loops with settings of the command line, and refuses those that they do not know.

A loop tells its stages the same whether one process runs all of them, or one each.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_aligner.commands.loop import LOOPS, environment_of, script_of, settings_of, usage
from nemo_aligner.errors import ConfigError

STAGE = """#!/usr/bin/env bash
# plays every stage: notes its arguments, and makes the files that the loop looks for; dies before it begins, or
# between its output and the record of how that was made, where it is told so.
# Plays the process that runs all of them, too
[[ $2 == nemo_aligner.owner ]] && exit
if [[ $2 == nemo_aligner.stages.one_process ]]; then
  echo $$ >>"$NOTES.hosts"
  while IFS= read -r -d '' count; do
    words=()
    for ((i = 0; i < count; i++)); do IFS= read -r -d '' word && words+=("$word"); done
    "$0" "${words[@]}" </dev/null || exit
    echo done >&3
  done
  exit
fi
[[ -n $DIES_AT && "$*" == *"$DIES_AT"* ]] && exit 9
printf '%s\\n' "${*:2}" >>"$NOTES"
[[ $2 == nemo_aligner ]] && printf '%s\\n' "${@:4}" >>"$NOTES.words"
quote="'"
for word in "$@"; do
  path=${word#*=}
  if [[ $path == "$quote"* ]]; then path=${path:1:-1} path=${path//\\\\$quote/$quote}; fi
  case $word in
    output_file=*)
      echo "$*" >"$path"
      if [[ -n $DIES_IN && $2 == nemo_aligner && $3 == "$DIES_IN" ]]; then exit 9; fi
      echo "$*" >"$path.meta.json"
      ;;
    exp_manager.explicit_log_dir=*)
      mkdir -p "$path/checkpoints"
      touch "$path/checkpoints/megatron_gpt_sft.nemo"
      ;;
  esac
done
"""


def test_settings_are_those_that_the_scripts_read() -> None:
    common = {"TRAINING_ITERS", "PROMPTS_PATH", "RESULT_PATH", "SAMPLER_ARGS", "LAUNCH", "PYTHON"}
    for loop, own in zip(LOOPS, (set(), {"THRESHOLD", "THRESHOLDS"}, {"TARGET_REWARD"}), strict=True):
        assert common | own <= settings_of(loop)
    assert "THRESHOLD" not in settings_of("rs")


def test_every_setting_is_explained() -> None:
    text = usage()
    assert [name for loop in LOOPS for name in settings_of(loop) if name not in text] == []


def test_a_value_may_hold_what_it_likes() -> None:
    assert environment_of("rs", ["SAMPLER_ARGS=data.n=4 seed=3", "SEED="]) == {
        "SAMPLER_ARGS": "data.n=4 seed=3",
        "SEED": "",
    }


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("THRESHOLD=1", "THRESHOLD: no such setting of aligner loop rs; it takes GENERATE_SAMPLES_PATH, "),
        ("data.n", "'data.n' is not of the form NAME=value"),
    ],
)
def test_what_the_loop_does_not_know_is_refused(word: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        environment_of("rs", [word])


class Played:
    """Loops whose stages are played: what each was told, in order."""

    def __init__(self, folder: Path, one_process: bool) -> None:
        self._stage, self._notes, self.result = folder / "stage", folder / "notes", folder / "loop"
        self._one_process = f"ONE_PROCESS={int(one_process)}"
        self._stage.write_text(STAGE)
        self._stage.chmod(0o755)

    def __call__(
        self, loop: str, *words: str, dies_at: str = "", dies_in: str = ""
    ) -> subprocess.CompletedProcess[str]:
        common = ("PROMPTS_PATH=p", "POLICY_MODEL_PATH=sft.nemo", "REWARD_MODEL_PATH=rm.nemo")
        settings = environment_of(
            loop, [f"PYTHON={self._stage}", f"RESULT_PATH={self.result}", self._one_process, *common, *words]
        )
        environment = {**os.environ, **settings, "NOTES": str(self._notes), "DIES_AT": dies_at, "DIES_IN": dies_in}
        command = ["bash", str(script_of(loop))]
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)

    def hosts(self) -> int:
        """How many processes ran all stages of a loop."""
        path = Path(f"{self._notes}.hosts")
        return len(path.read_text().split()) if path.exists() else 0

    def words(self) -> list[str]:
        """All overrides of all stages."""
        return Path(f"{self._notes}.words").read_text().splitlines()

    def told(self, stage: str) -> list[str]:
        return [line for line in self._notes.read_text().splitlines() if line.startswith(f"nemo_aligner {stage} ")]


@pytest.fixture(params=[False, True], ids=["process each", "one process"])
def play(tmp_path: Path, request: pytest.FixtureRequest) -> Played:
    return Played(tmp_path, request.param)


@pytest.mark.processes
def test_a_decision_transformer_asks_for_its_target_once_it_has_been_trained(play: Played) -> None:
    done = play("dt", "TRAINING_ITERS=2", "TARGET_REWARD=2", "SFT_ARGS=model.optim.lr=1")
    assert done.returncode == 0, done.stderr
    samples, labels, trainings = (play.told(name) for name in ("sample", "label", "sft"))
    assert ['data.prompt_template="{input} <rm_score>: 2.0 "' in line for line in samples] == [False, True]
    policies = ("sft.nemo", f"{play.result}/checkpoints/megatron_gpt_sft.nemo")
    assert [f"gpt_model_file={policy} " in line for line, policy in zip(samples, policies, strict=True)] == [True] * 2
    assert ["processor=dt" in line and "standardization.enable=True" in line for line in labels] == [True] * 2
    whole = 'model.data.train_ds.prompt_template="{input}{output}" model.optim.lr=1'
    assert [whole in line for line in trainings] == [True] * 2


@pytest.mark.processes
def test_a_decision_transformer_of_conversations_is_trained_with_the_chat_template(play: Played) -> None:
    done = play("dt", "TRAINING_ITERS=1", "SFT_ARGS=model.data.chat=True")
    assert done.returncode == 0, done.stderr
    [training] = play.told("sft")
    assert "model.data.chat=True" in training
    assert "prompt_template" not in training


def words_of(lines: list[str], key: str) -> list[str]:
    return [word.partition("=")[2] for line in lines for word in line.split() if word.startswith(f"{key}=")]


@pytest.mark.processes
@pytest.mark.parametrize("dies_at", ["", "threshold=0.5", "iter_0/improve_1", "iter_0/improve_2"])
def test_each_improve_step_trains_the_policy_of_the_one_before_also_after_a_kill(dies_at: str, play: Played) -> None:
    settings = ("TRAINING_ITERS=2", "THRESHOLDS=0 0.5 1")
    if dies_at:
        assert play("rest", *settings, dies_at=dies_at).returncode == 9
    done = play("rest", *settings)
    assert done.returncode == 0, done.stderr
    samples, labels, trainings = (play.told(name) for name in ("sample", "label", "sft"))
    last = f"{play.result}/checkpoints/megatron_gpt_sft.nemo"
    assert words_of(samples, "gpt_model_file") == ["sft.nemo", last], "samples are drawn once an iteration"
    assert words_of(labels, "threshold") == ["0", "0.5", "1"] * 2
    folders = [f"{play.result}/iter_{i}{step}" for i in range(2) for step in ("", "/improve_1", "/improve_2")]
    assert words_of(trainings, "exp_manager.explicit_log_dir") == folders
    before = [f"{folder}/checkpoints/megatron_gpt_sft.nemo" for folder in folders]
    assert words_of(trainings, "model.restore_from_path") == ["sft.nemo", *before[:2], last, *before[3:5]]
    assert not list(play.result.glob("iter_*"))


@pytest.mark.processes
@pytest.mark.parametrize("stage", ["sample", "label"])
def test_a_stage_that_was_killed_before_its_record_is_run_again(stage: str, play: Played) -> None:
    assert play("rs", "TRAINING_ITERS=1", dies_in=stage).returncode == 9
    assert play("rs", "TRAINING_ITERS=1").returncode == 0
    assert [len(play.told(name)) for name in ("sample", "label", "sft")] == [
        1 + (stage == "sample"),
        1 + (stage == "label"),
        1,
    ]
    spent = [line.rpartition(" ")[0] for line in (play.result / "seconds.log").read_text().splitlines()]
    assert list(dict.fromkeys(spent)) == ["0 sample", "0 label", "0 train"]


@pytest.mark.processes
@pytest.mark.parametrize("dies_at", ["", "iter_1", "loop_record"])
def test_what_was_best_in_an_iteration_competes_in_the_next_also_after_a_kill(dies_at: str, play: Played) -> None:
    settings = ("TRAINING_ITERS=3", "KEEP_BEST=1", "LABELER_ARGS=export_reward=False")
    if dies_at:
        assert play("rs", *settings, dies_at=dies_at).returncode == 9
    done = play("rs", *settings)
    assert done.returncode == 0, done.stderr
    labels = play.told("label")
    assert words_of(labels, "export_reward")[1::2] == ["True"] * 3, "the last one wins"
    assert words_of(labels, "best_so_far_file") == [f"{play.result}/best_so_far.jsonl"] * 2
    assert "best_so_far_file" not in labels[0]
    for part in ("", ".meta.json"):
        assert (play.result / f"best_so_far.jsonl{part}").read_text() == f"-m {labels[-1]}\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("loop", "value", "line"),
    [
        ("rs", "yes", "KEEP_BEST=yes is not 0 or 1"),
        (
            "rest",
            "1",
            "KEEP_BEST=1: there is a best sample of a prompt for rejection sampling alone, not with PROCESSOR=rest",
        ),
    ],
)
def test_keeping_the_best_is_for_rejection_sampling(loop: str, value: str, line: str, play: Played) -> None:
    done = play(loop, f"KEEP_BEST={value}")
    assert (done.returncode, done.stderr) == (1, f"error: {line}\n")
    assert not play.result.exists()


@pytest.mark.processes
@pytest.mark.parametrize("name", ["TRAINING_ITERS", "ROLLOUT_BATCH_SIZE", "SEED", "KEEP_SAMPLES"])
@pytest.mark.parametrize("value", ["08", "1e1", "-1", "many"])
def test_a_number_that_is_none_ends_the_loop_before_it_begins(name: str, value: str, play: Played) -> None:
    done = play("rs", f"{name}={value}")
    assert (done.returncode, done.stderr) == (1, f"error: {name}={value} is not a whole number\n")
    assert not play.result.exists()


@pytest.mark.processes
def test_a_count_of_iterations_that_is_none_is_named_and_left_as_it_is(play: Played) -> None:
    play.result.mkdir()
    count = play.result / "iter.log"
    count.write_text("two\n")
    done = play("rs")
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {count}: the number of finished iterations is needed, not 'two'\n",
    )
    assert count.read_text() == "two\n"


@pytest.mark.processes
def test_a_path_may_hold_what_the_grammar_of_overrides_gives_a_meaning(play: Played) -> None:
    play.result = play.result.parent / "a=b (é), it's [#1] ~&"
    prompts = play.result.parent / "x,y=z.jsonl"
    prompts.touch()
    done = play("rs", "TRAINING_ITERS=1", f"PROMPTS_PATH={prompts}", f"POLICY_MODEL_PATH={play.result}/old=1.nemo")
    assert done.returncode == 0, done.stderr
    parsed: dict[str, object] = {}
    for override in OverridesParser.create().parse_overrides(play.words()):
        parsed.setdefault(override.key_or_group, override.value())
    assert parsed["data.file_names"] == [str(prompts)]
    assert parsed["gpt_model_file"] == f"{play.result}/old=1.nemo"
    assert parsed["output_file"] == f"{play.result}/generated_samples.jsonl"
    assert parsed["model.restore_from_path"] == f"{play.result}/old=1.nemo"
    assert parsed["model.data.train_ds.file_path"] == f"{play.result}/filtered_samples.jsonl"
    assert parsed["exp_manager.explicit_log_dir"] == f"{play.result}/iter_0"
    assert (play.result / "checkpoints/megatron_gpt_sft.nemo").exists()


@pytest.mark.processes
@pytest.mark.parametrize("thresholds", ["1 0", "0 0", "0 a"])
def test_thresholds_that_do_not_rise_are_refused(thresholds: str, play: Played) -> None:
    done = play("rest", f"THRESHOLDS={thresholds}")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [f"error: THRESHOLDS={thresholds}: numbers are needed, each above the one before"],
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    ("settings", "status", "said", "hosts"),
    [
        (("ONE_PROCESS=1",), 0, "", 1),
        (("ONE_PROCESS=0",), 0, "", 0),
        (("ONE_PROCESS=1", "LAUNCH=env"), 0, "LAUNCH is set: each stage is a process of its own", 0),
        (("ONE_PROCESS=yes",), 1, "error: ONE_PROCESS=yes is not 0 or 1", 0),
    ],
)
def test_one_process_runs_all_stages_where_it_is_asked_for_and_can(
    settings: tuple[str, ...], status: int, said: str, hosts: int, tmp_path: Path
) -> None:
    play = Played(tmp_path, one_process=False)
    done = play("rs", "TRAINING_ITERS=2", *settings)
    assert (done.returncode, done.stderr.strip()) == (status, said)
    assert play.hosts() == hosts
    assert not list(play.result.glob("*.lock"))
