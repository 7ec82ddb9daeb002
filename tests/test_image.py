"""compress.py --image and --flash: what they put where, and what they refuse; without a board."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
littlefs = pytest.importorskip("littlefs")
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

import compress  # noqa: E402

WHOLE = compress.Build
KB, MB = 1 << 10, 1 << 20
# MicroPython's partitions-4MiBplus.csv of 1.26: label, type, subtype, place, size.
ROWS = [
    ("nvs", 1, 2, 0x9000, 0x6000),
    ("phy_init", 1, 1, 0xF000, 0x1000),
    ("factory", 0, 0, 0x10000, 0x1F0000),
]
VFS = ("vfs", 1, 0x81, 0x200000, 0x200000)
SETTINGS = {"ssid": "a WiFi", "password": "its password", "app": "device"}
# Of sizes about those from which on LittleFS keeps a file in blocks of its own.
APP = {
    "device.py": b"import device_parts.page\nTEXT = device_parts.page.TEXT\n"
    b"async def handler(reader, writer):\n    writer.write(TEXT)\n",
    "device_parts/__init__.py": b"",
    "device_parts/page.py": b"TEXT = b'the page'\n",
    "www/index.html": b"<p>" * 5000,
    "www/deep/empty.txt": b"",
}
APP.update({"sizes/%d.bin" % n: os.urandom(n) for n in (1, 127, 128, 129, 255, 512, 513, 4097)})


def table(rows, md5=True):
    """Return a partition table of the ESP-IDF's form."""
    out = b"".join(
        struct.pack("<2sBBII16s4x", b"\xaa\x50", kind, subtype, place, size, label.encode())
        for label, kind, subtype, place, size in rows
    )
    if md5:
        out += b"\xeb\xeb" + b"\xff" * 14 + hashlib.md5(out).digest()
    return out


def firmware(rows, number=0, start=0x1000, version="1.26.1", md5=True, size=1700 * KB):
    """Return what MicroPython's .bin for a chip looks like from without."""
    header = struct.pack("<BBBBI4sH10x", 0xE9, 3, 2, 0x20, 0x40080000, b"", number)
    out = header.ljust(0x8000 - start, b"\x5a") + table(rows, md5)
    out = out.ljust(0x10000 - start, b"\xff") + b"\xe9 an application "
    out += b"MicroPython v%s on 2025-09-11; Generic ESP32 module with ESP32\0" % version.encode()
    return out.ljust(size, b"\xa5")


def command(folder, *more, data=None, settings=SETTINGS, app=APP):
    """Write the inputs into `folder` and return the arguments that make an image of them."""
    line = ["--image", folder / "out.bin"]
    if data is not None:
        (folder / "firmware.bin").write_bytes(data)
        line += ["--firmware", folder / "firmware.bin"]
    if settings is not None:
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (folder / "settings.json").write_text(text)
        line += ["--settings", folder / "settings.json"]
    if app is not None:
        for path, content in app.items():
            (folder / "app" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "app" / path).write_bytes(content)
        line += ["--app", folder / "app"]
    return [str(part) for part in line + list(more)]


def refused(capsys, line):
    """Run what has to fail, and return its one line."""
    with pytest.raises(SystemExit) as raised:
        compress.main(line)
    out = capsys.readouterr()
    assert raised.value.code == 2 and out.err.count("\n") == 1, (raised.value.code, out.err)
    return out.err.replace("compress.py: ", "", 1).rstrip()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let most tests do without a minitor.mpy that takes seconds to make."""
    monkeypatch.setattr(compress, "Build", lambda *given: Small)


class Small:
    @staticmethod
    def modules(architecture):
        yield "minitor.mpy", b"M\x06" + architecture.encode() + b"\0" * 36000
        yield "minitor0.mpy", b"M\x06overlay"


def files_in(data):
    """Return {path: content} of a LittleFS, mounted as MicroPython does."""
    context = littlefs.UserContext(buffsize=len(data))
    context.buffer[:] = data
    fs = littlefs.LittleFS(context, mount=False, block_count=len(data) // 4096, block_size=4096,
                           read_size=32, prog_size=32, lookahead_size=32, cache_size=128)
    assert fs.mount() == 0
    found = {}
    for folder, _, names in fs.walk("/"):
        for name in names:
            path = folder.rstrip("/") + "/" + name
            with fs.open(path, "rb") as f:
                found[path[1:]] = f.read()
    return found


CASES = {
    "1.26, 4 MB": (dict(rows=ROWS), "4MB", 0x200000, 2 * MB),
    "1.27, 8 MB": (dict(rows=ROWS, version="1.27.0-preview.9.gab"), "8MB", 0x200000, 6 * MB),
    "1.25, vfs": (dict(rows=ROWS + [VFS], version="1.25.0"), "4MB", 0x200000, 2 * MB),
    "1.24, vfs on 16 MB": (dict(rows=ROWS + [VFS], version="1.24.1"), "16MB", 0x200000, 2 * MB),
    "no MD5": (dict(rows=ROWS, md5=False), "4MB", 0x200000, 2 * MB),
    "C3": (dict(rows=ROWS, number=5, start=0), "4MB", 0x200000, 2 * MB),
    "S3": (dict(rows=ROWS, number=9, start=0), "8MB", 0x200000, 6 * MB),
}


@pytest.mark.parametrize("case", CASES)
def test_image(case, tmp_path, capsys):
    made, flash, place, size = CASES[case]
    data = firmware(**made)
    line = command(tmp_path, "--flash-size", flash, data=data)
    compress.main(line)
    image = (tmp_path / "out.bin").read_bytes()
    start = made.get("start", 0x1000)
    assert image[: len(data)] == data and len(image) == place - start + size
    assert set(image[len(data) : place - start]) == {0xFF}
    found = files_in(image[place - start :])
    architecture = "rv32imc" if case == "C3" else "xtensawin"
    for name, content in Small.modules(architecture):
        assert found.pop(name) == content
    assert b"import board_boot\n" in found.pop("main.py")
    assert json.loads(found.pop("settings.json")) == SETTINGS
    modules = {path[:-4] + ".py" for path in found if path.endswith(".mpy")}
    assert modules == {"board_boot.py"} | {path for path in APP if path.endswith(".py")}
    assert all(found[path[:-3] + ".mpy"][:2] == b"M\x06" for path in modules)
    others = {path: content for path, content in APP.items() if path not in modules}
    assert {p: c for p, c in found.items() if not p.endswith(".mpy")} == others
    assert "at 0x%x a file system of %d KB" % (place, size >> 10) in capsys.readouterr().out
    # Deterministic, like all that compress.py makes.
    compress.main(line)
    assert (tmp_path / "out.bin").read_bytes() == image


def test_image_holds_the_board_build(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "Build", WHOLE)
    compress.main(command(tmp_path, data=firmware(ROWS)))
    found = files_in((tmp_path / "out.bin").read_bytes()[0x1FF000:])
    build = WHOLE(compress.SOURCE.read_text(encoding="utf-8"), "board")
    modules = dict(build.modules("xtensawin"))
    assert len(modules) > 1 and {name: found[name] for name in modules} == modules


def broken(data, place, new):
    return data[:place] + new + data[place + len(new) :]


GOOD = firmware(ROWS)
FOREIGN = {
    "empty": (b"", "0xE9"),
    "text": (b"<html>not found</html>" * 50, "0xE9"),
    "cut off": (GOOD[:0x6000], "not MicroPython"),
    "Arduino": (GOOD.replace(b"MicroPython", b"Arduino    "), "not MicroPython"),
    "old": (firmware(ROWS, version="1.23.0"), "1.23 is too old"),
    "ESP32-H2": (firmware(ROWS, number=16, start=0), "chip 16"),
    "no table": (broken(GOOD, 0x7000, b"\xff" * 256), "no partition table"),
    "application only": (b"\xe9" + b"\0" * 23 + b"MicroPython v1.26.0", "no partition table"),
    "magic": (broken(GOOD, 0x7000, b"\x50\xaa"), "damaged: row 0"),
    "row": (broken(GOOD, 0x7020, b"\x50\xaa"), "damaged: row 1"),
    "MD5": (broken(GOOD, 0x7070, b"\0" * 16), "MD5"),
    "place": (broken(GOOD, 0x7044, b"\0\0\x02\0"), "MD5"),
    "overlap": (GOOD.ljust(0x1FF001, b"\0"), "reaches into the file system at 0x200000"),
    "no vfs in 1.25": (firmware(ROWS, version="1.25.0"), "no partition vfs"),
    "TinyUF2": (firmware(ROWS + [("ffat",) + VFS[1:]]), "no partition vfs"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_firmware(case, tmp_path, capsys):
    data, text = FOREIGN[case]
    assert text in refused(capsys, command(tmp_path, data=data))
    assert not (tmp_path / "out.bin").exists()


def test_firmware_that_is_not_there(tmp_path, capsys):
    line = command(tmp_path, "--firmware", "/nothing/ESP32.bin")
    text = refused(capsys, line)
    assert text == "cannot read the firmware /nothing/ESP32.bin: No such file or directory"
    assert "needs --firmware" in refused(capsys, command(tmp_path))
    assert "--image has to say" in refused(capsys, ["--firmware", "ESP32.bin"])


@pytest.mark.parametrize("number,start,wrong,text", [
    (0, 0x1000, "rv32imc", "is for the esp32, which runs xtensawin"),
    (13, 0, "xtensawin", "is for the esp32c6, which runs rv32imc"),
])
def test_wrong_chip(number, start, wrong, text, tmp_path, capsys):
    data = firmware(ROWS, number, start)
    assert text in refused(capsys, command(tmp_path, "--arch", wrong, data=data))


def test_flash_too_small(tmp_path, capsys):
    line = command(tmp_path, "--flash-size", "2MB", data=GOOD)
    assert "flash of 2048 KB is too small" in refused(capsys, line)
    rows = ROWS[:2] + [("factory", 0, 0, 0x10000, 0x180000)]
    line = command(tmp_path, "--flash-size", "2MB", data=firmware(rows, size=MB))
    compress.main(line)
    rows = ROWS + [VFS[:4] + (6 * MB,)]
    assert "too small" in refused(capsys, command(tmp_path, data=firmware(rows)))


def test_full_file_system(tmp_path, capsys):
    line = command(tmp_path, data=GOOD, app=dict(APP, **{"www/large": b"x" * (2 * MB - 64 * KB)}))
    text = refused(capsys, line)
    assert text.startswith("the file system, 2048 KB, is full at "), text


@pytest.mark.parametrize("settings,text", [
    ("{'ssid': 1}", "JSON"),
    ("[]", "form"),
    (dict(SETTINGS, ssid=1), "ssid"),
    ({"password": "", "app": "device"}, '"ssid" is missing'),
    (dict(SETTINGS, app="other"), "there is no module other"),
    (None, "needs --settings"),
])
def test_settings(settings, text, tmp_path, capsys):
    assert text in refused(capsys, command(tmp_path, data=GOOD, settings=settings))


def test_application(tmp_path, capsys):
    text = refused(capsys, command(tmp_path, data=GOOD, app=None))
    assert "there is no module device" in text
    text = refused(capsys, command(tmp_path, "--app", "/nothing", data=GOOD))
    assert text == "the application /nothing is no folder"
    text = refused(capsys, command(tmp_path, data=GOOD, app=dict(APP, **{"minitor.py": b""})))
    assert "has its own file of that name" in text
    (tmp_path / "app" / "minitor.py").unlink()
    # Not what editors and CPython leave; but a boot.py, which the firmware runs as it is.
    more = {".git/x": b"", "__pycache__/x.pyc": b"", "boot.py": b"# boot\n"}
    compress.main(command(tmp_path, data=GOOD, app=dict(APP, **more)))
    found = files_in((tmp_path / "out.bin").read_bytes()[0x1FF000:])
    assert found["boot.py"] == b"# boot\n" and "boot.mpy" not in found
    assert not [path for path in found if ".git" in path or "__pycache__" in path]
    (tmp_path / "app" / "boot.py").unlink()
    line = command(tmp_path, data=GOOD, app=dict(APP, **{"device.py": b"def ("}))
    with pytest.raises(SystemExit):
        compress.main(line)
    assert re.match("compress.py: mpy-cross: device.py: SyntaxError", capsys.readouterr().err)


# ── Writing ──

ESPTOOL = """
import json, os, sys
with open(os.environ["ESPTOOL_TOLD"], "w") as f:
    json.dump(sys.argv[1:], f)
sys.exit(int(os.environ["ESPTOOL_ENDS"]))
"""


def flashed(folder, line, ends=0):
    """Run compress.py with an esptool of our own; return how it ended, and what that was told."""
    (folder / "path").mkdir(exist_ok=True)
    (folder / "path" / "esptool.py").write_text(ESPTOOL)
    told = folder / "told"
    told.unlink() if told.exists() else None
    environment = dict(os.environ, PYTHONPATH=str(folder / "path"), ESPTOOL_TOLD=str(told),
                       ESPTOOL_ENDS=str(ends))
    done = subprocess.run([sys.executable, str(ROOT / "compress.py")] + line, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return done, json.loads(told.read_text()) if told.exists() else None


@pytest.mark.parametrize("number,name,start", [
    (0, "esp32", 0x1000), (2, "esp32s2", 0x1000), (9, "esp32s3", 0), (5, "esp32c3", 0),
    (13, "esp32c6", 0),
])
def test_flash_an_image_made_before(number, name, start, tmp_path):
    image = tmp_path / "out.bin"
    image.write_bytes(firmware(ROWS, number, start))
    done, told = flashed(tmp_path, ["--image", str(image), "--flash", "/dev/ttyUSB7"])
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert told[:4] == ["--chip", name, "--port", "/dev/ttyUSB7"]
    assert told[-3:] == ["write_flash", hex(start), str(image)]


def test_flash(tmp_path):
    line = command(tmp_path, "--flash", "COM3", data=GOOD)
    done, told = flashed(tmp_path, line)
    assert done.returncode == 0 and told[-1] == str(tmp_path / "out.bin"), done.stderr
    assert (tmp_path / "out.bin").stat().st_size == 4 * MB - 0x1000
    (tmp_path / "out.bin").write_bytes(b"text")
    line = ["--image", str(tmp_path / "out.bin"), "--flash", "COM3"]
    done, told = flashed(tmp_path, line)
    assert done.returncode == 2 and told is None and "0xE9" in done.stderr
    (tmp_path / "out.bin").write_bytes(GOOD)
    done, told = flashed(tmp_path, line, 1)
    assert done.returncode == 1 and "esptool could not write" in done.stderr
    done, told = flashed(tmp_path, ["--flash", "COM3"])
    assert done.returncode == 2 and "--image has to say" in done.stderr


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "littlefs", None)
    with pytest.raises(SystemExit) as raised:
        compress.main(command(tmp_path, data=GOOD))
    assert raised.value.code == 1 and "pip install littlefs-python" in capsys.readouterr().err
    (tmp_path / "out.bin").write_bytes(GOOD)
    monkeypatch.setattr(compress.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        compress.main(["--image", str(tmp_path / "out.bin"), "--flash", "COM3"])
    assert raised.value.code == 1 and "pip install esptool" in capsys.readouterr().err
