"""Everything that the numbered scripts import."""

import os

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2 ** 26))  # OpenCV refuses larger headers; it asks when it is loaded
