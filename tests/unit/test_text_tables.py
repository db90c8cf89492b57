import unicodedata

import numpy as np
import pandas as pd
import pytest

from common.artifacts import text_tables
from common.artifacts.tables import read_table
from common.artifacts.text_tables import BadTable, read_text_table
from common.data.labels import read_csv, read_labels
from common.errors import UserError

PLAIN = "Id,Target\n001,0 25\n1e5,4\nNA,16\n"


def read(tmp_path, content, **how):
    path = tmp_path / "x.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_text_table(path, **how)


DIALECTS = {
    "as it is": PLAIN,
    "no end of the last line": PLAIN.rstrip("\n"),
    "CRLF": PLAIN.replace("\n", "\r\n"),
    "CR": PLAIN.replace("\n", "\r"),
    "mark of UTF-8": b"\xef\xbb\xbf" + PLAIN.encode(),
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16, high byte first": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "Unicode text of a spreadsheet": PLAIN.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "quotes": "".join(",".join(f'"{field}"' for field in line.split(",")) + "\n" for line in PLAIN.splitlines()),
    "a comma at the end of every line": PLAIN.replace("\n", ",\n"),
    "commas at the end of lines but the header's": "Id,Target\n" + PLAIN.split("\n", 1)[1].replace("\n", ",,\n"),
    "commas at the end of some lines": "Id,Target\n001,0 25,\n1e5,4\nNA,16,,\n",
    "blanks around names and fields": " Id , Target \n001 , 0 25\n 1e5,4 \nNA,\t16\n",
    "quotes after blanks": '"Id", "Target"\n"001", "0 25"\n"1e5", "4"\n"NA", "16"\n',
    "empty lines": "\n" + PLAIN.replace("\n", "\n\n"),
    "empty rows": PLAIN + ",\n,,,\n",
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_table_is_the_same_whatever_wrote_it(tmp_path, dialect):
    frame = read(tmp_path, DIALECTS[dialect])
    assert list(frame.columns) == ["Id", "Target"]
    assert frame.to_numpy().tolist() == [["001", "0 25"], ["1e5", "4"], ["NA", "16"]]


@pytest.mark.parametrize(
    "text", ["", "nan", "null", "None", "True", "1.0", "1e400", "0x10", "007", "-", "=1+1", "2018-01-02", "1,5"]
)
def test_text_stays_text(tmp_path, text):
    assert read(tmp_path, f'a,b\nx,"{text}"\n')["b"].tolist() == [text]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a line with the names of columns"),
        (b"\n\n", "is empty; expected"),
        (b",,\n", "is empty; expected"),
        (
            "Id,Target\na,0\nb,1,7\nc\n\nd,1,,x\n",
            r"^has 2 fields in its header and others below \(line 3 has 3, line 4 has 1, line 6 has 4\)$",
        ),
        ("Id\n" + 7 * "a,b\n", r"\(line 2 has 2, .*line 6 has 2 and 2 more lines\)$"),
        ('Id,Target\n"a\nb",0\nc,0,1\n', r"\(line 4 has 3\)"),
        ("Id,Id \na,0\n", "has the column 'Id' 2 times; expected once"),
        ("Id,,,x\na,,,\n", "has the column '' 2 times"),
        ('Id,Target\n"a,0\nb,1\n', r"is not a CSV file \(unexpected end of data in line 2\)"),
        ('Id,Target\n"a"b,0\n', r"is not a CSV file \(.* in line 2\)"),
        ('"Id"s,Target\na,0\n', r"is not a CSV file \(.* in line 1\)"),
        (
            "Id,Target\na,0\nZ\xfcrich,1\n".encode("latin-1"),
            r"is not UTF-8 text \(byte 0xfc in line 3\); save it as CSV in UTF-8",
        ),
        (PLAIN.encode("utf-16-le"), "holds bytes of value 0, as UTF-16 does; save it as CSV in UTF-8"),
        (PLAIN.encode("utf-32"), "bytes of value 0"),
        (PLAIN.encode("utf-16")[:-1], "is not UTF-16 text"),
    ],
)
def test_what_is_no_table_is_refused_by_line(tmp_path, content, message):
    with pytest.raises(BadTable, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("kind", "good", "values"),
    [
        (int, ["0", "-2", "+3", "4.0", "007"], [0, -2, 3, 4, 7]),
        (float, ["0", "-.5", "1e-3", "2.", "inf", " 7 "], [0, -0.5, 0.001, 2, np.inf, 7]),
    ],
)
def test_numbers_are_numbers(tmp_path, kind, good, values):
    column = read(tmp_path, "x,y\n" + "".join(f"{text},a\n" for text in good), kinds=lambda header: {"x": kind})["x"]
    assert column.dtype == np.dtype(kind) and column.tolist() == values
    assert read(tmp_path, "x,y\n,a\nnan,a\n", kinds=lambda header: {"x": float})["x"].isna().all()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, ""),
        (int, "1.5"),
        (int, "1e3"),
        (int, "9" * 19),
        (int, "nan"),
        (float, "NA"),
        (float, "0,5"),
        (float, "1_0"),
        (float, "٣"),
        (float, "high"),
        (float, "0x1"),
        (float, "1e"),
        (float, "--1"),
    ],
)
def test_what_is_no_number_is_named_by_line(tmp_path, kind, text):
    expected = "whole numbers" if kind is int else "numbers"
    with pytest.raises(BadTable, match=rf"has text in its column x, expected {expected} \(line 4: '{text}'\)$"):
        read(tmp_path, f'y,x\na,1\n\nb,"{text}"\n', kinds=lambda header: {"x": kind})


def test_a_file_of_the_largest_size_is_read_and_one_byte_more_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(text_tables, "MAX_BYTES", 2 * 10**6)
    content = (b"Id\n" + (b"a" * 99_999 + b"\n") * 20)[: 2 * 10**6]
    assert len(read(tmp_path, content)) == 20
    with pytest.raises(BadTable, match="^has 2 MB; expected a CSV file of at most 2 MB$"):
        read(tmp_path, content + b"a")


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize(
    "header",
    [lambda n: "a" * (n - 3) + ",b\n", lambda n: '"' + "a" * (1 + n % 2) + "\na" * (n // 2 - 1) + '",b\n'],
    ids=["of one line", "of many lines in quotes"],
)
def test_a_header_of_the_largest_length_is_read_and_a_longer_one_is_not(tmp_path, header, more):
    content = header(10_000 + more) + "1,2\n"
    if more:
        with pytest.raises(BadTable, match="^has a first line of over 10000 characters; expected the names"):
            read(tmp_path, content)
    else:
        assert read(tmp_path, content).to_numpy().tolist() == [["1", "2"]]


def test_five_lines_are_named_and_the_rest_counted(tmp_path):
    for wrong, rest in ((5, ""), (6, " and 1 more lines")):
        named = ", ".join(f"line {k + 3}: 'n'" for k in range(5))
        with pytest.raises(BadTable) as error:
            read(tmp_path, "x\n1\n" + "n\n" * wrong + "2\n", kinds=lambda header: {"x": int})
        assert str(error.value) == f"has text in its column x, expected whole numbers ({named}{rest})"


def test_statistics_come_back_as_they_were_written(tmp_path):  # fingerprints of trainings depend on their text
    values = np.random.default_rng(0).random(5000).round(6) * 10.0 ** np.random.default_rng(1).integers(-5, 1, 5000)
    text = pd.DataFrame({"x": values.round(6)}).to_csv(index=False)
    assert read(tmp_path, text, kinds=lambda header: {"x": float}).to_csv(index=False) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PLAIN.encode("utf-16"), "is UTF-16 text; save it in UTF-8"),
        (PLAIN.replace(",", ";"), "has the separator ';'; expected commas"),
        ("Id,Target\na,0,\n", r"has 2 fields in its header and others below \(line 2 has 3\)"),
    ],
)
def test_plain_tables_are_as_every_program_reads_them(tmp_path, content, message):
    with pytest.raises(BadTable, match=message):
        read(tmp_path, content, plain=True)
    frame = read(tmp_path, "Id , Target\na , 0\n\n", plain=True)
    assert list(frame.columns) == ["Id ", " Target"] and frame.to_numpy().tolist() == [["a ", " 0"]]


def test_ids_are_compared_in_composed_form(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Id,Target\nZürich_1,0\nMalmö,1\n")
    (tmp_path / "x.csv").write_text(decomposed, encoding="utf-8")
    assert read_labels(tmp_path / "x.csv")["Id"].tolist() == ["Zürich_1", "Malmö"]
    (tmp_path / "x.csv").write_text(decomposed + "Malmö,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="appear more than once:\n  Malmö"):
        read_labels(tmp_path / "x.csv")


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path):
    (tmp_path / "x.csv").write_text("id;Label\na;0\n")
    with pytest.raises(UserError, match=r"x.csv has no column Id; its columns are 'id', 'Label'$"):
        read_csv(tmp_path / "x.csv", "Target")


TABLES = {
    "samples.csv": "Id,part,Target,side\n",
    "left_out.csv": "Id,part,Target,place\n",
    "folds.csv": "Id,Target,part,group,fold,copies\n",
    "duplicates.csv": "Id,part,Target,near_group,group,kept\n",
    "submission.csv": "Id,Predicted\n",
    "duplicate_pairs.csv": "Id,part,other_Id,other_part,red,green,blue,Target,other_Target,agreement\n",
}
NUMBERS = {"side", "place", "fold", "copies", "kept", "red", "green", "blue", "agreement"}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("text", ["001", "1e5", "16", "NA", "TRUE"])
def test_ids_labels_and_groups_of_our_own_tables_stay_text(tmp_path, name, text):
    columns = TABLES[name].strip().split(",")
    (tmp_path / name).write_text(
        TABLES[name] + ",".join("1" if column in NUMBERS else text for column in columns) + "\n"
    )
    row = read_table(tmp_path / name, "CURE").iloc[0]
    assert all(row[column] == (1 if column in NUMBERS else text) for column in columns)
