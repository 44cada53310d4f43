"""Rows as a model sees them: one function for what is sampled, scored, evaluated and trained."""

from __future__ import annotations

from pathlib import Path

from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.data.chat import ChatTemplate, ChatTokenizer, Frame
from nemo_aligner.data.jsonl import Row
from nemo_aligner.errors import DataError
from nemo_aligner.records import Turns


def filled(template: str | None, input_key: str, prompt: str) -> str:
    """The prompt as the model sees it; plain replacement, so braces in the prompt are only text."""
    return prompt if template is None else template.replace(f"{{{input_key}}}", prompt)


class RowTexts:
    """Plain prompts through `template`, conversations through the chat template: `chat`, None where there is none.

    Of a conversation `template` is around the turn that is answered. `key` is the config key of a chat template.
    """

    def __init__(self, template: str | None, input_key: str, chat: ChatTemplate | None, key: str) -> None:
        self._template, self._input_key, self._chat, self._key = template, input_key, chat, key

    def prompt(self, row: Row, path: str | Path, line: int | None = None) -> str:
        """What the model goes on from. Raises DataError."""
        turns = Turns.of(row, self._input_key)
        if turns is None:
            return filled(self._template, self._input_key, row[self._input_key])
        return self._needed_chat(path, line).prompt(self._said(row, turns), path, line)

    def frame(self, row: Row, path: str | Path, line: int | None = None) -> Frame:
        """What is around a response; nothing but the prompt before it, where that is plain. Raises DataError."""
        turns = Turns.of(row, self._input_key)
        if turns is None:
            return Frame(self.prompt(row, path, line), "", "")
        return self._needed_chat(path, line).frame(self._said(row, turns), path, line)

    def text(self, row: Row, output_key: str, path: str | Path, line: int | None = None) -> str:
        """Prompt and response together; a conversation with its answer as the template writes it. Raises DataError."""
        turns = Turns.of(row, self._input_key)
        if turns is not None and turns.answered:
            return self._needed_chat(path, line).whole(self._said(row, turns), path, line)
        return self.frame(row, path, line).text(row[output_key])

    def _said(self, row: Row, turns: Turns) -> Row:
        if self._template is None:
            return row
        return {**row, turns.field: turns.saying(filled(self._template, self._input_key, turns.text)).given}

    def _needed_chat(self, path: str | Path, line: int | None) -> ChatTemplate:
        if self._chat is None:
            raise DataError(
                f"the row is a conversation, and the model's tokenizer has no chat template; give {self._key}",
                path, line,
            )  # fmt: skip
        return self._chat


def texts_of(data: OfflineDataConfig, tokenizer: ChatTokenizer) -> RowTexts:
    """As the keys of `data` and the tokenizer's own chat template say."""
    key = "data.chat_template"
    return RowTexts(data.prompt_template, data.input_key, ChatTemplate.of(tokenizer, data, key), key)
