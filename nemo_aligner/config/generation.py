"""Config of megatron_gpt_eval: responses to a few prompts, and a server that gives them."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.config.fixed import GENERATION, GENERATION_INFERENCE, check_amp_o2, check_fixed
from nemo_aligner.config.schema import MISSING, InferenceConfig, ParallelConfig, TrainerConfig, at_least
from nemo_aligner.errors import ConfigError


@dataclass
class EvalInferenceConfig(InferenceConfig):
    """`inference` of this script."""

    compute_logprob: bool = False  # nothing is generated: the log-probabilities of the prompts themselves
    all_probs: bool = False
    auth_token_file: str | None = None  # of the server: clients must send the token in it; null = nobody must
    max_concurrent_requests: int = 256  # of the server: more at once are refused, with HTTP status 429

    def validate(self) -> None:
        super().validate()
        at_least(1, inference__max_concurrent_requests=self.max_concurrent_requests)


@dataclass
class GenerationConfig(ChatKeys, ParallelConfig):
    gpt_model_file: str = MISSING  # .nemo file, extracted or Hugging Face folder
    prompts: list[str] | None = None
    prompts_jsonl: str | None = None  # JSONL: a text, {"text"}, {"input"} or a conversation in each line
    output_file: str | None = None  # JSONL of the responses; null = standard output
    inference: EvalInferenceConfig = field(default_factory=EvalInferenceConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = 1234
    megatron_amp_O2: bool | None = None  # True needs bf16, which always has it

    server: bool = False
    host: str = "127.0.0.1"  # 0.0.0.0 = every network of this machine
    port: int = 5555
    model_name: str | None = None  # what OpenAI's clients call it; null = the archive's name
    web_server: bool = False
    web_port: int = 9889
    username: str | None = None
    password: str | None = None
    share: bool = False

    checkpoint_dir: str | None = None  # NeMo's YAML has these; archives alone are read, and cut anew at every load
    checkpoint_name: str | None = None
    hparams_file: str | None = None
    pipeline_model_parallel_split_rank: int | None = None
    expert_model_parallel_size: int = 1
    context_parallel_size: int = 1

    def validate(self) -> None:
        self.inference.validate()
        self.trainer.validate()
        check_amp_o2(self.megatron_amp_O2, self.trainer.precision, "megatron_amp_O2")
        check_fixed(self, GENERATION)
        check_fixed(self.inference, GENERATION_INFERENCE, "inference")
        if not self.server and not self.prompts and self.prompts_jsonl is None:
            raise ConfigError('nothing to do: give prompts=["..."], prompts_jsonl=file, or server=True', "prompts")
        self._check_server()

    def _check_server(self) -> None:
        for name in ("port", "web_port"):
            if not 0 < getattr(self, name) < 65536:
                raise ConfigError(f"{getattr(self, name)} is not a port, 1 to 65535", name)
        if self.web_server and not self.server:
            raise ConfigError("the page needs the server; add server=True", "web_server")
        if self.web_server and self.web_port == self.port:
            raise ConfigError(f"{self.port} is port's too; choose another", "web_port")
        if self.web_server and self.inference.auth_token_file is not None and self.password is None:
            raise ConfigError("the page is a door too; give one where clients need a token", "password")
        if self.username is not None and self.password is None:
            raise ConfigError("a username needs one", "password")
