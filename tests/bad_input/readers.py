"""What reads a bad input: a script's main with a command line, or the reader that the scripts use."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_aligner.errors import AlignerError, ServerError
from tests.fakes import ByteTokenizer, OneProcess
from tests.fuzz.targets import app, asked
from tests.tiny import ARCHIVED

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    path.stem: path
    for path in (*(ROOT / "examples/nlp/gpt").rglob("*.py"), *(ROOT / "scripts").glob("*.py"))
    if "import main" in path.read_text()
}
_ONE_FILE = "data.file_names=[rows.jsonl]"
RIGHT = {
    "train_gpt_sft": ("model.restore_from_path=policy", "model.data.train_ds.file_path=rows.jsonl"),
    "train_reward_model": (
        "pretrained_checkpoint.restore_from_path=policy", "model.data.data_prefix={train: [rows.jsonl]}",
    ),
    "train_gpt_reinforce_actor": (
        "pretrained_checkpoint.restore_from_path=policy", "model.data.data_prefix={train: [rows.jsonl]}",
        "remote_critic_rm.reward_model.ip=localhost",
    ),
    "serve_reward_model": ("rm_model_file=judge",),
    "megatron_gpt_eval": ("gpt_model_file=policy", "prompts=[a]"),
    "launch_random_sampler": ("gpt_model_file=policy", _ONE_FILE, "output_file=out.jsonl"),
    "launch_reward_labeler": ("gpt_model_file=judge", _ONE_FILE, "output_file=out.jsonl"),
    "evaluate_policy": ("policy_files=[policy]", "reward_model_file=judge", _ONE_FILE, "output_file=out.json"),
}  # fmt: skip
"""What a command line needs, but for the keys that a case gives itself."""


@cache
def _main(script: str) -> Callable[[], None]:
    spec = importlib.util.spec_from_file_location(f"bad_input_{script}", SCRIPTS[script])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


def arguments(command: list[str]) -> list[str]:
    """Of a script, with those that a right command line has; none of them where `-` stands before its name."""
    name, *own = command
    given = {one.partition("=")[0] for one in own}
    return [*(one for one in RIGHT.get(name, ()) if one.partition("=")[0] not in given), *own]


def run(command: list[str]) -> None:
    """In this process."""
    sys.argv = [str(SCRIPTS[command[0].lstrip("-")]), *arguments(command)]
    _main(command[0].lstrip("-"))()


def jsonl(path: str, hf_dataset: bool = False) -> None:
    from nemo_aligner.data.jsonl import load_rows

    load_rows(path, required={"input": "data.input_key"}, hf_dataset=hf_dataset, cache_dir="temporary/cache")


def architecture(path: str) -> None:
    from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture

    read_architecture(path, key="gpt_model_file")


def archive(path: str) -> None:
    from nemo_aligner.engine.checkpoints.nemo_archive import open_archive

    with open_archive(path, OneProcess(), key="gpt_model_file"):
        pass


def tokenizer(folder: str, **settings: Any) -> None:
    """Of an opened archive, with these settings beside those of the tiny one."""
    from nemo_aligner.engine.loading import _opened

    _opened("m.nemo", Path(folder), replace(ARCHIVED, tokenizer=ARCHIVED.tokenizer | settings), "gpt_model_file")


def checkpoint(state: dict[str, Any], files: dict[str, str], then: dict[str, str | None]) -> None:
    """A checkpoint of these files, some of which are others afterwards, or gone."""
    from nemo_aligner.engine.checkpoints.checkpoint_folder import check_whole
    from tests.bad_input import made

    folder = Path("temporary/step_3")
    made.checkpoint(folder, state, files)
    for name, text in then.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    try:
        check_whole(folder)
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def metadata(folder: str) -> None:
    from nemo_aligner.engine.checkpoints.sharded import check_metadata

    check_metadata(Path(folder))


def hugging_face(folder: str) -> None:
    from nemo_aligner.engine.checkpoints.hf_folder import read_hf_folder

    read_hf_folder(Path(folder))


def gguf(path: str) -> None:
    from nemo_aligner.engine.checkpoints.gguf_weights import read_gguf

    read_gguf(Path(path))


def adapter(folder: str) -> None:
    from nemo_aligner.engine.checkpoints.peft_folder import read_peft_folder

    read_peft_folder(Path(folder), ARCHIVED)


def template(text: str, row: dict[str, Any]) -> None:
    """A chat template, and a row of training data that it renders."""
    from nemo_aligner.data.chat import ChatTemplate

    ChatTemplate(text, ByteTokenizer(), "model.data.chat_template").segments(row, "rows.jsonl", 7)


def generation(method: str, path: str, body: Any, type: str = "application/json") -> None:
    """A request to the generation server, whose answer is the line."""
    content = body if isinstance(body, str) else json.dumps(body)
    status, answer = asyncio.run(asked(app(), method, path, content.encode(), type))
    raise ServerError(f"HTTP {status}: {json.loads(answer)['error']['message']}")


def door(headers: dict[str, str], body: str = "", path: str = "/v2/models/m/infer") -> None:
    """A request to the reward server's door, which has a token and takes 100 bytes."""
    from nemo_aligner.servers.doors import Door, Guard
    from nemo_aligner.servers.gate import Gate

    guard = Guard(Gate("http://127.0.0.1:9", "x"), [Door("127.0.0.1", 80, "port", token="t" * 16, max_bytes=100)])
    status, answer = asyncio.run(asked(guard, "POST", path, body.encode(), "application/json", headers))
    raise ServerError(f"HTTP {status}: {json.loads(answer)['error']}")


def rewards(**inputs: list[Any]) -> None:
    """A request to the reward model, decoded as Triton hands it over; the first error is the line."""
    from nemo_aligner.servers.reward_server import answer_requests
    from nemo_aligner.servers.wire import RequestReader

    def array(name: str, rows: list[Any]) -> np.ndarray:
        if name == "sentences":
            return np.array([[one.encode("latin-1") for one in row] for row in rows], dtype=object)
        return np.array(rows, dtype=np.bool_ if name == "add_EOS" else np.int64)

    reader = RequestReader(ByteTokenizer(), limit=8, vocab_size=258, append_eod=False, max_text_bytes=20)
    [found] = answer_requests([{name: array(name, rows) for name, rows in inputs.items()}], reader, _never)
    raise AlignerError(next(error.decode() for error in found["error"][:, 0] if error))


def _never(rows: list[list[int]]) -> list[float]:
    return [0.0] * len(rows)


def memory() -> None:
    """As of a list that does not fit."""
    raise MemoryError


READERS: dict[str, Callable[..., None]] = {
    reader.__name__: reader
    for reader in (
        jsonl, architecture, archive, tokenizer, checkpoint, metadata, hugging_face, gguf, adapter, template,
        generation, door, rewards, memory,
    )
}  # fmt: skip
