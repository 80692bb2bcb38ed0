"""The peaks that the speed of a job is planned from: a card's products and memory, the links in a node and between nodes.

All are stated, by data sheets or by the user, but the speed of products, which `launch/benchmark.py gpu` measures.
"""

from dataclasses import dataclass

from pipeline.flops import peak_flops
from pipeline.runtime.deepspeed_json import RANKS_OF_A_NODE

MATRIX_SHARE = 0.8
"""Share of a card's peak that large products reach where nothing was measured: 798 of 989 TFLOP/s on an H100 (8192³)."""
STEP_SHARE = {"H100": 0.8, "H200": 0.8}
"""Share of that speed that products keep in a whole step, by a part of the card's name; all of it elsewhere. Without it the
plan expected 1.18 and 1.23 times the speed of the two steps measured on an H200, 1.06 to 1.38 times that of nine in
llm-foundry's tables for the H100, and 0.89 to 1.03 times that of five for the A100. A Hopper card lowers its clock under a
steady load; what else has a part in it is not known."""
MEMORY_SHARE = 0.9
"""Share of a card's memory bandwidth that a copy reaches: 3.0 of 3.35 TB/s on an H100."""
MEMORY_BANDWIDTH = {"H100 PCIe": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
"""Bytes a second by a part of the device's name, from its maker's data sheets (A100: 80 GB)."""
NODE_BANDWIDTH = {"H100 PCIe": 64e9, "H100": 450e9, "H200": 450e9, "A100": 300e9}
"""Bytes a second that a GPU sends to others of its node: NVLink one way, PCIe 5 for the PCIe card."""


@dataclass(frozen=True)
class Hardware:
    """The means by which a rank computes, remembers and sends, in FLOPs and bytes a second.

    peak_flops: of the data sheet, what MFU is a share of; None where it is not known.
    matrix_flops: what large products reach. step_share: how much of it they keep in a step (`STEP_SHARE`).
    memory_bandwidth: of a copy, reads and writes together.
    node_ranks: ranks that share a node. node_bandwidth: of a rank to others of its node.
    network_bandwidth: of a rank's own adapter to other nodes. latency: seconds of one message.
    """

    name: str
    peak_flops: float | None
    matrix_flops: float
    memory_bandwidth: float
    node_ranks: int = RANKS_OF_A_NODE
    node_bandwidth: float = 450e9
    network_bandwidth: float = 50e9
    latency: float = 5e-6
    step_share: float = 1.0

    @property
    def step_flops(self) -> float:
        """FLOPs a second of large products in a step."""
        return self.step_share * self.matrix_flops

    def bandwidth(self, ranks: int) -> float:
        """Return the bytes a second that a rank sends and receives in a collective of `ranks`.

        A ring enters and leaves each node once. NCCL lays a ring through each of a node's adapters, so between nodes their
        bandwidths add up, until a rank's link within the node is full.
        """
        if ranks <= self.node_ranks:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.node_ranks * self.network_bandwidth)


def hardware_of(card: str, **stated: float | None) -> Hardware | None:
    """Return the hardware with this card, and with what is stated in place of its data sheet; None if too little is known."""
    given = {key: value for key, value in stated.items() if value is not None}
    peak, memory, node = (peak_flops(card), _of(card, MEMORY_BANDWIDTH), _of(card, NODE_BANDWIDTH))
    known: dict[str, float | None] = {
        "matrix_flops": None if peak is None else MATRIX_SHARE * peak,
        "memory_bandwidth": None if memory is None else MEMORY_SHARE * memory,
    }
    known |= {} if node is None else {"node_bandwidth": node}
    figures = {key: value for key, value in (known | given).items() if value is not None}
    if not {"matrix_flops", "memory_bandwidth"} <= figures.keys():
        return None
    return Hardware(card, peak, step_share=step_share_of(card), **figures)  # type: ignore[arg-type]


def step_share_of(card: str) -> float:
    """Return the card's `STEP_SHARE`, 1 where none is known."""
    return _of(card, STEP_SHARE) or 1.0


def _of(card: str, figures: dict[str, float]) -> float | None:
    return next((figure for name, figure in figures.items() if name in card), None)
