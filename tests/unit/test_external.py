"""Downloads from a server in this process that answers as bad ones do."""

import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.data.samples import list_samples
from common.errors import UserError
from common.external import atlas, fetch
from tests.conftest import ROOT


def jpeg(colour):
    planes = np.zeros((64, 64, 3), np.uint8)
    planes[..., {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1]}[colour]] = 90
    buffer = io.BytesIO()
    Image.fromarray(planes).save(buffer, "JPEG")
    return buffer.getvalue()


JPEGS = {colour: jpeg(colour) for colour in ("red", "green", "blue", "yellow")}


class Server(http.server.ThreadingHTTPServer):
    """Serves JPEGs; `faults` : path -> functions of the handler that answer the next requests instead."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.seen, self.pattern = {}, [], f"http://127.0.0.1:{self.server_port}/{{antibody}}/{{field}}_"
        self.pattern += "{colour}.jpg"

    def paths(self):
        return sorted(path for path, _, _ in self.seen)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, time.monotonic(), self.headers["User-Agent"]))
        faults = self.server.faults.get(self.path) or self.server.faults.get("*")
        if faults:
            return faults.pop(0)(self)
        self.answer(JPEGS[self.path.rpartition("_")[2].removesuffix(".jpg")])

    def answer(self, body, code=200, length=None, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def code(number, **headers):
    return lambda handler: handler.answer(b"sorry", number, **headers)


def cut(handler):
    handler.answer(JPEGS["red"][:200], length=len(JPEGS["red"]))


def chunk_without_end(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(JPEGS["red"][:-20])


def slow(handler):
    handler.send_response(200)
    handler.end_headers()
    for place in range(0, len(JPEGS["red"]), 100):
        handler.wfile.write(JPEGS["red"][place : place + 100])
        time.sleep(0.02)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.01)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("Id,Target\n101_7_A1_1,8\nHPA000202_8_B2_1,0 25\n")
    return path


def get(server, table, **options):
    out = table.parent / "data" / "external"
    atlas.download(table, out, server.pattern, rate=1000, **options)
    return out


def test_stage_01_reads_what_was_downloaded(server, table, tmp_path):
    out = get(server, table)
    (tmp_path / "data" / "train.csv").write_text("Id,Target\nx,0\n")
    samples = {sample.Id: sample for sample in list_samples(tmp_path / "data")}
    assert all(not samples[Id].fault and len(samples[Id].files) == 4 for Id in ("101_7_A1_1", "HPA000202_8_B2_1"))
    assert samples["HPA000202_8_B2_1"].Target == "0 25"
    assert "/202/8_B2_1_yellow.jpg" in server.paths() and len(server.seen) == 8
    assert (out / "images" / "101_7_A1_1_blue.jpg").read_bytes() == JPEGS["blue"]
    assert not (out / "missing.csv").exists() and all("pipeline" in agent for _, _, agent in server.seen)


def test_complete_files_are_kept_and_cut_ones_replaced(server, table):
    out = get(server, table)
    (out / "images" / "101_7_A1_1_blue.jpg").write_bytes(JPEGS["blue"][:-5])
    (out / "images" / "101_7_A1_1_red.jpg").write_bytes(b"")
    server.seen.clear()
    get(server, table)
    assert server.paths() == ["/101/7_A1_1_blue.jpg", "/101/7_A1_1_red.jpg"]
    assert (out / "images" / "101_7_A1_1_blue.jpg").read_bytes() == JPEGS["blue"]


@pytest.mark.parametrize("fault", [code(500), code(503), code(429), cut, chunk_without_end, slow])
def test_a_passing_failure_is_tried_again(server, table, fault):
    server.faults = {"/101/7_A1_1_red.jpg": [fault]}
    out = get(server, table)
    assert (out / "images" / "101_7_A1_1_red.jpg").read_bytes() == JPEGS["red"]
    assert server.paths().count("/101/7_A1_1_red.jpg") == (1 if fault is slow else 2)


def test_what_the_server_does_not_have_is_listed_and_the_rest_is_used(server, table, capsys):
    server.faults = {
        "/202/8_B2_1_red.jpg": [code(404)],
        "/202/8_B2_1_green.jpg": [lambda handler: handler.answer(b"<html>no such image</html>")],
        "/202/8_B2_1_blue.jpg": [code(500)] * 9,
    }
    with pytest.raises(UserError, match=r"3 files are missing(.|\n)*1 of 2 samples are complete") as error:
        get(server, table)
    out = table.parent / "data" / "external"
    assert "HPA000202_8_B2_1_red.jpg: 404 Not Found" in str(error.value)
    assert "8_B2_1_blue.jpg: 500 Internal Server Error, at each of 5 tries" in str(error.value)
    assert list(pd.read_csv(out / "external.csv")["Id"]) == ["101_7_A1_1"]
    missing = pd.read_csv(out / "missing.csv")
    assert list(missing["file"]) == [f"HPA000202_8_B2_1_{colour}.jpg" for colour in ("blue", "green", "red")]
    assert "cannot be read" in missing["reason"][1] and missing["url"][2].endswith("/202/8_B2_1_red.jpg")
    assert server.paths().count("/202/8_B2_1_red.jpg") == 1  # another try would not help
    server.faults = {}
    get(server, table)
    assert len(pd.read_csv(out / "external.csv")) == 2 and not (out / "missing.csv").exists()


@pytest.mark.parametrize("when", ["2", lambda: formatdate(time.time() + 2.5, usegmt=True)])
def test_a_server_that_asks_to_wait_is_left_alone(server, table, when):
    asked = when if isinstance(when, str) else when()
    server.faults = {"/101/7_A1_1_red.jpg": [code(429, Retry_After=asked)]}
    get(server, table, connections=1, limit=1)
    times = [seen for _, seen, _ in server.seen]
    assert len(times) == 5 and 1.4 < times[1] - times[0] < 4


def test_requests_keep_the_rate(server, table):
    out = table.parent / "out"
    atlas.download(table, out, server.pattern, rate=20, connections=8)
    times = sorted(seen for _, seen, _ in server.seen)
    assert times[-1] - times[0] > 7 / 20 - 0.1


def test_a_dead_server_ends_the_download_early(server, table):
    table.write_text("Id,Target\n" + "".join(f"{k}_1_A1_1,0\n" for k in range(1, 60)))
    server.faults = {"*": [code(503)] * 1000}
    with pytest.raises(UserError, match="the last 12 files could not be downloaded.*503.*run the same command again"):
        get(server, table)
    assert len(server.seen) < 150


def test_classes_limit_and_earlier_lists(server, table):
    out = get(server, table, classes=[25])
    assert list(pd.read_csv(out / "external.csv")["Id"]) == ["HPA000202_8_B2_1"]
    out = get(server, table, limit=1)
    assert list(pd.read_csv(out / "external.csv")["Id"]) == ["HPA000202_8_B2_1", "101_7_A1_1"]
    with pytest.raises(UserError, match="no sample has one of the labels 9"):
        get(server, table, classes=[9])


@pytest.mark.parametrize("Id", ["../101_7_A1_1", "101_7/../../x", "x_7_A1_1", "101", "0_7_A1_1", "101_a b", "١_7_A1_1"])
def test_ids_that_are_not_the_atlass_are_refused_before_any_request(server, table, Id):
    table.write_text(f"Id,Target\n101_7_A1_1,0\n{Id},0\n")
    with pytest.raises(UserError, match="expected Ids of the Human Protein Atlas|not plain file names"):
        get(server, table)
    assert not server.seen and not (table.parent / "data").exists()


@pytest.mark.parametrize("host", ["v19", "file:///{antibody}/{field}_{colour}", "https://x/{antibody}/{field}.jpg"])
def test_a_host_is_a_name_or_a_pattern(host):
    with pytest.raises(UserError, match="--host: expected v18, current or a URL such as https://v18"):
        atlas.url_pattern(host)


def test_the_competitions_host():
    job = atlas.jobs_of("HPA000992_si27_F4_11", atlas.url_pattern("v18"), ROOT)[3]
    assert job.url == "https://v18.proteinatlas.org/images/992/si27_F4_11_yellow.jpg"
    assert job.path.name == "HPA000992_si27_F4_11_yellow.jpg"


def test_the_list_is_not_overwritten(server, table):
    own = table.parent / "data" / "external" / "external.csv"
    own.parent.mkdir(parents=True)
    own.write_text(table.read_text())
    with pytest.raises(UserError, match="keep the list elsewhere"):
        atlas.download(own, own.parent, server.pattern)
    assert own.read_text() == table.read_text()


def test_every_id_of_the_competitions_lists_is_accepted(real_data):
    for name in ("HPAv18RBGY_wodpl.csv", "HPAv18RGBY_WithoutUncertain_wodpl.csv"):
        table = pd.read_csv(real_data / "labels" / name, dtype=str)
        assert len(atlas.select(table, None, None)) == len(table)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_download_resumes(server, table, number):
    out, hang = table.parent / "out", threading.Event()
    server.faults = {"/202/8_B2_1_red.jpg": [lambda handler: hang.wait(20)]}
    command = [sys.executable, "-m", "common.external", "--list", table, "--out", out, "--host", server.pattern]
    command += ["--rate", "1000", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "/202/8_B2_1_red.jpg" not in server.paths():
        time.sleep(0.02)
    os.kill(process.pid, number)
    error = process.communicate(timeout=10)[1]
    hang.set()
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    assert number == signal.SIGKILL or "stopped; finished work is kept. To resume: python" in error
    assert not (out / "external.csv").exists()
    server.faults, before = {}, len(server.seen)
    atlas.download(table, out, server.pattern, rate=1000)
    assert server.paths().count("/101/7_A1_1_red.jpg") == 1 and len(server.seen) == before + 4
    assert len(pd.read_csv(out / "external.csv")) == 2
