"""The chat template that a run is given is the model's own from then on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.engine.checkpoints.tokenizer import FastTokenizer
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.training_template import training_template
from tests import chats
from tests.chats import GEMMA, SMOLLM2, user

ASKED = [user("Is it so?")]


class Model:
    def __init__(self, template: str | None) -> None:
        self.tokenizer: FastTokenizer = chats.ours(template)
        self.kept: list[str] = []

    def keep_chat_template(self, template: str) -> None:
        self.kept.append(template)
        self.tokenizer.chat_template = template


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("own", [None, GEMMA])
def test_a_template_given_is_kept_as_text_and_rendered_as_transformers_does(
    tmp_path: Path, own: str | None, as_file: bool
) -> None:
    (tmp_path / "t.jinja").write_text(SMOLLM2)
    model = Model(own)
    template = training_template(model, ChatKeys(str(tmp_path / "t.jinja") if as_file else SMOLLM2))  # type: ignore[arg-type]
    assert model.kept == [SMOLLM2]
    theirs = chats.theirs(tmp_path)
    theirs.chat_template = SMOLLM2
    assert template is not None
    assert template.render(ASKED, generation_prompt=True) == theirs.apply_chat_template(
        ASKED, tokenize=False, add_generation_prompt=True
    )


def test_without_one_the_model_keeps_its_own_or_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = Model(GEMMA)
    template = training_template(model, ChatKeys(chat_template_kwargs={"a": 1}))  # type: ignore[arg-type]
    assert template is not None
    assert "<start_of_turn>user" in template.render(ASKED, generation_prompt=True)
    assert training_template(Model(None), ChatKeys()) is None  # type: ignore[arg-type]
    assert model.kept == []
    said = "model.data.chat_template_kwargs are not kept in the archive: who uses it has to be given them too"
    assert caplog.messages == [said]


def test_what_is_no_template_is_refused_and_not_kept(tmp_path: Path) -> None:
    model = Model(GEMMA)
    with pytest.raises(ConfigError, match=r"^model\.data\.chat_template: /no\.jinja cannot be read: No such file"):
        training_template(model, ChatKeys("/no.jinja"))  # type: ignore[arg-type]
    assert model.kept == []
