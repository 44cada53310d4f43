"""The chat template of a training run: given under one key by all of them, and kept with what is trained."""

from __future__ import annotations

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.data.chat import ChatTemplate, template_text, with_values
from nemo_aligner.engine.interfaces import TrainableModel

TEMPLATE = "model.data.chat_template"


def training_template(model: TrainableModel, given: ChatKeys) -> ChatTemplate | None:
    """The template given, else the model's own, with the values given for it. None where there is neither.

    It is the model's own from now on, and in its archive: whoever draws from the archive, or scores with it, renders
    conversations as it was trained on them. Raises ConfigError.
    """
    own = model.tokenizer.chat_template
    text = template_text(given.chat_template, TEMPLATE) or own
    if text is None:
        return None
    text = with_values(text, given.chat_template_kwargs or {})
    template = ChatTemplate(text, model.tokenizer, TEMPLATE)
    if text != own:
        model.keep_chat_template(text)
    return template
