"""The model zoo of the tests: one tiny, randomly initialised model per family, and batches for it.

Every linear dimension is a multiple of 16, every model has two or three layers, dropout is on where the family has it
(so that training and evaluation differ), and ``use_cache`` is off. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

VOCABULARY = 64
HIDDEN = 32
INTERMEDIATE = 64
HEADS = 4
DROPOUT = 0.1


@dataclass(frozen=True)
class Family:
    """A model and how to feed it.

    Attributes:
        model: in training mode, seeded.
        make_batch: ``(batch, seq, labels)`` to the keyword arguments of ``model``; fresh values on every call.
        causal: whether the model attends causally (and nothing else masks its attention).
    """

    model: nn.Module
    make_batch: Callable[..., dict[str, Any]]
    causal: bool = False


def draws_alike(gm: GraphModule) -> bool:
    """Whether a traced model draws the random numbers of the original in training; layer drop (OPT of older
    transformers) draws some of its own that no graph can branch on."""
    return not any("captured as it evaluates" in note for note in gm.meta["fxsparse_trace"].notes)


class MLP(nn.Module):
    """A plain ``nn.Sequential`` behind a forward with a named input, and a loss when labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(HIDDEN, INTERMEDIATE),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(INTERMEDIATE, INTERMEDIATE),
            nn.ReLU(),
            nn.LayerNorm(INTERMEDIATE),
            nn.Linear(INTERMEDIATE, HIDDEN, bias=False),
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layers(x)
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits


def token_ids(batch: int, seq: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, seq))


def causal_lm_batch(batch: int = 4, seq: int = 16, labels: bool = True) -> dict[str, Any]:
    ids = token_ids(batch, seq)
    return {"input_ids": ids, "labels": ids.clone()} if labels else {"input_ids": ids}


def padding_mask(batch: int, seq: int) -> Tensor:
    """Random right padding ``[batch, seq]``, at least one token kept in each row."""
    return (torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1))).long()


def _sequential() -> Family:
    def make_batch(batch: int = 4, seq: int = 16, labels: bool = True) -> dict[str, Any]:
        inputs: dict[str, Any] = {"x": torch.randn(batch, seq, HIDDEN)}
        if labels:
            inputs["labels"] = torch.randint(HIDDEN, (batch, seq))
        return inputs

    return Family(_seeded(MLP), make_batch)


def _bert() -> Family:
    config = transformers.BertConfig(**_encoder_sizes(), num_labels=3)

    def make_batch(batch: int = 4, seq: int = 16, labels: bool = True) -> dict[str, Any]:
        inputs = {"input_ids": token_ids(batch, seq), "attention_mask": padding_mask(batch, seq)}
        if labels:
            inputs["labels"] = torch.randint(3, (batch,))
        return inputs

    return Family(_seeded(transformers.BertForSequenceClassification, config), make_batch)


def _roberta() -> Family:
    config = transformers.RobertaConfig(**_encoder_sizes(), pad_token_id=1)

    def make_batch(batch: int = 4, seq: int = 16, labels: bool = True) -> dict[str, Any]:
        inputs = {"input_ids": token_ids(batch, seq)}
        if labels:
            inputs["labels"] = token_ids(batch, seq)
        return inputs

    return Family(_seeded(transformers.RobertaForMaskedLM, config), make_batch)


def _opt() -> Family:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        ffn_dim=INTERMEDIATE,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
        layerdrop=0.0,
        use_cache=False,
    )
    return Family(_seeded(transformers.OPTForCausalLM, config), causal_lm_batch, causal=True)


def _gpt2() -> Family:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_inner=INTERMEDIATE,
        n_layer=2,
        n_head=HEADS,
        n_positions=64,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        bos_token_id=0,
        eos_token_id=1,
        loss_type="ForCausalLM",
        use_cache=False,
    )
    return Family(_seeded(transformers.GPT2LMHeadModel, config), causal_lm_batch, causal=True)


def _llama() -> Family:
    config = transformers.LlamaConfig(**_decoder_sizes(), num_key_value_heads=2, num_hidden_layers=3)
    return Family(_seeded(transformers.LlamaForCausalLM, config), causal_lm_batch, causal=True)


def _qwen2() -> Family:
    config = transformers.Qwen2Config(
        **_decoder_sizes(), num_key_value_heads=2, num_hidden_layers=2, tie_word_embeddings=True
    )
    return Family(_seeded(transformers.Qwen2ForCausalLM, config), causal_lm_batch, causal=True)


def _mistral() -> Family:
    """A sliding window of 4: causal, and masked further."""
    config = transformers.MistralConfig(
        **_decoder_sizes(), num_key_value_heads=2, num_hidden_layers=2, sliding_window=4
    )
    return Family(_seeded(transformers.MistralForCausalLM, config), causal_lm_batch)


def _t5() -> Family:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INTERMEDIATE,
        num_layers=2,
        num_heads=HEADS,
        dropout_rate=DROPOUT,
        decoder_start_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )

    def make_batch(batch: int = 4, seq: int = 16, labels: bool = True) -> dict[str, Any]:
        ids = token_ids(batch, seq)
        target = token_ids(batch, seq // 2)
        return {"input_ids": ids, "labels": target} if labels else {"input_ids": ids, "decoder_input_ids": target}

    return Family(_seeded(transformers.T5ForConditionalGeneration, config), make_batch)


def _vit() -> Family:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=DROPOUT,
        num_labels=3,
    )

    def make_batch(batch: int = 4, seq: int = 16, labels: bool = True) -> dict[str, Any]:
        inputs = {"pixel_values": torch.randn(batch, 3, 16, 16)}
        if labels:
            inputs["labels"] = torch.randint(3, (batch,))
        return inputs

    return Family(_seeded(transformers.ViTForImageClassification, config), make_batch)


def _encoder_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": DROPOUT,
        "attention_probs_dropout_prob": DROPOUT,
    }


def _decoder_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "use_cache": False,
    }


def _seeded(build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(*args)
        _randomise(model)
        return model.train()


def _randomise(model: nn.Module) -> None:
    """Moves norms and biases away from ones and zeros, so that a rewrite that drops one is seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)


FAMILIES: dict[str, Callable[[], Family]] = {
    "sequential": _sequential,
    "bert": _bert,
    "opt": _opt,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "vit": _vit,
    "qwen2": _qwen2,
    "roberta": _roberta,
    "mistral": _mistral,
}
"""Every family by its name; the first six are those that every pass is tested on."""

CORE_FAMILIES: tuple[str, ...] = ("sequential", "bert", "opt", "gpt2", "llama", "t5")
