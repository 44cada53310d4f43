"""Chat templates render as transformers renders them, and what is trained on is what the assistant writes."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers

from nemo_aligner.data.chat import ChatTemplate, messages_of
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.errors import ConfigError, DataError

MESSAGES = [
    {"role": "system", "content": "Be <kind> & 'brief'"},
    {"role": "user", "content": "Grüße 🎬"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "a2"},
]
PLAIN = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %};{% endfor %}"
)
TEMPLATES = {
    "special tokens": PLAIN,
    "tojson": "{{ messages | tojson }}{{ {'b': 1, 'a': '<é>'} | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": MARKED,
    "generation prompt": PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}",
    "tools": "{% if tools is none %}none{% endif %}{% if documents is defined %}defined{% endif %}",
    "blocks on lines of their own": "{% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\nend",
}


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    names = {name: token for name, token in BYTE_TOKENIZER.items() if name.endswith("_token")}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(
    name: str, prompt: bool, tokenizer: FastTokenizer, theirs: Any
) -> None:
    found = ChatTemplate(TEMPLATES[name], tokenizer, "k").render(MESSAGES, generation_prompt=prompt)
    assert found == theirs.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
    )


def test_the_date_is_todays(tokenizer: FastTokenizer) -> None:
    found = ChatTemplate("{{ strftime_now('%Y-%m') }}", tokenizer, "k").render(MESSAGES, generation_prompt=False)
    assert found == datetime.now().strftime("%Y-%m")


def segments(template: str, tokenizer: FastTokenizer) -> list[tuple[str, bool]]:
    return ChatTemplate(template, tokenizer, "k").segments({"messages": MESSAGES}, "rows.jsonl", 3)


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_segments_are_the_whole_text_and_the_assistants_are_marked(template: str, tokenizer: FastTokenizer) -> None:
    found = segments(template, tokenizer)
    whole = ChatTemplate(template, tokenizer, "k").render(MESSAGES, generation_prompt=False)
    assert "".join(text for text, _ in found) == whole
    marked = [text for text, is_target in found if is_target]
    start, end = ("", "<|eos|>") if template == MARKED else ("<assistant>", "<|eos|>\n")
    assert marked == [f"{start}a1{end}", f"{start}a2{end}"]  # with EOS, or the model never learns to stop


def test_a_conversation_that_the_template_refuses_is_named_with_its_line(tokenizer: FastTokenizer) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the chat template refuses the conversation: no system"):
        segments("{{ raise_exception('no system') }}", tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the chat template refuses the conversation"):
        segments("{{ messages[0]['content'] + 1 }}", tokenizer)


def test_a_conversation_that_cannot_be_cut_into_turns_is_named_with_its_line(tokenizer: FastTokenizer) -> None:
    fault = r"^rows\.jsonl:3: the chat template does not render a conversation as a prefix of its continuation$"
    for template in (
        "{{ messages | length }}" + PLAIN,  # what was said before an answer changes with the answer
        PLAIN + "{% if add_generation_prompt %}<bot>{% endif %}",  # an answer does not begin as it was asked for
    ):
        with pytest.raises(DataError, match=fault):
            segments(template, tokenizer)
    with pytest.raises(DataError, match=r"^p:4: the conversation has no assistant turn to train on$"):
        ChatTemplate(PLAIN, tokenizer, "k").segments({"messages": MESSAGES[:2]}, "p", 4)


def test_nemos_conversations_are_messages_of_the_roles_that_their_names_stand_for() -> None:
    names = {"User": "user", "human": "user", "prompter": "user", "Assistant": "assistant", "gpt": "assistant"}
    turns = [{"from": name, "value": name, "weight": i % 2} for i, name in enumerate([*names, "Tool"])]
    wanted = [{"role": names.get(t["from"], "tool"), "content": t["from"], "weight": t["weight"]} for t in turns]
    assert messages_of({"conversations": turns}, "p", 1) == wanted
    told = {"role": "system", "content": "be brief"}
    assert messages_of({"conversations": turns, "system": "be brief"}, "p", 1) == [told, *wanted]
    plain = messages_of({"conversations": [{"from": "User", "value": "x"}], "system": ""}, "p", 1)
    assert plain == [{"role": "user", "content": "x", "weight": 1}]
    for turn in ("text", {"value": "x"}, {"from": "User"}):
        with pytest.raises(DataError, match=r"^p:5: the turn .* lacks a role or a text$"):
            messages_of({"conversations": [*turns, turn]}, "p", 5)
    with pytest.raises(DataError, match=r"^p:5: a chat row needs `messages` or `conversations`, a list of turns$"):
        messages_of({"messages": "x", "conversations": {}}, "p", 5)


def test_what_is_no_template_names_its_key(tokenizer: FastTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"model\.data\.chat_template: not a valid Jinja template"):
        ChatTemplate("{% if %}", tokenizer, "model.data.chat_template")


def weighted(*weights: int) -> dict[str, Any]:
    turns = iter(weights)
    return {"messages": [{**m, "weight": next(turns)} if m["role"] == "assistant" else m for m in MESSAGES]}


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("weights", [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_a_turn_of_weight_0_is_read_and_no_target(
    tokenizer: FastTokenizer, template: str, weights: tuple[int, int]
) -> None:
    chat = ChatTemplate(template, tokenizer, "k")
    found = chat.segments(weighted(*weights), "p", 1)
    targets = "".join(text for text, is_target in found if is_target)
    assert [f"a{i + 1}" in targets for i in range(2)] == [weight == 1 for weight in weights]
    assert "".join(text for text, _ in found) == "".join(
        text for text, _ in chat.segments({"messages": MESSAGES}, "p", 1)
    )


def test_a_weight_that_is_no_choice_is_refused(tokenizer: FastTokenizer) -> None:
    with pytest.raises(DataError, match=r"^p:3: a turn's weight is 0 or 1, not 2$"):
        ChatTemplate(PLAIN, tokenizer, "k").segments(weighted(1, 2), "p", 3)


def test_weights_and_generation_blocks_that_are_no_turns_do_not_go_together(tokenizer: FastTokenizer) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(DataError, match=r"^p:3: the chat template's generation blocks are not one a turn, so weights"):
        ChatTemplate(template, tokenizer, "k").segments(weighted(1, 0), "p", 3)


@pytest.mark.parametrize("turn", ["text", {"role": "user"}, {"content": "x"}, {"role": "user", "content": 1}])
def test_a_turn_without_a_role_or_a_text_is_named_with_its_line(tokenizer: FastTokenizer, turn: Any) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the turn .* lacks a role or a text$"):
        ChatTemplate(PLAIN, tokenizer, "k").segments({"messages": [*MESSAGES, turn]}, "rows.jsonl", 7)


@pytest.mark.parametrize("name", ["pad_token", "unk_token", "additional_special_tokens"])
def test_a_token_that_is_not_known_is_never_written_as_nothing(name: str, tokenizer: FastTokenizer) -> None:
    rows = {"messages": MESSAGES}
    said = rf"^p:2: the chat template refuses the conversation: it writes {name}, which is not known here"
    chat = ChatTemplate(f"{{{{ {name} }}}}" + PLAIN, tokenizer, "k")
    for render in (chat.whole, chat.prompt, chat.frame, chat.segments):
        with pytest.raises(DataError, match=said):
            render(rows, "p", 2)
    asking = ChatTemplate(f"{{% if {name} is defined %}}x{{% endif %}}" + PLAIN, tokenizer, "k")
    assert asking.whole(rows, "p", 2) == ChatTemplate(PLAIN, tokenizer, "k").whole(rows, "p", 2)
    given = ChatTemplate(f"{{{{ {name} }}}}" + PLAIN, tokenizer, "k", {name: "<x>"})
    assert given.whole(rows, "p", 2).startswith("<x>")


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1", "\ufdd2"])
def test_no_letter_of_a_turn_is_taken_for_a_mark_of_a_template(mark: str, tokenizer: FastTokenizer) -> None:
    rows = {"messages": [{"role": "user", "content": f"a{mark}b"}, {"role": "assistant", "content": "c"}]}
    for render in (
        ChatTemplate(MARKED, tokenizer, "k").whole,
        ChatTemplate(MARKED, tokenizer, "k").prompt,
        ChatTemplate(MARKED, tokenizer, "k").segments,
    ):
        with pytest.raises(DataError, match=rf"^p:2: a turn holds U\+{ord(mark):04X}, which is no character$"):
            render(rows, "p", 2)


@pytest.mark.parametrize(
    "reach",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ''.format_map({'x': 1}).__class__.mro() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_reaches_no_attribute_changes_nothing_and_counts_no_further_than_it_may(
    reach: str, tokenizer: FastTokenizer
) -> None:
    template = ChatTemplate(reach, tokenizer, "chat_template")
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(jinja2.TemplateError):
        template.render(messages, generation_prompt=True)
    assert messages == [{"role": "user", "content": "a"}]
