import numpy as np
import pandas as pd
from PIL import Image

from common.data.images import write_planes
from common.data.pictures import SHOWN, composite, save_contact_sheet


def test_the_composite_has_the_atlas_colours():
    planes = np.zeros((4, 2, 2), np.uint8)
    planes[0, 0, 0] = planes[1, 0, 1] = planes[2, 1, 0] = planes[3, 1, 1] = 200
    picture = composite(planes)
    assert picture[0, 0].tolist() == [255, 0, 0] and picture[0, 1].tolist() == [0, 255, 0]
    assert (
        picture[1, 0].tolist() == [0, 0, 255] and picture[1, 1, 0] == picture[1, 1, 1] > 100 and picture[1, 1, 2] == 0
    )
    assert composite(np.zeros((4, 2, 2), np.uint8)).max() == 0


def test_every_pair_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        write_planes(tmp_path / f"s{i}.tif", rng.integers(100, 256, (4, 64, 64), dtype=np.uint8))
    pairs = pd.DataFrame(
        {
            "Id": "s0",
            "part": "train",
            "other_Id": ["s1", "s2", "s3"] * 9,
            "other_part": "test",
            "red": 1,
            "green": 2,
            "blue": 3,
            "Target": "0 1",
            "other_Target": "",
        }
    )
    save_contact_sheet(
        tmp_path / "sheet.png", tmp_path, {"closest": pairs, "none of these": pairs[:0], "far": pairs[:2]}
    )
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    drawn = (picture != 255).any(axis=2).mean()
    assert drawn > 0.3  # much of a sheet of 5 rows is pictures
    save_contact_sheet(tmp_path / "empty.png", tmp_path, {"closest": pairs[:0]})
    assert Image.open(tmp_path / "empty.png").height < picture.shape[0] / 3 and SHOWN == 12
