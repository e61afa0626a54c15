"""The demo base model's shape, its tokenizer and chat template, and greedy answers from any such model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from demo.corpus import Document

VOCABULARY = 2048
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"

# ESFT's own prompt format (github.com/deepseek-ai/ESFT, utils.py), which is DeepSeek-V2's chat template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def render(document: Document) -> str:
    """A document as one training string, BOS and EOS included."""
    if isinstance(document, str):
        return f"{BOS}{document}{EOS}"
    parts = [BOS]
    for message in document:
        if message["role"] == "assistant":
            parts.append(f"Assistant: {message['content']}{EOS}")
        else:
            parts.append(("User: " if message["role"] == "user" else "") + message["content"] + "\n\n")
    return "".join(parts)


def build_tokenizer(corpus: Iterable[Document], sample: int = 12000) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the first ``sample`` documents; digits stay single, so numbers have a shape."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (render(document).replace(BOS, "").replace(EOS, "\n") for document in islice(corpus, sample))
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> DeepseekV2ForCausalLM:
    """A DeepSeek-V2 of 3.8 M parameters with fresh weights: MLA, one dense layer, then layers of 16 routed experts."""
    config = DeepseekV2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=96,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        moe_intermediate_size=64,
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        initializer_range=0.04,  # about 1/sqrt(hidden_size), halved: the default 0.02 is meant for far wider models
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return DeepseekV2ForCausalLM(config)


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], batch: int = 50, limit: int = 128
) -> list[str]:
    """Greedy answers to rendered prompts, decoded in left-padded batches of at most ``limit`` new tokens."""
    replies: list[str] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        inputs = tokenizer(some, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=tokenizer.pad_token_id,
        )
        replies += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, exam: list[tuple[str, str]]) -> float:
    """Share of (prompt, answer) pairs answered exactly."""
    replies = answers(model, tokenizer, [prompt for prompt, _ in exam])
    return sum(reply == answer for reply, (_, answer) in zip(replies, exam, strict=True)) / len(exam)
