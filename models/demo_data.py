"""The demo corpus as token blocks on disk, and the two text files that stand beside the model."""

import importlib.metadata
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from models.corpus import STANDARD_LIBRARY, Source, hash_number, split_of
from models.demo_tokenizer import END_OF_TEXT_ID

TEXT_FILES = (("calibration", "calibration.txt", 250_000), ("held-out", "heldout.txt", 400_000))  # split, file, bytes
LICENCE_HEADER = """# Where these texts come from

Each text file holds whole source files, separated by blank lines, of packages whose own metadata states a permissive
licence. The model was trained on none of them. Copyright stays with the authors of each package; `licences/` holds the
licence texts that the packages ship.
"""


def pack(texts: Iterable[str], tokenizer: Tokenizer, file: Path, seed: int) -> int:
    """Write `texts` as one stream of uint16 token ids, `<|endoftext|>` after each, in shuffled order. Returns the tokens."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    order = np.random.default_rng(seed).permutation(len(encoded))
    stream = np.concatenate([np.array([*encoded[i], END_OF_TEXT_ID], dtype=np.uint16) for i in order])
    with file.with_suffix(".draft").open("wb") as draft:
        np.save(draft, stream)
    file.with_suffix(".draft").replace(file)
    return len(stream)


class PackedTokens:
    """Blocks of a packed stream in an order that depends on the seed and on nothing else, so any step can be reproduced."""

    def __init__(self, file: Path, block_tokens: int, seed: int):
        stream = np.load(file, mmap_mode="r")
        self.blocks = stream[: len(stream) // block_tokens * block_tokens].reshape(-1, block_tokens)
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, blocks: int) -> torch.Tensor:
        """The blocks of one step, int64 [blocks, block_tokens]. Each epoch has an order of its own."""
        numbers = range(step * blocks, (step + 1) * blocks)
        rows = [self._order(number // len(self.blocks))[number % len(self.blocks)] for number in numbers]
        return torch.from_numpy(self.blocks[rows].astype(np.int64))

    def first(self, blocks: int) -> torch.Tensor:
        """The first blocks in the order of the file, for measuring."""
        return torch.from_numpy(self.blocks[:blocks].astype(np.int64))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        return self._orders[epoch]


def write_demo_texts(sources: list[Source], folder: Path) -> None:
    """Write calibration.txt, heldout.txt, LICENSES.md and licences/: whole files, up to a size fit for a repository."""
    folder.mkdir(parents=True, exist_ok=True)
    notes, written = [LICENCE_HEADER], []
    for split, name, limit_bytes in TEXT_FILES:
        chosen = choose([source for source in sources if split_of(source.path) == split], limit_bytes)
        (folder / name).write_text("\n".join(source.text for source in chosen), "utf-8")
        notes.append(f"## {name}\n\n| file | package | version | licence |\n| --- | --- | --- | --- |")
        notes += [f"| `{s.path}` | {s.package} | {s.version} | {s.licence} |" for s in chosen]
        notes.append("")
        written += chosen
    (folder / "LICENSES.md").write_text("\n".join(notes), "utf-8")
    copy_licences({source.package for source in written}, folder / "licences")


def choose(sources: list[Source], limit_bytes: int) -> list[Source]:
    """Whole files up to a size, in the order of their hashes, so that many packages have a share."""
    chosen, used_bytes = [], 0
    for source in sorted(sources, key=lambda source: hash_number(source.path)):
        size = len(source.text.encode()) + 1  # the blank line between files
        if used_bytes + size <= limit_bytes:
            chosen.append(source)
            used_bytes += size
    return chosen


def copy_licences(packages: set[str], folder: Path) -> None:
    """Copy the licence text that each package ships, as MIT and BSD ask of whoever passes their sources on."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in sorted(packages):
        if package == STANDARD_LIBRARY:
            files = [Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"]
        else:
            distribution = importlib.metadata.distribution(package)
            names = [file for file in distribution.files or [] if ".dist-info" in str(file) and "_vendor" not in str(file)]
            files = [Path(str(distribution.locate_file(file))) for file in names if file.name.upper().startswith("LICENSE")]
        texts = [file.read_text("utf-8", errors="replace").strip() for file in files if file.is_file()]
        if texts:
            (folder / f"{package.replace(' ', '-')}.txt").write_text("\n\n".join(texts) + "\n", "utf-8")
