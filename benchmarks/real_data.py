"""Where the benchmarks find real images, labels and predictions."""

import os
import sys
from pathlib import Path

from common.errors import UserError


def real(name: str) -> Path:
    """Return a folder of the real data, which HPA_REAL_DATA names."""
    folder = Path(os.environ.get("HPA_REAL_DATA", ""), name)
    if not os.environ.get("HPA_REAL_DATA") or not folder.is_dir():
        raise UserError(
            f"HPA_REAL_DATA is not set or has no {name}; it names the folder that holds kaggle_tiff/, "
            f"kaggle_png/ and labels/: HPA_REAL_DATA=DIR python {sys.argv[0]}"
        )
    return folder
