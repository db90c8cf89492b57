"""Files of published weights: their hosts, their digests, and the normalisation that belongs to them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PYTORCH = "https://download.pytorch.org/models"
# The project moved; its old address forwards to the new one.
TIMM = (
    "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights",
    "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights",
)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Published:
    """A file of published weights, and its network's normalisation of RGB values in [0, 1].

    urls : tried in order; none if the file comes with a package
    sha256 : at least its first digits; empty if its publisher states none
    places : function that returns paths where other programs keep the file on this machine
    others : more files of the same network's weights, each looked for after this one
    """

    file: str
    urls: tuple[str, ...]
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    places: Callable[[], list[Path]] = list
    others: tuple["Published", ...] = ()

    @property
    def files(self) -> tuple["Published", ...]:
        """Return this file and the others, in the order in which they are looked for."""
        return (self, *self.others)


def named_by_digest(file: str, *hosts: str) -> Published:
    """Describe a file whose name ends in the first digits of its SHA-256, as those of torchvision and timm do."""
    return Published(file, tuple(f"{host}/{file}" for host in hosts), Path(file).stem.rsplit("-", 1)[1], *IMAGENET)
