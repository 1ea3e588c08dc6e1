"""What is updated: LoRA adapters of real models, computed from the models' dimensions, and made-up sweeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Inventory:
    """The tensors that one optimizer updates."""

    name: str  # as on the command line
    label: str  # as in tables and pictures
    shapes: tuple[Shape, ...]

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def sizes(self) -> list[int]:
        """Elements of every tensor."""
        return [rows * columns for rows, columns in self.shapes]

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama kind, by what decides the shapes of its adapters."""

    label: str
    layers: int
    hidden: int
    kv: int  # rows of the key and value projections
    intermediate: int

    def linears(self, targets: str) -> list[tuple[int, int]]:
        """(in, out) of the adapted linears of a layer: `qv`, or `all`."""
        query, kv = (self.hidden, self.hidden), (self.hidden, self.kv)
        if targets == "qv":
            return [query, kv]
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return [query, kv, kv, query, up, up, down]

    def adapter(self, targets: str, r: int) -> Inventory:
        """A is (r, in) and B is (out, r), as PEFT lays them out."""
        layer = [shape for i, o in self.linears(targets) for shape in ((r, i), (o, r))]
        words = {"qv": "q,v", "all": "all linear"}[targets]
        name = f"{self.label.lower()}-{targets}-r{r}"
        return Inventory(name, f"{self.label} {words} r={r}", tuple(layer * self.layers))


MODELS = (
    Model("Llama-2-7B", layers=32, hidden=4096, kv=4096, intermediate=11008),
    Model("Llama-3-8B", layers=32, hidden=4096, kv=1024, intermediate=14336),
    Model("Qwen2.5-7B", layers=28, hidden=3584, kv=512, intermediate=18944),
    Model("Llama-3-70B", layers=80, hidden=8192, kv=1024, intermediate=28672),
)
RANKS = (8, 16, 64)
# 16 tensors of 2,048 elements: what a step costs besides its arithmetic
_TINY = Model("tiny", layers=4, hidden=256, kv=256, intermediate=0)
TINY = replace(_TINY.adapter("qv", 8), name="tiny")

INVENTORIES = {
    inventory.name: inventory
    for inventory in (
        TINY,
        *(model.adapter(targets, r) for model in MODELS for targets in ("qv", "all") for r in RANKS),
    )
}
# queries and values, as in the LoRA paper, and PEFT's default rank
DEFAULT = "llama-2-7b-qv-r8"

# parameters of the default adapter, cut into ever more tensors
SWEEP_PARAMETERS = 2**22
SWEEP_TENSORS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
# and the default adapter's number of tensors, of ever more elements, to 134 MB of parameters
SWEEP_FIXED_TENSORS = 128
SWEEP_SIZES = tuple(2**power for power in range(6, 19, 2))


def even(tensors: int, parameters: int) -> Inventory:
    """`parameters` elements in tensors that differ by at most one element."""
    small, larger = divmod(parameters, tensors)
    shapes = [(1, small + 1)] * larger + [(1, small)] * (tensors - larger)
    return Inventory(f"{tensors}x{small}", f"{tensors:,} tensors of {small:,}", tuple(shapes))


def sweeps() -> dict[str, list[Inventory]]:
    """More tensors at a fixed total size, and larger tensors at a fixed number of them."""
    return {
        "tensors": [even(tensors, SWEEP_PARAMETERS) for tensors in SWEEP_TENSORS],
        "size": [even(SWEEP_FIXED_TENSORS, SWEEP_FIXED_TENSORS * size) for size in SWEEP_SIZES],
    }
