"""An adapter's archive, and the same adapter as the PEFT library keeps it: what it means is W + alpha/r · B A."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_aligner.config.architecture import Architecture
from nemo_aligner.config.peft import LoraTuning, PeftConfig
from nemo_aligner.config.schema import ModelOverrides, OptimConfig, TrainerConfig
from nemo_aligner.engine.checkpoints.nemo_archive import read_architecture, save_archive
from nemo_aligner.engine.checkpoints.peft_folder import write_peft_folder
from nemo_aligner.engine.checkpoints.tokenizer import BYTE_TOKENIZER, FastTokenizer, byte_tokenizer
from nemo_aligner.engine.checks import check_training
from nemo_aligner.engine.conversion import export_adapter, export_hf, import_adapter
from nemo_aligner.engine.model.build import RunOptions, build_model
from nemo_aligner.engine.policy import load_policy, load_policy_for_training
from nemo_aligner.engine.processes.cluster import MegatronCluster, start_cluster
from nemo_aligner.engine.reward_model import load_reward_model, load_reward_model_for_training
from nemo_aligner.errors import CheckpointError, OutputError
from nemo_aligner.stages.supervised.loop import ranking_objective, sft_objective
from tests.faulty_disk import FaultyDisk
from tests.live_bytes import LiveBytes
from tests.tiny import ARCHIVED, rows

pytestmark = pytest.mark.processes

TRAINER = TrainerConfig(accelerator="cpu", precision="32")
LORA = LoraTuning(adapter_dim=3, alpha=6.0, target_modules=["all"])
TEXTS = [[5, 9, 77, 30, 2], [100, 3, 40, 41, 42, 43, 44, 9, 8, 7]]


@contextmanager
def processes() -> Iterator[MegatronCluster]:
    with start_cluster(TRAINER, tensor=1, pipeline=1, seed=11) as cluster:
        yield cluster


def write_base(path: Path, arch: Architecture) -> Path:
    with processes() as cluster:
        torch.manual_seed(3)
        tokenizer = FastTokenizer(byte_tokenizer(), BYTE_TOKENIZER)
        save_archive(path, build_model(arch, RunOptions()), arch, tokenizer, cluster)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.nemo", replace(ARCHIVED, precision="32"))


def asked(base: Path, lora: LoraTuning = LORA, **more: Any) -> ModelOverrides:
    return ModelOverrides(restore_from_path=str(base), peft=PeftConfig("lora", lora_tuning=lora, **more))


def trained(base: Path, target: Path, lora: LoraTuning = LORA, **more: Any) -> list[Tensor]:
    """Train an adapter and write its archive; log-probabilities of TEXTS."""
    with processes() as cluster:
        policy = load_policy_for_training(asked(base, lora, **more), TRAINER, cluster)
        policy.add_optimizer(OptimConfig(name="adamw", lr=1e-2), clip_grad=1.0, max_steps=5)
        for step in range(5):
            policy.train_step([rows(seed=step)], sft_objective)
        policy.save_nemo(target)
        return policy.logprobs(TEXTS, 2)


def logprobs(archive: Path) -> list[Tensor]:
    with processes() as cluster:
        return load_policy(archive, cluster, precision="32").logprobs(TEXTS, 2)


def load(folder: Path) -> Any:
    """The folder's model, by transformers; its from_pretrained does not go with Megatron in one process."""
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder, dtype=torch.float32))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def by_transformers(model: Any) -> list[Tensor]:
    with torch.no_grad():
        found = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in TEXTS]
    return [own[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0] for own, row in zip(found, TEXTS, strict=True)]


def added_by_hand(model: Any, folder: Path) -> Any:
    """W += alpha/r · B A for every pair of an adapter's folder, as PEFT's LoraConfig defines its fields."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert config["peft_type"] == "LORA"
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert module.rpartition(".")[2] in config["target_modules"]
        b = tensors[name.replace("lora_A", "lora_B")]
        model.get_submodule(module).weight.data += config["lora_alpha"] / config["r"] * (b @ tensors[name])
    return model


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-4, rtol=1e-4)


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", ["nemo", "canonical"])
def test_adapter_merged_archive_and_both_exports_are_the_policy_that_was_trained(
    variant: str, base: Path, tmp_path: Path
) -> None:
    lora = replace(LORA, variant=variant)
    policy = trained(base, tmp_path / "adapter.nemo", lora)
    assert not same(policy, logprobs(base))
    assert same(policy, logprobs(tmp_path / "adapter.nemo"))
    assert same(policy, trained(base, tmp_path / "merged.nemo", lora, merge=True))
    assert same(policy, logprobs(tmp_path / "merged.nemo"))
    assert (tmp_path / "adapter.nemo").stat().st_size < (tmp_path / "merged.nemo").stat().st_size
    assert read_architecture(tmp_path / "merged.nemo").peft is None

    export_hf(base, tmp_path / "hf")
    export_hf(tmp_path / "adapter.nemo", tmp_path / "hf merged")
    export_adapter(tmp_path / "adapter.nemo", tmp_path / "peft")
    close(policy, by_transformers(load(tmp_path / "hf merged")))
    close(policy, by_transformers(added_by_hand(load(tmp_path / "hf"), tmp_path / "peft")))

    import_adapter(tmp_path / "peft", base, tmp_path / "imported.nemo", precision="32")
    assert same(policy, logprobs(tmp_path / "imported.nemo"))
    assert read_architecture(tmp_path / "imported.nemo").peft["lora_tuning"]["variant"] == variant  # type: ignore[index]


def test_merged_weights_are_written_without_a_second_copy_of_all(base: Path, tmp_path: Path) -> None:
    with processes() as cluster, LiveBytes() as live:
        policy = load_policy_for_training(asked(base, merge=True), TRAINER, cluster)
        of_layers = [p for name, p in policy.module.named_parameters() if ".layers." in name]
        live.restart()
        before = live.now
        policy.save_nemo(tmp_path / "merged.nemo")
    # of one weight: the sum in float32, its cast and the copy of a part
    assert live.peak - before < 4 * max(p.nbytes for p in of_layers) < sum(p.nbytes for p in of_layers)


def test_an_adapter_beside_experts_is_merged_and_exported_as_it_was_trained(tmp_path: Path) -> None:
    base = write_base(tmp_path / "experts.nemo", replace(ARCHIVED, precision="32", num_moe_experts=4))
    policy = trained(base, tmp_path / "adapter.nemo", replace(LORA, target_modules=["attention"]))
    assert not same(policy, logprobs(base))
    assert same(policy, logprobs(tmp_path / "adapter.nemo"))
    export_adapter(tmp_path / "adapter.nemo", tmp_path / "peft")
    import_adapter(tmp_path / "peft", base, tmp_path / "imported.nemo", precision="32")
    assert same(policy, logprobs(tmp_path / "imported.nemo"))
    export_hf(base, tmp_path / "hf")
    export_hf(tmp_path / "adapter.nemo", tmp_path / "merged")
    before, after, pairs = (
        load_file(tmp_path / name)
        for name in ("hf/model.safetensors", "merged/model.safetensors", "peft/adapter_model.safetensors")
    )
    for name in before:
        module = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        added = torch.zeros(())
        if f"{module}A.weight" in pairs:
            added = LORA.scale * pairs.pop(f"{module}B.weight") @ pairs.pop(f"{module}A.weight")
        torch.testing.assert_close(after[name], before[name] + added)
    assert not pairs


def test_the_peft_library_reads_what_is_written_and_what_it_writes_is_read(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    policy = trained(base, tmp_path / "adapter.nemo")
    export_hf(base, tmp_path / "hf")
    export_adapter(tmp_path / "adapter.nemo", tmp_path / "peft")
    close(policy, by_transformers(peft.PeftModel.from_pretrained(load(tmp_path / "hf"), tmp_path / "peft")))

    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(load(tmp_path / "hf"), config)  # q_proj and v_proj, as is its habit
    theirs.save_pretrained(tmp_path / "their peft")
    import_adapter(tmp_path / "their peft", base, tmp_path / "imported.nemo", precision="32")
    close(logprobs(tmp_path / "imported.nemo"), by_transformers(theirs.eval()))


def their_adapter(folder: Path, modules: Sequence[str] = ("q_proj", "v_proj"), **config: Any) -> dict[str, Tensor]:
    """An adapter of rank 2 for the base, laid out as the library does."""
    sizes = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "up_proj": (32, 48), "down_proj": (48, 32)}
    generator, tensors = torch.Generator().manual_seed(4), {}
    for layer in range(2):
        for module in modules:
            inner, out = sizes[module]
            block = "mlp" if module in ("up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, inner, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    full = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": [*modules], "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(full))
    return tensors


@pytest.fixture
def own() -> dict[str, Tensor]:
    """Tensors of an adapter on every layer of ARCHIVED."""
    with processes():
        shapes = build_model(ARCHIVED, RunOptions(lora=LORA)).state_dict()
    return {name: torch.randn(w.shape) for name, w in shapes.items() if name.startswith("adapters.")}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "adapter_model.bin"]
)
def test_an_adapter_is_not_written_into_the_folder_of_a_model(
    name: str, tmp_path: Path, own: dict[str, Tensor]
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match=rf"^cannot write {tmp_path}: its {name} would be read too; take it away, or"):
        write_peft_folder(tmp_path, ARCHIVED, LORA, own)
    assert files(tmp_path) == {name: b"{}"}


def test_an_adapter_that_is_cut_short_over_an_older_one_is_none_and_can_be_written_again(
    tmp_path: Path, own: dict[str, Tensor]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/tokenizer.json").write_text("kept")
    for name, change in (("old", 1), ("new", 2)):
        write_peft_folder(tmp_path / name, ARCHIVED, LORA, {key: change * tensor for key, tensor in own.items()})
    old, new = files(tmp_path / "old"), files(tmp_path / "new") | {"tokenizer.json": b"kept"}
    assert old.keys() == new.keys()
    for at in range(1, 100):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / f"peft_{at}"))
        try:
            with FaultyDisk(folder, errno.ENOSPC, removals=True).failing_from(at):
                write_peft_folder(folder, ARCHIVED, LORA, {key: 2 * tensor for key, tensor in own.items()})
            break
        except OutputError:
            assert files(folder) in (old, new) or not (folder / "adapter_config.json").exists()
        write_peft_folder(folder, ARCHIVED, LORA, {key: 2 * tensor for key, tensor in own.items()})
        assert files(folder) == new
    assert at > 4


def test_an_adapter_of_some_parts_of_fused_layers_comes_back_as_it_was(base: Path, tmp_path: Path) -> None:
    tensors = their_adapter(tmp_path / "theirs", ("q_proj", "v_proj", "up_proj", "down_proj"))
    import_adapter(tmp_path / "theirs", base, tmp_path / "adapter.nemo", precision="32")
    export_hf(base, tmp_path / "hf")
    by_hand = by_transformers(added_by_hand(load(tmp_path / "hf"), tmp_path / "theirs"))
    close(logprobs(tmp_path / "adapter.nemo"), by_hand)
    export_adapter(tmp_path / "adapter.nemo", tmp_path / "back")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 1)


@pytest.mark.parametrize(
    ("config", "modules", "message"),
    [
        ({"use_dora": True}, ("q_proj",), "adapter_config.json: use_dora=True is not understood"),
        ({"modules_to_save": ["lm_head"]}, ("q_proj",), "modules_to_save=.* is not understood"),
        ({"rank_pattern": {"q_proj": 8}}, ("q_proj",), "rank_pattern=.* is not understood"),
        ({"bias": "all"}, ("q_proj",), "bias=all is not none"),
        ({"init_lora_weights": "pissa"}, ("q_proj",), "init_lora_weights=pissa changes the base's weights"),
        ({"peft_type": "IA3"}, ("q_proj",), "peft_type=IA3 is not LORA"),
        ({"r": 4}, ("v_proj",), r"lora_A of self_attn.v_proj in layer 0 is \(2, 32\), not \(4, 32\)"),
    ],
)
def test_what_is_not_understood_of_an_adapter_is_refused_by_name(
    config: dict[str, Any], modules: Sequence[str], message: str, base: Path, tmp_path: Path
) -> None:
    their_adapter(tmp_path / "theirs", modules, **config)
    with pytest.raises(CheckpointError, match=message):
        import_adapter(tmp_path / "theirs", base, tmp_path / "adapter.nemo", precision="32")
    assert not (tmp_path / "adapter.nemo").exists()


def test_an_adapter_begins_where_another_ended_and_only_beside_its_own_base(base: Path, tmp_path: Path) -> None:
    first, key = trained(base, tmp_path / "first.nemo"), "model.restore_from_path"
    with processes() as cluster:
        model = asked(base, restore_from_path=str(tmp_path / "first.nemo"))
        check_training(TRAINER, model, key=key)
        policy = load_policy_for_training(model, TRAINER, cluster)
        policy.keep_initial_weights()
        assert same(policy.logprobs(TEXTS, 2), first)
        initial = policy.initial_logprobs(TEXTS, 2)
    assert same(initial, logprobs(base))

    def refused(model: ModelOverrides, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            check_training(TRAINER, model, key=key)

    refused(asked(tmp_path / "first.nemo"), f"{key}=.*first.nemo is an adapter; give its base there")
    refused(asked(base, restore_from_path=str(base)), "base.nemo is a whole model, not an adapter")
    other = asked(base, replace(LORA, adapter_dim=4), restore_from_path=str(tmp_path / "first.nemo"))
    refused(other, "has adapter_dim 3, and model.peft.lora_tuning.adapter_dim is 4")

    whole = trained(base, tmp_path / "other.nemo", merge=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "first.nemo").rename(tmp_path / "elsewhere" / "first.nemo")
    base.rename(tmp_path / "elsewhere" / "base.nemo")
    assert same(logprobs(tmp_path / "elsewhere" / "first.nemo"), first), "the base is beside it"
    (tmp_path / "other.nemo").rename(base)
    assert same(logprobs(base), whole)
    with pytest.raises(CheckpointError, match=r"first.nemo is an adapter of another archive than .*base.nemo"):
        logprobs(tmp_path / "elsewhere" / "first.nemo")
    base.unlink()
    (tmp_path / "elsewhere" / "base.nemo").unlink()
    with pytest.raises(CheckpointError, match=r"^gpt_model_file=.*first.nemo is an adapter, and its base is not there"):
        check_training(
            TRAINER, ModelOverrides(restore_from_path=str(tmp_path / "elsewhere" / "first.nemo")), key="gpt_model_file"
        )


def test_a_reward_models_adapter_carries_its_head(base: Path, tmp_path: Path) -> None:
    with processes() as cluster:
        model = load_reward_model_for_training(asked(base), TRAINER, cluster, reward_model_type="binary_ranking")
        model.add_optimizer(OptimConfig(name="adamw", lr=1e-2), clip_grad=1.0, max_steps=5)
        for _ in range(3):
            model.train_step([rows()], ranking_objective)
        rewards = model.score(TEXTS, 2)
        model.save_nemo(tmp_path / "reward.nemo")
    with processes() as cluster:
        assert load_reward_model(tmp_path / "reward.nemo", cluster, precision="32").score(TEXTS, 2) == rewards
