"""Config of the reward server."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_aligner.config.chat import ChatKeys
from nemo_aligner.config.fixed import NO_MODEL, NO_TEMPLATE, check_fixed
from nemo_aligner.config.rewards import RewardSources
from nemo_aligner.config.schema import ParallelConfig, RewardStandardization, TrainerConfig, at_least
from nemo_aligner.errors import ConfigError


@dataclass
class ServingConfig:
    """`inference`: the address, and how requests become batches."""

    ip: str = "127.0.0.1"  # address to listen on; 0.0.0.0 = every network of this machine
    port: int = 5555
    model_name: str = "reward_model"
    inference_micro_batch_size: int = 4  # texts per forward pass
    max_batch_size: int = 1024  # texts scored together, and in one request at most
    max_queue_delay_microseconds: int = 2000  # how long a request waits for others to be scored with it
    max_request_bytes: int = 64 << 20  # larger requests are refused
    max_concurrent_requests: int = 256  # more at once are refused, with HTTP status 503, and may be sent again
    auth_token_file: str | None = None  # clients must send the token in it; null = whoever reaches the port may ask
    max_text_bytes: int = 1 << 20  # longer texts are refused; those beyond the model's context are cut and flagged


@dataclass
class ServedModelConfig(ParallelConfig):
    """`model`: how the archive's model is cut over processes."""

    precision: str | None = "${trainer.precision}"  # that of the trainer, or null
    reward_standardization: RewardStandardization = field(default_factory=RewardStandardization)


@dataclass
class ServerConfig(ChatKeys, RewardSources):
    rm_model_file: str | None = None  # .nemo file or extracted folder
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: ServingConfig = field(default_factory=ServingConfig)
    model: ServedModelConfig = field(default_factory=ServedModelConfig)

    def validate(self) -> None:
        self.trainer.validate()
        self.trainer.check_precision_of(self.model.precision, "model.precision")
        self.reward_plan.check_model(self.rm_model_file, "rm_model_file")
        if self.rm_model_file is None:
            check_fixed(self.model, NO_MODEL, "model")
            check_fixed(self, NO_TEMPLATE)
            if self.model.reward_standardization.enable:
                raise ConfigError("there is no reward model to standardise", "model.reward_standardization.enable")
            if self.trainer.devices * self.trainer.num_nodes > 1:
                raise ConfigError("functions alone are served by one process; give reward_workers", "trainer.devices")
        self.model.reward_standardization.validate("model.reward_standardization")
        serving = self.inference
        at_least(
            1,
            inference__inference_micro_batch_size=serving.inference_micro_batch_size,
            inference__max_batch_size=serving.max_batch_size,
            inference__max_text_bytes=serving.max_text_bytes,
            inference__max_request_bytes=serving.max_request_bytes,
            inference__max_concurrent_requests=serving.max_concurrent_requests,
        )
        at_least(0, inference__max_queue_delay_microseconds=serving.max_queue_delay_microseconds)
        if not 0 < serving.port < 65536:
            raise ConfigError(f"{serving.port} is not a port, 1 to 65535", "inference.port")
