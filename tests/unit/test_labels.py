import os

import numpy as np
import pytest

from common.data.labels import absent_classes, format_targets, parse_targets, read_csv, read_labels
from common.demo.data import REAL_COUNTS
from common.errors import UserError


def table(tmp_path, text):
    path = tmp_path / "train.csv"
    path.write_text(text)
    return path


def test_labels_and_texts_are_inverse():
    targets = parse_targets(["2 22", "0", "27 1"])
    assert targets.shape == (3, 28) and targets.sum() == 5
    assert format_targets(targets) == ["2 22", "0", "1 27"]


@pytest.mark.parametrize("text", ["28", "x", "-1", "1 x", "1,2", "1.0", " ", "٣"])
def test_one_wrong_text_among_good_ones_is_not_parsed(text):
    with pytest.raises(UserError, match="expected labels 0 to 27 separated by spaces, found:") as error:
        parse_targets(["1", text, "", "2 3"])
    assert repr(text) in str(error.value)
    assert parse_targets(["", "3"]).sum(axis=1).tolist() == [0, 1]


def test_absent_classes_are_named():
    targets = np.ones((1, 28), dtype=bool)
    targets[0, 27] = False
    assert absent_classes(targets) == ["Rods & rings"]
    assert absent_classes(np.vstack([targets, np.eye(1, 28, 3, dtype=bool)])) == [
        "Rods & rings"
    ]  # one sample is enough


def test_ids_stay_text(tmp_path):
    assert list(read_labels(table(tmp_path, "Id,Target\n001,1\n1e5,2\n"))["Id"]) == ["001", "1e5"]


@pytest.mark.parametrize("Id", ["NA", "nan", "null"])
def test_words_for_missing_values_are_ids_too(tmp_path, Id):
    assert list(read_labels(table(tmp_path, f"Id,Target\na,1\n{Id},2\n"))["Id"]) == ["a", Id]


@pytest.mark.parametrize("Id", ["../x", "a/b", "/etc/passwd", "..", ".hidden", "a\\b", "", "c:d", "x" * 201])
def test_an_id_with_a_path_in_it_is_refused(tmp_path, Id):
    with pytest.raises(UserError, match="not plain file names"):
        read_labels(table(tmp_path, f'Id,Target\ngood-id,1\n"{Id}",1\nbetter-id,1\n'))


@pytest.mark.parametrize("target", ["28", "x", "-1", "1,2", "", "1 x", "٣", "1.0", "001"])
def test_a_wrong_label_is_refused_with_its_id(tmp_path, target):
    with pytest.raises(UserError, match=r"labels 0 to 27 separated by spaces, found:\n  good-id: "):
        read_labels(table(tmp_path, f'Id,Target\nfirst,1\ngood-id,"{target}"\nlast,2 3\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a line with the names of columns"),
        ("Id,Target\n", "has no rows"),
        ("Id,Label\na,1\n", "has no column Target; its columns are 'Id', 'Label'"),
        ("Id,Target,Target\na,1,2\n", "has the column 'Target' 2 times; expected once"),
        ("Id,Target," + "x" * 10_000, "has a first line of over 10000 characters"),
        ("Id,Target\na,1\nb,2\na,3\n", "appear more than once:\n  a"),
        ("Id,Target\na,1,2,3,4\nb,1\nc,1,2,3,4,5,6\n", "."),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_labels(table(tmp_path, text))


def test_a_missing_table_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="none.csv is missing; expected a CSV file with the columns Id,Predicted"):
        read_csv(tmp_path / "none.csv", "Predicted")


def test_lists_of_errors_show_ten_and_the_count(tmp_path):
    rows = "".join(f"id{i},99\n" for i in range(25))
    with pytest.raises(UserError) as caught:
        read_labels(table(tmp_path, "Id,Target\n" + rows))
    assert "id9: " in str(caught.value) and "id10" not in str(caught.value)
    assert "... and 15 more (25 in all)" in str(caught.value)


def test_the_real_labels_have_the_published_counts(real_data):
    counts = parse_targets(read_labels(real_data / "labels" / "train.csv")["Target"]).sum(axis=0)
    assert counts.tolist() == REAL_COUNTS.tolist()


def test_a_file_may_have_128_mib_and_not_a_byte_more(tmp_path):
    path = table(tmp_path, "Id,Target\n")
    os.truncate(path, 2**27)  # sparse: nothing is written
    with pytest.raises(UserError, match="^(?!.*MB)"):  # for its content, not for its size
        read_labels(path)
    os.truncate(path, 2**27 + 1)
    with pytest.raises(UserError, match="train.csv has 134 MB; expected a CSV file of at most 134 MB"):
        read_labels(path)
