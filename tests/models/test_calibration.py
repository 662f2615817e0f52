"""What linear layers are given when rows go through a model once."""

import pytest
import torch
import transformers

from fastft.models import gptq
from fastft.models.calibration import residuals, walk


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes)).eval()


def llama(**changes) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes, **changes)).eval()


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and "layer" in name}


def test_what_is_known_is_of_tokens_without_padding():
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
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())

    model.eval()
    given: dict[str, list] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0][0].detach()))
    for row in rows:
        model(input_ids=row[None])
    assert list(found) == list(layers)
    for name, parts in given.items():
        first, x = parts[0], torch.cat(parts)
        assert [half.tokens for half in found[name]] == [5, 21]
        torch.testing.assert_close(found[name][0].moment, first.T @ first / 5, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gptq.joined(found[name]).moment, x.T @ x / 26, rtol=1e-3, atol=1e-4)
        assert not gptq.joined(found[name]).drift.any()  # nothing was changed


@pytest.mark.parametrize("make", [bert, llama])
def test_later_layers_see_what_became_of_earlier_ones(make):
    """And what the model gave them as it was, and what their output is added to."""
    model, inputs = make(), {"input_ids": torch.randint(3, 50, (2, 8))}
    layers, found = linears(model), {}
    given: dict[str, torch.Tensor] = {}

    def note(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: given.__setitem__(name, args[0].detach().flatten(0, -2)))

    for name, layer in layers.items():
        note(name, layer)
    for name, norm in model.named_modules():
        if type(norm).__name__.endswith("Norm"):
            note(name, norm)
    model(**inputs)
    plain = dict(given)

    def visit(name: str, halves: list) -> None:
        found[name] = halves
        layers[name].weight.data = layers[name].weight * 0.9

    assert walk(model, inputs, layers, visit) == []
    given.clear()
    model(**inputs)  # as the walk left it: the inputs of each layer depend on the layers before it alone
    for name, halves in found.items():
        every, x, p = gptq.joined(halves), given[name], plain[name]
        torch.testing.assert_close(every.moment, x.T @ x / 16, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(every.drift, (p - x).T @ x / 16, rtol=1e-3, atol=1e-4)
        if name.endswith(("o_proj", "down_proj")):
            norm = name.replace("self_attn.o_proj", "input_layernorm")
            norm = norm.replace("mlp.down_proj", "post_attention_layernorm")
            r, s = plain[norm], given[norm]
        elif name.endswith("output.dense"):  # its norm is given the sum
            norm, layer = name.replace("dense", "LayerNorm"), layers[name]
            s = given[norm] - layer(given[name])
            r = plain[norm] - torch.nn.functional.linear(plain[name], layer.weight / 0.9, layer.bias)
        else:
            assert every.behind is None
            continue
        torch.testing.assert_close(every.behind, (r - s).T @ x / 16, rtol=1e-3, atol=1e-4)


def test_what_outputs_are_added_to():
    ids = {"input_ids": torch.tensor([[3, 4, 5]])}
    model = llama()
    assert residuals(model, ids, linears(model))[0] == {
        name: pair
        for i, layer in enumerate(model.model.layers)
        for name, pair in {
            f"model.layers.{i}.self_attn.o_proj": (layer.input_layernorm, 0),
            f"model.layers.{i}.mlp.down_proj": (layer.post_attention_layernorm, 0),
        }.items()
    }
    model = bert()
    first, second = model.bert.encoder.layer
    assert residuals(model, ids, linears(model))[0] == {
        "bert.encoder.layer.0.attention.output.dense": (model.bert.embeddings.LayerNorm, 1),
        "bert.encoder.layer.0.output.dense": (first.attention.output.LayerNorm, 1),
        "bert.encoder.layer.1.attention.output.dense": (first.output.LayerNorm, 1),
        "bert.encoder.layer.1.output.dense": (second.attention.output.LayerNorm, 1),
    }


def test_zeros_are_added_to_nothing():
    """A norm of zeros makes outputs of zeros, whose sum with anything is that."""
    model = llama(num_key_value_heads=1)
    model.model.layers[1].input_layernorm.weight.data.zero_()
    found, often = residuals(model, {"input_ids": torch.tensor([[3, 4, 5]])}, linears(model))
    assert not often and sorted(found) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert walk(model, {"input_ids": torch.randint(3, 50, (4, 6))}, linears(model), lambda *_: None) == []


class Shared(torch.nn.Module):
    """Of two layers with the same input, one is added to what the norm was given."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 8)
        self.one, self.other, self.last = (torch.nn.Linear(8, n, bias=False) for n in (8, 12, 8))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(2))

    def forward(self, input_ids):
        h = self.embed(input_ids)
        x = self.norms[0](h)
        h, aside = h + self.one(x), self.other(x)
        return self.last(self.norms[1](h)).sum() + aside.sum()


def test_only_the_layer_that_is_added_knows_what_to():
    torch.manual_seed(0)
    model, found = Shared(), {}
    layers = {name: getattr(model, name) for name in ("one", "other", "last")}
    walk(model, {"input_ids": torch.randint(0, 64, (4, 6))}, layers, found.__setitem__)
    assert [name for name, halves in found.items() if halves[0].behind is not None] == ["one"]


def test_layers_that_are_called_again_and_again():
    """ALBERT's: no visit, for what a first call says is not what later ones are given."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "embedding_size": 16}
    model = transformers.AlbertModel(transformers.AlbertConfig(vocab_size=50, num_hidden_layers=3, **sizes)).eval()
    layers = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    seen: list[str] = []
    left = walk(model, {"input_ids": torch.randint(3, 50, (4, 6))}, layers, lambda name, _: seen.append(name))
    assert sorted(seen) == ["encoder.embedding_hidden_mapping_in", "pooler"]
    assert sorted(seen + left) == sorted(layers)


def test_padding_that_no_mask_names():
    """Decoders get none: which tokens are real is said beside the inputs."""
    model, found, alone = llama(), {}, {}
    rows = torch.randint(3, 50, (4, 8))
    real = torch.arange(8)[None] < torch.tensor([8, 3, 5, 8])[:, None]

    def halve(into: dict):
        def visit(name: str, halves: list) -> None:
            into[name] = gptq.joined(halves)
            model.get_submodule(name).weight.data = model.get_submodule(name).weight * 0.9

        return visit

    walk(model, {"input_ids": rows}, linears(model), halve(found), real)
    for row, tokens in zip(rows, real.sum(1), strict=True):  # causal: what follows a row changes nothing of it
        model = llama()
        walk(model, {"input_ids": row[None, :tokens]}, linears(model), halve(one := {}))
        for name, inputs in one.items():
            before = alone.get(name, (0, 0, 0))
            alone[name] = tuple(a + tokens * b for a, b in zip(before, inputs[1:3], strict=False))
    for name, inputs in found.items():
        assert inputs.tokens == 24
        torch.testing.assert_close(inputs.moment, alone[name][0] / 24, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(inputs.drift, alone[name][1] / 24, rtol=1e-3, atol=1e-5)


def test_what_counts_the_rows_goes_through_once():
    """Documents' bounds, say: then nothing is known of the model as it was."""
    rows, seen = torch.randint(3, 50, (4, 8)), {}
    model = bert()
    walk(model, {"input_ids": rows}, linears(model), seen.__setitem__)
    assert all(half.drift is not None for halves in seen.values() for half in halves)
    model.forward = lambda input_ids, bounds: type(model).forward(model, input_ids)
    walk(model, {"input_ids": rows, "bounds": torch.tensor([0, 32])}, linears(model), seen.__setitem__)
    assert all(half.drift is None and half.tokens == 16 for halves in seen.values() for half in halves)


def test_layers_that_no_row_reaches():
    model = bert()
    layers = linears(model)
    strange = {"aside": torch.nn.Linear(4, 4)}
    seen: list[str] = []
    left = walk(model, {"input_ids": torch.tensor([[3, 4]])}, layers | strange, lambda name, _: seen.append(name))
    assert left == ["aside"] and seen == list(layers)


def test_the_head_over_the_vocabulary_is_not_computed():
    model, seen = llama(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append("lm_head"))
    layers = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"}
    assert walk(model, {"input_ids": torch.tensor([[3, 4]])}, layers, lambda *_: None) == [] and not seen
    model(torch.tensor([[3, 4]]))
    assert seen == ["lm_head"]
