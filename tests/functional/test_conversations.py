"""Conversations through the commands: SFT with a template of its config, and REINFORCE from what SFT leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture
from tests import chats
from tests.chats import assistant, jsonl, system, user
from tests.functional.conftest import Workshop, run
from tests.functional.test_commands import SFT
from tests.functional.test_documented import lines

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [
    [user("say ab")],
    [system("be brief"), user("say cd"), assistant("cd"), user("once more")],
    [user("say ef")],
    [system("sing"), user("say gh")],
]
ROWS = [
    {"messages": ASKED[0], "wanted": "a"},
    {"prompt": ASKED[1], "wanted": "c"},
    {"messages": ASKED[2], "wanted": "e"},
    {"system": "sing", "conversations": [{"from": "User", "value": "say gh"}], "wanted": "g"},
]
REWARD = """
def wanted(prompts, responses, wanted, **fields):
    return [len(p) + r.count(w) for p, r, w in zip(prompts, responses, wanted)]
"""


@pytest.fixture(scope="module")
def sft(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SFT leaves of four conversations, with a template that the archive it begins with has not."""
    folder = tmp_path_factory.mktemp("sft")
    rows = [{"messages": [user(f"say {word}"), assistant(word * 3)]} for word in ("ab", "cd", "ef", "gh")]
    answers = jsonl(folder / "chats.jsonl", *rows)
    run(
        "python", SFT, f"model.restore_from_path={workshop.path('sft_model.nemo')}", "model.data.chat=True",
        f"model.data.chat_template='{TEMPLATE}'", f"model.data.train_ds.file_path={answers}",
        f"model.data.validation_ds.file_path={answers}", "model.data.train_ds.global_batch_size=4",
        "trainer.sft.max_epochs=8", "trainer.sft.val_check_interval=1", "model.optim.lr=3e-3", "~model.optim.sched",
        f"exp_manager.explicit_log_dir={folder}", "trainer.precision=32",
    )  # fmt: skip
    return folder


def test_a_chat_is_trained_on_and_lowers_the_loss_of_its_answers(sft: Path) -> None:
    losses = [row["val/loss"] for row in lines(sft / "metrics.jsonl") if "val/loss" in row]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5


def test_reinforce_draws_answers_to_conversations_as_the_template_that_sft_was_given_renders_them(
    sft: Path, tmp_path: Path
) -> None:
    prompts, notes = jsonl(tmp_path / "prompts.jsonl", *ROWS), tmp_path / "notes"
    (tmp_path / "rewards.py").write_text(REWARD)
    run(
        "python", "tests/functional/noting_prompts.py", str(notes),
        "examples/nlp/gpt/train_gpt_reinforce_actor.py",
        f"pretrained_checkpoint.restore_from_path={sft / 'checkpoints/megatron_gpt_sft.nemo'}",
        f"model.data.data_prefix={{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
        f"reward_function={tmp_path / 'rewards.py'}:wanted", "trainer.precision=32",
        f"exp_manager.explicit_log_dir={tmp_path / 'actor'}", "model.ppo.num_rollout_samples=2",
        "model.ppo.num_rollout_per_prompt=2", "model.ppo.rollout_micro_batch_size=2", "model.global_batch_size=4",
        "model.ppo.length_params.max_length=6", "trainer.ppo.val_check_interval=2",
    )  # fmt: skip

    theirs = chats.theirs(tmp_path)
    theirs.chat_template = TEMPLATE
    tokens = [tuple(theirs.apply_chat_template(m, add_generation_prompt=True, return_dict=False)) for m in ASKED]
    drawn = [tuple(json.loads(line)) for line in notes.read_text().splitlines()]
    validations, rollouts = 2, 2  # before and after the two steps, of the first two prompts; of each prompt
    assert sorted(drawn) == sorted(validations * tokens[:2] + rollouts * tokens)

    rows = [row for step in (1, 2) for row in lines(tmp_path / f"actor/rollouts/step_{step}.jsonl")]
    fields = [next(name for name in row if name in ("messages", "prompt", "conversations")) for row in rows]
    shown = [json.dumps(row[name]) for row, name in zip(rows, fields, strict=True)]
    asked = [json.dumps(row.get("messages", row.get("prompt", row.get("conversations")))) for row in ROWS]
    assert sorted(shown) == sorted(rollouts * asked), "every prompt as its row has it"
    for row, conversation in zip(rows, shown, strict=True):
        place = asked.index(conversation)
        text = ASKED[place][-1]["content"]
        assert row["reward"] == len(text) + row["output"].count(str(ROWS[place]["wanted"]))
    left = read_architecture(tmp_path / "actor/checkpoints/megatron_gpt_rs_actor.nemo")
    assert left.tokenizer["chat_template"] == TEMPLATE
