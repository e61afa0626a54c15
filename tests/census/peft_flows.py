"""Adapters that PEFT makes in more than one step."""

from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import CordaConfig
from torch import nn
from transformers import AutoModelForSequenceClassification

from tests.census import by_peft
from tests.census.families import Family
from tests.census.made import Made, Maker, peft_may_refuse
from tests.support.engine_harness import prompts
from tests.support.tiny_models import VOCAB, make_config


def converted(init: str, **fields: Any) -> Maker:
    """PiSSA and OLoRA also change the base's weights; PEFT can turn what was trained into a plain LoRA on the base."""

    def make(family: Family, directory: Path) -> Made:
        with peft_may_refuse():
            torch.manual_seed(0)
            settings = by_peft.config(family, init_lora_weights=init, **fields)
            model = peft.get_peft_model(family.model(), settings)
            model.peft_config["default"].init_lora_weights = True
            initial = directory.with_name(f"{directory.name}-initial")
            model.save_pretrained(initial)
            by_peft.train(model)
            model.peft_config["default"].init_lora_weights = init
            model.save_pretrained(directory, path_initial_model_for_weight_conversion=str(initial))
        return Made(directory, directory)

    return make


def on_its_residual_base(family: Family, directory: Path) -> Made:
    """PiSSA as saved, and the base without what PiSSA took out of it, as its authors publish them."""
    by_peft.save(family, directory, init_lora_weights="pissa")

    def residual(attention: str) -> nn.Module:
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(family.model(attention), by_peft.config(family, init_lora_weights="pissa"))
        return wrapped.unload()

    return Made(directory, directory, base=residual, trained_on=family.model)


def eva(family: Family, directory: Path) -> Made:
    with peft_may_refuse():
        settings = by_peft.config(family, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
        torch.manual_seed(0)
        model = peft.get_peft_model(family.model(), settings)
        rows = [torch.tensor([(prompt * 20)[:20]]) for prompt in prompts(8)]
        batches = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
        peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        by_peft.train(model)
        model.save_pretrained(directory)
    return Made(directory, directory)


def corda(family: Family, directory: Path) -> Made:
    with peft_may_refuse():
        from peft.tuners.lora.corda import preprocess_corda  # wants a package that PEFT does not

        model = family.model()
        settings = by_peft.config(family, init_lora_weights="corda", corda_config=CordaConfig())
        preprocess_corda(model, settings, run_model=lambda: [model(torch.tensor([it])) for it in prompts()])
        wrapped = peft.get_peft_model(model, settings)
        by_peft.train(wrapped)
        wrapped.save_pretrained(directory)
    return Made(directory, directory)


def only_b_trained(family: Family, directory: Path) -> Made:
    """LoRA-FA is an optimizer that leaves A alone."""
    with peft_may_refuse():
        torch.manual_seed(0)
        model = peft.get_peft_model(family.model(), by_peft.config(family))
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad = False
        by_peft.train(model)
        model.save_pretrained(directory)
    return Made(directory, directory)


def _two(family: Family) -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(family.model(), by_peft.config(family))
    model.add_adapter("other", by_peft.config(family, r=3))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name
    by_peft.train(model)
    return model


def two_in_one_directory(family: Family, directory: Path) -> Made:
    with peft_may_refuse():
        _two(family).save_pretrained(directory)
    return Made(directory, directory)


def weighted(combination: str, **options: Any) -> Maker:
    """Two adapters made into one."""

    def make(family: Family, directory: Path) -> Made:
        with peft_may_refuse():
            model = _two(family) if combination != "linear" else _two_of_a_rank(family)
            model.add_weighted_adapter(["default", "other"], [0.7, 0.6], "both", combination, **options)
            model.save_pretrained(directory, selected_adapters=["both"])
        return Made(directory / "both", directory / "both")

    return make


def _two_of_a_rank(family: Family) -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(family.model(), by_peft.config(family))
    model.add_adapter("other", by_peft.config(family))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name
    by_peft.train(model)
    return model


def resized(family: Family, directory: Path) -> Made:
    """Three tokens were added to the base, which is served with them."""

    def base(attention: str = "eager") -> nn.Module:
        model = family.model(attention)
        torch.manual_seed(3)
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        return model

    with peft_may_refuse():
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), by_peft.config(family))
        by_peft.train(model)
        model.save_pretrained(directory)
    return Made(directory, directory, base=base)


def with_a_classifier(family: Family, directory: Path) -> Made:
    with peft_may_refuse():
        model = AutoModelForSequenceClassification.from_config(make_config(family.tiny, **family.sizes))
        wrapped = peft.get_peft_model(model, by_peft.config(family, task_type="SEQ_CLS"))
        by_peft.train(wrapped)
        wrapped.save_pretrained(directory)
    return Made(directory, None)


def arrow(family: Family, directory: Path) -> Made:
    """Arrow is made of several adapters; its configuration alone is what a row can try."""
    return by_peft.lora(arrow_config=peft.ArrowConfig())(family, directory)
