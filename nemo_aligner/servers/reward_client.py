"""The actor's side of the reward server: texts go out while generation goes on, and are asked for again until answered.

Scoring has no side effects, so a request may be repeated at will: a server that is killed and started again costs time,
never a reward. Answers say which archive the rewards are of; another one in its place ends the run.
"""

from __future__ import annotations

import http.client
import json
import logging
import random
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from nemo_aligner.config.reinforce import RemoteRewardModelConfig
from nemo_aligner.data.jsonl import dump_row
from nemo_aligner.errors import ServerError
from nemo_aligner.rewards.interfaces import Candidate, Outcome
from nemo_aligner.servers.wire import (
    ARCHIVE,
    CONVERSATIONS,
    ERROR,
    FIELDS,
    PARTS,
    PROMPTS,
    RESPONSES,
    REWARDS,
    SENTENCES,
    SERVER_FAILED,
    RequestError,
    conversation_of,
    outcome_of,
)

if TYPE_CHECKING:
    from pytriton.client import ModelClient

log = logging.getLogger(__name__)

KEY = "remote_critic_rm.reward_model"
_THREADS = 4
_TELL_EVERY_S = 10.0
_REQUEST_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 5.0
"""Of PyTriton's wait for a server that is away, in which it neither looks whether the run goes on nor tells of it."""
_SURE_AFTER_S = 20.0
_UNAUTHORIZED, _TOO_LARGE = 401, "413"  # HTTP
_NO_ANSWER = (OSError, ValueError, http.client.HTTPException)
"""What a request over HTTP may end with: nobody there, or something else than was asked for."""


class RewardClient:
    """Sends texts to the server of `config`, from a few threads of its own, with the token that it wants, if any."""

    def __init__(self, config: RemoteRewardModelConfig, token: str | None = None) -> None:
        self._config, self._server, self._token = config, config.reward_model, token
        self._url = f"http://{self._server.ip}:{self._server.port}"
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="reward")
        self._local = threading.local()
        self._closed = threading.Event()
        self._hurried = False
        self.reads_parts = False  # known once it is ready: it takes prompt, response and fields apart
        self.reads_conversations = False  # as well
        self._without_since: float | None = None  # the server is ready, and has no such model
        self._lock = threading.Lock()
        self.archive: str | None = None  # sha256: of the model that gave the first reward of the run

    def wait_until_ready(self) -> None:
        """Return once the model is served.

        Raises ServerError with what to change: after `init_timeout_s`, and at once for a model that will never do.
        """
        begin = told = time.monotonic()
        while True:
            fault = self._not_ready() or self._unlike()
            if fault is None:
                return
            waited = time.monotonic() - begin
            if waited >= self._config.init_timeout_s:
                raise ServerError(
                    f"no reward server at {self._url} after {waited:.0f} s ({fault}); check {KEY}.ip and {KEY}.port, "
                    "or wait longer with remote_critic_rm.init_timeout_s"
                )
            if time.monotonic() - told >= _TELL_EVERY_S or told == begin:
                told = time.monotonic() + 1e-6
                log.info("waiting for the reward server at %s, for %.0f s so far (%s)", self._url, waited, fault)
            self._closed.wait(min(1.0, self._config.init_timeout_s / 10))

    def _not_ready(self) -> str | None:
        """None when the model answers, else why not."""
        try:
            with self._open(f"v2/models/{self._server.name}/ready") as reply:
                return None if reply.status == 200 else f"HTTP status {reply.status}"
        except urllib.error.HTTPError as fault:
            self._check_name()
            return f"it serves no model {self._server.name!r} yet (HTTP status {fault.code})"
        except _NO_ANSWER as fault:
            return _reason(getattr(fault, "reason", fault))

    def _check_name(self) -> None:
        """Raises ServerError for a name that will never come: the server lists others, or has long been ready without.

        Triton is ready before its models are, but not for long; PyTriton's does not let others see the list.
        """
        names = self._names()
        if names and self._server.name not in names:
            self._refuse_name(f"serves {', '.join(names)}, not {self._server.name}")
        now = time.monotonic()
        ready = self._answers("v2/health/ready") and not self._answers(f"v2/models/{self._server.name}")
        self._without_since = (self._without_since or now) if ready else None
        if self._without_since is not None and now - self._without_since >= _SURE_AFTER_S:
            self._refuse_name(f"has been ready for {_SURE_AFTER_S:.0f} s without a model {self._server.name}")

    def _refuse_name(self, why: str) -> NoReturn:
        raise ServerError(f"the server at {self._url} {why}; give {KEY}.name")

    def _refuse_token(self) -> NoReturn:
        wants = "a token" if self._token is None else "another token than this one"
        raise ServerError(f"the server at {self._url} wants {wants}; give remote_critic_rm.auth_token_file")

    def _names(self) -> list[str]:
        """The models that the server lists, as far as it does."""
        try:
            return [str(model["name"]) for model in self._json("v2/repository/index", data=b"{}")]
        except (*_NO_ANSWER, KeyError, TypeError):
            return []

    def _answers(self, path: str) -> bool:
        try:
            with self._open(path):
                return True
        except _NO_ANSWER:
            return False

    def _unlike(self) -> str | None:
        """None for a model that answers rewards of batches of texts; why not, where that cannot be found out now.

        Raises ServerError for another model.
        """
        path = f"v2/models/{self._server.name}"
        try:
            about, batching = self._json(path), self._json(f"{path}/config")
        except _NO_ANSWER as fault:
            return f"it does not say what it takes: {_reason(fault)}"
        if not (isinstance(about, dict) and isinstance(batching, dict)):
            return "it does not say what it takes"
        for kind, wanted in (("inputs", SENTENCES), ("outputs", REWARDS)):
            names = [part.get("name") for part in about.get(kind, [])]
            if wanted not in names:
                raise ServerError(f"{self._url}/{path} has the {kind} {names}, not {wanted}; is {KEY}.name right?")
        names = [part.get("name") for part in about.get("inputs", [])]
        self.reads_parts, self.reads_conversations = RESPONSES in names, CONVERSATIONS in names
        if not batching.get("max_batch_size"):
            raise ServerError(f"{self._url}/{path} takes no batches (max_batch_size 0), and texts are sent in batches")
        return None

    def _json(self, path: str, data: bytes | None = None) -> Any:
        with self._open(path, data) as reply:
            return json.load(reply)

    def _open(self, path: str, data: bytes | None = None) -> Any:
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        try:
            return urllib.request.urlopen(urllib.request.Request(f"{self._url}/{path}", data, headers), timeout=5)
        except urllib.error.HTTPError as fault:
            if fault.code == _UNAUTHORIZED:
                self._refuse_token()
            raise

    def submit(self, texts: Sequence[str], more: Mapping[str, np.ndarray] | None = None) -> Future[list[float]]:
        """Rewards of `texts`, in their order, to come; `more` are other inputs."""
        inputs = {SENTENCES: _column(texts), **(more or {})}
        return self._threads.submit(lambda: _floats(self._answer(inputs)))

    def judge(self, candidates: Sequence[Candidate]) -> Future[list[Outcome]]:
        """Outcomes of `candidates`, in their order, to come; of a server with reward functions they hold the fields."""
        chats = {}
        chat = next((candidate for candidate in candidates if candidate.turns is not None), None)
        if chat is not None:
            if self.reads_conversations:
                entries = [[conversation_of(candidate)] for candidate in candidates]
                chats[CONVERSATIONS] = np.array(entries, dtype=object)
            elif not self.reads_parts:
                raise ServerError(
                    f"the reward model at {self._url} takes texts alone, and {chat.where} is a conversation"
                )
        if not self.reads_parts:
            texts = ["" if c.turns is not None else c.prompt + c.response for c in candidates]
            return _then(self.submit(texts, chats), lambda scores: [Outcome(score) for score in scores])
        columns = {
            PROMPTS: [candidate.prompt for candidate in candidates],
            RESPONSES: [candidate.response for candidate in candidates],
            FIELDS: [dump_row(candidate.fields) for candidate in candidates],
        }
        inputs = {name: _column(own) for name, own in columns.items()} | chats
        return self._threads.submit(lambda: [outcome_of(raw) for raw in self._answer(inputs)[PARTS][:, 0]])

    def hurry(self) -> None:
        """From now on a server that does not answer is not asked again. For signal handlers: it takes no lock."""
        self._hurried = True

    def close(self) -> None:
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _answer(self, inputs: dict[str, np.ndarray]) -> Any:
        """Asks until there is an answer. Raises ServerError after `inference_timeout_s`, or for a refused request."""
        begin, told, pause = time.monotonic(), 0.0, 0.25
        while True:
            try:
                return self._ask(inputs)
            except Exception as fault:
                self._drop_connection()
                reason = _reason(fault)
                waited = time.monotonic() - begin
                if isinstance(fault, RequestError):
                    raise ServerError(f"the reward server at {self._url} refused a text: {reason}") from None
                if isinstance(fault, ServerError):
                    raise
                if self._hurried or self._closed.is_set() or waited >= self._config.inference_timeout_s:
                    raise ServerError(
                        f"no answer from the reward server at {self._url} ({KEY}.ip and .port) for {waited:.0f} s "
                        f"({reason}); start it again, or wait longer with remote_critic_rm.inference_timeout_s"
                    ) from None
                if waited - told >= _TELL_EVERY_S or not told:
                    told = waited + 1e-6
                    log.warning("the reward server at %s does not answer, asking again (%s)", self._url, reason)
                self._closed.wait(pause * random.uniform(0.5, 1.0))  # or all ranks would come back at once
                pause = min(2 * pause, 5.0)

    def _ask(self, inputs: dict[str, np.ndarray]) -> Any:
        try:
            answer = self._connection().infer_batch(**inputs)
        except Exception as fault:
            status = getattr(fault.__cause__, "status", None)  # of tritonclient's exception, a text
            if status is not None and status() == _TOO_LARGE:
                raise RequestError(f"{fault.__cause__.message()} in one request") from None  # type: ignore[union-attr]
            raise
        for raw in answer[ERROR][:, 0] if ERROR in answer else []:  # other people's servers have no such output
            if raw:
                said = _text(raw)
                raise ConnectionError(said) if said == SERVER_FAILED else RequestError(said)
        count = len(next(iter(inputs.values())))
        if len(answer[REWARDS]) != count:
            raise RequestError(f"{len(answer[REWARDS])} rewards came back for {count} texts")
        if ARCHIVE in answer:  # nor this one
            self._check_same(_text(answer[ARCHIVE][0, 0]))
        return answer

    def _check_same(self, archive: str) -> None:
        """Raises ServerError where the rewards are of another archive than the first ones."""
        with self._lock:
            first = self.archive = self.archive or archive
        if archive != first:
            raise ServerError(
                f"the reward server at {self._url} has another reward model than when the run began: the archive with "
                f"the sha256 {archive[:16]}, not {first[:16]}; serve that one again, or begin another run"
            )

    def _connection(self) -> Any:
        """PyTriton's client is not for several threads, so each has its own."""
        if not hasattr(self._local, "client"):
            from pytriton.client import ModelClient
            from pytriton.client.warnings import NotSupportedTimeoutWarning

            logging.getLogger("pytriton").setLevel(logging.WARNING)
            warnings.simplefilter("ignore", NotSupportedTimeoutWarning)  # answers may take longer
            timeout = min(_REQUEST_TIMEOUT_S, self._config.inference_timeout_s)
            connect = ModelClient if self._token is None else _client_with(self._token)
            self._local.client = connect(
                self._url,
                self._server.name,
                lazy_init=True,
                init_timeout_s=min(_CONNECT_TIMEOUT_S, timeout),
                inference_timeout_s=timeout,
            )
        return self._local.client

    def _drop_connection(self) -> None:
        client = self._local.__dict__.pop("client", None)
        if client is not None:
            try:
                client.close()
            except Exception as fault:
                log.debug("closing a broken connection: %s", fault)


def _column(texts: Sequence[str]) -> np.ndarray:
    """Texts as Triton takes them, `[B, 1]`."""
    return np.array([[text.encode()] for text in texts], dtype=object)


def _floats(answer: Any) -> list[float]:
    return [float(reward) for reward in answer[REWARDS][:, 0]]


def _then(answer: Future[list[float]], make: Callable[[list[float]], list[Outcome]]) -> Future[list[Outcome]]:
    """A future of what `make` makes of another's result."""
    made: Future[list[Outcome]] = Future()

    def arrived(found: Future[list[float]]) -> None:
        try:
            made.set_result(make(found.result()))
        except BaseException as fault:  # CancelledError too
            made.set_exception(fault)

    answer.add_done_callback(arrived)
    return made


def _client_with(token: str) -> type[ModelClient]:
    """PyTriton's client, every request of which has the token; its own `access_token` is not in all of them."""
    from pytriton.client import ModelClient
    from tritonclient.http import InferenceServerClientPlugin

    class Bearer(InferenceServerClientPlugin):
        def __call__(self, request: Any) -> None:
            request.headers["Authorization"] = f"Bearer {token}"

    class Client(ModelClient):
        def create_client_from_url(self, url: str, network_timeout_s: float | None = None) -> Any:
            client = super().create_client_from_url(url, network_timeout_s)
            client.register_plugin(Bearer())
            return client

    return Client


def _text(raw: bytes | str) -> str:
    """Of an answer in the binary form, or in JSON."""
    return raw.decode() if isinstance(raw, bytes) else raw


def _reason(fault: Exception) -> str:
    """The first line that says something; Triton wraps faults of the model in lines of its own."""
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
