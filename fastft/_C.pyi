"""Signatures of the native module. It knows no torch: every array is a raw address (int), 0 meaning "absent".

Common arguments
----------------
device       -1 for the CPU, otherwise a CUDA device ordinal. ValueError when this build has no CUDA.
stream       cudaStream_t as an integer; ignored on the CPU.
num_threads  OpenMP threads to use on the CPU, 0 for OpenMP's own default; ignored on CUDA.
dtype tags   F32, BF16 below; anything else raises ValueError.
"""

F32: int
BF16: int

def build_info() -> dict[str, object]:
    """The build: version (str), cuda (bool), cuda_archs (list[str]),
    compiler (str), openmp (bool), cpu_paths (list[str]: those compiled in).
    """

def cpu_features() -> dict[str, bool]:
    """What this CPU has: avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq, avx512_bf16."""

def cpu_path() -> str:
    """ "scalar", "avx2" or "avx512": the path in use. FASTFT_CPU forces one; ValueError when this CPU cannot run it."""

ADAMW_SCRATCH: int

def adamw(
    device: int,
    stream: int,
    params: list[int],
    grads: list[int],
    exp_avgs: list[int],
    exp_avg_sqs: list[int],
    max_exp_avg_sqs: list[int],  # empty unless amsgrad
    copies: list[int],  # empty, or one bf16 address per tensor (0: none): the updated parameter rounded to bf16
    remainders: list[int],  # int16, with param_store 2
    exp_avg_scales: list[int],  # float32[ceil(numel / 256)], with state_store 2
    exp_avg_sq_scales: list[int],
    # one float32 scalar per tensor (host memory for the CPU, device memory for CUDA): steps done so far
    steps: list[int],
    numels: list[int],
    offsets: list[int],  # index of a tensor's first element for the random numbers; empty: 0
    param_dtype: int,
    grad_dtype: int,
    param_store: int,  # bf16 params: 0 rounded to nearest, 1 stochastically, 2 with a remainder
    state_store: int,  # 0 float32, 1 bf16, 2 8-bit codes; 1 and 2 are rounded stochastically
    seed: int,
    lr: float,
    lr_ptr: int,  # float32 scalar that replaces lr when not 0 (so that a captured CUDA graph sees a new lr)
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,  # True: AdamW (p -= lr*wd*p); False: L2 (g += wd*p)
    maximize: bool,
    grad_scale: int,  # float32 scalar, g *= *grad_scale, or 0
    found_inf: int,  # float32 scalar; when != 0 nothing at all is written (parameters, state, step), or 0
    num_threads: int,
    scratch: int = 0,  # ADAMW_SCRATCH bytes of device memory per tensor: for a call captured into a CUDA graph
) -> None:
    """One AdamW step over a list of contiguous tensors.

    Arithmetic in float32 (bias corrections and 1 - beta in float64). Increments each *steps[i] by 1 unless found_inf.
    Rules as torch.optim.AdamW:

        denom = sqrt(v) / sqrt(1 - beta2^t) + eps
        p -= lr / (1 - beta1^t) * m / denom

    Quantized state and parameters are defined, bit by bit, in fastft/ops/quantized_state.py.
    """

def cross_entropy(
    *,
    device: int,
    stream: int,
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    logits_stride: int,  # elements between rows; elements of a row are contiguous
    target: int,  # int64[rows]
    class_weight: int,  # float32[vocab] or 0
    token_weight: int,  # float32, or 0
    token_weight_stride: int,  # 1: one weight per row; 0: one scalar for all rows
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,  # 0: none
    logit_scale: float,
    loss: int,  # float32[rows] out: token_weight * row loss; exactly 0 for ignored rows. 0: not wanted
    lse: int,  # float32[rows] out: logsumexp of the scaled and capped logits. 0: not wanted
    grad: int,  # same dtype as logits, may be equal to logits (in place). 0: forward only
    grad_stride: int,
    grad_scale: int,  # float32: multiplies the gradient before it is rounded, or 0
    grad_scale_stride: int,  # 1: one factor per row; 0: one scalar
    # int64 scalar out (host for the CPU, device for CUDA): index of a row whose target is out of range, else -1
    bad_row: int,
    num_threads: int,
    # CUDA kernel, for benchmarks and tests: 0 chosen by device and call, 1 the kernels that need no sm_90; 8 or 16: the
    # one for sm_90 with so many warps, plus 100 * the fewest blocks a row
    variant: int = 0,
) -> None:
    """Softmax cross-entropy, forward and gradient in one go. Per row i with target y, x = cap(logit_scale * logits),
    cap(a) = softcap * tanh(a / softcap), s = label_smoothing, w = class_weight (1 when absent):

        lse  = log sum_c exp(x_c)
        nll  = (1 - s) * w_y * (lse - x_y) + s / V * sum_c w_c * (lse - x_c)
        loss = token_weight_i * (nll + z_loss * lse^2)
        grad = d loss / d logits * grad_scale_i          (grad rows of ignored targets are 0)

    An out-of-range target (not ignore_index) yields loss NaN, grad 0 and bad_row. A row of all -inf, or one with a NaN,
    yields NaN loss and NaN grad, as torch does. rows * vocab may exceed 2^31."""

SUM_SQUARES_SCRATCH: int

def sum_squares(
    *,
    device: int,
    stream: int,
    tensors: list[int],
    numels: list[int],
    dtype: int,
    out: int,  # one float64, written (host memory for the CPU, device memory for CUDA)
    scratch: int,  # SUM_SQUARES_SCRATCH float64 of device memory; ignored on the CPU
    num_threads: int,
) -> None:
    """Sum of the squares of all elements of contiguous tensors, in float64."""

# A decoder layer's parts on the CPU: csrc/include/fastft/decoder.h says what each computes and which results may lie
# where an operand does. Arrays are contiguous and of one dtype, (rows, columns), where no stride is given; rstd,
# dweight, cos, sin and lse are float32.

def rms_forward(
    *,
    x: int,
    residual: int,  # or 0
    weight: int,  # (columns,)
    total: int,  # x + residual out; 0 without a residual
    y: int,
    rstd: int,  # (rows,) out
    rows: int,
    columns: int,
    eps: float,
    dtype: int,
    num_threads: int,
) -> None: ...
def rms_backward(
    *,
    dy: int,
    x: int,
    weight: int,
    rstd: int,
    extra: int,  # added to dx, or 0
    dx: int,
    y: int,  # the forward's result again, or 0
    dweight: int,  # (columns,) out
    rows: int,
    columns: int,
    dtype: int,
    num_threads: int,
) -> None: ...
def rope(
    *,
    array: int,  # (rows, stride), rotated in place
    cos: int,  # (period, table_stride), the first dim / 2 of each row
    sin: int,
    rows: int,
    stride: int,
    heads: int,
    dim: int,
    period: int,
    table_stride: int,
    back: bool,
    dtype: int,
    num_threads: int,
) -> None: ...
def gated_forward(
    *, gate: int, up: int, out: int, rows: int, width: int, stride: int, dtype: int, num_threads: int
) -> None:
    """``stride``: elements between rows of gate and up."""

def gated_backward(
    *,
    gate: int,
    up: int,
    dout: int,
    out: int,  # the forward's result again, or 0
    dgate: int,  # rows as far apart as those of gate and up
    dup: int,
    rows: int,
    width: int,
    stride: int,
    dtype: int,
    num_threads: int,
) -> None: ...
def attention_forward(
    *,
    q: int,  # (tokens, heads, dim), strides between tokens
    k: int,  # (tokens, groups, dim)
    v: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    bounds: int,  # int32[documents + 1]
    documents: int,
    tokens: int,
    heads: int,
    groups: int,
    dim: int,
    scale: float,
    window: int,  # 0: none
    out: int,  # (tokens, heads, dim)
    lse: int,  # (tokens, heads)
    dtype: int,
    num_threads: int,
) -> None:
    """Raises ValueError for bounds that do not rise from 0 to ``tokens`` at most."""

def attention_backward(
    *,
    q: int,
    k: int,
    v: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    bounds: int,
    documents: int,
    tokens: int,
    heads: int,
    groups: int,
    dim: int,
    scale: float,
    window: int,
    out: int,  # what the forward wrote
    lse: int,
    dtype: int,
    num_threads: int,
    grad: int,  # as out
    dq: int,  # as q, with strides of their own
    dk: int,
    dv: int,
    dq_stride: int,
    dk_stride: int,
    dv_stride: int,
) -> None: ...
def stream_4r3w(*, p: int, g: int, m: int, v: int, n: int, num_threads: int) -> None:
    """p += g, m += g, v += g over float32[n] on the CPU, the limit that benchmarks/adamw.py compares with.

    It has the memory traffic of one fp32 AdamW step (4 reads, 3 writes) and next to no arithmetic.
    """
