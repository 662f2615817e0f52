"""The scaling model: bytes, FLOPs and seconds of one optimizer step of data-parallel training under ZeRO.

    step = G * (max(compute, overlapped communication) + exposed communication) + communication between steps +
    optimizer + stall

with G micro-steps per step. Everything is of one GPU, in bytes, seconds and FLOPs, unless a name says otherwise.
Sources: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) for bytes communicated and held; Korthikanti et al. 2022
(arXiv 2205.05198) for activations; PaLM (Chowdhery et al. 2022, appendix B) for model FLOPs and MFU. The constants that
no formula gives are in `Constants`; fit.py gets them from published measurements.
"""

from dataclasses import dataclass

from fastft.plan.memory import ACTIVATION_BYTES, CHECKPOINT_BYTES, RESERVED_BYTES, sharded

WEIGHT_BYTES = 2  # bf16
MASTER_BYTES = 12  # fp32 master weights and Adam's two moments
OPTIMIZER_BYTES = (
    28  # read and written per parameter of the shard: fp32 weight, moments and their stores, bf16 gradient and weight
)


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU and how it is connected, by data sheet.

    Attributes
    ----------
    flops : float
        Peak bf16 FLOP/s, dense.
    hbm_bandwidth, memory : float
        Bytes per second, and bytes, of the GPU's memory.
    intra_node_bandwidth : float
        NVLink bytes per second and direction of one GPU.
    inter_node_bandwidth : float
        Bytes per second and direction of a whole node's network cards: a ring crosses between two nodes over all of
        them at once.
    gpus_per_node : int
    price : float
        Of one GPU for an hour, in any currency; None: not known.
    host_link : float
        Bytes per second and direction between one GPU and its host.
    host_bandwidth : float
        Bytes per second of the host's memory, for each of its GPUs.
    """

    flops: float
    hbm_bandwidth: float
    memory: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    gpus_per_node: int = 8
    price: float | None = None
    host_link: float = 64e9
    host_bandwidth: float = 77e9


# NVIDIA's data sheets of the SXM parts; nodes are DGX: one network card of 200 (A100) or 400 Gbit/s per GPU, PCIe 4
# (A100) or 5 to the host, whose two processors have 8 channels of DDR4-3200 (A100) or DDR5-4800 each.
HARDWARE = {
    "a100": Hardware(312e12, 2.039e12, 80e9, 300e9, 200e9, host_link=32e9, host_bandwidth=51e9),
    "h100": Hardware(989.4e12, 3.35e12, 80e9, 450e9, 400e9),
    "h200": Hardware(989.4e12, 4.8e12, 141e9, 450e9, 400e9),
    "b200": Hardware(2250e12, 8.0e12, 180e9, 900e9, 400e9),
}


@dataclass(frozen=True)
class Shape:
    """What the model needs to know of a decoder: its parameters, layers and hidden size."""

    parameters: int
    layers: int
    hidden: int
    active: int | None = None  # parameters that a token uses, of a mixture of experts; None: all

    @property
    def used(self) -> int:
        return self.parameters if self.active is None else self.active

    @classmethod
    def of_size(cls, parameters: int) -> "Shape":
        """A usual shape of that size: parameters = 12 * layers * hidden ** 2
        (Kaplan et al. 2020) and hidden = 128 * layers, as in 7B and 13B models.
        """
        layers = max(1, round((parameters / (12 * 128**2)) ** (1 / 3)))
        return cls(parameters, layers, max(1, round((parameters / (12 * layers)) ** 0.5)))


@dataclass(frozen=True)
class Setup:
    """A run to be planned.

    Attributes
    ----------
    world_size : int
        GPUs, each a data-parallel rank.
    zero : int
        ZeRO stage, 0 to 3. FSDP's FULL_SHARD is 3; its SHARD_GRAD_OP is 2 when accumulation is 1.
    micro_batch, sequence_length : int
        Sequences per GPU and micro-step (a fraction where GPUs share them), tokens in each.
    accumulation : int
        Micro-steps per optimizer step.
    recompute : bool
        Full activation recomputation (gradient checkpointing of every layer).
    reduce_bytes : int
        Bytes per element in which gradients are reduced.
    stall : float
        Seconds per step that nothing hides (loading data, logging).
    trained : float
        Share of the parameters that is trained: an adapter beside frozen weights needs none of their gradients.
    sequence : int
        Ranks that share a sequence, each with a part of its tokens (``sequence_length`` is the whole).
    offload : str or None
        "optimizer" or "parameters": what is in the host's memory.
    """

    model: Shape
    hardware: Hardware
    world_size: int
    zero: int
    micro_batch: float
    sequence_length: int
    accumulation: int = 1
    recompute: bool = False
    reduce_bytes: int = 2
    stall: float = 0.0
    trained: float = 1.0
    sequence: int = 1
    offload: str | None = None

    @property
    def tokens(self) -> float:
        """Tokens per GPU and micro-step."""
        return self.micro_batch * self.sequence_length


@dataclass(frozen=True)
class Constants:
    """What no data sheet says.

    Attributes
    ----------
    kernel_efficiency : float
        Share of peak FLOP/s that matrix products and attention reach while they run.
    activation_traffic : float
        Bytes of HBM traffic per token, layer and hidden unit of everything that is no matrix product (norms,
        activations, residuals, casts).
    recompute_share : float
        Time of the recomputed forward pass over what its FLOPs say: 1 means 8 instead of 6 FLOPs per parameter and
        token.
    exposed_share : float
        Share of the overlappable communication, at the links' nominal bandwidth, that the step takes longer by: what
        computation does not hide, and what it loses to communication kernels. Measurements see only exposed_share /
        bandwidth, so lower real bandwidth is in it.
    hop_latency : float
        Seconds per hop of a ring collective.
    """

    kernel_efficiency: float
    activation_traffic: float
    recompute_share: float
    exposed_share: float
    hop_latency: float


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step of a `Setup`, and what follows from them."""

    setup: Setup
    compute: float
    communication: float  # all of it, hidden or not
    waited: float  # for the communication that nothing hides
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.compute + self.waited + self.optimizer + self.setup.stall

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.setup.tokens * self.setup.accumulation / self.seconds

    @property
    def communication_share(self) -> float:
        """Share of the step in which the GPU waits for communication."""
        return self.waited / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: FLOPs of the model, without recomputation, over the peak."""
        return model_flops_per_token(self.setup) * self.tokens_per_second / self.setup.hardware.flops


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: parameters, gradients and optimizer state; activations; the allowance for everything else."""

    states: float
    activations: float
    reserved: float = RESERVED_BYTES

    @property
    def total(self) -> float:
        return self.states + self.activations + self.reserved


def communicated_bytes(setup: Setup) -> tuple[float, float]:
    """Bytes that a GPU sends per step: (next to forward and backward passes, between steps).

    With f = (N-1)/N, Psi parameters and 2-byte gradients, in all: stages 0 and 1 4 Psi f, stage 2 (2 G + 2) Psi f,
    stage 3 6 G Psi f. Stages 1 and 2 gather the new weights between steps, where nothing hides it.
    """
    elements = setup.model.parameters * (setup.world_size - 1) / setup.world_size
    weights, gradients, passes = WEIGHT_BYTES * elements, setup.reduce_bytes * elements, setup.accumulation
    gradients *= setup.trained
    if setup.zero == 0:
        return 2 * gradients, 0.0  # all-reduce: reduce-scatter and all-gather
    if setup.zero == 1:
        return gradients, weights * setup.trained
    if setup.zero == 2:
        return passes * gradients, weights * setup.trained
    return passes * (2 * weights + gradients), 0.0


def collectives(setup: Setup) -> tuple[int, int]:
    """Ring collectives per step, (next to the passes, between steps), one per layer and one for the embedding;
    an all-reduce is two.
    """
    units = setup.model.layers + 1
    overlapped = {0: 2, 1: 1, 2: setup.accumulation, 3: 3 * setup.accumulation}[setup.zero] * units
    return overlapped, units if setup.zero in (1, 2) else 0


def bus_bandwidth(setup: Setup) -> float:
    """Bytes per second that a ring over all ranks carries past each of them: that of its slowest link."""
    hardware = setup.hardware
    if setup.world_size <= hardware.gpus_per_node:
        return hardware.intra_node_bandwidth
    return min(hardware.intra_node_bandwidth, hardware.inter_node_bandwidth)


def communication_seconds(setup: Setup, constants: Constants) -> tuple[float, float]:
    """Seconds per step (next to the passes, between steps), were nothing hidden:
    bytes over bandwidth and N - 1 hops per collective.
    """
    hops = (setup.world_size - 1) * constants.hop_latency
    sizes, counts = communicated_bytes(setup), collectives(setup)
    overlapped, between = (
        size / bus_bandwidth(setup) + count * hops for size, count in zip(sizes, counts, strict=True)
    )
    return overlapped, between


def model_flops_per_token(setup: Setup) -> float:
    """6 per parameter and 12 * layers * hidden * sequence length for
    attention (PaLM, appendix B, which leaves out the causal mask's half).
    """
    return 6 * setup.model.used + 12 * setup.model.layers * setup.model.hidden * setup.sequence_length


def compute_seconds(setup: Setup, constants: Constants) -> float:
    """Forward and backward pass of one micro-step: FLOPs at the kernels' rate,
    the rest's HBM traffic, and what is recomputed.

    Attention's FLOPs matter: at 2,048 tokens they are 4 % of a 70B model's, 17 % of a 1B model's. So does the traffic,
    which falls with 1/hidden and is why small models reach less of the peak.
    """
    worked = model_flops_per_token(setup) - 2 * setup.model.used * (1 - setup.trained)  # no gradient of frozen weights
    flops = worked / (setup.hardware.flops * constants.kernel_efficiency)
    traffic = constants.activation_traffic * setup.model.layers * setup.model.hidden / setup.hardware.hbm_bandwidth
    again = 1 + constants.recompute_share / 3 if setup.recompute else 1.0
    return setup.tokens * (flops + traffic) * again


def optimizer_seconds(setup: Setup) -> float:
    """One pass over the parameters that this rank updates: all at stage 0, a shard above. Offloaded, it is the host's
    processors that make it, and the new weights come back (but where they stay there) while it goes on.
    """
    local = setup.trained * setup.model.parameters / (setup.world_size if setup.zero else 1)
    if setup.offload is None:
        return OPTIMIZER_BYTES * local / setup.hardware.hbm_bandwidth
    back = WEIGHT_BYTES * local / setup.hardware.host_link if setup.offload == "optimizer" else 0.0
    return max(OPTIMIZER_BYTES * local / setup.hardware.host_bandwidth, back)


def step(setup: Setup, constants: Constants) -> Step:
    """The time of one optimizer step."""
    compute = setup.accumulation * compute_seconds(setup, constants)
    overlappable, between = communication_seconds(setup, constants)
    overlappable += fetched_seconds(setup)
    between += setup.accumulation * exchange_seconds(setup, constants)
    exposed = constants.exposed_share * overlappable
    outlasting = max(0.0, overlappable - exposed - compute)  # max(compute, overlapped) without the compute
    return Step(setup, compute, overlappable + between, outlasting + exposed + between, optimizer_seconds(setup))


def fetched_seconds(setup: Setup) -> float:
    """Weights of this rank that are in the host's memory, brought to the GPU for each forward and backward pass; what
    computation does not hide of it is taken to be what it does not hide of other communication. And the gradients,
    which go the other way.
    """
    if setup.offload is None:
        return 0.0
    own = WEIGHT_BYTES * setup.model.parameters / (setup.world_size if setup.zero == 3 else 1)
    gradients = setup.reduce_bytes * setup.trained * setup.model.parameters / setup.world_size
    passes = 2 * setup.accumulation if setup.offload == "parameters" else 0
    return (passes * own + gradients) / setup.hardware.host_link


def exchange_seconds(setup: Setup, constants: Constants) -> float:
    """Of a micro-step on sequences that are cut over ranks (DeepSpeed-Ulysses, arXiv 2309.14509): each layer exchanges
    queries, keys and values, and the output, forward and backward; nothing hides it. Keys and values are counted like
    queries: the most that they take.
    """
    n, hardware = setup.sequence, setup.hardware
    if n == 1:
        return 0.0
    link = hardware.intra_node_bandwidth if n <= hardware.gpus_per_node else bus_bandwidth(setup)
    sent = 8 * WEIGHT_BYTES * setup.model.hidden * setup.tokens * (n - 1) / n
    return setup.model.layers * (sent / link + 4 * (n - 1) * constants.hop_latency)


def memory(setup: Setup) -> Memory:
    """Bytes on one GPU: 16 per parameter, of which stage 1 shards the optimizer's 12,
    stage 2 also gradients, stage 3 also weights.

    Activations: 34 bytes per token, layer and hidden unit; with recomputation 2, and one layer's 34 while it is gone
    through. Logits are not counted: the loss is taken chunk by chunk. Stage 3 also holds two gathered layers.
    """
    parameters, n, layers = setup.model.parameters, setup.world_size, setup.model.layers
    weights, gradients, optimizer = WEIGHT_BYTES * parameters, WEIGHT_BYTES * parameters, MASTER_BYTES * parameters
    gathered = min(1.0, 2 / layers) * WEIGHT_BYTES * parameters if setup.zero == 3 and n > 1 else 0.0
    states = sum(sharded(setup.zero, n, weights, gradients, optimizer))
    unit = setup.tokens * setup.model.hidden
    activations = (
        unit * (CHECKPOINT_BYTES * layers + ACTIVATION_BYTES) if setup.recompute else unit * ACTIVATION_BYTES * layers
    )
    return Memory(states + gathered, activations)
