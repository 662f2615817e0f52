"""The decoder layer as one function, against transformers' own layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastft.ops import decoder
from fastft.ops.decoder import Documents, Shape, attention, decoder_layer, reference, rms_norm
from tests.ops.common import DEVICE

D, HEADS, GROUPS, DIM, WIDTH = 48, 6, 2, 8, 40
LENGTHS = [5, 9, 1, 17]


def documents(lengths: list[int], rotary: nn.Module, x: Tensor) -> tuple[Documents, Tensor]:
    position = torch.cat([torch.arange(n) for n in lengths])[None].to(x.device)
    cos, sin = rotary(x, position)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=x.device)
    return Documents(bounds, max(lengths), cos.flatten(0, 1), sin.flatten(0, 1)), position


def family(name: str, **more):
    """A layer of a family, and its rotary embedding."""
    import importlib

    module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    config = getattr(importlib.import_module(f"transformers.models.{name.lower()}"), f"{name}Config")(
        hidden_size=D,
        intermediate_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        num_hidden_layers=1,
        vocab_size=32,
        head_dim=DIM,
        **more,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = getattr(module, f"{name}DecoderLayer")(config, 0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer, getattr(module, f"{name}RotaryEmbedding")(config), config


def weights_of(layer: nn.Module) -> tuple:
    a, m = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight,
        a.q_proj.bias, a.k_proj.bias, a.v_proj.bias, a.o_proj.weight, layer.post_attention_layernorm.weight,
        m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
    )  # fmt: skip


def mask_of(lengths: list[int], window: int | None) -> Tensor:
    n = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i = torch.arange(n)
    seen = (document[:, None] == document) & (i[:, None] >= i)
    if window:
        seen &= i[:, None] - i < window
    return torch.where(seen, 0.0, float("-inf"))[None, None]


def test_equals_layers_of_transformers():
    for name, more, window in (("Llama", {}, None), ("Qwen2", {}, None), ("Mistral", {"sliding_window": 4}, 4)):
        layer, rotary, config = family(name, **more)
        x = torch.randn(1, sum(LENGTHS), D)
        where, position = documents(LENGTHS, rotary, x)
        shape = Shape(HEADS, GROUPS, DIM, DIM**-0.5, config.rms_norm_eps, window)
        grad = torch.randn_like(x)
        results = []
        for fused in (False, True):
            copied = copy.deepcopy(layer)
            given = x.clone().requires_grad_()
            if fused:
                out = decoder_layer(given, where, shape, weights_of(copied))
            else:
                out = copied(
                    given,
                    attention_mask=mask_of(LENGTHS, window),
                    position_ids=position,
                    position_embeddings=(where.cos[None], where.sin[None]),
                )
            out.backward(grad)
            results.append([out.detach(), given.grad, *(p.grad for p in copied.parameters())])
        assert len(results[0]) == len(results[1]) == (14 if name == "Qwen2" else 11), name
        for plain, fused in zip(*results, strict=True):
            assert plain is not None and fused is not None
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def test_weights_side_by_side_are_multiplied_at_once_and_give_the_same():
    layer, rotary, _ = family("Llama")
    x = torch.randn(2, 16, D)
    where, _ = documents([16, 10, 6], rotary, x)
    shape = Shape(HEADS, GROUPS, DIM, DIM**-0.5, 1e-6)
    results = []
    for joined in (False, True):
        copied = copy.deepcopy(layer)
        linears = (copied.self_attn.q_proj, copied.self_attn.k_proj, copied.self_attn.v_proj)
        if joined:
            whole = torch.cat([m.weight.data for m in linears])
            for m, part in zip(linears, whole.split([len(m.weight) for m in linears]), strict=True):
                m.weight.data = part
        side = decoder.side_by_side(tuple(m.weight for m in linears))
        assert (side is not None) == joined
        if joined:
            assert torch.equal(side, whole)
        out = decoder_layer(x, where, shape, weights_of(copied))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in copied.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # products of other shapes sum in another order


def test_only_what_is_trained_gets_a_gradient_and_a_second_backward_is_refused():
    layer, rotary, _ = family("Qwen2")
    layer.requires_grad_(False)
    layer.mlp.down_proj.weight.requires_grad_(True)
    layer.self_attn.k_proj.bias.requires_grad_(True)
    x = torch.randn(1, 8, D)
    where, _ = documents([8], rotary, x)
    out = decoder_layer(x, where, Shape(HEADS, GROUPS, DIM, 0.3, 1e-6), weights_of(layer)).sum()
    out.backward(retain_graph=True)
    assert [n for n, p in layer.named_parameters() if p.grad is not None] == [
        "self_attn.k_proj.bias",
        "mlp.down_proj.weight",
    ]
    with pytest.raises(RuntimeError, match="run twice"):  # it has used up what it kept
        out.backward()


def test_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    layer, rotary, _ = family("Llama")
    x = torch.randn(1, 12, D)
    where, _ = documents([7, 5], rotary, x)
    grads = []
    for again in (False, True):
        copied = copy.deepcopy(layer)

        def run(x: Tensor, copied=copied) -> Tensor:
            return decoder_layer(x, where, Shape(HEADS, GROUPS, DIM, 0.3, 1e-6), weights_of(copied))

        given = x.clone().requires_grad_()
        (checkpoint(run, given, use_reentrant=False) if again else run(given)).square().sum().backward()
        grads.append([given.grad, *(p.grad for p in copied.parameters())])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_gated():
    gate, up = (torch.randn(2, 3, 10, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 3, 10)
    expected = nn.functional.silu(gate) * up
    found = decoder.gated(gate, up)
    torch.testing.assert_close(found, expected)
    plain = torch.autograd.grad(expected, [gate, up], grad)
    torch.testing.assert_close(torch.autograd.grad(found, [gate, up], grad), plain)


def test_rms_norm():
    x = torch.randn(3, 5, 24, requires_grad=True)
    w = torch.randn(24, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5).double(), (x, w), eps=1e-2, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), nn.functional.rms_norm(x, (24,), w, 1e-5))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_kernels_equal_the_reference(dtype):
    ops = pytest.importorskip("fastft.ops.triton.decoder")
    torch.manual_seed(0)
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE).to(dtype)

    def same(found, expected) -> None:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)

    for n, d in ((7, 24), (9, 64), (3, 130)):
        x, r, w, dy = rand(n, d), rand(n, d), rand(d), rand(n, d)
        for residual in (None, r):
            same(ops.rms_forward(x, residual, w, 1e-5), reference.rms_forward(x, residual, w, 1e-5))
        rstd = reference.rms_forward(x, None, w, 1e-5)[2]
        for extra in (None, r):
            y = [torch.empty_like(x) for _ in range(2)]
            found = ops.rms_backward(dy, x, w, rstd, extra, y[0])
            same(found, reference.rms_backward(dy, x, w, rstd, extra, y[1]))
            same(y[0], y[1])
        out = r.clone()
        assert ops.rms_backward(dy, x, w, rstd, out, None, out)[0] is out
        same(out, reference.rms_backward(dy, x, w, rstd, r)[0])
    for heads, groups, dim in ((3, 1, 8), (4, 4, 16), (7, 2, 24)):
        qkv = rand(10, (heads + 2 * groups) * dim)
        cos, sin = (torch.cat([t, t], 1).contiguous() for t in (rand(5, dim // 2), rand(5, dim // 2)))
        one, other = qkv.clone(), qkv.clone()
        ops.rope_forward(one, cos, sin, heads + groups, dim)
        reference.rope_forward(other, cos, sin, heads + groups, dim)
        same(one, other)
        ops.rope_forward(one, cos, sin, heads + groups, dim, back=True)
        reference.rope_forward(other, cos, sin, heads + groups, dim, back=True)
        same(one, other)
        grads = rand(10, heads, dim), rand(10, groups, dim), rand(10, groups, dim)
        same(ops.rope_backward(*grads, cos, sin), reference.rope_backward(*grads, cos, sin))
    for width in (8, 33, 1025):
        gu, da = rand(4, 2 * width), rand(4, width)
        halves = gu.chunk(2, 1)
        same(ops.swiglu_forward(*halves), reference.swiglu_forward(*halves))
        apart = [half.contiguous() for half in halves]
        same(ops.swiglu_forward(*apart), reference.swiglu_forward(*apart))
        same(ops.swiglu_backward(*apart, da), reference.swiglu_backward(*apart, da))
        pair = [(gu.clone(), da.clone()) for _ in range(2)]
        for module, (both, grad) in zip((ops, reference), pair, strict=True):
            module.swiglu_backward(*both.chunk(2, 1), grad, in_place=True)
        same(pair[0], pair[1])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_attention_by_document_on_a_gpu(window):
    torch.manual_seed(0)
    lengths = [300, 1, 77, 512]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), h, 64) for h in (8, 2, 2))
    grad = torch.randn_like(q)
    expected = attention.forward(q, k, v, bounds, 512, 0.125, window)[0]
    back = attention.backward(grad, q, k, v, expected, (), bounds, 512, 0.125, window)
    on = [t.cuda().bfloat16() for t in (q, k, v, grad)]
    out, kept = attention.forward(*on[:3], bounds.cuda(), 512, 0.125, window)
    found = attention.backward(on[3], *on[:3], out, kept, bounds.cuda(), 512, 0.125, window)
    for one, other in zip((out, *found), (expected, *back), strict=True):
        assert (one.cpu().float() - other).norm() / other.norm() < 1e-2


def test_documents_as_cudnn_wants_them(monkeypatch):
    """Powers of two of documents, the missing ones of length 0; where each begins in elements."""
    from fastft.ops.decoder import cudnn

    monkeypatch.setattr(cudnn, "_known", {})
    qkv = torch.empty(40, (4 + 2 * 2) * 8)
    q, k, v = (part.unflatten(1, (-1, 8)) for part in qkv.split([32, 16, 16], 1))
    out = torch.empty(40, 4, 8)
    bounds = torch.tensor([0, 7, 30, 40], dtype=torch.int32)
    key = cudnn._key(q, k, v, out, 3, 23, 0.5)
    assert (key.documents, key.longest, key.tokens, key.strides) == (16, 256, 64, (64, 64, 64, 32))
    lengths, *begins = cudnn._tables(bounds, key)
    assert lengths.tolist() == [7, 23, 10] + [0] * 13 and lengths.dtype == torch.int32
    for begin, stride in zip(begins, (64, 64, 64, 32, 4), strict=True):
        assert begin.tolist() == [n * stride for n in [0, 7, 30, 40] + [40] * 13] and begin.dtype == torch.int64
    assert cudnn._tables(bounds, key)[0] is lengths  # once for all layers
    assert cudnn._key(q, k, v, out, 17, 300, 0.5).documents == 32
    # One row of a model that joins heads last: (n, heads, dim) with other strides
    odd = torch.empty(4, 40, 8).transpose(0, 1)
    assert cudnn.heads_side_by_side(q) is q
    assert cudnn.heads_side_by_side(odd).stride() == (32, 8, 1)


def test_a_graph_serves_what_is_not_larger(monkeypatch):
    from fastft.ops.decoder import cudnn

    monkeypatch.setattr(cudnn, "_known", {})

    def sizes(documents: int, longest: int, tokens: int, heads: int = 4) -> tuple[int, ...]:
        q, out = (torch.empty(tokens, heads, 8) for _ in range(2))
        return cudnn._key(q, q, q, out, documents, longest, 0.5)[:3]

    assert sizes(30, 2000, 16384) == (32, 2048, 16384)
    assert sizes(17, 1100, 14336) == (32, 2048, 16384)  # the last step of an epoch
    assert sizes(9, 1100, 16384) == (32, 2048, 16384)  # fewer documents: up to half of it stays empty
    assert sizes(30, 600, 16000) == (32, 2048, 16384)
    assert sizes(4, 100, 100) == (16, 256, 128)  # far smaller: its own
    assert sizes(30, 2000, 16385) == (32, 2048, 20480)  # larger: its own
    assert sizes(30, 2000, 16300) == (32, 2048, 16384)  # the smallest that serves
    assert sizes(30, 2000, 14336, heads=2) == (32, 2048, 14336)  # another kind
    for tokens in (1, 63, 64, 65, 1000, 5000, 16385, 100_000):
        size = cudnn._rounded(tokens)
        assert tokens <= size < max(tokens * 1.25, tokens + 64) and size % 64 == 0


@pytest.mark.gpu
def test_cudnn_on_a_gpu():
    from fastft.ops.decoder import cudnn

    if cudnn.library() is None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs nvidia-cudnn-frontend and a Hopper GPU")
    for heads, groups, dim in ((8, 2, 64), (4, 4, 128)):
        assert cudnn.refuses(torch.device("cuda", 0), torch.bfloat16, heads, groups, dim) == ""
