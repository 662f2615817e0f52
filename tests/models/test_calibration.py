"""What linear layers are given when rows go through a model once."""

import torch
import transformers

from fastft.models.calibration import walk


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and "encoder" in name}


def test_second_moments_without_padding():
    model, rows = bert(), [torch.randint(3, 50, (n,)) for n in (5, 9, 12)]
    layers, found = linears(model), {}
    padded = torch.zeros(3, 12, dtype=torch.int64)
    mask = torch.zeros(3, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1
    model.train()
    state = torch.random.get_rng_state()
    assert walk(model, {"input_ids": padded, "attention_mask": mask}, layers, found.__setitem__) == []
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())

    model.eval()
    given: dict[str, list] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0][0].detach()))
    for row in rows:
        model(input_ids=row[None])
    assert list(found) == list(layers)
    for name, parts in given.items():
        x = torch.cat(parts)
        torch.testing.assert_close(found[name], x.T @ x / 26, rtol=1e-3, atol=1e-4)


def test_later_layers_see_what_became_of_earlier_ones():
    model, inputs = bert(), {"input_ids": torch.randint(3, 50, (2, 8))}
    layers, before, after = linears(model), {}, {}
    walk(model, inputs, layers, before.__setitem__)

    def visit(name: str, moment: torch.Tensor) -> None:
        after[name] = moment
        layers[name].weight.data = layers[name].weight * 0.5

    walk(model, inputs, layers, visit)
    first, *later = layers
    assert torch.equal(before[first], after[first])
    assert not torch.allclose(before[later[-1]], after[later[-1]])


def test_layers_that_no_row_reaches():
    model = bert()
    layers = linears(model)
    strange = {"aside": torch.nn.Linear(4, 4)}
    seen: list[str] = []
    left = walk(model, {"input_ids": torch.tensor([[3, 4]])}, layers | strange, lambda name, _: seen.append(name))
    assert left == ["aside"] and seen == list(layers)


def test_the_head_over_the_vocabulary_is_not_computed():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model, seen = transformers.LlamaForCausalLM(config), []
    model.lm_head.register_forward_hook(lambda *_: seen.append("lm_head"))
    layers = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"}
    assert walk(model, {"input_ids": torch.tensor([[3, 4]])}, layers, lambda *_: None) == [] and not seen
    model(torch.tensor([[3, 4]]))
    assert seen == ["lm_head"]
