"""What is fuzzed: readers of bytes that anybody may have made, each with inputs to begin with.

A target returns where it read the input or refused it in one line, and raises what no user should see.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zstandard

from nemo_aligner.data.jsonl import dump_row, load_rows, parse_line
from nemo_aligner.errors import AlignerError
from tests.fakes import ByteTokenizer, OneProcess

Target = Callable[[bytes, Path], None]
"""Reads an input, with a folder for the files that it takes."""


@dataclass(frozen=True)
class Fuzzed:
    target: Target
    seeds: Callable[[], list[bytes]]
    modules: tuple[str, ...]  # whose branches guide the fuzzer


def jsonl(data: bytes, folder: Path) -> None:
    """The first byte chooses the packing; rows that are read can be written, and are then read as the same."""
    path = folder / f"rows.jsonl{('', '.gz', '.zst')[data[0] % 3 if data else 0]}"
    path.write_bytes(data[1:])
    try:
        rows = load_rows(path, required={"input": "data.input_key"})
    except AlignerError:
        return
    for row in rows:
        text = dump_row(row)
        assert "\n" not in text
        assert dump_row(parse_line(text, path, 1)) == text


def _jsonl_seeds() -> list[bytes]:
    rows = [{"input": "é\u2028", "id": 1, "deep": [[{"a": None}]]}, {"input": "", "x": 1e300, "y": "\ud83d\ude00"}]
    text = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + '\n\n{"input": NaN}\r{"input": "\\ud83d"}'
    packed = text.encode()
    return [b"\0" + packed, b"\1" + gzip.compress(packed), b"\2" + zstandard.compress(packed)]


def archive(data: bytes, folder: Path) -> None:
    """What is opened lies in its own folder, and nothing else has appeared."""
    from nemo_aligner.engine.checkpoints.nemo_archive import open_archive, read_architecture
    from nemo_aligner.engine.checkpoints.tokenizer import load_tokenizer

    path, before = folder / "m.nemo", tempfile.tempdir
    path.write_bytes(data)
    tempfile.tempdir = str(folder)
    try:
        arch = read_architecture(path)
        with open_archive(path, OneProcess()) as opened:
            assert sorted(found.name for found in folder.iterdir()) == sorted(["m.nemo", opened.name])
            if arch.tokenizer.get("library") in (None, "huggingface"):
                load_tokenizer(opened, arch)
    except AlignerError:
        pass
    finally:
        tempfile.tempdir = before
    assert [found.name for found in folder.iterdir()] == ["m.nemo"]


def packed(files: dict[str, bytes]) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


SHAPE: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}


def _archive_seeds() -> list[bytes]:
    config = yaml.safe_dump({**SHAPE, "vocab_size": 9, "peft": None, "tokenizer": {"library": None}}).encode()
    files = {"model_config.yaml": config, "model_weights/x": b"abc", "tokenizer.json": b"{}"}
    sums = b"%s  model_weights/x\n" % (b"0" * 64)
    return [packed(files), packed({**files, "SHA256SUMS": sums}), packed({f"./{name}": files[name] for name in files})]


def importers(data: bytes, folder: Path) -> None:
    """The first byte chooses the file: of a Hugging Face folder, a GGUF file, or an adapter's folder."""
    from nemo_aligner.engine.checkpoints.gguf_weights import read_gguf
    from nemo_aligner.engine.checkpoints.hf_folder import read_hf_folder
    from nemo_aligner.engine.checkpoints.peft_folder import read_peft_folder

    name = NAMES[data[0] % len(NAMES) if data else 0]
    for file, content in _whole().items():
        (folder / file).write_bytes(content)
    (folder / name).write_bytes(data[1:])
    try:
        if name.endswith(".gguf"):
            read_gguf(folder / name)
        elif name.startswith("adapter"):
            from nemo_aligner.config.architecture import Architecture

            read_peft_folder(folder, Architecture.from_nemo(SHAPE))
        else:
            read_hf_folder(folder)
    except AlignerError:
        pass
    finally:
        for found in folder.iterdir():
            found.unlink()


NAMES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "model.safetensors", "m.gguf", "adapter_config.json", "adapter_model.safetensors"),
    "model.safetensors.index.json",
)
_TENSOR = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def _whole() -> dict[str, bytes]:
    """Files of a folder of which nothing is wrong."""
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8,
        "num_attention_heads": 2, "vocab_size": 9, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    tensors = len(_TENSOR).to_bytes(8, "little") + _TENSOR + b"\0" * 8
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "version": "1.0"}
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    files = {"config.json": config, "tokenizer.json": tokenizer, "adapter_config.json": adapter}
    return {
        **{name: json.dumps(content).encode() for name, content in files.items()},
        **dict.fromkeys(("model.safetensors", "adapter_model.safetensors"), tensors),
    }


def _importer_seeds() -> list[bytes]:
    files = _whole() | {
        "tokenizer_config.json": (
            b'{"eos_token": {"content": "a"}, "chat_template": [{"name": "default", "template": ""}]}'
        ),
        "special_tokens_map.json": b'{"bos_token": "b"}',
        "generation_config.json": b'{"eos_token_id": [0, 1], "pad_token_id": 1}',
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors.index.json": b'{"weight_map": {"x": "model.safetensors"}}',
        "m.gguf": gguf_file(),
    }
    more = {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "quantization_config": {"quant_method": "fp8"},
        "sliding_window": 4, "layer_types": ["sliding_attention"], "head_dim": 4, "num_key_value_heads": 1,
    }  # fmt: skip
    rich = json.dumps({**json.loads(files["config.json"]), **more, "architectures": ["MistralForCausalLM"]}).encode()
    return [bytes([NAMES.index(name)]) + content for name, content in files.items()] + [b"\0" + rich]


def gguf_file(**other: Any) -> bytes:
    """A GGUF file of a shape, a tokenizer and one tensor; `other` values take the place of its own, None of none."""
    import gguf

    values: dict[str, Any] = {
        "llama.block_count": 1, "llama.embedding_length": 8, "llama.feed_forward_length": 8, "llama.context_length": 16,
        "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 3],
        "tokenizer.ggml.merges": [], "tokenizer.ggml.eos_token_id": 1, **other,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "m.gguf", values.pop("general.architecture", "llama"))
        for name, value in values.items():
            if value is None or value == []:
                continue
            numbers = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            ({str: writer.add_string, list: writer.add_array} | numbers)[type(value)](name, value)
        writer.add_tensor("token_embd.weight", np.zeros((2, 8), np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return (Path(folder) / "m.gguf").read_bytes()


def requests(data: bytes, folder: Path) -> None:
    """The first byte chooses the route, or the reward server's own; every answer says 4xx, or that the desk is shut."""
    kind = data[0] % (len(ROUTES) + 1) if data else 0
    if kind == len(ROUTES):
        _reward_request(data[1:])
        return
    status, body = asyncio.run(asked(app(), *ROUTES[kind], data[1:]))
    assert 400 <= status < 500 or status == 503, (status, body[:300])
    assert set(json.loads(body)) == {"error"}


ROUTES = (("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("PUT", "/generate"))


async def asked(
    application: Any,
    method: str,
    path: str,
    body: bytes,
    kind: str = "application/json",
    more: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and body that an ASGI application answers with; `more` headers."""
    told: list[Any] = []
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return left.pop() if left else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        told.append(message)

    fields = {"content-type": kind, "content-length": str(len(body)), **(more or {})}
    headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": headers,
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "state": {},
    }  # fmt: skip
    await application(scope, receive, send)
    return told[0]["status"], b"".join(message.get("body", b"") for message in told[1:])


_made: list[Any] = []


def app() -> Any:
    """Nobody draws for it, and its desk is shut: what is accepted is answered with 503."""
    if not _made:
        from nemo_aligner.data.chat import ChatTemplate
        from nemo_aligner.servers.generation.app import make_app
        from nemo_aligner.servers.generation.clerk import Served
        from nemo_aligner.servers.generation.desk import Closing, FrontDesk

        class Shut(FrontDesk):
            def submit(self, requests: Any) -> Any:
                raise Closing

        template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", ByteTokenizer(), "chat_template")
        _made.append(make_app(Served("m", ByteTokenizer(), 64, 258, template, (), False, seed=1), Shut(lambda: True)))
    return _made[0]


def _reward_request(data: bytes) -> None:
    """JSON: a name → rows, of texts or numbers, as Triton hands them over."""
    from nemo_aligner.servers.reward_server import answer_requests
    from nemo_aligner.servers.wire import RequestReader

    try:
        given = json.loads(data)
        assert isinstance(given, dict)
        assert all(isinstance(rows, list) for rows in given.values())
        inputs = {
            name: np.array([[one.encode("utf-8", "surrogatepass") for one in row] for row in rows], dtype=object)
            if name == "sentences"
            else np.array(rows, dtype=np.bool_ if name == "add_EOS" else np.int64)
            for name, rows in given.items()
        }
    except Exception:  # Triton refuses it itself
        return
    reader = RequestReader(ByteTokenizer(), limit=8, vocab_size=258, append_eod=False, max_text_bytes=20)
    answers = answer_requests([inputs], reader, lambda rows: [float(len(row)) for row in rows])
    [found] = answers
    assert len(found["rewards"]) == len(found["exceeded"]) == len(found["error"])


def _request_seeds() -> list[bytes]:
    bodies: list[tuple[int, dict[str, Any]]] = [
        (0, {"prompt": ["a", "b"], "max_tokens": 4, "n": 2, "stop": ["x"], "logprobs": 2, "echo": True, "seed": 1}),
        (0, {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}, "temperature": 0}),
        (1, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "top_logprobs": 1}),
        (1, {"model": "m", "messages": [{"role": "user", "content": "a", "name": "b"}], "logprobs": True}),
        (2, {"sentences": ["a"], "tokens_to_generate": 5, "end_strings": ["x"], "greedy": True, "random_seed": 3}),
        (3, {"sentences": [["a"], ["é"]], "add_EOS": [[True], [False]]}),
        (3, {"tokens": [[1, 2], [3, 0]], "sequence_lengths": [[2], [1]]}),
    ]
    return [bytes([route]) + json.dumps(body).encode() for route, body in bodies]


FUZZED = {
    "jsonl": Fuzzed(jsonl, _jsonl_seeds, ("nemo_aligner.data.jsonl", "json", "gzip")),
    "archive": Fuzzed(
        archive, _archive_seeds, ("nemo_aligner.engine.checkpoints", "nemo_aligner.config", "tarfile", "yaml")
    ),
    "importers": Fuzzed(
        importers, _importer_seeds, ("nemo_aligner.engine.checkpoints", "nemo_aligner.config", "gguf", "json")
    ),
    "requests": Fuzzed(requests, _request_seeds, ("nemo_aligner.servers", "nemo_aligner.data.chat", "json")),
}
