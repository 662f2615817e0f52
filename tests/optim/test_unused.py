"""Parameters that take no part in a step keep their value at every ZeRO stage, as torch's optimizers leave them."""

import pytest
import torch
from safetensors.torch import load_file

import launch

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
WHERE = [(zero, dtype) for zero in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def xlnet(tmp_path_factory, corpus):
    """A classifier in whose forward ``mask_emb`` and, without token types, ``seg_embed`` take no part."""
    from conftest import _tokenizer
    from transformers import XLNetConfig, XLNetForSequenceClassification

    folder = tmp_path_factory.mktemp("xlnet")
    tokenizer = _tokenizer(corpus, folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    config = XLNetConfig(**sizes, pad_token_id=tokenizer.pad_token_id, num_labels=3)
    XLNetForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_unused_parameters_keep_their_value(classification_config, tmp_path, xlnet, world):
    """Weight decay of 0.5 a step shrinks what it touches at once; the used parameters, it does."""
    paths = []
    for zero, dtype in WHERE:
        name = f"z{zero}-{dtype}"
        config = {
            **classification_config,
            "model": {"path": str(xlnet), "dtype": dtype},
            "data": {**classification_config["data"], "cache": str(tmp_path / "prepared")},
            "optim": {"lr": 1e-2, "weight_decay": 0.5},
            "parallel": {"zero": zero},
            "run": {**classification_config["run"], "dir": str(tmp_path / name)},
        }
        paths.append(launch.write_config(tmp_path / f"{name}.yaml", config))
    launch.ranks(world, [RUNS, "train", *paths])
    before = load_file(xlnet / "model.safetensors")
    for zero, dtype in WHERE:
        after = load_file(tmp_path / f"z{zero}-{dtype}" / "model" / "model.safetensors")
        for name in ("transformer.mask_emb", "transformer.layer.0.rel_attn.seg_embed"):
            assert torch.equal(after[name], before[name].to(after[name].dtype)), (zero, dtype, name)
        assert not torch.equal(after["logits_proj.weight"].float(), before["logits_proj.weight"].float())


def test_an_adapter_that_is_used_by_some_steps_only(tmp_path):
    """One parameter has a gradient in every other step: it moves in those, and its moments wait in between."""
    from types import SimpleNamespace

    from fastft.optim import FusedAdamW
    from fastft.zero.unused import Unused

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        own = True
    else:
        own = False
    try:
        model = torch.nn.ParameterList([torch.ones(3), torch.ones(3)])
        optimizer = FusedAdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        engine = SimpleNamespace(module=model, optimizer=optimizer, device=torch.device("cpu"))
        unused = Unused(engine, optimizer)
        model[0].sum().backward()
        assert unused.take() == [model[1]]
        (model[0].sum() + model[1].sum()).backward()
        assert unused.take() == []
        assert [p.tolist() for p in unused.take()] == [[1.0] * 3] * 2, "what was taken is forgotten"
    finally:
        if own:
            torch.distributed.destroy_process_group()
