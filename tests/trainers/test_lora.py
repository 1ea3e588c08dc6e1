"""`fusedlr.lora.param_groups` on real PEFT models, beside PEFT's own LoRA+ grouping."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from snapshots import bits
from torch import nn
from trainer_kit import tiny_llama

import fusedlr
from fusedlr.lora import param_groups

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LR, RATIO, DECAY = 1e-3, 16.0, 0.1
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(adapter_name: str = "default", **options: Any) -> nn.Module:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(tiny_llama(num_hidden_layers=2), config, adapter_name=adapter_name)


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    return param_groups(model, **{"lr": LR, "b_lr_ratio": RATIO, "weight_decay": DECAY, **options})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def placed(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[str, float, float]]:
    """For every trainable parameter its group's name, rate and decay; each must be in exactly one group."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    out: dict[str, tuple[str, float, float]] = {}
    for group in groups:
        assert group["params"]
        for p in group["params"]:
            name = by_id[id(p)]
            assert name not in out
            out[name] = group["name"], group["lr"], group["weight_decay"]
    assert out.keys() == trainable(model).keys()
    return out


A = ("lora_A", LR, DECAY)
B = ("lora_B", LR * RATIO, DECAY)
OTHER = ("other", LR, DECAY)
STILL = ("other_no_decay", LR, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": LINEARS},
        {"target_modules": "all-linear"},
        {"use_rslora": True, "r": 8},
        {"rank_pattern": {"q_proj": 2}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_matrices_a_learn_at_the_rate_and_b_faster(options):
    model = adapted(**options)
    where = placed(model, groups_of(model))
    assert {name: A if ".lora_A." in name else B for name in where} == where
    assert set(where.values()) == {A, B}


def test_without_a_ratio_all_learn_alike():
    model = adapted()
    assert {group["lr"] for group in param_groups(model, lr=LR)} == {LR}


def test_decay_that_is_not_given_is_the_optimizers():
    model = adapted(lora_bias=True)
    optimizer = fusedlr.FusedAdamW(param_groups(model, lr=LR), lr=LR, weight_decay=0.3)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "lora_A": 0.3,
        "lora_B": 0.3,
        "lora_B_no_decay": 0.0,
    }
    # one that is given wins, as any option of a group does
    optimizer = fusedlr.FusedAdamW(param_groups(model, lr=LR, weight_decay=0.2), lr=LR, weight_decay=0.3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


def test_dora_magnitudes_do_not_decay():
    model = adapted(use_dora=True)
    where = placed(model, groups_of(model))
    magnitudes = {name: value for name, value in where.items() if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 4
    assert set(magnitudes.values()) == {STILL}
    assert set(where.values()) == {A, B, STILL}


def test_biases_of_b_learn_as_b_and_do_not_decay():
    model = adapted(lora_bias=True)
    where = placed(model, groups_of(model))
    biases = {value for name, value in where.items() if name.endswith("bias")}
    assert biases == {("lora_B_no_decay", LR * RATIO, 0.0)}
    assert set(where.values()) == {A, B, *biases}


def test_whole_modules_learn_at_the_rate_and_only_their_matrices_decay():
    model = adapted(modules_to_save=["embed_tokens", "lm_head", "input_layernorm"])
    where = placed(model, groups_of(model))

    def saved(part: str) -> set[Any]:
        return {value for name, value in where.items() if f"{part}.modules_to_save" in name}

    assert saved("lm_head") == {OTHER}
    assert saved("embed_tokens") == {STILL}
    assert saved("input_layernorm") == {STILL}


def test_adapters_of_embeddings_are_a_and_b_without_decay():
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    where = placed(model, groups_of(model))
    assert {v for n, v in where.items() if "lora_embedding_A" in n} == {("lora_A_no_decay", LR, 0.0)}
    assert {v for n, v in where.items() if "lora_embedding_B" in n} == {("lora_B_no_decay", LR * RATIO, 0.0)}
    assert {v for n, v in where.items() if "q_proj" in n} == {A, B}


def test_trained_token_rows_are_embeddings():
    model = adapted(trainable_token_indices=[1, 2, 5])
    where = placed(model, groups_of(model))
    assert {value for name, value in where.items() if "trainable_tokens" in name} == {STILL}


def test_biases_of_the_base_model_are_trained_if_peft_says_so():
    model = peft.get_peft_model(
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
            )
        ),
        peft.LoraConfig(r=2, target_modules=["query"], bias="all"),
    )
    where = placed(model, groups_of(model))
    assert {value for name, value in where.items() if "lora_" not in name} == {STILL}
    assert {value for name, value in where.items() if "lora_" in name} == {A, B}


@pytest.mark.parametrize("adapter", ["embedding", "lora_A", "lora_B", "trainable_tokens", "lora_embedding_A"])
def test_the_name_of_an_adapter_does_not_matter(adapter):
    model = adapted(adapter)
    where = placed(model, groups_of(model))
    assert set(where.values()) == {A, B}
    assert {value for name, value in where.items() if f".lora_A.{adapter}" in name} == {A}


def test_linear_layers_below_a_module_called_embedding_decay():
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embedding = nn.ModuleDict({"proj": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.patch_embedding["proj"](x)

    model = peft.get_peft_model(Patches(), peft.LoraConfig(r=2, target_modules=["proj"]))
    assert set(placed(model, groups_of(model)).values()) == {A, B}


def test_only_the_trainable_adapter_is_taken():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    where = placed(model, groups_of(model))
    assert len(where) == 4
    assert all(".second." in name for name in where)


def test_groups_have_a_fixed_order():
    model = adapted(use_dora=True, lora_bias=False, modules_to_save=["lm_head"])
    assert [group["name"] for group in groups_of(model)] == ["lora_A", "lora_B", "other", "other_no_decay"]


def loraplus(model: nn.Module, cls: type = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model, cls, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY, **options
    )


def settings(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {
        by_id[id(p)]: (g.get("initial_lr", g["lr"]), g["weight_decay"]) for g in groups for p in g["params"]
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": LINEARS},
        {"use_rslora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_rates_and_decay_are_pefts(options):
    model = adapted(**options)
    assert settings(model, groups_of(model)) == settings(model, loraplus(model).param_groups)


def test_where_pefts_grouping_is_another():
    """PEFT gives vectors the rate of B, embedding adapters a rate of their own, and decays all of these."""
    model = adapted(
        use_dora=True, target_modules=["q_proj"], modules_to_save=["embed_tokens", "input_layernorm"]
    )
    ours, theirs = settings(model, groups_of(model)), settings(model, loraplus(model).param_groups)
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert len(differ) == 5
    for name in differ:
        if "embed_tokens" in name:
            assert (ours[name], theirs[name]) == ((LR, 0.0), (LR, DECAY))
        else:
            assert "lora_magnitude_vector" in name or "layernorm" in name
            assert (ours[name], theirs[name]) == ((LR, 0.0), (LR * RATIO, DECAY))
    embedding = adapted(target_modules=["embed_tokens"])
    assert {lr for lr, _ in settings(embedding, loraplus(embedding).param_groups).values()} == {1e-6}


def test_peft_builds_its_loraplus_optimizer_from_ours():
    """It passes empty groups."""
    model = adapted()
    schedule = fusedlr.linear(warmup_steps=2, total_steps=10)
    optimizer = loraplus(model, fusedlr.FusedAdamW, schedule=schedule, max_grad_norm=1.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0, 4, 0]
    assert optimizer.scheduler.base_lrs == [LR, 1e-6, LR * RATIO, LR * RATIO]
    train(model, optimizer)
    assert optimizer.metrics()["step"].tolist() == [3, 3, 3, 3]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
    tokens = torch.randint(0, 32, (3, 2, 8), generator=torch.Generator().manual_seed(0))
    for batch in tokens:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def test_the_groups_train_as_with_torch():
    schedule = fusedlr.linear(warmup_steps=2, total_steps=6)
    results = []
    for stock in (False, True):
        torch.manual_seed(0)
        model = adapted(use_dora=True, modules_to_save=["lm_head"]).double()
        frozen = {name: bits(p) for name, p in model.named_parameters() if not p.requires_grad}
        groups = groups_of(model)
        if stock:
            optimizer: Any = torch.optim.AdamW(groups)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_at)
        else:
            optimizer, scheduler = fusedlr.FusedAdamW(groups, schedule=schedule), None
            assert optimizer.scheduler.base_lrs == [LR, LR * RATIO, LR, LR]
            assert "name: lora_B" in repr(optimizer)
        train(model, optimizer, scheduler)
        assert {name: bits(p) for name, p in model.named_parameters() if not p.requires_grad} == frozen
        results.append([p.detach() for p in trainable(model).values()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_model_given_whole_costs_only_what_is_trained():
    model = adapted()
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=LR, max_grad_norm=1.0)
    train(model, optimizer)
    assert len(optimizer.state) == len(trainable(model)) < len(optimizer.param_groups[0]["params"])


def test_adapters_of_a_bf16_model_keep_fp32_moments():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_llama().to(torch.bfloat16),
        peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True),
    )
    dtypes = {p.dtype for p in trainable(model).values()}
    assert dtypes == {torch.float32, torch.bfloat16}
    optimizer = fusedlr.FusedAdamW(groups_of(model), max_grad_norm=1.0)
    train(model, optimizer)
    assert {entry["exp_avg"].dtype for entry in optimizer.state.values()} == {torch.float32}
    assert optimizer.metrics()["skipped"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-4}, "lr=-0.0001 must be a finite number >= 0"),
        ({"lr": math.nan}, "lr=nan must be a finite number >= 0"),
        ({"lr": "1e-4"}, "lr='1e-4' must be a finite number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be a finite number >= 0"),
        ({"weight_decay": math.inf}, "weight_decay=inf must be a finite number >= 0"),
        ({"b_lr_ratio": 0}, "b_lr_ratio=0 must be a finite number above 0"),
        ({"b_lr_ratio": math.inf}, "b_lr_ratio=inf must be a finite number above 0"),
        ({"b_lr_ratio": None}, "b_lr_ratio=None must be a finite number above 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_with_their_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        groups_of(adapted(), **options)


def test_a_frozen_model_is_refused():
    model = adapted()
    for p in model.parameters():
        p.requires_grad_(False)
    total = len(list(model.parameters()))
    with pytest.raises(
        ValueError, match=rf"all {total} parameters of PeftModelForCausalLM are frozen; looked for .*lora_A"
    ):
        groups_of(model)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(
        ValueError,
        match=r"Linear has 2 trainable parameters \(weight, bias, ...\) but no LoRA matrix; looked for",
    ):
        groups_of(nn.Linear(3, 2))
