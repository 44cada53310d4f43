"""What a model sees of a row: a plain prompt as it is, a conversation as transformers renders it."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_aligner.config.offline import OfflineDataConfig
from nemo_aligner.data.row_texts import RowTexts, texts_of
from nemo_aligner.errors import DataError
from tests import chats
from tests.chats import GEMMA, LLAMA3, REAL, SMOLLM2, THINKING, assistant, ours, system, user

ONCE = [user("Grüße 🎬?")]
AGAIN = [*ONCE, assistant("a1\n\nand more"), user("again")]
TOLD = [system("Be <brief>."), *AGAIN]


def texts(template: str | None, **data: Any) -> RowTexts:
    return texts_of(OfflineDataConfig(chat_template=template, **data), ours())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return chats.theirs(tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("field", ["messages", "prompt"])
@pytest.mark.parametrize(
    ("name", "messages"),
    [(name, said) for name in REAL for said in (ONCE, AGAIN, TOLD) if not (name == "Gemma 2" and said is TOLD)],
)
def test_prompt_and_answered_prompt_are_what_transformers_renders(
    name: str, messages: list[dict[str, str]], field: str, theirs: Any
) -> None:
    found, row = texts(REAL[name]), {field: messages, "output": "Sure: 1\n2"}
    theirs.chat_template = REAL[name]
    assert found.prompt(row, "p") == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    whole = theirs.apply_chat_template([*messages, assistant("Sure: 1\n2")], tokenize=False)
    assert found.text(row, "output", "p") == whole
    assert found.text({field: [*messages, assistant("Sure: 1\n2")]}, "output", "p") == whole, (
        "with its last turn inside"
    )
    frame = found.frame(row, "p")
    assert frame.prompt == found.prompt(row, "p")
    assert frame.prompt + "Sure: 1\n2" + frame.closing + frame.rest == whole


def test_an_answer_stands_as_it_was_drawn_also_where_the_template_would_change_it() -> None:
    drawn = " with blanks \n"
    found = texts(LLAMA3).text({"messages": ONCE, "output": drawn}, "output", "p")
    assert f"<|end_header_id|>\n\n{drawn}<|eot_id|>" in found
    thought = texts(THINKING).text({"messages": AGAIN, "output": "no thoughts"}, "output", "p")
    assert thought.endswith("<|im_start|>assistant\nno thoughts<|im_end|>\n")


def test_what_the_template_says_is_the_assistants_is_what_it_would_have_to_write() -> None:
    marked = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    frame = texts(marked).frame({"messages": AGAIN}, "p")
    assert (frame.prompt[-16:], frame.closing, frame.rest) == ("again;assistant:", "!", ";")


def test_values_for_the_template_come_from_config_and_row_and_the_rows_go_first(theirs: Any) -> None:
    theirs.chat_template = THINKING
    for config, own in [(True, None), (False, None), (True, False), (False, True)]:
        row = {"messages": ONCE} | ({} if own is None else {"chat_template_kwargs": {"enable_thinking": own}})
        wanted = theirs.apply_chat_template(
            ONCE, tokenize=False, add_generation_prompt=True, enable_thinking=config if own is None else own
        )
        assert texts(THINKING, chat_template_kwargs={"enable_thinking": config}).prompt(row, "p") == wanted
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    theirs.chat_template = template
    for given in (tools, None):
        assert texts(template).prompt({"messages": ONCE, "tools": given}, "p") == theirs.apply_chat_template(
            ONCE, tools=given, tokenize=False
        )


def test_a_prompt_template_is_around_the_turn_that_is_answered() -> None:
    found = texts(SMOLLM2, prompt_template="Q: {input}\n", input_key="input")
    assert found.prompt({"input": "x {input}"}, "p") == "Q: x {input}\n"
    assert found.prompt({"messages": AGAIN}, "p") == texts(SMOLLM2).prompt(
        {"messages": [*AGAIN[:-1], user("Q: again\n")]}, "p"
    )
    spoken = {"conversations": [{"from": "User", "value": "again"}]}
    assert found.prompt(spoken, "p") == texts(SMOLLM2).prompt({"messages": [user("Q: again\n")]}, "p")


def test_a_text_in_the_input_key_is_the_prompt_whatever_else_the_row_has() -> None:
    assert texts(SMOLLM2).text({"input": "a", "messages": AGAIN, "output": "b"}, "output", "p") == "ab"
    assert texts(None).text({"input": "a", "output": "b"}, "output", "p") == "ab"


@pytest.mark.parametrize(
    ("template", "row", "line"),
    [
        (None, {"messages": ONCE}, "the row is a conversation, and the model's tokenizer has no chat template; give k"),
        (GEMMA, {"messages": TOLD}, "the chat template refuses the conversation: System role not supported"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", {"messages": TOLD},
            "the chat template leaves out the system turn 'Be <brief>.'",
        ),
        ("{{ messages[0].content }}", {"messages": [*AGAIN, user("more")]},
         "the chat template leaves out the user turn 'again'"),
        (SMOLLM2, {"messages": ONCE, "tools": "look"}, "field 'tools' is no list of tools for the chat template"),
        (SMOLLM2, {"messages": ONCE, "chat_template_kwargs": [1]},
         "field 'chat_template_kwargs' is no object of values for the chat template"),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_rendered_is_one_line(
    template: str | None, row: dict[str, Any], line: str
) -> None:
    from nemo_aligner.data.chat import ChatTemplate

    chat = None if template is None else ChatTemplate(template, ours(), "k")
    with pytest.raises(DataError) as fault:
        RowTexts(None, "input", chat, "k").prompt(row, "rows.jsonl", 3)
    assert str(fault.value) == f"rows.jsonl:3: {line}"


def test_a_template_that_leaves_out_answers_is_said_so() -> None:
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"^p:4: the chat template leaves out what the assistant answers$"):
        texts(silent).frame({"messages": ONCE}, "p", 4)
