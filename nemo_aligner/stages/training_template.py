"""The chat template of a training run: given under one key by all of them, and kept with what is trained."""

from __future__ import annotations

import logging

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.data.chat import ChatTemplate, template_text
from nemo_aligner.engine.interfaces import TrainableModel

log = logging.getLogger(__name__)

TEMPLATE = "model.data.chat_template"


def training_template(model: TrainableModel, given: ChatKeys) -> ChatTemplate | None:
    """The template given, which is the model's own from now on and in its archive; else what it has. None: neither.

    Whoever draws from the archive, or scores with it, renders conversations as it was trained on them. Raises
    ConfigError.
    """
    text = template_text(given.chat_template, TEMPLATE)
    if text is not None:
        model.keep_chat_template(text)
    if given.chat_template_kwargs:
        log.info("%s_kwargs are not kept in the archive: who uses it has to be given them too", TEMPLATE)
    return ChatTemplate.of(model.tokenizer, given, TEMPLATE)
