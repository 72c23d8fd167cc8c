"""Tiny random models of several architectures, and models whose gradients are known."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import SequenceClassifierOutput

VOCABULARY = 31


def bert(labels: int = 3, seed: int = 0, **changes: Any) -> Any:
    """Two layers, hidden size 16, a classifier."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
        "num_labels": labels,
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**(settings | changes)))


def gpt2(seed: int = 0) -> Any:
    """Two layers of Conv1D, hidden size 16, the head tied to the embedding."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(*, tied: bool = False, seed: int = 0) -> Any:
    """Two layers, hidden size 16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens(rows: int = 4, length: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)


def text(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A batch of a language model."""
    ids = tokens(rows, seed=seed)
    return {"input_ids": ids, "labels": ids}


def labelled(rows: int = 4, labels: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch of a classifier; the label can be read off the first token."""
    ids = tokens(rows, seed=seed)
    return {"input_ids": ids, "labels": ids[:, 0] % labels}


class Residual(nn.Module):
    """A stem and two residual blocks with the names of a ResNet, a norm in each, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.conv1, block.conv2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            block.bn1 = nn.BatchNorm2d(8)
            self.layer1.append(block)
        self.fc = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        x = self.conv1(pixel_values)
        for block in self.layer1:
            x = x + block.conv2(torch.relu(block.bn1(block.conv1(x))))
        logits = self.fc(x.mean((2, 3)))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def residual(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    return Residual()


def images(rows: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """A batch of a classifier of images; the label is the brightest channel."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, 3, 6, 6, generator=generator) / 2
    labels = torch.randint(0, 3, (rows,), generator=generator)
    pixels[torch.arange(rows), labels] += 0.5
    return {"pixel_values": pixels, "labels": labels}


class Dot(nn.Module):
    """The gradient of the loss of a sample is the sample; of a batch, their mean."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.layer = nn.Module()
        self.layer.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer.weight * x).flatten(1).sum(1).mean()


class Neurons(nn.Module):
    """The gradient of `layer.weight` is the mean of the batch, whatever the weights."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, rows)
        self.norm = nn.LayerNorm(rows)
        self.classifier = nn.Linear(rows, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer.weight * x.mean(0)).sum()


def quiet_gpt_oss() -> Any:
    """A model with transposed fused experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_local_experts=3,
        num_experts_per_tok=2, max_position_embeddings=16, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GptOssForCausalLM(config)


def mixtral() -> Any:
    """A model with fused experts, stored [expert, out, in]."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=16,
    )  # fmt: skip
    return MixtralForCausalLM(config)


class LikeGPT2(nn.Module):
    """The linear layers of a GPT-2 as `nn.Linear`, under the same names, weights transposed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for path, module in model.named_modules():
            if type(module).__name__ != "Conv1D":
                continue
            parent: nn.Module = self
            *parts, leaf = path.split(".")
            for part in parts:
                if part not in parent._modules:
                    parent.add_module(part, nn.ModuleList() if part == "h" else nn.Module())
                parent = parent._modules[part]
            linear = nn.Linear(module.nx, module.nf)
            linear.weight.data = module.weight.detach().t().contiguous()
            parent.add_module(leaf, linear)
        self.head = nn.Linear(1, 1)  # the last linear layer counts as the head
