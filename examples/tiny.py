"""Stand-ins for your model and your data, so that the examples run in seconds and without a network."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def adapters():
    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def lora_model():
    return get_peft_model(llama(), adapters())


def dataset(count=96):
    # every second token repeats the one before
    rows = torch.randint(1, 64, (count, 16), generator=torch.Generator().manual_seed(1))
    rows[:, 1::2] = rows[:, ::2]
    return [{"input_ids": row, "labels": row} for row in rows]
