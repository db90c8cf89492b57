"""Find real images, labels and predictions for the benchmarks."""

import os
import sys
from pathlib import Path

from common.errors import UserError


def real(name: str) -> Path:
    """Return a subfolder of the real data in HPA_REAL_DATA."""
    folder = Path(os.environ.get("HPA_REAL_DATA", ""), name)
    if not os.environ.get("HPA_REAL_DATA") or not folder.is_dir():
        raise UserError(
            f"HPA_REAL_DATA is not set or has no {name}; set it to the folder that holds kaggle_tiff/, "
            f"kaggle_png/ and labels/: HPA_REAL_DATA=DIR python {sys.argv[0]}"
        )
    return folder
