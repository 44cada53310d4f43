"""The chat template that a run is given is the model's own from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.data.chat import ChatTemplate, check_template
from nemo_aligner.engine.checkpoints.tokenizer import FastTokenizer
from nemo_aligner.errors import ConfigError
from nemo_aligner.stages.training_template import training_template
from tests import chats
from tests.chats import GEMMA, SMOLLM2, THINKING, user

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


def test_without_one_the_model_keeps_its_own_or_none() -> None:
    model = Model(GEMMA)
    template = training_template(model, ChatKeys())  # type: ignore[arg-type]
    assert template is not None
    assert "<start_of_turn>user" in template.render(ASKED, generation_prompt=True)
    assert training_template(Model(None), ChatKeys(chat_template_kwargs={"a": 1})) is None  # type: ignore[arg-type]
    assert model.kept == []


VALUES = {
    "enable_thinking": False,
    "tools": [{"name": "f"}],
    "said": "é\n%}{% raw %}'\"\\",
    "more": {"a": [None, -1.5]},
}
SHOWS = "  {% if enable_thinking is defined %}\n{{ [enable_thinking, tools, said, more] | tojson }}{% endif %}\n"


@pytest.mark.parametrize("own", [{}, {"enable_thinking": True}, {"said": "", "more": None, "tools": []}])
@pytest.mark.parametrize("template", [f"{SHOWS}{{{{ messages[0].content }}}}", f"\n{THINKING}"])
def test_the_values_given_are_kept_as_defaults_that_transformers_has_too(
    tmp_path: Path, template: str, own: dict[str, Any]
) -> None:
    model = Model(template)
    made = training_template(model, ChatKeys(chat_template_kwargs=VALUES))  # type: ignore[arg-type]
    assert made is not None
    theirs = chats.theirs(tmp_path)
    theirs.chat_template = template
    wanted = theirs.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, **{**VALUES, **own})
    assert made.render(ASKED, generation_prompt=True, values=own) == wanted
    given = ChatTemplate.of(model.tokenizer, ChatKeys(chat_template_kwargs=own), "data.chat_template")
    assert given is not None
    assert given.render(ASKED, generation_prompt=True) == wanted
    [theirs.chat_template] = model.kept
    assert theirs.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, **own) == wanted
    training_template(model, ChatKeys(chat_template_kwargs=VALUES))  # type: ignore[arg-type]
    assert len(model.kept) == 1, "the next run with the same values keeps the archive's template as it is"


@pytest.mark.parametrize("values", [{"a b": 1}, {"none": 1}, {"a.b": 1}, {"a": float("nan")}])
def test_values_that_no_template_can_have_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.data\.chat_template_kwargs\..* is nothing that a chat template has"
    ):
        check_template(ChatKeys(chat_template_kwargs=values), "model.data.chat_template")


def test_what_is_no_template_is_refused_and_not_kept(tmp_path: Path) -> None:
    model = Model(GEMMA)
    with pytest.raises(ConfigError, match=r"^model\.data\.chat_template: /no\.jinja cannot be read: No such file"):
        training_template(model, ChatKeys("/no.jinja"))  # type: ignore[arg-type]
    assert model.kept == []
