"""A tiny Llama, its data and its tokenizer, for the tests with the real Trainer and TRL."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 97
LENGTH = 12


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers, hidden size 32, untied head: 24 k parameters, the same ones for one seed."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    return model.to(dtype)


def tokens(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Collatable samples; what follows a token depends on it, so there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        start = int(torch.randint(3, VOCABULARY, (1,), generator=generator))
        ids = (start + 5 * torch.arange(LENGTH)) % (VOCABULARY - 3) + 3
        noise = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        ids = torch.where(torch.rand(LENGTH, generator=generator) < 0.1, noise, ids)
        samples.append({"input_ids": ids, "labels": ids.clone()})
    return samples


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    """Arguments of a short quiet run on the CPU."""
    settings = {
        "output_dir": str(out),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return TrainingArguments(**(settings | changes))


def trainer(out: Path, model: torch.nn.Module | None = None, **changes: Any) -> Trainer:
    """A real Trainer; what `TrainingArguments` does not know goes to the Trainer itself."""
    own = {
        key: changes.pop(key)
        for key in (
            "callbacks",
            "data_collator",
            "eval_dataset",
            "model_init",
            "optimizers",
            "train_dataset",
        )
        if key in changes
    }
    own.setdefault("train_dataset", tokens(64))
    if "model_init" not in own:
        own["model"] = llama() if model is None else model
    return Trainer(args=arguments(out, **changes), **own)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that a checkpoint would hold."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and torch.equal(x.view(torch.uint8), b[k].view(torch.uint8))
        for k, x in a.items()
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 ... w96 and the special tokens of `llama`, without any download."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def sentence(sample: dict[str, torch.Tensor]) -> str:
    """The text of one sample of `tokens`."""
    return " ".join(f"w{int(i)}" for i in sample["input_ids"])


warnings.filterwarnings("ignore", message=".*pin_memory.*")
